"""moe-reduce drop-layers: drop the layers named, or those with the least Block Influence (arXiv:2403.03853)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import model_arguments, transforming
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from moe_reduce.models.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    transforming.add_arguments(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--layers", type=_numbers, help="numbers of the layers to drop, counted from 0, such as 3,5")
    wanted.add_argument(
        "--count", type=int, help="how many layers to drop: those with the least Block Influence on --data"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the shallower model and returns its path."""
    if arguments.count is not None and arguments.data is None:
        raise UserError(
            f"--count={arguments.count} needs text to measure Block Influence on: give --data, or name --layers"
        )
    if arguments.count is not None:
        _check_count(arguments)
    model = transforming.read(arguments, overrides)
    from moe_reduce.reduction.layers import drop_layers

    settings = {"layers": arguments.layers} if arguments.count is None else _least_influential(arguments, model)
    dropped = settings["layers"]
    return transforming.write(arguments, model, drop_layers(model, dropped), settings, _kept_experts(model, dropped))


def _check_count(arguments: argparse.Namespace) -> None:
    layers = model_arguments.directory_config(arguments.model).layers
    if not 1 <= arguments.count < layers:
        raise UserError(f"--count={arguments.count} must be at least 1 and below the {layers} layers")


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be layer numbers such as 3,5") from None


def _kept_experts(model: "Model", dropped: list[int]) -> Any:
    """Original (layer, index) of the experts in the remaining layers; None if dropping a layer drops no expert."""
    from moe_reduce.core.provenance import originals

    if model.config.moe is None or model.config.moe.placement == "shared":
        return None
    rows = originals(model.config, model.chain)
    return [row for layer, row in enumerate(rows, model.config.dense_layers) if layer not in dropped]


def _least_influential(arguments: argparse.Namespace, model: "Model") -> dict[str, Any]:
    """{count, layers, block_influence}; as in ShortGPT, all layers are measured once, in the whole model."""
    import numpy as np

    from moe_reduce.reduction.layers import block_influence

    batches = model_arguments.batches(arguments, model.config.vocab_size, every_token=True)
    influence_N = block_influence(model, batches)
    order = [layer for layer in np.argsort(influence_N, kind="stable").tolist() if layer >= model.config.dense_layers]
    layers = sorted(order[: arguments.count])
    influence = {f"layer {layer}": round(value, 6) for layer, value in enumerate(influence_N.tolist())}
    print(model_arguments.show({"block_influence": influence, "dropped": layers}, as_json=False))
    return {"count": arguments.count, "layers": layers, "block_influence": list(influence.values())}
