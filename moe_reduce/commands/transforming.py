"""Steps shared by the commands that transform a model: read it, measure the cost, write the result."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import model_arguments
from moe_reduce.core.provenance import Step
from moe_reduce.models.parameters import parameter_count

if TYPE_CHECKING:
    from moe_reduce.models.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --out, --overwrite, and the data to measure the loss on."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file"
    )
    model_arguments.add_out(parser, required=True, what="model directory")
    model_arguments.add_data(parser, required=False, purpose="text to measure the loss on, before and after")


def read(arguments: argparse.Namespace, overrides: list[str]) -> "Model":
    """Loads --model; mistakes in --out and --data are reported before any weight is read."""
    model_arguments.no_overrides(overrides)
    from moe_reduce import load
    from moe_reduce.storage.model_directory import KIND

    model_arguments.check_out(arguments, KIND)
    if arguments.data is not None:
        model_arguments.data_config(arguments)
    return load(arguments.model, execution=model_arguments.execution(arguments))


def write(
    arguments: argparse.Namespace, before: "Model", after: "Model", settings: dict[str, Any], kept_experts: Any = None
) -> Path:
    """Saves the transformed model, prints its cost, and returns --out; with --data, measures the loss of both.

    settings and kept_experts go into the manifest: the arguments of the transform, and the original (layer, index) of
    each expert kept.
    """
    from moe_reduce import save
    from moe_reduce.storage import manifest

    sizes = parameter_count(before.config), parameter_count(after.config)
    cost = {"parameters": f"{sizes[0]:,} -> {sizes[1]:,}"}
    quality = None
    if arguments.data is not None:
        settings = settings | model_arguments.measured_on(arguments)
        earlier, quality = _evaluated(arguments, before), _evaluated(arguments, after)
        cost["loss"] = f"{earlier['loss']:.4f} -> {quality['loss']:.4f}"
        quality = quality | {"loss_before": earlier["loss"]}
    step = Step(
        command=arguments.command,
        arguments=settings,
        inputs=(manifest.input_of(arguments.model),),
        parameters_before=sizes[0],
        parameters_after=sizes[1],
        quality=quality,
        kept_experts=kept_experts,
    )
    save(after, arguments.out, step, overwrite=arguments.overwrite)
    print(model_arguments.show(cost, as_json=False))
    return arguments.out


def _evaluated(arguments: argparse.Namespace, model: "Model") -> dict[str, Any]:
    from moe_reduce.inference.evaluate import evaluate

    data = model_arguments.data_config(arguments)
    return evaluate(model, data, arguments.batch_size, arguments.max_batches).figures()
