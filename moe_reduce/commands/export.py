"""moe-reduce export: write a model as StableHLO, ONNX or GGUF; of the first two, logits are checked first."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from moe_reduce.commands import model_arguments

GGUF, GGUF_TYPES = "gguf", ("f16", "q8_0", "q4_0")
FORMATS = {"stablehlo": ("stablehlo",), "onnx": ("onnx",), "both": ("stablehlo", "onnx")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file"
    )
    model_arguments.add_out(parser, required=True, what="directory")
    parser.add_argument(
        "--format", required=True, choices=(*FORMATS, GGUF),
        help="stablehlo for jax.export, onnx for onnxruntime, or both; gguf for llama.cpp",
    )  # fmt: skip
    parser.add_argument("--type", choices=GGUF_TYPES, help=f"type of the matrices in GGUF (default: {GGUF_TYPES[0]})")
    parser.add_argument("--batch-size", type=int, help="fixed number of sequences in a batch (default: any)")
    parser.add_argument("--sequence-length", type=int, help="fixed number of tokens in a sequence (default: any)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the directory, prints the largest difference of its logits, and returns its path."""
    model_arguments.no_overrides(overrides)
    model_arguments.check_positive(arguments, "batch_size", "sequence_length")
    from moe_reduce import load
    from moe_reduce.storage import export, manifest

    model_arguments.check_out(arguments, export.KIND)
    if arguments.format == GGUF:
        return _write_gguf(arguments)
    model_arguments.check_unused(arguments, f"with --format={arguments.format}", "type")
    target, formats = arguments.out.absolute(), FORMATS[arguments.format]
    export.check(model_arguments.directory_config(arguments.model), formats)
    source = manifest.input_of(arguments.model)
    content = {"command": _command(arguments), "model": {"path": source.path, "sha256": source.sha256}}
    sizes = (arguments.batch_size, arguments.sequence_length)
    model = load(arguments.model, dtype="float32")
    content = export.write(model, target, formats, sizes, content, arguments.overwrite)
    print(model_arguments.show(_shown(content), as_json=False))
    return arguments.out


def _write_gguf(arguments: argparse.Namespace) -> Path:
    """Writes model.gguf and export.json."""
    model_arguments.check_unused(arguments, "with --format=gguf", "batch_size", "sequence_length")
    model_arguments.fill(arguments, {"type": GGUF_TYPES[0]})
    from moe_reduce.core import disk, outputs
    from moe_reduce.storage import export, gguf_writing, manifest

    config, source = model_arguments.directory_config(arguments.model), manifest.input_of(arguments.model)
    gguf_writing.check(arguments.model, config, arguments.type)
    with outputs.directory(arguments.out.absolute(), export.KIND, arguments.overwrite) as unfinished:
        file = unfinished / "model.gguf"
        gguf_writing.write(arguments.model, config, file, arguments.type)
        described = {"format": GGUF, "type": arguments.type, "bytes": file.stat().st_size}
        content: dict[str, Any] = {
            "command": _command(arguments),
            "model": {"path": source.path, "sha256": source.sha256},
            "files": {file.name: described | {"sha256": manifest.sha256_of_file(file)}},
        }
        disk.write_json(unfinished / export.EXPORT_FILE, content)
    print(model_arguments.show({file.name: described}, as_json=False))
    return arguments.out


def _command(arguments: argparse.Namespace) -> str:
    names = ("model", "out", "format", "type", "batch_size", "sequence_length")
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
