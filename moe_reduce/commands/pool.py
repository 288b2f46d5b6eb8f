"""moe-reduce pool: the experts of all layers as one pool that every layer can call."""

import argparse
from pathlib import Path

from moe_reduce.commands import transforming
from moe_reduce.core.config import PoolStage, to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    transforming.add_arguments(parser)
    parser.add_argument(
        "--start", choices=("lossless", "concat", "random"), default="lossless",
        help="routers side by side that choose as before; without their bias; or new ones (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--score-function", choices=("softmax", "sigmoid"), default="softmax",
        help="of the pool's routers; sigmoid is only near to lossless (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--router",
        choices=("shared", "layer"),
        default="shared",
        help="one for all layers, or one each (default: %(default)s)",
    )
    parser.add_argument("--bias", type=float, help="against other layers' experts, in logits (default: exact)")
    parser.add_argument("--offset", type=float, default=0.0, help="subtracted before sigmoid scores (default: 0)")
    shown = "fold norms and output sizes out of the experts, which rounds them to their dtype once more"
    parser.add_argument("--canonical", action="store_true", help=shown)
    parser.add_argument("--seed", type=int, default=0, help="of --start=random (default: 0)")


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
