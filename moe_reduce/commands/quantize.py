"""moe-reduce quantize: store the matrices of a model in fewer bits; one layer at a time is in memory."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import model_arguments
from moe_reduce.core import disk, schemes
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.core.schemes import Scheme
from moe_reduce.models.parameters import counts_by_component, parameter_count

if TYPE_CHECKING:
    from moe_reduce.quantization.files import Report

KEEP = "keep"  # in place of a scheme
KEPT = {"native": "router,norm", "compressed-tensors": "router,norm,embedding,unembedding"}


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
        "--keep", help="components to leave as they are unless --scheme names them (default: router,norm, and for "
        "compressed-tensors the token tables)",
    )  # fmt: skip
    parser.add_argument("--method", choices=("rtn",), default="rtn", help="rtn: round to nearest (default)")
    parser.add_argument(
        "--clip", choices=("min-max", "percentile", "mse"), default="min-max",
        help="range that the values of a scale cover: all, 99.9 %% of them, or that of the smallest squared error "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=tuple(KEPT), default="native",
        help="layout on disk: ours, for every scheme, or one that transformers opens (default: %(default)s)",
    )  # fmt: skip


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the quantised model directory, prints bits, bytes and errors by component, and returns its path."""
    model_arguments.no_overrides(overrides)
    from moe_reduce.quantization import clipping, files
    from moe_reduce.quantization.round_to_nearest import schemes_by_path
    from moe_reduce.reduction.files import open_directory
    from moe_reduce.storage.model_directory import KIND, write_directory

    model_arguments.check_out(arguments, KIND)
    directory = open_directory(arguments.model)
    if directory.quantised:
        raise UserError(f"{arguments.model} is quantised already: quantise the model that it was made from")
    chosen = _chosen(arguments, directory.config)
    by_path = schemes_by_path(directory.config, chosen)
    make = files.Target.native if arguments.format == "native" else files.Target.compressed_tensors
    target = make(directory.config, by_path)
    beside = arguments.out.with_name(f"{arguments.out.name}.parts")
    with disk.writing(arguments.out, "choose another --out"), disk.temporary_beside(beside) as spool:
        rounding = files.to_nearest(by_path, clipping.ranges(arguments.clip))
        items, report = files.quantise_files(directory, target, spool, rounding)
        step = _step(arguments, directory.config, chosen, report)
        write_directory(files.contents(directory, target, items, step), arguments.out, arguments.overwrite)
    print(_table(directory.config, chosen, report))
    return arguments.out


def _chosen(arguments: argparse.Namespace, config: ModelConfig) -> dict[str, Scheme]:
    """The scheme of each component that is quantised."""
    known = counts_by_component(config)
    named: dict[str, str] = {}
    usual = None
    for part in filter(None, arguments.scheme.split(",")):
        component, equals, name = part.rpartition("=")
        if not equals:
            usual = name
        elif component not in known:
            raise UserError(f"--scheme: the model has no component {component!r}; it has {', '.join(known)}")
        else:
            named[component] = name
    from moe_reduce.quantization.round_to_nearest import every_component

    keep = KEPT[arguments.format] if arguments.keep is None else arguments.keep
    kept = [name for name in keep.split(",") if name in known or arguments.keep is not None]
    found = {} if usual is None else every_component(config, _scheme(arguments, usual), kept)
    for component, name in named.items():
        if name == KEEP:
            found.pop(component, None)
        else:
            found[component] = _scheme(arguments, name)
    if not found:
        raise UserError(f"--scheme={arguments.scheme} quantises nothing: name a scheme, such as int8 or int4-g64")
    return found


def _scheme(arguments: argparse.Namespace, name: str) -> Scheme:
    if arguments.group_size is None:
        return schemes.parse(name)
    if f"{name}-g{arguments.group_size}" not in schemes.NAMES:
        raise UserError(
            f"--group-size={arguments.group_size} does not go with {name}: it is for int8 and int4, and one of "
            f"{', '.join(map(str, schemes.GROUPS))}"
        )
    return schemes.parse(f"{name}-g{arguments.group_size}")


def _step(arguments: argparse.Namespace, config: ModelConfig, chosen: Mapping[str, Scheme], report: "Report") -> Step:
    from moe_reduce.storage import manifest

    count = parameter_count(config)
    settings = {name: getattr(arguments, name) for name in ("method", "clip", "format")}
    return Step(
        command="quantize",
        arguments=settings | {"schemes": {component: str(scheme) for component, scheme in sorted(chosen.items())}},
        inputs=(manifest.input_of(arguments.model),),
        parameters_before=count,
        parameters_after=count,
        quality={f"relative_error.{name}": error for name, error in sorted(report.errors().items())},
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


def _sizes(report: "Report", components: list[str], count: int) -> list[Any]:
    before, after = (sum(found[name] for name in components) for found in (report.before, report.after))
    return [f"{8 * after / count:.3f}", f"{before:,}", f"{after:,}"]
