"""--adapter of the commands: an unmerged adapter gives what the merged model gives, alone and beside others."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import text
from test_adapters import ADAPTER_METHODS, disturbed
from training_runs import MODELS, initial_params

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, bank, merging
from moe_reduce.core.config import ExecutionConfig, GenerateConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.inference import generate as generation
from moe_reduce.inference.generate import generate, ready
from moe_reduce.models.model import Model
from moe_reduce.storage import manifest

METHODS = ("lora", "skema", "dora")
PROMPTS = ["Once", "Or twice", "one"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with a tokenizer, adapters of each method, and a LoRA in the form of PEFT."""
    place = tmp_path_factory.mktemp("adapters")
    config = dataclasses.replace(MODELS["dense"], vocab_size=400, init_std=0.3, max_positions=64)
    moe_reduce.save(Model(config, initial_params(config), ExecutionConfig().resolve("cpu")), place / "base")
    train_tokenizer([text(80, 0)], 400).save(place / "base")
    base, origin = moe_reduce.load(place / "base"), manifest.input_of(place / "base")
    for seed, method in enumerate(METHODS):
        adapter = disturbed(adapters.init(ADAPTER_METHODS[method], base), seed)
        (place / method).mkdir()
        adapter_directory.save(adapter, base.config, origin, place / method)
        moe_reduce.save(merging.merge(base, adapter), place / f"{method}-merged")
        train_tokenizer([text(80, 0)], 400).save(place / f"{method}-merged")
    shutil.copytree(place / "lora", place / "peft")
    (place / "peft" / adapter_directory.DESCRIPTION).unlink()
    return place


def generated(capsys, model, prompts, *options):
    given = ["generate", f"--model={model}", *(f"--prompt={prompt}" for prompt in prompts), "--max-tokens=12"]
    assert main([*given, *options]) == 0
    return capsys.readouterr().out


def test_generate_with_an_adapter_is_the_merged_model(place, capsys):
    base = generated(capsys, place / "base", PROMPTS)
    for method in METHODS:
        found = generated(capsys, place / "base", PROMPTS, f"--adapter={place / method}")
        assert found == generated(capsys, place / f"{method}-merged", PROMPTS) != base
    assert generated(capsys, place / "base", PROMPTS, "--adapter=none") == base


def test_prompts_name_their_adapters(place, capsys):
    names = [f"{place / 'skema'}", "none", f"{place / 'peft'}"]
    models = [place / "skema-merged", place / "base", place / "lora-merged"]
    found = generated(capsys, place / "base", PROMPTS, *(f"--adapter={name}" for name in names))
    each = [generated(capsys, model, [prompt]) for model, prompt in zip(models, PROMPTS, strict=True)]
    titles = [f"== {prompt} [{name}]\n" for prompt, name in zip(PROMPTS, names, strict=True)]
    assert found == "".join(title + one for title, one in zip(titles, each, strict=True))


def test_evaluate_with_an_adapter_is_the_merged_model(place, tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 400, (4, 17), dtype=np.int32))
    losses = {}
    for name, options in (
        ("lora-merged", []),
        ("base", [f"--adapter={place / 'lora'}", f"--baseline={place / 'base'}"]),
    ):
        data = [
            f"--data={tmp_path / 'tokens.npy'}",
            "--sequence-length=17",
            f"--cache={tmp_path}",
            f"--out={tmp_path / name}",
        ]
        assert main(["evaluate", f"--model={place / name}", *data, *options]) == 0, capsys.readouterr().err
        losses[name] = json.loads((tmp_path / name / "summary.json").read_text())
    found = losses["base"]
    assert found["loss"] == pytest.approx(losses["lora-merged"]["loss"], rel=1e-5)
    assert found["beside_baseline"]["loss"]["difference"] == pytest.approx(
        found["loss"] - found["beside_baseline"]["loss"]["baseline"], rel=1e-4
    )
    assert abs(found["beside_baseline"]["loss"]["difference"]) > 1e-3
    assert found["adapter"] == str(place / "lora")


def test_monitor_names_the_adapter(place, tmp_path, capsys):
    base, lora = place / "base", place / "lora"
    given = [f"--model={base}", f"--model={base}", f"--adapter={lora}", "--adapter=none", "--max-tokens=4"]
    assert main(["monitor", *given, "--pause=0.01", f"--out={tmp_path / 'out'}"]) == 0, capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "out" / "monitor.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [f"{base} + {lora}", str(base)]
    assert {row["quantisation"] for row in rows} == {"float32"}
    wrong = ["--ollama=a", f"--adapter={lora}", f"--out={tmp_path / 'wrong'}"]
    assert main(["monitor", *wrong]) == 2
    assert "there are 1 --adapter and 0 --model" in capsys.readouterr().err


def test_another_adapter_needs_no_new_program(place):
    base = moe_reduce.load(place / "base")
    loaded = [adapter_directory.load(place / name, base.config, None) for name in ("lora", "skema")]
    settings, prompts = GenerateConfig(max_tokens=4), [[1, 2], [3]]
    counters = (generation._prefill, generation._decode)
    model = ready(bank.activate(base, [*loaded, None]))
    first = generate(model, prompts, settings, [0, 1])
    before = [counter._cache_size() for counter in counters]
    assert generate(model, prompts, settings, [1, 0]) != first
    other = [disturbed(adapter, seed=7) for adapter in loaded]
    generate(ready(bank.activate(base, [*other, None])), prompts, settings, [2, 1])
    assert [counter._cache_size() for counter in counters] == before
    for entries in ([0], [0, 3], [-1, 0]):
        with pytest.raises(UserError, match="one of the 3 adapters of the bank for each prompt"):
            generate(model, prompts, settings, entries)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--adapter=missing"], "--adapter=missing is not a directory: give one that adapt or PEFT wrote"),
        (
            ["--adapter=lora", "--adapter=lora"],
            "there are 2 --adapter and 3 --prompt: give one adapter for all, or one for each",
        ),
        (["--adapter=lora", "--adapter=dora", "--adapter=none"], "--adapter=dora is a DoRA, which cannot run beside"),
    ],
)
def test_mistakes_are_one_line(place, given, line, capsys, monkeypatch):
    monkeypatch.chdir(place)
    arguments = ["generate", "--model=base", *(f"--prompt={prompt}" for prompt in PROMPTS), "--max-tokens=8", *given]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert line in error
    assert len(error.splitlines()) == 1


def test_an_adapter_of_another_base_is_one_line(place, capsys):
    for adapter, line in (("lora", "is another model (its hash differs)"), ("peft", "give the adapter of this base")):
        config = dataclasses.replace(MODELS["dense"], vocab_size=400, feed_forward_width=24, width=24)
        other = place / f"other-{adapter}"
        moe_reduce.save(Model(config, initial_params(config), ExecutionConfig().resolve("cpu")), other)
        train_tokenizer([text(80, 0)], 400).save(other)
        assert main(["generate", f"--model={other}", "--prompt=x", f"--adapter={place / adapter}"]) == 2
        error = capsys.readouterr().err.strip()
        assert line in error
        assert len(error.splitlines()) == 1
