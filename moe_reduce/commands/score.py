"""moe-reduce score: rank experts under several criteria, from one pass over a corpus."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from moe_reduce.commands import model_arguments
from moe_reduce.core import outputs
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from moe_reduce.core.config import MoEConfig
    from moe_reduce.reduction.scores import Sums

KIND = outputs.json_kind("a set of scores", "scores.json", ("tokens", "counts", "scores"), ())
SHOWN = 3  # experts named at each end of a ranking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a mixture of experts: a directory, ours or from Hugging Face"
    )
    model_arguments.add_data(parser, required=True, purpose="text to calibrate on")
    parser.add_argument(
        "--criteria",
        default="reap,frequency,max_activation",
        help="criteria, comma separated, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--layer-wise", action="store_true", help="load one layer at a time, for models larger than memory"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random criterion (default: 0)")
    model_arguments.add_out(parser, "scores.json", what="file")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the scores as JSON, and beside it the raw sums as arrays and two pictures; returns the path of the JSON.

    Prints the best and the worst experts of each criterion, and the files.
    """
    model_arguments.no_overrides(overrides)
    written = _files(arguments.out)
    model_arguments.check_out_files(arguments, written, KIND)
    from moe_reduce.reduction import scores
    from moe_reduce.reports import score_pictures
    from moe_reduce.storage import manifest

    wanted = scores.CRITERIA if arguments.criteria == "all" else arguments.criteria.split(",")
    scores.check_criteria(wanted)
    model_arguments.data_config(arguments)
    sums, moe = _layer_wise(arguments) if arguments.layer_wise else _whole(arguments)
    found = scores.scores(moe, sums, wanted, arguments.seed)
    found = dataclasses.replace(found, model=manifest.input_of(arguments.model))
    with outputs.file_set(written, KIND, arguments.overwrite) as unfinished:
        scores.write_arrays(sums, unfinished / f"{arguments.out.stem}.npz")
        score_pictures.pictures(found, unfinished / arguments.out.stem)
        scores.write(found, unfinished / arguments.out.name)
    shown = {name: _ends(values, found.counts_by_layer is not None) for name, values in found.scores.items()}
    print(
        model_arguments.show(
            shown | {"tokens": found.tokens, "files": ", ".join(map(str, [*written[1:], arguments.out]))}, as_json=False
        )
    )
    return arguments.out


def _ends(scores_NE: "np.ndarray", pool: bool) -> dict[str, str]:
    """The experts with the highest and the lowest scores of a criterion, in words."""
    order = scores_NE.argsort(axis=None, kind="stable")
    experts = scores_NE.shape[1]

    def shown(places: "np.ndarray") -> str:
        found = ((int(place) // experts, int(place) % experts, scores_NE.flat[place]) for place in places)
        return ", ".join(f"{'' if pool else f'layer {layer} '}expert {e} ({value:.4g})" for layer, e, value in found)

    return {"highest": shown(order[::-1][:SHOWN]), "lowest": shown(order[:SHOWN])}


def _files(out: Path) -> list[Path]:
    """The files to write, the scores first."""
    if out.suffix != ".json":
        raise UserError(f"--out={out} must end in .json: arrays and pictures with the same name go beside it")
    return [out.with_name(out.stem + end) for end in (".json", ".npz", "-histogram.png", "-map.png")]


def _whole(arguments: argparse.Namespace) -> "tuple[Sums, MoEConfig]":
    from moe_reduce.reduction import scores
    from moe_reduce.reduction.transform import moe_of

    model = model_arguments.load_model(arguments)
    moe = moe_of(model.config)
    batches = model_arguments.batches(arguments, model.config.vocab_size, every_token=True)
    return scores.collect(model, batches), moe


def _layer_wise(arguments: argparse.Namespace) -> "tuple[Sums, MoEConfig]":
    from moe_reduce.reduction import files, layerwise

    directory = files.open_directory(arguments.model)
    moe = directory.moe
    batches = list(model_arguments.batches(arguments, directory.config.vocab_size, every_token=True))
    return layerwise.collect(directory, batches, model_arguments.execution(arguments)), moe
