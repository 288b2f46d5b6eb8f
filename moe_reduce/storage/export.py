"""Export a model to a directory with model.stablehlo or model.onnx, or both, and export.json.

Running these files needs only jax (on CPU, CUDA or TPU) or only onnxruntime:

    jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes())).call(tokens_BT)
    onnxruntime.InferenceSession("model.onnx").run(["logits"], {"tokens": tokens_BT})[0]

with token ids int32 [B, T] and logits [B, T, V]. Weights are part of the file; weights and logits are fp32.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_reduce.core import disk, outputs
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import parameter_count
from moe_reduce.storage import export_formats, manifest
from moe_reduce.storage.export_trace import DISPATCH, Traced, trace

if TYPE_CHECKING:
    from moe_reduce.models.model import Model

EXPORT_FILE = "export.json"
KIND = outputs.json_kind("an exported model", EXPORT_FILE, ("command", "files", "model"))
FILE_LIMIT = 2**31 - 2**26  # bytes of weights: both formats are limited to 2 GiB, and the graph takes part of it
SHAPES = ((2, 16), (3, 5))  # [B, T] of the batches that check a file whose sizes are dynamic
RELATIVE_TOLERANCE = 1e-4  # fraction of the largest logit; another order of summation differs by a tenth of it


def check(config: ModelConfig, formats: Sequence[str]) -> None:
    """Check everything that can be checked before weights are loaded; raise UserError if the export cannot work."""
    for file_format in formats:
        export_formats.require(file_format)
    size = 4 * parameter_count(config)
    if size > FILE_LIMIT:
        raise UserError(
            f"the weights take {size / 1e9:.1f} GB in fp32 and a file can hold 2 GB: export a smaller model"
        )


def write(
    model: "Model",
    target: Path,
    formats: Sequence[str],
    sizes: tuple[int | None, int | None],
    content: dict[str, Any],
    overwrite: bool,
) -> dict[str, Any]:
    """Write the directory atomically; return the content of export.json.

    sizes: (batch, time), None for a dynamic size. content: further entries of export.json. Raises UserError when a
    format cannot express the model, when a written file does not run or gives other logits than the model, or when the
    directory cannot be written.
    """
    traced = trace(model, *sizes)
    exported = {file_format: export_formats.convert(file_format, traced) for file_format in formats}
    batches = _batches(traced)
    expected = [np.asarray(model(tokens_BT)) for tokens_BT in batches]
    content = content | _described(model, traced, formats) | {"checked_on": [tokens.shape for tokens in batches]}
    content["files"] = {}
    with outputs.directory(target, KIND, overwrite) as unfinished:
        for file_format, result in exported.items():
            file = unfinished / export_formats.FILES[file_format]
            file.write_bytes(result.content)
            found = [export_formats.logits(file_format, file, tokens_BT) for tokens_BT in batches]
            content["files"][file.name] = {
                "format": file_format,
                **result.details,
                "bytes": len(result.content),
                "sha256": manifest.sha256_of_file(file),
                **_compared(file.name, expected, found),
            }
        disk.write_json(unfinished / EXPORT_FILE, content)
    return content


def _batches(traced: Traced) -> list[np.ndarray]:
    """Random token ids from a fixed seed, in two shapes unless both sizes are given."""
    random = np.random.default_rng(0)
    given = [[size if isinstance(size, int) else open_size for size, open_size in zip(traced.shape, shape, strict=True)]
             for shape in SHAPES]  # fmt: skip
    shapes = sorted({tuple(shape) for shape in given})
    return [random.integers(0, traced.vocab_size, shape, dtype=np.int32) for shape in shapes]


def _described(model: "Model", traced: Traced, formats: Sequence[str]) -> dict[str, Any]:
    packages = [*manifest.PACKAGES, *(name for item in formats for name in export_formats.PACKAGES[item])]
    return {
        "versions": manifest.versions(packages) | {"python": platform.python_version()},
        "commit": manifest.commit(),
        "inputs": [{"name": export_formats.TOKENS, "shape": list(traced.shape), "dtype": "int32"}],
        "outputs": [{"name": export_formats.LOGITS, "shape": [*traced.shape, traced.vocab_size], "dtype": "float32"}],
        "dispatch": None if model.config.moe is None else DISPATCH,
    }


def _compared(name: str, expected: list[np.ndarray], found: list[np.ndarray]) -> dict[str, float]:
    """Compare logits; raise UserError when they differ by more than the tolerance."""
    pairs = list(zip(expected, found, strict=True))
    difference = max(float(np.max(np.abs(ours - theirs))) for ours, theirs in pairs)
    tolerance = RELATIVE_TOLERANCE * max(1.0, *(float(np.max(np.abs(ours))) for ours in expected))
    same = np.concatenate([(ours.argmax(-1) == theirs.argmax(-1)).ravel() for ours, theirs in pairs])
    if not difference <= tolerance:  # true for NaN as well
        raise UserError(
            f"{name} gives logits that differ by {difference:.3g} from the model's, above the tolerance of "
            f"{tolerance:.3g} (same best token at {same.mean():.1%} of positions): nothing was written, use another "
            "--format"
        )
    return {
        "largest_difference": difference,
        "tolerance": tolerance,
        "argmax_agreement": float(same.mean()),
    }
