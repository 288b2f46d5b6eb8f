"""moe-reduce export: write a model as StableHLO or ONNX, after checking its logits against the model's."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from moe_reduce.commands import model_arguments

FORMATS = {"stablehlo": ("stablehlo",), "onnx": ("onnx",), "both": ("stablehlo", "onnx")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file"
    )
    model_arguments.add_out(parser, required=True, what="directory")
    parser.add_argument(
        "--format", required=True, choices=FORMATS, help="stablehlo for jax.export, onnx for onnxruntime, or both"
    )
    parser.add_argument("--batch-size", type=int, help="fixed number of sequences in a batch (default: any)")
    parser.add_argument("--sequence-length", type=int, help="fixed number of tokens in a sequence (default: any)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the directory, prints the largest difference of its logits, and returns its path."""
    model_arguments.no_overrides(overrides)
    model_arguments.check_positive(arguments, "batch_size", "sequence_length")
    from moe_reduce import load
    from moe_reduce.storage import export, manifest

    model_arguments.check_out(arguments, export.KIND)
    target, formats = arguments.out.absolute(), FORMATS[arguments.format]
    export.check(model_arguments.directory_config(arguments.model), formats)
    source = manifest.input_of(arguments.model)
    content = {"command": _command(arguments), "model": {"path": source.path, "sha256": source.sha256}}
    sizes = (arguments.batch_size, arguments.sequence_length)
    model = load(arguments.model, dtype="float32")
    content = export.write(model, target, formats, sizes, content, arguments.overwrite)
    print(model_arguments.show(_shown(content), as_json=False))
    return arguments.out


def _command(arguments: argparse.Namespace) -> str:
    names = ("model", "out", "format", "batch_size", "sequence_length")
    given = {name: getattr(arguments, name) for name in names}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return shlex.join(["moe-reduce", "export", *options, *(["--overwrite"] if arguments.overwrite else [])])


def _shown(content: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "largest logit difference": f"{file['largest_difference']:.3g} (tolerance {file['tolerance']:.3g})",
            "same best token": f"{file['argmax_agreement']:.1%}",
            "bytes": file["bytes"],
        }
        for name, file in content["files"].items()
    }
