"""Commands killed before a change of the file system: nothing is lost, nothing half-made is taken for whole.

Three cheap cases run always, with a few kills each from a fixed seed. All kills of prune, pool, merge, score, adapt and
export, and a sample of those of train and reduce, take a quarter of an hour:

    pytest tests/test_kills.py --slow -s
"""

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from kill_harness import Case, Findings, Server, content, examine
from training_runs import MODELS, environment, token_data

import moe_reduce
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model

RUN = """
from moe_reduce.core import config as defaults


def get_config():
    config = defaults.{base}()
    config.mesh.data = 1
    config.data.update(source={source!r}, sequence_length=32, validation_fraction=0.25)
    config.execution.block_rows = 8
    config.train.update(batch_size=8, log_every=1, evaluate_every=100, evaluate_batches=1, checkpoint_every=1)
{more}
    return config
"""
MORE = {
    "adapt": """
    config.model = {model!r}
    config.adapter.update(method="lora", targets="q,v", rank=2)
    config.train.update(steps=2)
""",
    "train": """
    config.model.update(vocab_size=384, layers=2, width=16, query_heads=4, key_value_heads=2, head_width=4)
    config.model.update(feed_forward_width=32)
    config.train.update(steps=3, warmup_steps=1)
""",
    "reduce": """
    config.model = {model!r}
    config.update(defaults.in_order({{
        "pool": defaults.stage("pool"),
        "tune": defaults.stage("tune", steps=2, learning_rate=1e-2),
        "prune": defaults.stage("prune", keep=0.5, criterion="reap_total", calibration_batches=1),
    }}))
""",
}
ARTIFACTS = ("prune", "pool", "merge", "score", "export")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(environment(devices=1, cache=tmp_path_factory.mktemp("compiled"))) as running:
        yield running


def saved(kind: str, directory: Path) -> None:
    config = dataclasses.replace(MODELS[kind], init_std=0.3)
    moe_reduce.save(Model(config, init_params(config, jax.random.key(0)), ExecutionConfig()), directory)


def run_config(root: Path, command: str) -> str:
    values = {"base": {"train": "base"}.get(command, f"{command}_base"), "source": str(root / "tokens.npy")}
    more = MORE[command].format(model=str(root / "model"))
    (root / "config.py").write_text(RUN.format(**values, more=more))
    return f"--config={root / 'config.py'}"


@pytest.fixture(scope="module")
def case(server, tmp_path_factory) -> Callable[..., Case]:
    """case(command, overwrite) prepares a directory with the inputs of a command and, if asked, an earlier result."""

    def prepared(command: str, overwrite: bool = False) -> Case:
        root = tmp_path_factory.mktemp("kills") / command
        root.mkdir()
        token_data(root, rows=32)
        saved("dense" if command in ("adapt", "merge", "export") else "layer", root / "model")
        if command in MORE:
            arguments = [command, run_config(root, command), f"--workdir={root / 'run'}"]
            results = ("run/summary.json", "run/metrics.jsonl", "run/model", "run/adapter", "run/loss.png")
            results += tuple(f"run/{stage}" for stage in ("00-original", "01-pool", "02-tune", "03-prune"))
            redrawn = () if command == "reduce" else ("run/loss.png",)
            return Case(command, arguments, root, ("model", "tokens.npy"), results, resumes=True, redrawn=redrawn)
        given, results = artifact(server, root, command)
        if overwrite:
            assert server.run(given(first=True), root)["status"] == 0
        more = ["--overwrite"] if overwrite else []
        inputs = ("model", "tokens.npy", "scores-in.json", "adapter")
        return Case(f"{command}{' --overwrite' * overwrite}", [*given(first=False), *more], root, inputs, results)

    return prepared


