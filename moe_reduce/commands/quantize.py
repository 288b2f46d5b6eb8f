"""moe-reduce quantize: store the matrices of a model in fewer bits.

One layer at a time is in memory, with GPTQ and AWQ twice, beside the calibration text; of a pool the whole model.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import model_arguments
from moe_reduce.core import disk, schemes
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.core.schemes import KEEP, Scheme
from moe_reduce.models.parameters import counts_by_component, parameter_count

if TYPE_CHECKING:
    from moe_reduce.quantization.files import Report
    from moe_reduce.reduction.files import Directory

KEPT = {"native": ("router", "norm"), "compressed-tensors": ("router", "norm", "embedding", "unembedding")}
NEAREST = "rtn"  # the method that needs no text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file"
    )
    model_arguments.add_out(parser, required=True, what="model directory")
    parser.add_argument(
        "--scheme", required=True, metavar="SCHEME[,COMPONENT=SCHEME...]",
        help="format of the matrices, and of those of some components: int8, int4, int4-affine-g64, fp8, fp8-block, "
        "nf4, mxfp4, ternary, ...; COMPONENT=keep leaves a component as it is",
    )  # fmt: skip
    parser.add_argument("--group-size", type=int, help="inputs that share a scale, for int8 and int4 (int4: 128)")
    parser.add_argument(
        "--keep", type=lambda text: text.split(","),
        help="components to leave as they are unless --scheme names them (default: router,norm, and for "
        "compressed-tensors the token tables)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=(NEAREST, "gptq", "awq"), default=NEAREST,
        help="rtn: round to nearest; gptq (arXiv:2210.17323) and awq (arXiv:2306.00978) need --data "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--clip", choices=("min-max", "percentile", "mse"), default="min-max",
        help="range that the values of a scale cover: all, 99.9 %% of them, or that of the smallest squared error "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=tuple(KEPT), default="native",
        help="layout on disk: ours, for every scheme, or one that transformers opens (default: %(default)s)",
    )  # fmt: skip
    model_arguments.add_data(parser, required=False, purpose="calibration text of gptq and awq")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the quantised model directory, prints bits, bytes and errors by component, and returns its path."""
    model_arguments.no_overrides(overrides)
    _check_data(arguments)
    from moe_reduce.quantization import files
    from moe_reduce.quantization.round_to_nearest import schemes_by_path
    from moe_reduce.reduction.files import open_directory
    from moe_reduce.storage.model_directory import KIND

    model_arguments.check_out(arguments, KIND)
    directory = open_directory(arguments.model)
    if directory.quantised:
        raise UserError(f"{arguments.model} is quantised already: quantise the model that it was made from")
    chosen = _chosen(arguments, directory.config)
    by_path = schemes_by_path(directory.config, chosen)
    make = files.Target.native if arguments.format == "native" else files.Target.compressed_tensors
    print(_write(arguments, directory, make(directory.config, by_path), chosen))
    return arguments.out


def _check_data(arguments: argparse.Namespace) -> None:
    """Raises UserError for a method without the text that it needs, and for text that none needs."""
    if arguments.method == NEAREST:
        model_arguments.check_unused(arguments, f"with --method={NEAREST}", "data")
    elif arguments.data is None:
        raise UserError(f"--method={arguments.method} needs calibration text: give --data")
    else:
        model_arguments.data_config(arguments)


def _rounding(arguments: argparse.Namespace, directory: "Directory", target: Any) -> Any:
    """Makes the rounding of --method; GPTQ and AWQ calibrate each layer when its first tensor is asked for."""
    from moe_reduce.quantization import calibrated, clipping, files, streamed

    config, ranges = directory.config, clipping.ranges(arguments.clip)
    if arguments.method == NEAREST:
        return files.ToNearest(target.schemes, ranges)
    settings = calibrated.Settings(arguments.method, target.schemes, ranges)
    batches = list(model_arguments.batches(arguments, config.vocab_size, every_token=True))
    return streamed.calibrated(directory, model_arguments.execution(arguments), settings, batches)


