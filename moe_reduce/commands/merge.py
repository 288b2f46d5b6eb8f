"""moe-reduce merge: merge an adapter into its base model, with reports that show the result is equivalent."""

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moe_reduce.commands import adapter_arguments, model_arguments
from moe_reduce.core.provenance import Input

SAMPLE = (4, 64)  # sequences and tokens: random ids on which logits are compared without --data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        help="the base model: a directory, ours or from Hugging Face, or a .gguf file",
    )
    parser.add_argument("--adapter", required=True, type=Path, help="an adapter directory written by adapt or by PEFT")
    model_arguments.add_out(parser, required=True, what="model directory")
    parser.add_argument(
        "--full-precision", action="store_true", help="leave the merged matrices of a quantised base in float32"
    )
    model_arguments.add_corpus(parser, required=False, purpose="text to compare logits on (default: random tokens)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the merged model with merge.json and equivalence.json in it, and returns its path."""
    model_arguments.no_overrides(overrides)
    from moe_reduce import load
    from moe_reduce.adapters import adapter_directory, merging
    from moe_reduce.runs import equivalence
    from moe_reduce.storage import manifest
    from moe_reduce.storage.model_directory import KIND, save

    model_arguments.check_out(arguments, KIND)
    adapter_arguments.check_adapters([str(arguments.adapter)])
    base = load(arguments.model)
    base_input = manifest.input_of(arguments.model)
    adapter = adapter_directory.load(arguments.adapter, base.config, base_input)
    merged = merging.merge(base, adapter)
    sample = _sample(arguments, base.config.vocab_size)
    report = equivalence.equivalence(base, adapter, merged, sample)
    equivalence.check(report)
    stored = merged if arguments.full_precision else merging.requantised(merged, base, adapter)
    if stored is not merged:
        report["requantised"] = equivalence.requantising(merged, stored, sample)
    *earlier, step = merged.chain
    inputs = (base_input, Input(str(arguments.adapter), step.arguments["adapter"]))
    step = dataclasses.replace(step, inputs=inputs, quality={"perplexity": report["perplexity"]["merged"]})
    stored = dataclasses.replace(stored, chain=tuple(earlier))

    def reports(directory: Path, files: Mapping[str, str]) -> Collection[str]:
        equivalence.write_reports(directory, files, base_input, adapter, report)
        return equivalence.MERGE_LOG, equivalence.EQUIVALENCE

    save(stored, arguments.out, step, overwrite=arguments.overwrite, also=reports)
    shown = {name: report[name] for name in ("largest_logit_difference", "perplexity", "latency_seconds")}
    if "requantised" in report:
        shown["requantised"] = equivalence.shown(report["requantised"])
    print(model_arguments.show(shown, as_json=False))
    return arguments.out


def _sample(arguments: argparse.Namespace, vocab_size: int) -> list[Any]:
    import numpy as np

    if arguments.data is not None:
        return list(model_arguments.batches(arguments, vocab_size))
    tokens = np.random.default_rng(0).integers(0, vocab_size, (SAMPLE[0], SAMPLE[1] + 1), dtype=np.int32)
    return [{"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones(SAMPLE, np.float32)}]