def artifact(server: Server, root: Path, command: str) -> tuple[Callable[[bool], list[str]], tuple[str, ...]]:
    """(arguments of a command, which differ for an earlier result; the names that it writes)."""
    data = [f"--data={root / 'tokens.npy'}", "--sequence-length=32", "--batch-size=8"]
    model = f"--model={root / 'model'}"
    if command == "prune":
        made = server.run(["score", model, *data, f"--out={root / 'scores-in.json'}"], root)
        assert made["status"] == 0, made
    if command == "merge":
        adapted = ["adapt", run_config(root, "adapt"), f"--workdir={root / 'run'}"]
        assert server.run(adapted, root)["status"] == 0
        (root / "run/adapter").rename(root / "adapter")
        shutil.rmtree(root / "run")
    own: dict[str, tuple[list[str], list[str]]] = {  # of the command, and of what was there before
        "prune": (["--keep=0.5"], ["--keep=1.0"]),
        "pool": (["--router=layer"], ["--start=concat"]),
        "merge": ([], data),
        "score": (["--criteria=reap,frequency"], ["--criteria=max_activation"]),
        "export": (["--format=stablehlo", "--batch-size=2"], ["--format=stablehlo", "--batch-size=1"]),
    }
    fixed = {"prune": [f"--scores={root / 'scores-in.json'}"], "merge": [f"--adapter={root / 'adapter'}"]}
    ends = (".json", ".npz", "-histogram.png", "-map.png")
    results = tuple(f"out{end}" for end in ends) if command == "score" else ("out",)
    fixed["score"] = data

    def given(first: bool) -> list[str]:
        return [command, model, *fixed.get(command, []), *own[command][first], f"--out={root / results[0]}"]

    return given, results


def few(count: int, seed: int) -> Callable[[int], list[int]]:
    """The last changes of a command, where results become real, are drawn as often as all others together."""

    def chosen(changes: int) -> list[int]:
        draw = random.Random(seed)
        ends = range(max(1, changes - 15), changes + 1)
        return sorted({draw.choice(ends if number % 2 else range(1, changes + 1)) for number in range(count)})

    return chosen


def test_a_few_kills(server, case):
    found = Findings()
    for seed, (command, overwrite) in enumerate([("prune", True), ("prune", False), ("score", True)]):
        examine(server, case(command, overwrite), few(6, seed), found)
    print(f"\n{found}")
    assert found.kills >= 12
    assert found.faults() == {}


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("command", ARTIFACTS)
def test_every_kill_of_a_command_on_files(server, case, command, overwrite):
    found = Findings()
    examine(server, case(command, overwrite), lambda changes: range(1, changes + 1), found)
    print(f"\n{command}{' --overwrite' * overwrite}: {found}")
    assert found.faults() == {}


@pytest.mark.slow
def test_every_kill_where_names_cannot_be_exchanged(server, case):
    """Between two renames nothing has the name; the next command that reads it gives the old result its name back."""
    found, made = Findings(), case("prune", True)
    made = dataclasses.replace(
        made, exchanges=False, reader=("inspect", f"--model={made.root / 'out'}"), name=f"{made.name}, two renames"
    )
    examine(server, made, lambda changes: range(1, changes + 1), found)
    print(f"\n{made.name}: {found}")
    assert found.faults() == {}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "count"), [("adapt", None), ("train", 25), ("reduce", 25)])
def test_kills_of_runs(server, case, command, count):
    found = Findings()
    examine(server, case(command), few(count, 0) if count else lambda changes: range(1, changes + 1), found)
    print(f"\n{command}: {found}")
    assert found.faults() == {}


def test_the_harness_sees_what_is_half_made(tmp_path):
    """The comparison is not blind: another byte, a missing file or a changed number is another content."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/weights").write_bytes(b"123")
    (tmp_path / "out/figures.json").write_text('{"loss": 1.0, "seconds": 2.0}')
    first = content(tmp_path, ["out"])
    (tmp_path / "out/figures.json").write_text('{"loss": 1.0, "seconds": 3.0}')
    assert content(tmp_path, ["out"]) == first
    (tmp_path / "out/figures.json").write_text('{"loss": 1.5, "seconds": 2.0}')
    assert content(tmp_path, ["out"]) != first
    (tmp_path / "out/figures.json").unlink()
    assert content(tmp_path, ["out"]) != first
