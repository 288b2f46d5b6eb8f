"""moe-reduce pool: put the experts of all layers into one pool that every layer can call."""

import argparse
from pathlib import Path

from moe_reduce.commands import transforming
from moe_reduce.core.config import to_dict
from moe_reduce.core.stages import PoolStage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    transforming.add_arguments(parser)
    parser.add_argument(
        "--start", choices=("lossless", "concat", "random"), default="lossless",
        help="routers of the pool: lossless concatenates the old ones and adds a bias that keeps every choice; concat "
        "omits the bias; random starts from new routers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--score-function", choices=("softmax", "sigmoid"), default="softmax",
        help="score function of the pool's routers; sigmoid is not exactly lossless (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--router",
        choices=("shared", "layer"),
        default="shared",
        help="one router for all layers, or one for each layer (default: %(default)s)",
    )
    parser.add_argument(
        "--bias", type=float, help="logits subtracted from other layers' experts (default: enough to be exact)"
    )
    parser.add_argument(
        "--offset", type=float, default=0.0, help="offset subtracted from logits before the sigmoid (default: 0)"
    )
    shown = "move norm weights and output scales out of the experts, which rounds their weights once more"
    parser.add_argument("--canonical", action="store_true", help=shown)
    parser.add_argument("--seed", type=int, default=0, help="seed of --start=random (default: 0)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the pooled model and returns its path."""
    from moe_reduce.reduction.pool import check_options
    from moe_reduce.runs.stages.pool import pool_experts

    names = ("canonical", "start", "score_function", "router", "bias", "offset")
    stage = PoolStage(**{name: getattr(arguments, name) for name in names})
    check_options(stage)
    model = transforming.read(arguments, overrides)
    result = pool_experts(stage, model, arguments.seed)
    settings = to_dict(stage) | {"seed": arguments.seed}
    return transforming.write(arguments, model, result.model, settings, result.kept_experts)
