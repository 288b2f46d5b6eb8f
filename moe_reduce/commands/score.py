"""moe-reduce score: how much each expert matters, under several criteria, from one pass over a corpus."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moe_reduce import disk
from moe_reduce.commands import model_arguments

if TYPE_CHECKING:
    from moe_reduce.config import MoEConfig
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
    model_arguments.check_out(arguments.out, arguments.overwrite)
    from moe_reduce.reduction import scores
    from moe_reduce.reduction.pictures import score_pictures

    wanted = scores.CRITERIA if arguments.criteria == "all" else arguments.criteria.split(",")
    scores.check_criteria(wanted)
    model_arguments.data_config(arguments)
    sums, moe = _layer_wise(arguments) if arguments.layer_wise else _whole(arguments)
    found = scores.scores(moe, sums, wanted, arguments.seed)
    with disk.writing(arguments.out, "free some space or choose another path"):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        scores.write_arrays(sums, arguments.out.with_suffix(".npz"))
        score_pictures(found, arguments.out.with_suffix(""))
        scores.write(found, arguments.out)
    return arguments.out


def _whole(arguments: argparse.Namespace) -> "tuple[Sums, MoEConfig]":
    from moe_reduce.reduction import scores

    model = model_arguments.load_model(arguments)
    moe = scores.moe_of(model.config)
    return scores.collect(model, model_arguments.batches(arguments, model.config.vocab_size)), moe


def _layer_wise(arguments: argparse.Namespace) -> "tuple[Sums, MoEConfig]":
    from moe_reduce.reduction import files, layerwise

    directory = files.open_directory(arguments.model)
    moe = directory.moe
    batches = list(model_arguments.batches(arguments, directory.config.vocab_size))
    return layerwise.collect(directory, batches, model_arguments.execution(arguments)), moe
