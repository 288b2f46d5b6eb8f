"""Arguments and checks that several commands on model directories share."""

import argparse
import dataclasses
import glob
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.core import outputs
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_reduce.core.config import DataConfig, ExecutionConfig
    from moe_reduce.models.model import Model

INPUTS = (
    "model",
    "baseline",
    "adapter",
    "scores",
    "data",
    "tokenizer",
    "task_path",
    "task_data",
    "runs",
)  # arguments that are read
DEFAULT_LENGTH = 256
CORPUS_DEFAULTS = {"cache": "runs/tokens", "text_field": "text"}


def add_out(
    parser: argparse.ArgumentParser, default: str | None = None, required: bool = False, what: str = "directory"
) -> None:
    """Adds --out and --overwrite. what: the kind of thing that is written."""
    shown = f"{what} to write" + (f" (default: {default})" if default else "")
    path = default and Path(default)
    parser.add_argument("--out", type=Path, default=path, required=required, help=shown)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def check_out(arguments: argparse.Namespace, kind: outputs.Kind) -> None:
    """Raises UserError when --out cannot become a directory of this kind, before its content is computed."""
    outputs.check(arguments.out, kind, arguments.overwrite, _inputs(arguments))
    outputs.check_writable(arguments.out)


def check_out_files(arguments: argparse.Namespace, files: list[Path], kind: outputs.Kind) -> None:
    """Raises UserError when a result of several files cannot be written. files: the one that says its kind first."""
    outputs.check_files(files, kind, arguments.overwrite, _inputs(arguments))
    outputs.check_writable(files[0])


