"""moe-reduce plan: exact parameter counts, bytes and FLOPs of a configuration or a model directory."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_reduce.commands import config_file, model_arguments, run_arguments
from moe_reduce.core import schemes
from moe_reduce.core.config import AdaptConfig, ModelConfig, ReduceConfig, RunConfig, any_from_dict
from moe_reduce.core.devices import CACHE_BITS, Device, device, quantity
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import counts_by_component, parameter_count

FLOATS = ("float32", "bfloat16")  # dtypes of weights that are not quantised
SERVING_DEFAULTS = {"context": 1024, "batch": 1, "dtype": "bfloat16", "cache_dtype": "bfloat16"}
CARD = ("memory", "bandwidth", "flops")  # arguments that describe a device without a name
Runs = dict[str, RunConfig | ReduceConfig | AdaptConfig]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    config_file.add_arguments(parser, required=False)
    parser.add_argument("--model", type=Path, help="a model directory or .gguf file instead of a configuration")
    shown = {name: f"(default: {value})" for name, value in SERVING_DEFAULTS.items()}
    parser.add_argument("--context", type=int, help=f"tokens of a sequence {shown['context']}")
    parser.add_argument("--batch", type=int, help=f"sequences answered at once {shown['batch']}")
    dtypes = (*FLOATS, *schemes.NAMES)
    parser.add_argument(
        "--dtype", choices=dtypes, metavar="DTYPE",
        help=f"dtype of the weights at inference: {', '.join(FLOATS)}, or a scheme of quantize {shown['dtype']}",
    )  # fmt: skip
    parser.add_argument(
        "--cache-dtype", choices=tuple(CACHE_BITS), help=f"dtype of the KV cache {shown['cache_dtype']}"
    )
    _add_device(parser)
    parser.add_argument(
        "--table", action="store_true", help="print the bytes in every number format, and of the cache by context"
    )
    parser.add_argument(
        "--topology", metavar="NAME", help="plan a training step instead: compiled for TPUs (v4:2x2x4), or estimated "
        "for GPUs (h100:8)",
    )  # fmt: skip
    parser.add_argument("--variant", action="append", metavar="NAME", help="plan this variant only; may be repeated")
    parser.add_argument(
        "--stage", action="append", metavar="NAME", help="with --topology, plan this stage of a reduction only"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="check whether the model fits this device: rtx5090, h100, v4, ..."
    )
    parser.add_argument("--memory", metavar="SIZE", help="memory of a device without a name, such as 16GB")
    parser.add_argument("--bandwidth", metavar="RATE", help="its memory bandwidth, such as 448GB/s")
    parser.add_argument(
        "--flops", metavar="RATE", help="its dense bf16 peak, such as 93TFLOP/s; bounds reading prompts"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Returns the plan: all details for one model, a table for several models or stages."""
    _check(arguments, overrides)
    if arguments.model:
        models = {str(arguments.model): model_arguments.directory_config(arguments.model)}
    else:
        runs = run_arguments.chosen(config_file.read(arguments.config, overrides, any_from_dict), arguments.variant)
        named: Runs = {name or arguments.config: described for name, described in runs.items()}
        if arguments.topology:
            return _steps(named, arguments)
        models = {}
        for name, described in named.items():
            models |= _models(name, described)
    from moe_reduce.reports import plan_table

    if arguments.table:
        from moe_reduce.planning.formats import formats

        tables = {name: formats(model) for name, model in models.items()}
        return model_arguments.show(tables, as_json=True) if arguments.json else plan_table.format_table(tables)
    plans = {name: plan(model, arguments.context) | _serving(model, arguments) for name, model in models.items()}
    return _shown(plans, plan_table.serving_table, arguments.json)


