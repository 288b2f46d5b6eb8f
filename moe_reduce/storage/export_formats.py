"""StableHLO and ONNX: convert a traced model to one file that contains its weights, and run such a file.

Both formats need optional packages, which are imported when they are used.
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.storage.export_trace import Traced

TOKENS, LOGITS = "tokens", "logits"
PLATFORMS = ("cpu", "cuda", "tpu")
PACKAGES = {"stablehlo": ("flatbuffers",), "onnx": ("jax2onnx", "onnx", "onnxruntime")}  # optional ones
FILES = {name: f"model.{name}" for name in PACKAGES}
ERRORS = 3  # log level of onnxruntime: errors and worse


@dataclass(frozen=True)
class Exported:
    """Bytes of an exported file, and the details of its format for export.json."""

    content: bytes
    details: dict[str, Any]


def require(file_format: str) -> None:
    """Import the packages of a format; raise UserError with the install command when one is missing."""
    for package in PACKAGES[file_format]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            reason = f"--format={file_format} needs the package {package} ({error})"
            raise UserError(f"{reason}: pip install -e '.[export]' in the checkout of moe_reduce") from error


def convert(file_format: str, traced: Traced) -> Exported:
    """Convert a model; raise UserError with the reason when the format cannot express it."""
    try:
        return _to_stablehlo(traced) if file_format == "stablehlo" else _to_onnx(traced)
    except Exception as error:  # converters raise arbitrary exceptions for unsupported operations
        raise UserError(f"--format={file_format} cannot express this model: {_line(error)}") from error


def logits(file_format: str, file: Path, tokens_BT: np.ndarray) -> np.ndarray:
    """Run an exported file: int32 [B, T] -> fp32 logits [B, T, V]; raise UserError when it does not run."""
    try:
        return _run_stablehlo(file, tokens_BT) if file_format == "stablehlo" else _run_onnx(file, tokens_BT)
    except Exception as error:  # runtimes have exception types of their own
        raise UserError(f"--format={file_format}: the file written does not run: {_line(error)}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _to_stablehlo(traced: Traced) -> Exported:
    with _without_locations():
        exported = jax.export.export(jax.jit(traced.function), platforms=PLATFORMS)(traced.tokens)
    details = {
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
    }
    return Exported(bytes(exported.serialize()), details)


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Leave the paths and lines of source code out of what is lowered: they differ from machine to machine."""
    config: Any = jax.config  # whose flags are unknown to the type checker
    limit = config.jax_traceback_in_locations_limit
    config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        config.update("jax_traceback_in_locations_limit", limit)


def _run_stablehlo(file: Path, tokens_BT: np.ndarray) -> np.ndarray:
    return np.asarray(jax.export.deserialize(bytearray(file.read_bytes())).call(tokens_BT))


def _to_onnx(traced: Traced) -> Exported:
    jax2onnx: Any = importlib.import_module("jax2onnx")
    with _quiet():
        proto = jax2onnx.to_onnx(
            traced.function, [traced.tokens], model_name="moe_reduce", input_names=[TOKENS], output_names=[LOGITS]
        )
    for dimension, size in zip(proto.graph.output[0].type.tensor_type.shape.dim, traced.shape, strict=False):
        if isinstance(size, str):  # jax2onnx has replaced the name
            dimension.dim_param = size
    (opset,) = (entry.version for entry in proto.opset_import if entry.domain == "")
    return Exported(proto.SerializeToString(), {"opset": opset, "ir_version": proto.ir_version})


def _run_onnx(file: Path, tokens_BT: np.ndarray) -> np.ndarray:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run([LOGITS], {TOKENS: tokens_BT})[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence jax2onnx, which logs hundreds of lines about internal steps."""
    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers  # jax2onnx adds a handler
