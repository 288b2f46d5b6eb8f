"""Models in formats that other programs run: a directory of model.stablehlo, model.onnx and export.json.

Read back with jax alone, on CPU, CUDA or TPU, or with onnxruntime alone:

    jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes())).call(tokens_BT)
    onnxruntime.InferenceSession("model.onnx").run(["logits"], {"tokens": tokens_BT})[0]

of token ids int32 [B, T]; the weights are inside, in fp32, as are the logits [B, T, V].
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_reduce.core import disk
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import parameter_count
from moe_reduce.storage import export_formats, manifest
from moe_reduce.storage.export_trace import DISPATCH, Traced, trace

if TYPE_CHECKING:
    from moe_reduce.models.model import Model

EXPORT_FILE = "export.json"
FILE_LIMIT = 2**31 - 2**26  # bytes of weights: files of both formats end at 2 GiB, and the graph needs some of it
SHAPES = ((2, 16), (3, 5))  # of the batches that a file is checked on, where their sizes are open
RELATIVE_TOLERANCE = 1e-4  # of the largest logit; sums in another order differ by a tenth of it


def check(config: ModelConfig, target: Path, formats: Sequence[str], overwrite: bool) -> None:
    """Raises UserError when something is in the way that can be told before a weight is read."""
    disk.check_directory(target, overwrite, EXPORT_FILE, "an exported model")
    for file_format in formats:
        export_formats.require(file_format)
    size = 4 * parameter_count(config)
    if size > FILE_LIMIT:
        raise UserError(f"the weights take {size / 1e9:.1f} GB in fp32 and a file holds 2: export a smaller model")


def write(
    model: "Model", target: Path, formats: Sequence[str], sizes: tuple[int | None, int | None], content: dict[str, Any]
) -> dict[str, Any]:
    """Writes the directory whole or not at all, and returns what export.json says.

    sizes: of batch and time, None where any is taken. content: what else export.json has to say. Raises UserError when
    a format cannot express the model, a file does not run or does not give the model's logits, or cannot be written.
    """
    traced = trace(model, *sizes)
    exported = {file_format: export_formats.convert(file_format, traced) for file_format in formats}
    batches = _batches(traced)
    expected = [np.asarray(model(tokens_BT)) for tokens_BT in batches]
    content = content | _described(model, traced, formats) | {"checked_on": [tokens.shape for tokens in batches]}
    content["files"] = {}
    with disk.writing(target, "free the space or choose another path"), disk.temporary_beside(target) as unfinished:
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
        disk.replace_directory(unfinished, target)
    return content


def _batches(traced: Traced) -> list[np.ndarray]:
    """Random token ids, always the same; of two shapes unless both sizes are given."""
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
    """How far the logits found are from those expected; raises UserError when they are too far."""
    pairs = list(zip(expected, found, strict=True))
    difference = max(float(np.max(np.abs(ours - theirs))) for ours, theirs in pairs)
    tolerance = RELATIVE_TOLERANCE * max(1.0, *(float(np.max(np.abs(ours))) for ours in expected))
    same = np.concatenate([(ours.argmax(-1) == theirs.argmax(-1)).ravel() for ours, theirs in pairs])
    if not difference <= tolerance:  # also when it is not a number
        raise UserError(
            f"{name} gives logits that differ by {difference:.3g} from the model's, above the tolerance of "
            f"{tolerance:.3g}, and the same best token at {same.mean():.1%} of positions: it was not kept"
        )
    return {
        "largest_difference": difference,
        "tolerance": tolerance,
        "argmax_agreement": float(same.mean()),
    }
