"""moe-reduce prune: keeps the best experts, from file to file; weights pass through a few megabytes at a time."""

import argparse
from pathlib import Path

from moe_reduce.commands import model_arguments
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input, Step, home_layers
from moe_reduce.models.parameters import parameter_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", required=True, type=Path, help="a mixture of experts, of ours or of Hugging Face")
    parser.add_argument("--scores", required=True, type=Path, help="what moe-reduce score wrote for this model")
    parser.add_argument("--criterion", default="reap", help="one of those scored (default: reap)")
    parser.add_argument("--keep", required=True, type=float, help="share of the experts, such as 0.5, or their number")
    parser.add_argument(
        "--scope", choices=("layer", "global"), default="layer",
        help="the best of each layer, as many in each; or the best of all, which gives layers pools of their own size "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--floor", type=int, help="fewest in a layer, with --scope=global (default: those active)")
    parser.add_argument("--protect-super-experts", action="store_true", help="keep experts of outstanding activation")
    model_arguments.add_out(parser, required=True, what="model directory")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the pruned model directory, prints what it cost, and returns its path."""
    model_arguments.no_overrides(overrides)
    model_arguments.check_out(arguments.out, arguments.overwrite)

    from moe_reduce.reduction import files, scores
    from moe_reduce.storage import manifest
    from moe_reduce.storage.model_directory import write_directory

    directory = files.open_directory(arguments.model)
    found, source = scores.read(arguments.scores), manifest.input_of(arguments.model)
    if found.model is not None and found.model.sha256 != source.sha256:
        raise UserError(
            f"--scores={arguments.scores} are of {found.model.path}, and --model={arguments.model} is another model "
            "(its hash differs): score this one"
        )
    kept = _choose(arguments, directory, found)
    before = parameter_count(directory.config)
    after = parameter_count(files.pruned(directory, kept).config)
    step = Step(
        command="prune",
        arguments={name: getattr(arguments, name) for name in ("criterion", "keep", "scope", "floor")}
        | {"protect_super_experts": arguments.protect_super_experts},
        inputs=(
            source,
            Input(str(arguments.scores), manifest.sha256_of_file(arguments.scores)),
        ),
        parameters_before=before,
        parameters_after=after,
        kept_experts=files.kept_originals(directory, kept),
    )
    write_directory(files.prune_files(directory, kept, step), arguments.out, arguments.overwrite)
    counts = sorted({len(row) for row in kept})
    shown = {
        "experts of a pool": f"{directory.moe.experts} -> {' to '.join(map(str, counts[:1] + counts[1:][-1:]))}",
        "parameters": f"{before:,} -> {after:,}",
    }
    print(model_arguments.show(shown, as_json=False))
    return arguments.out


def _choose(arguments: argparse.Namespace, directory, found):
    from moe_reduce.reduction import files, selection

    moe = directory.moe
    values = found.of(arguments.criterion)
    rows = 1 if moe.placement == "shared" else directory.config.layers
    if values.shape != (rows, moe.experts):
        raise UserError(
            f"--scores={arguments.scores} are of {values.shape[0]} x {values.shape[1]} experts, the model has {rows} x "
            f"{moe.experts}: score this model"
        )
    protected: frozenset = frozenset()
    if arguments.protect_super_experts:
        home_NE = home_layers(directory.config, directory.chain)
        protected = selection.super_experts(found.of("max_activation"), home_NE, directory.config.layers)
    if arguments.scope == "layer":
        if arguments.floor is not None:
            raise UserError("--floor is for --scope=global; with --scope=layer every layer keeps the same number")
        return selection.keep_by_row(values, selection.count_of(arguments.keep, moe.experts), protected)
    floor = moe.active if arguments.floor is None else arguments.floor
    if floor < moe.active:
        raise UserError(f"--floor={floor} is below the {moe.active} experts that are active for a token: raise it")
    keep = selection.count_of(arguments.keep, rows * moe.experts)
    return selection.keep_overall(values, keep, floor, protected, files.sole_callers(directory))
