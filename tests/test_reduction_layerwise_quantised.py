"""Layer-wise scores of quantised directories are those of the same values in fp32."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import packed_models
import pytest
from test_storage_published import fp8_directories, mxfp4_directories
from transformers_models import written

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.models.weights import dequantised
from moe_reduce.reduction import layerwise


def made(scheme: str, *options: str) -> Callable[[Path], tuple[Path, Path]]:
    """A function that makes (a directory quantised by ourselves, one with the same values in fp32)."""

    def make(directory: Path) -> tuple[Path, Path]:
        written(directory / "model", "qwen3_moe", **packed_models.SIZES | {"moe_intermediate_size": 64})
        out = f"--out={directory / 'quantised'}"
        assert main(["quantize", f"--model={directory / 'model'}", f"--scheme={scheme}", *options, out]) == 0
        model, flat = (
            moe_reduce.load(directory / "model"),
            trees.flatten(moe_reduce.load(directory / "quantised").params),
        )
        values = {path: dequantised(value, np.float32) for path, value in flat.items()}
        moe_reduce.save(model.with_params(trees.unflatten(values)), directory / "whole")
        return directory / "quantised", directory / "whole"

    return make


def packed(method: str, **changes: bool) -> Callable[[Path], tuple[Path, Path]]:
    return lambda directory: packed_models.directories(directory, packed_models.stated(method, **changes))


MAKERS = {
    "fp8": fp8_directories,
    "mxfp4": mxfp4_directories,
    "gptq": packed("gptq"),
    "gptq, act-order": packed("gptq", desc_act=True),
    "awq": packed("awq"),
    "compressed-tensors": made("int4-g32", "--format=compressed-tensors"),
    "nf4, token table too": made("nf4"),
}


# one layout with a tensor for each expert, and one for all experts, are also read expert by expert
CASES = [(name, layerwise.CHUNK_BYTES) for name in MAKERS] + [("gptq", 1), ("mxfp4", 1)]
QUICK = (("fp8", layerwise.CHUNK_BYTES), ("gptq, act-order", layerwise.CHUNK_BYTES), ("mxfp4", 1))
MARKED = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("name", "chunk_bytes"), MARKED)
def test_scores_are_those_of_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk_bytes: int):
    monkeypatch.setattr(layerwise, "CHUNK_BYTES", chunk_bytes)
    quantised, whole = MAKERS[name](tmp_path)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, (4, 16)).astype(np.int32))
    found = []
    for place, more in ((quantised, ["--layer-wise"]), (whole, [])):
        out = tmp_path / f"{place.name}.json"
        options = [f"--data={tmp_path / 'tokens.npy'}", "--criteria=all", f"--out={out}"]
        assert main(["score", f"--model={place}", *options, *more]) == 0
        found.append(json.loads(out.read_text()))
    ours, wanted = found
    assert ours["counts"] == wanted["counts"]
    for criterion, values in wanted["scores"].items():
        np.testing.assert_allclose(ours["scores"][criterion], values, rtol=2e-5, err_msg=criterion)
