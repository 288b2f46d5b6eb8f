"""The table of launch/quantised.sh: changes by hand, a row for each format, and the picture."""

import argparse
import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def quantised(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import quantised

    return quantised


def test_what_is_measured_so_far_becomes_a_table_and_a_picture(quantised, tmp_path):
    """A loss that is higher by 0.1 in every sequence is a perplexity higher by e^0.1 - 1, without doubt."""
    given = argparse.Namespace(
        model=tmp_path / "model", workdir=tmp_path / "work", out=tmp_path / "out", sequences=2, limit=5, tokens=8
    )
    losses = {"fp32": [2.0, 3.0], "int8": [2.1, 3.1], "ternary": [9.0, 10.0]}
    for name, each in losses.items():
        place = tmp_path / "work" / name
        (place / "model").mkdir(parents=True)
        (place / "model/model.safetensors").write_bytes(b"x" * 500_000)
        (place / "perplexity.json").write_text(json.dumps({"nll": [10 * loss for loss in each], "tokens": [10, 10]}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"x" * 2_000_000)
    quantised._write(given)
    found = json.loads((tmp_path / "out/summary.json").read_text())
    assert [row[:5] for row in found["rows"][:2]] == [
        ["fp32", "2.0 MB", "", f"{math.exp(2.5):.2f}", ""],
        ["int8", "0.5 MB", "", f"{math.exp(2.6):.2f}", "+10.5% (+10.5 to +10.5)"],
    ]
    assert all(len(row) == len(found["columns"]) for row in found["rows"])
    assert (tmp_path / "out/quality.png").read_bytes().startswith(b"\x89PNG")


def test_formats_that_share_a_speed_have_equal_schemes(quantised):
    for name, chosen in quantised.FORMATS.items():
        if chosen.decodes_as is not None:
            other = quantised.FORMATS[chosen.decodes_as]
            assert (other.scheme, other.dtype) == (chosen.scheme, chosen.dtype), name
