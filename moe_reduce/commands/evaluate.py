"""moe-reduce evaluate: loss, perplexity and next-token accuracy of a model on a corpus."""

import argparse
import dataclasses
from pathlib import Path

from moe_reduce.commands import model_arguments
from moe_reduce.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", required=True, type=Path, help="a model directory of ours or of Hugging Face")
    parser.add_argument("--data", required=True, help="path, glob, hub:OWNER/NAME, python-stdlib, or token ids (.npy)")
    parser.add_argument("--tokenizer", help="tokenizer.model, tokenizer.json or a directory (default: the model's own)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a batch (default: 16)")
    parser.add_argument("--max-batches", type=int, help="stop after so many (default: the whole corpus)")
    parser.add_argument("--cache", default="runs/tokens", help="where prepared tokens are kept (default: runs/tokens)")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    model_arguments.add_out(parser, "runs/evaluation")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Prints the figures, writes summary.json and returns its path."""
    model_arguments.no_overrides(overrides)
    out = Path(arguments.out)
    model_arguments.check_out(out, arguments.overwrite)
    from moe_reduce import load, validation
    from moe_reduce.config import DataConfig, ExecutionConfig
    from moe_reduce.inference.evaluate import evaluate
    from moe_reduce.training.run import SUMMARY, write_json

    execution = dataclasses.replace(ExecutionConfig(), compute_dtype=arguments.compute_dtype)
    import jax

    data = DataConfig(
        source=arguments.data,
        tokenizer=arguments.tokenizer or str(arguments.model),
        sequence_length=arguments.sequence_length,
        validation_fraction=0.0,
        cache=arguments.cache,
    )
    validation.check_data(data)
    for name, value in (("--batch-size", arguments.batch_size), ("--max-batches", arguments.max_batches)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be positive, got {value}")
    model = load(arguments.model, execution=execution.resolve(jax.default_backend()))
    result = evaluate(model, data, arguments.batch_size, arguments.max_batches)
    print(model_arguments.show(result, as_json=False))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SUMMARY, {"model": str(arguments.model), "data": arguments.data} | result)
    return out / SUMMARY
