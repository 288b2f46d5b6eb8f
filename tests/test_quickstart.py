"""The three commands of launch/quickstart.sh on tiny models: what they leave, and what a second call does."""

import json
import re
from pathlib import Path

import pytest
from training_runs import unmeasured_peak

from moe_reduce.__main__ import main
from moe_reduce.core.errors import UserError
from moe_reduce.reports import comparison
from moe_reduce.training import job

ROOT = Path(__file__).parent.parent
NAMES = ["dense", "mixture", "pooled", "pruned", "recovered"]
MODEL = {"vocab_size": 384, "layers": 2, "width": 16, "query_heads": 2, "key_value_heads": 1, "head_width": 8}


def overrides(section, values):
    return [f"--config.{section}.{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus, token_cache):
    """A directory with models/, reduced/ and comparison/."""
    directory = tmp_path_factory.mktemp("quickstart")
    data = {"source": corpus, "cache": token_cache, "sequence_length": 32, "workers": 1, "validation_fraction": 0.1}
    train = {"batch_size": 8, "evaluate_batches": 2, "warmup_steps": 1}
    shared = ["--config.mesh.data=1", *overrides("data", data), *overrides("train", train)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "peak", unmeasured_peak)
        words = [f"--config={ROOT}/configs/quickstart_models.py", f"--workdir={directory}/models", *shared]
        small = [*overrides("model", MODEL), *overrides("model.moe", {"experts": 4, "active": 2, "width": 16})]
        assert main(["train", *words, *small, "--config.train.steps=4"]) == 0
        words = [f"--config={ROOT}/configs/quickstart_reduce.py", f"--workdir={directory}/reduced", *shared]
        start = f"--config.model={directory}/models/mixture/model"
        short = overrides("stages.recovered", {"steps": 2, "warmup_steps": 1})
        assert main(["reduce", *words, start, *short]) == 0
    assert _compare(directory) == 0
    return directory


def _compare(directory, *more):
    runs = ["--runs", f"{directory}/models", f"{directory}/reduced"]
    return main(["compare", *runs, "--prompt=word", "--max-tokens=12", f"--out={directory}/comparison", *more])


def _summary(directory):
    return json.loads((directory / "comparison" / "summary.json").read_text())


def test_table_has_every_model_and_the_pool_computes_the_same(finished):
    rows = {row[0]: dict(zip(comparison.COLUMNS, row, strict=True)) for row in _summary(finished)["rows"]}
    assert list(rows) == NAMES
    assert rows["pooled"]["validation loss"] == rows["mixture"]["validation loss"]
    assert rows["mixture"]["accuracy kept"] == rows["pooled"]["accuracy kept"] == "100.0%"
    sizes = {name: int(row["parameters"].replace(",", "")) for name, row in rows.items()}
    assert sizes["recovered"] == sizes["pruned"] < sizes["pooled"]
    assert all(float(row["decoded tokens/s"].replace(",", "")) > 0 for row in rows.values())


def test_picture_and_texts_are_there(finished):
    assert (finished / "comparison" / "quality.png").read_bytes().startswith(b"\x89PNG")
    summary = _summary(finished)
    assert list(summary["texts"]) == NAMES
    assert summary["texts"]["mixture"] == summary["texts"]["pooled"]


def test_every_summary_names_its_text(finished, corpus):
    summaries = [finished / "models" / "dense", finished / "reduced"]
    found = [json.loads((workdir / "summary.json").read_text())["data"] for workdir in summaries]
    assert [data["source"] for data in found] == [str(corpus)] * 2
    assert len({data["fingerprint"] for data in found}) == 1
    assert _summary(finished)["data"] == found[0]


def test_second_call_shows_the_finished_result_again(finished, capsys):
    before = (finished / "comparison" / "quality.png").stat().st_mtime_ns
    assert _compare(finished) == 0
    out = capsys.readouterr().out
    assert "is done: nothing to do" in out
    assert all(re.search(rf"^{name} ", out, re.MULTILINE) for name in NAMES)
    assert out.splitlines()[-1] == f"{finished}/comparison/summary.json"
    assert (finished / "comparison" / "quality.png").stat().st_mtime_ns == before


def test_another_question_needs_another_place(finished, capsys):
    assert _compare(finished, "--seed=1") == 2
    assert "comparison exists: choose another path or add --overwrite" in capsys.readouterr().err


def test_what_does_not_compare_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match=r"has no summary\.json"):
        comparison.entries([tmp_path])
    with pytest.raises(UserError, match="two models named 'dense'"):
        comparison.entries([finished / "models", finished / "models"])
    other = json.loads((finished / "models" / "dense" / "summary.json").read_text())
    other |= {"name": "other", "data": other["data"] | {"fingerprint": "0" * 64}}
    (tmp_path / "summary.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="different texts"):
        comparison.entries([finished / "models", tmp_path])


def test_path_of_the_reduction_starts_with_the_model_that_was_reduced(finished):
    entries = comparison.entries([finished / "models", finished / "reduced"])
    assert [entry.name for entry in comparison.reduction_path(entries)] == NAMES[1:]
