"""moe-reduce evaluate: loss, perplexity and next-token accuracy of a model on a corpus."""

import argparse
from pathlib import Path

from moe_reduce import disk
from moe_reduce.commands import model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", required=True, type=Path, help="a model directory of ours or of Hugging Face")
    model_arguments.add_data(parser, required=True, purpose="what to measure on")
    model_arguments.add_out(parser, "runs/evaluation")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Prints the figures, writes summary.json and returns its path."""
    model_arguments.no_overrides(overrides)
    out = arguments.out
    model_arguments.check_out(out, arguments.overwrite)
    from moe_reduce.inference.evaluate import evaluate
    from moe_reduce.training.run import SUMMARY

    data = model_arguments.data_config(arguments)
    model = model_arguments.load_model(arguments)
    result = evaluate(model, data, arguments.batch_size, arguments.max_batches)
    print(model_arguments.show(result, as_json=False))
    with disk.writing(out, "free some space or choose another path"):
        out.mkdir(parents=True, exist_ok=True)
        disk.write_json(out / SUMMARY, {"model": str(arguments.model), "data": arguments.data} | result)
    return out / SUMMARY