def _check(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Raises UserError for arguments that do not go together, and sets the defaults of serving."""
    if bool(arguments.config) == bool(arguments.model):
        raise UserError("give either --config=FILE or --model=DIR")
    model_arguments.check_positive(arguments, "context", "batch")
    _card(arguments)
    if arguments.topology:
        model_arguments.check_unused(arguments, "with --topology", *SERVING_DEFAULTS, "device", *CARD)
        if arguments.table:
            raise UserError("--table does nothing with --topology: leave it out")
    else:
        if arguments.table:
            model_arguments.check_unused(arguments, "with --table", *SERVING_DEFAULTS, "device", *CARD)
        model_arguments.check_unused(arguments, "without --topology", "stage")
        model_arguments.fill(arguments, SERVING_DEFAULTS)
    if arguments.model:
        model_arguments.no_overrides(overrides)
        if arguments.topology:
            raise UserError("--topology plans a run: give --config, not --model")
        model_arguments.check_unused(arguments, "with --model", "variant")


def _card(arguments: argparse.Namespace) -> Device | None:
    """The device to check, by name or described; None without one. Raises UserError for half a description."""
    if arguments.device:
        model_arguments.check_unused(arguments, "with --device", *CARD)
        return device(arguments.device)
    if arguments.memory is None or arguments.bandwidth is None:
        model_arguments.check_unused(arguments, "without both --memory and --bandwidth", *CARD)
        return None
    memory = quantity("--memory", arguments.memory, "B")
    bandwidth = quantity("--bandwidth", arguments.bandwidth, "B/s")
    flops = 0.0 if arguments.flops is None else quantity("--flops", arguments.flops, "FLOP/s")
    return Device(f"{arguments.memory} at {arguments.bandwidth}", round(memory), bandwidth, flops)


def _steps(runs: Runs, arguments: argparse.Namespace) -> str:
    from moe_reduce.commands import plan_topology
    from moe_reduce.reports import plan_table

    plans = plan_topology.plan(runs, arguments.topology, arguments.stage)
    return _shown(plans, plan_table.step_table, arguments.json)


def _shown(plans: dict[str, Any], table: Callable[[dict[str, Any]], str], as_json: bool) -> str:
    return table(plans) if len(plans) > 1 and not as_json else model_arguments.show(plans, as_json)


def _serving(model: ModelConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Inference memory; with --device also whether it fits, the highest speed, and changes that make it fit."""
    from moe_reduce.planning import serving

    wanted = serving.Serving(model, arguments.context, arguments.batch, arguments.dtype, arguments.cache_dtype)
    total = serving.total(wanted)
    found: dict[str, Any] = {
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "cache_dtype": arguments.cache_dtype,
        "serving_bytes": serving.needs(wanted) | {"total": total},
        "bytes_read_per_step": serving.bytes_read(wanted),
    }
    card = _card(arguments)
    if card is None:
        return found
    found |= {
        "device": card.name,
        "device_memory_bytes": card.memory,
        "fits": total <= card.memory,
        "share_of_memory": round(total / card.memory, 4),
        "decode_bound_tokens_per_second": round(serving.decode_bound(wanted, card), 1),
    }
    if card.flops:
        found["prompt_bound_tokens_per_second"] = round(serving.prompt_bound(wanted, card), 1)
    if total > card.memory:
        changes = serving.remedies(wanted, card.memory)
        found["would_fit_with"] = {what: f"{serving.total(one):,} bytes" for what, one in changes} or "nothing"
    return found


def _models(name: str, described: RunConfig | ReduceConfig | AdaptConfig) -> dict[str, ModelConfig]:
    """The model that a run trains or adapts, or the models before and after each stage of a reduction, by name."""
    if isinstance(described, RunConfig):
        return {name: described.model}
    if isinstance(described, AdaptConfig):
        return {name: model_arguments.directory_config(Path(described.model))}
    from moe_reduce.runs.stages import configurations

    first = described.architecture or model_arguments.directory_config(Path(described.model))
    return {f"{name} {stage}": config for stage, config in [("original", first), *configurations(first, described)]}


def plan(model: ModelConfig, context: int) -> dict[str, Any]:
    """Counts, bytes and FLOPs of a model, computed from abstract leaves, so no weights are needed."""
    from moe_reduce.planning.flops import (
        active_parameters,
        forward_flops_per_token,
        matmul_parameters_per_token,
        train_flops_per_token,
    )

    total, moe = parameter_count(model), model.moe
    experts = 0 if moe is None else moe.experts * (1 if moe.placement == "shared" else model.expert_layers)
    return {
        "parameters": total,
        "experts": experts,
        "active_parameters": active_parameters(model),
        "by_component": counts_by_component(model),
        "matmul_parameters_per_token": matmul_parameters_per_token(model),
        "weight_bytes": {"float32": 4 * total, "bfloat16": 2 * total},
        "training_state_bytes": {"weights": 4 * total, "gradients": 4 * total, "adam_moments": 8 * total},
        "context": context,
        "largest_context": model.context,
        "forward_flops_per_token": forward_flops_per_token(model, context),
        "train_flops_per_token": train_flops_per_token(model, context),
    }
