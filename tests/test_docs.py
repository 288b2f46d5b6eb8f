"""Documents: links resolve, every command in them parses, and commands below `<!-- run -->` run on tiny models."""

import argparse
import importlib
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jax
import pytest
from conftest import text
from training_runs import MODELS, unmeasured_peak

import moe_reduce
from moe_reduce.__main__ import COMMANDS, main
from moe_reduce.commands import config_file
from moe_reduce.core.config import ExecutionConfig, any_from_dict, text_to_lora_from_dict
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.reports import documents
from moe_reduce.training import job

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
GUIDES = sorted(ROOT.glob("docs/guides/*.md"))
BLOCK = re.compile(r"(<!-- run -->\n)?^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODEL_OPTIONS = ("--model", "--baseline", "--config.model", "--config.data.tokenizer", "--config.distill.teacher")
ROOMS = {path.name for path in (ROOT / "moe_reduce").iterdir() if path.is_dir()}
VOCABULARY = 300
SCHEDULE = [
    "--config.train.batch_size=8", "--config.train.evaluate_every=2", "--config.train.evaluate_batches=1",
    "--config.train.checkpoint_every=2", "--config.data.cache=tokens", "--config.data.workers=1",
    "--config.mesh.data=1", "--config.execution.scan_unroll=1",
]  # fmt: skip
SHORT = ["--config.train.steps=2", "--config.train.warmup_steps=1", "--config.data.sequence_length=32"]
CORPUS = ["--sequence-length=32", "--max-batches=1", "--cache=tokens"]
SMALLER = {  # arguments that make a command of a guide quick, and change nothing else about it
    "train": [*SCHEDULE, *SHORT, f"--config.model.vocab_size={VOCABULARY}", "--config.model.layers=2"],
    "adapt": [*SCHEDULE, "--config.train.steps=2", "--config.train.warmup_steps=1", "--config.recall_pairs=2"],
    "reduce": [
        *SCHEDULE,
        "--config.data.sequence_length=32",
        "--config.stages.prune.calibration_batches=1",
        "--config.stages.anneal.steps=2",
        "--config.stages.anneal.warmup_steps=1",
        "--config.stages.recover.steps=2",
        "--config.stages.recover.warmup_steps=1",
    ],
    **dict.fromkeys(("score", "evaluate", "drop-layers"), CORPUS),
}


def identified(file):
    return str(file.relative_to(ROOT))


def commands(document, run_only=False):
    """[words after moe-reduce] of each command in a document's bash blocks, in order; placeholders are left out."""
    found = []
    for marked, block in BLOCK.findall(document.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            places = [place for place, word in enumerate(words) if word in COMMANDS]
            if not places or (run_only and not marked) or "…" in line:
                continue
            caller = words[places[0] - 1]
            if caller == "moe-reduce" or caller.endswith(".sh") or caller in ("run", "watch"):  # of launch/tpu.sh
                found.append(words[places[0] :])
    return found


@cache
def runs_of(command, file, *overrides):
    reader = text_to_lora_from_dict if command == "text-to-lora" else any_from_dict
    return config_file.read(file, list(overrides), reader)


@pytest.mark.parametrize("document", DOCUMENTS, ids=identified)
def test_relative_links_resolve(document):
    for target in LINK.findall(document.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        linked = document if not path else document.parent / unquote(path)
        assert linked.exists(), f"{identified(document)} links {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=identified)
def test_documents_name_nothing_that_a_reader_lacks(document):
    for private in ("../shared", "METHODS", "DESIGN", "ANCHORS", "/work"):
        assert private not in re.sub(r"\w/work(ers?|dirs?)", "", document.read_text())


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_modules_that_documents_name_exist(document):
    named = re.findall(r"`(?:moe_reduce/)?([\w/]+/[\w/]*(?:\.py)?)`", (ROOT / document).read_text())
    found = [name for name in named if name.split("/")[0] in ROOMS]
    assert len(found) > 5
    assert [name for name in found if not (ROOT / "moe_reduce" / name).exists()] == []


def test_the_table_of_families_is_made_from_the_code():
    guide = ROOT / "docs/guides/families.md"
    current = documents.fill(guide, ROOT / "results")
    assert current == guide.read_text(), "run moe-reduce report --document=docs/guides/families.md"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_lists_every_command():
    listed = re.findall(r"`([\w-]+)`", (ROOT / "README.md").read_text())
    assert set(COMMANDS) <= set(listed)


def test_figures_of_the_readme_stand_on_the_pages_that_it_links():
    rows = re.findall(r"^\| .* \| (.*) \| \[.*\]\((docs/results/\w+\.md)\) \|$", (ROOT / "README.md").read_text(), re.M)
    assert 5 <= len(rows) <= 8
    for measured, page in rows:
        known = (ROOT / page).read_text()
        for figure in re.findall(r"[+\d][\d,]*\.\d+(?: ± [\d.]+)?[%×]?", measured):
            assert figure in known, f"{figure} is not on {page}"


def documented_commands():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]
    for document in documents:
        for number, words in enumerate(commands(document)):
            yield pytest.param(words, id=f"{document.stem}-{number}-{words[0]}")


@pytest.mark.parametrize("words", [*documented_commands()])
def test_every_command_parses(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *arguments = words
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    importlib.import_module(f"moe_reduce.commands.{command.replace('-', '_')}").add_arguments(parser)
    parsed, overrides = parser.parse_known_args(arguments)
    if getattr(parsed, "config", None) is None:
        assert overrides == []
        return
    runs = runs_of(command, parsed.config, *overrides)  # raises for a key that does not exist
    assert set(parsed.variant or ()) <= set(runs)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A tiny mixture and a tiny dense model with a tokenizer, and text, under one directory."""
    directory = tmp_path_factory.mktemp("stand_ins")
    (directory / "text.txt").write_text(text(documents=300, seed=0))
    tokenizer = train_tokenizer([text(documents=100, seed=seed) for seed in range(2)], VOCABULARY)
    (directory / "tokenizer").mkdir()
    tokenizer.save(directory / "tokenizer")
    execution = ExecutionConfig(platform="cpu")
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "width": 32, "head_width": 8}
    dense = replace(MODELS["dense"], **sizes, feed_forward_width=256)
    moe = MODELS["layer"].moe
    assert moe is not None
    mixture = replace(MODELS["layer"], **sizes, moe=replace(moe, width=32))
    for name, config in {"mixture": mixture, "dense": dense}.items():
        params = init_params(config, jax.random.key(0))
        moe_reduce.save(Model(config, params, execution, source=directory / "tokenizer"), directory / name)
    return directory


def prepare(directory, stand_ins, wanted):
    """Links for the models that commands read and that none of them writes."""
    (directory / "configs").symlink_to(ROOT / "configs")
    (directory / "text.txt").symlink_to(stand_ins / "text.txt")
    written = [
        word.partition("=")[2] for words in wanted for word in words if word.startswith(("--out=", "--workdir="))
    ]
    for words in wanted:
        for word in words:
            option, _, path = word.partition("=")
            if option not in MODEL_OPTIONS or any(path == out or path.startswith(f"{out}/") for out in written):
                continue
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            if not (directory / path).exists():
                (directory / path).symlink_to(stand_ins / ("dense" if path.startswith("Llama") else "mixture"))


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if commands(guide, run_only=True)], ids=identified)
def test_marked_commands_run(guide, stand_ins, tmp_path, monkeypatch, capsys):
    """Each guide in a directory of its own, in the order of the page: whoever has only that page can follow it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "peak", unmeasured_peak)
    wanted = commands(guide, run_only=True)
    prepare(tmp_path, stand_ins, wanted)
    for words in wanted:
        status = main([*words, *SMALLER.get(words[0], [])])
        shown = capsys.readouterr()
        assert status == 0, f"{' '.join(words)}\n{shown.err[-2000:]}"