def _write(arguments: argparse.Namespace, directory: "Directory", target: Any, chosen: Mapping[str, Scheme]) -> str:
    """Quantises layer by layer and writes --out; returns the table, and the experts seen too seldom."""
    from moe_reduce.quantization import files
    from moe_reduce.storage.model_directory import write_directory

    rounding = _rounding(arguments, directory, target)
    beside = arguments.out.with_name(f"{arguments.out.name}.parts")
    with disk.writing(arguments.out, "choose another --out"), disk.temporary_beside(beside) as spool:
        items, report = files.quantise_files(directory, target, spool, rounding)
        calibration = None if arguments.method == NEAREST else rounding.report
        errors = None if calibration is None else calibration.errors()
        step = _step(arguments, directory.config, chosen, report, errors)
        write_directory(files.contents(directory, target, items, step), arguments.out, arguments.overwrite)
    rare = [
        f"expert {expert} of layer {layer} got {tokens} tokens: rounded to nearest"
        for layer, expert, tokens in (() if calibration is None else calibration.rare)
    ]
    return "\n".join([_table(directory.config, chosen, report), *rare])


def _chosen(arguments: argparse.Namespace, config: ModelConfig) -> dict[str, Scheme]:
    """The scheme of each component that is quantised."""
    from moe_reduce.quantization.choice import choose

    known = counts_by_component(config)
    keep = [name for name in KEPT[arguments.format] if name in known] if arguments.keep is None else arguments.keep
    return choose(config, _with_groups(arguments), keep, "--scheme")


def _with_groups(arguments: argparse.Namespace) -> str:
    """--scheme with --group-size added to the names of its schemes."""
    if arguments.group_size is None:
        return arguments.scheme
    usual, named = schemes.split(arguments.scheme)
    for name in (usual, *named.values()):
        if name not in (None, KEEP) and f"{name}-g{arguments.group_size}" not in schemes.NAMES:
            sizes = ", ".join(map(str, schemes.GROUPS))
            raise UserError(
                f"--group-size={arguments.group_size} does not go with {name}: it is for int8 and int4, one of {sizes}"
            )
    ending = f"-g{arguments.group_size}"
    parts = [] if usual is None else [usual + ending]
    return ",".join(parts + [f"{one}={name if name == KEEP else name + ending}" for one, name in named.items()])


def _step(
    arguments: argparse.Namespace,
    config: ModelConfig,
    chosen: Mapping[str, Scheme],
    report: "Report",
    of_products: Mapping[str, float] | None = None,
) -> Step:
    """The link of the chain. of_products: squared errors of the products over calibration, by component."""
    from moe_reduce.storage import manifest

    count = parameter_count(config)
    settings = {name: getattr(arguments, name) for name in ("method", "clip", "format")}
    if arguments.data is not None:
        settings |= model_arguments.measured_on(arguments)
    errors = {f"relative_error.{name}": error for name, error in report.errors().items()}
    errors |= {f"relative_squared_error_of_products.{name}": error for name, error in (of_products or {}).items()}
    return Step(
        command="quantize",
        arguments=settings | {"schemes": {component: str(scheme) for component, scheme in sorted(chosen.items())}},
        inputs=(manifest.input_of(arguments.model),),
        parameters_before=count,
        parameters_after=count,
        quality=dict(sorted(errors.items())),
    )


def _table(config: ModelConfig, chosen: Mapping[str, Scheme], report: "Report") -> str:
    """One row for each component: scheme, bits a weight, bytes before and after, relative error."""
    from moe_reduce.reports import tables

    errors, counts = report.errors(), counts_by_component(config)
    rows: list[list[str]] = [["component", "scheme", "bits a weight", "bytes before", "bytes after", "relative error"]]
    for name, count in counts.items():
        error = f"{errors[name]:.2%}" if name in errors else "-"
        rows.append([name, str(chosen.get(name, KEEP)), *_sizes(report, [name], count), error])
    rows.append(["total", "", *_sizes(report, list(counts), sum(counts.values())), ""])
    return tables.aligned(rows)


def _sizes(report: "Report", components: list[str], count: int) -> list[str]:
    before, after = (sum(found[name] for name in components) for found in (report.before, report.after))
    return [f"{8 * after / count:.3f}", f"{before:,}", f"{after:,}"]
