"""moe-reduce prune: keep the best experts; copies weights from file to file and needs little memory."""

import argparse
from pathlib import Path

from moe_reduce.commands import model_arguments
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input, Step, home_layers
from moe_reduce.models.parameters import parameter_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a mixture of experts: a directory, ours or from Hugging Face"
    )
    parser.add_argument(
        "--scores", required=True, type=Path, help="the scores.json that moe-reduce score wrote for this model"
    )
    parser.add_argument(
        "--criterion", default="reap", help="rank experts by this criterion of the scores (default: reap)"
    )
    parser.add_argument(
        "--keep", required=True, type=float, help="experts to keep: a share such as 0.5, or their number"
    )
    parser.add_argument(
        "--scope", choices=("layer", "global"), default="layer",
        help="layer: keep equally many experts in each layer; global: keep the best of the whole model, so that layers "
        "keep different numbers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--floor", type=int, help="fewest experts to keep in a layer, with --scope=global (default: the active ones)"
    )
    parser.add_argument(
        "--protect-super-experts",
        action="store_true",
        help="always keep experts with outstanding activations (arXiv:2507.23279)",
    )
    model_arguments.add_out(parser, required=True, what="model directory")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the pruned model directory, prints what it cost, and returns its path."""
    model_arguments.no_overrides(overrides)
    from moe_reduce.reduction import files, scores
    from moe_reduce.storage import manifest
    from moe_reduce.storage.model_directory import KIND, write_directory

    model_arguments.check_out(arguments, KIND)
    directory = files.open_directory(arguments.model)
    found, source = scores.read(arguments.scores), manifest.input_of(arguments.model)
    if found.model is not None and found.model.sha256 != source.sha256:
        raise UserError(
            f"--scores={arguments.scores} were made for {found.model.path}, and --model={arguments.model} is another "
            "model (its hash differs): score this one"
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
    rows = 1 if moe.placement == "shared" else directory.config.expert_layers
    if values.shape != (rows, moe.experts):
        raise UserError(
            f"--scores={arguments.scores} hold {values.shape[0]} x {values.shape[1]} experts, the model has {rows} x "
            f"{moe.experts}: score this model"
        )
    protected: frozenset = frozenset()
    if arguments.protect_super_experts:
        home_layer_NE = home_layers(directory.config, directory.chain)
        protected = selection.super_experts(found.of("max_activation"), home_layer_NE, directory.config.expert_layers)
    if arguments.scope == "layer":
        if arguments.floor is not None:
            raise UserError("--floor is for --scope=global; with --scope=layer every layer keeps the same number")
        keep = selection.count_of(arguments.keep, moe.experts)
        return selection.keep_by_row(values, keep, protected, moe.groups)
    floor = moe.active if arguments.floor is None else arguments.floor
    if floor < moe.active:
        raise UserError(f"--floor={floor} is below the {moe.active} experts that each token uses: raise it")
    keep = selection.count_of(arguments.keep, rows * moe.experts)
    return selection.keep_overall(values, keep, floor, protected, files.exclusive_layers(directory))
