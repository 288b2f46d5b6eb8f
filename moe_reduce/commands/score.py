"""moe-reduce score: how much each expert matters, under several criteria, from one pass over a corpus."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from moe_reduce.commands import model_arguments
from moe_reduce.core import disk
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from moe_reduce.core.config import MoEConfig
    from moe_reduce.reduction.scores import Sums


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", required=True, type=Path, help="a mixture of experts, of ours or of Hugging Face")
    model_arguments.add_data(parser, required=True, purpose="what to calibrate on")
    parser.add_argument(
        "--criteria", default="reap,frequency,max_activation", help="comma separated, or all (default: %(default)s)"
    )
    parser.add_argument("--layer-wise", action="store_true", help="for a model larger than memory: a layer at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the random criterion (default: 0)")
    model_arguments.add_out(parser, "scores.json", what="file")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the scores as JSON, the sums as arrays beside it, and two pictures; returns the path of the JSON."""
    model_arguments.no_overrides(overrides)
    written = _files(arguments.out)
    for file in written:
        model_arguments.check_out(file, arguments.overwrite)
    from moe_reduce.reduction import scores
    from moe_reduce.reports import score_pictures
    from moe_reduce.storage import manifest

    wanted = scores.CRITERIA if arguments.criteria == "all" else arguments.criteria.split(",")
    scores.check_criteria(wanted)
    model_arguments.data_config(arguments)
    sums, moe = _layer_wise(arguments) if arguments.layer_wise else _whole(arguments)
    found = scores.scores(moe, sums, wanted, arguments.seed)
    found = dataclasses.replace(found, model=manifest.input_of(arguments.model))
    remedy = "free some space or choose another path"
    with disk.writing(arguments.out, remedy), disk.temporary_beside(arguments.out) as unfinished:
        scores.write_arrays(sums, unfinished / f"{arguments.out.stem}.npz")
        score_pictures.pictures(found, unfinished / arguments.out.stem)
        scores.write(found, unfinished / arguments.out.name)
        for file in written:
            (unfinished / file.name).replace(file)
    return arguments.out


def _files(out: Path) -> list[Path]:
    """All that is written; the scores are the last, so that where they are the others are too."""
    if out.suffix != ".json":
        raise UserError(f"--out={out} must end in .json: arrays and pictures of the same name go beside it")
    return [out.with_name(out.stem + end) for end in (".npz", "-histogram.png", "-map.png", ".json")]


def _whole(arguments: argparse.Namespace) -> "tuple[Sums, MoEConfig]":
    from moe_reduce.reduction import scores
    from moe_reduce.reduction.transform import moe_of

    model = model_arguments.load_model(arguments)
    moe = moe_of(model.config)
    return scores.collect(model, model_arguments.batches(arguments, model.config.vocab_size)), moe


def _layer_wise(arguments: argparse.Namespace) -> "tuple[Sums, MoEConfig]":
    from moe_reduce.reduction import files, layerwise

    directory = files.open_directory(arguments.model)
    moe = directory.moe
    batches = list(model_arguments.batches(arguments, directory.config.vocab_size))
    return layerwise.collect(directory, batches, model_arguments.execution(arguments)), moe