def _inputs(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yields the files and directories that the arguments of a command name as its inputs."""
    for name in INPUTS:
        value = getattr(arguments, name, None)
        for given in value if isinstance(value, list) else [value]:
            for part in str(given or "").split(",") if name == "data" else [str(given or "")]:
                yield from map(Path, [part, *glob.iglob(part, recursive=True)] if part else [])


def check_utf8(option: str, *texts: str) -> None:
    """Raises UserError for bytes on the command line that are not UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{option}={text!r} is not UTF-8 ({error.reason}): give it as UTF-8") from None


def add_data(parser: argparse.ArgumentParser, required: bool, purpose: str) -> None:
    """Adds --data, the options for reading it, and --compute-dtype."""
    add_corpus(parser, required, purpose)
    add_compute_dtype(parser)


def add_corpus(parser: argparse.ArgumentParser, required: bool, purpose: str) -> None:
    """Adds --data and the options for reading it, which `data_config` uses."""
    kinds = "a path, glob, hub:OWNER/NAME, python-stdlib, or token ids (.npy)"
    parser.add_argument("--data", required=required, help=f"{purpose}: {kinds}")
    field = CORPUS_DEFAULTS["text_field"]
    parser.add_argument(
        "--text-field", default=field, help=f"field of jsonl and parquet rows that holds the text (default: {field})"
    )
    parser.add_argument("--tokenizer", help="tokenizer.model, tokenizer.json or a directory (default: the model's own)")
    cache = CORPUS_DEFAULTS["cache"]
    shown = f"tokens in a sequence (default: {DEFAULT_LENGTH}; token ids have the length of their file)"
    parser.add_argument("--sequence-length", type=int, help=shown)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences in a batch (default: 16)")
    parser.add_argument("--max-batches", type=int, help="stop after this many batches (default: the whole corpus)")
    parser.add_argument("--cache", default=cache, help=f"directory of cached tokens (default: {cache})")


def add_compute_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds --compute-dtype, which `execution` uses."""
    shown = "dtype of matrix products (default: %(default)s)"
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32", help=shown)


def data_config(arguments: argparse.Namespace) -> "DataConfig":
    """The whole corpus that --data names; raises UserError when a number is out of range."""
    from moe_reduce.core.config import DataConfig

    check_positive(arguments, "batch_size", "max_batches")
    data = DataConfig(
        source=arguments.data,
        text_field=arguments.text_field,
        tokenizer=arguments.tokenizer or str(arguments.model),
        sequence_length=sequence_length(arguments),
        validation_fraction=0.0,
        cache=arguments.cache,
    )
    data.check()
    return data


def sequence_length(arguments: argparse.Namespace) -> int:
    """Tokens in a sequence: as given, else the length of the rows of token ids, else the default."""
    if arguments.sequence_length is not None:
        return arguments.sequence_length
    from moe_reduce.core.data_config import content
    from moe_reduce.data.rows import row_length

    return row_length(arguments.data) if content(arguments.data) == "token_ids" else DEFAULT_LENGTH


def execution(arguments: argparse.Namespace) -> "ExecutionConfig":
    """Execution settings for this machine's platform and --compute-dtype."""
    import jax

    from moe_reduce.core.config import ExecutionConfig

    wanted = dataclasses.replace(ExecutionConfig(), compute_dtype=arguments.compute_dtype)
    return wanted.resolve(jax.default_backend())


def load_model(arguments: argparse.Namespace, directory: Path | None = None, mesh: "Mesh | None" = None) -> "Model":
    """Loads --model or another directory to run it; on a mesh, each device loads only its own part."""
    from moe_reduce import load

    place: Path = directory or arguments.model
    if mesh is None:
        return load(place, execution=execution(arguments), blocks=True)
    from moe_reduce.training import sharding

    places = sharding.model_shardings(mesh, directory_config(place))
    return load(place, execution=execution(arguments), shardings=places, blocks=True)


def add_tensor(parser: argparse.ArgumentParser) -> None:
    """Adds --tensor, which `tensor_mesh` uses."""
    shown = "devices to split each matrix over; on a CPU, each core counts as a device (default: %(default)s)"
    parser.add_argument("--tensor", type=int, default=1, help=shown)


def tensor_mesh(arguments: argparse.Namespace, *models: Path) -> "Mesh | None":
    """The mesh of --tensor devices for these models; None for one device. Call it before JAX looks for devices."""
    check_positive(arguments, "tensor")
    if arguments.tensor == 1:
        return None
    import contextlib

    import jax

    from moe_reduce.core.config import MeshConfig
    from moe_reduce.training import sharding

    wanted = MeshConfig(data=1, tensor=arguments.tensor)
    for model in models:
        wanted.check_fits(directory_config(model), tensor="--tensor")
    with contextlib.suppress(RuntimeError):  # JAX has found its devices already, and their number is fixed
        jax.config.update("jax_num_cpu_devices", arguments.tensor)
    if len(jax.devices()) < arguments.tensor:
        raise UserError(f"--tensor={arguments.tensor} needs as many devices, but there are {len(jax.devices())}")
    return sharding.make_mesh(wanted)


def batches(arguments: argparse.Namespace, vocab_size: int, every_token: bool = False) -> Iterator[Any]:
    """Yields the batches of --data, at most --max-batches, with a progress bar.

    every_token: count tokens rather than targets, as data/rows.py says.
    """
    from tqdm import tqdm

    from moe_reduce.data.batches import WholeSplit
    from moe_reduce.data.prepare import prepare
    from moe_reduce.data.rows import every_token as counting_all

    data = data_config(arguments)
    tokens, _ = prepare(data, vocab_size)
    found = WholeSplit(counting_all(tokens) if every_token else tokens, data, arguments.batch_size)
    count = len(found) if arguments.max_batches is None else min(arguments.max_batches, len(found))
    for index in tqdm(range(count), unit="batch", disable=not sys.stderr.isatty()):
        yield found[index]


def measured_on(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings, apart from the model, that a loss on --data depends on."""
    names = ("data", "text_field", "tokenizer", "batch_size", "max_batches", "compute_dtype")
    return {name: getattr(arguments, name) for name in names} | {"sequence_length": sequence_length(arguments)}


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UserError for the first of the named arguments that is given and not positive."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"{_option(name)} must be positive, got {value}")


def check_unused(arguments: argparse.Namespace, where: str, *names: str) -> None:
    """Raises UserError for the first of the named arguments that is given but not used. where: the reason."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserError(f"{_option(name)} does nothing {where}: leave it out")


def fill(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Sets defaults after parsing, for commands that must know which arguments were given."""
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def no_overrides(overrides: list[str]) -> None:
    """Raises UserError for arguments that the command does not know."""
    if overrides:
        raise UserError(f"unknown argument {overrides[0]}: see --help")


def show(content: dict[str, Any], as_json: bool) -> str:
    """Nested values as indented lines, or as JSON."""
    return json.dumps(content, indent=2) if as_json else "\n".join(_lines(content, 0))


def _lines(content: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{key}", *_lines(value, depth + 1)]
        elif isinstance(value, list):
            lines += [f"{'  ' * depth}{key}", *(f"{'  ' * (depth + 1)}{item}" for item in value)]
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            lines.append(f"{'  ' * depth}{key}: {shown}")
    return lines


def directory_config(directory: Path) -> ModelConfig:
    """Reads the architecture of a model directory from its config.json alone."""
    from moe_reduce.families import read_config

    return read_config(directory)[0]
