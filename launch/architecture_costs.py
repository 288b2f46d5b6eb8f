"""Loss that each architecture reduction costs a trained dense model, without retraining.

The moe-reduce commands measure the loss on unseen text before and after each reduction.
Command: python launch/architecture_costs.py --model=runs/cpu_pair/seed1/dense/model --data=TEXT
(writes docs/results/architecture/summary.json; the model is the dense one of ./launch/shared_moe.sh)
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import moe_reduce
from moe_reduce.__main__ import main as moe_reduce_command
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.disk import write_json

ROOT = Path(__file__).parent.parent


def reductions(config: ModelConfig) -> dict[str, list[str]]:
    """Command arguments of each measured reduction, in sizes that fit the model."""
    width = config.feed_forward_width or 0
    return {
        "the identity (all layers kept, GQA of as many heads)": [
            "group-heads",
            f"--key-value-heads={config.key_value_heads}",
        ],
        "half of the key/value heads": ["group-heads", f"--key-value-heads={config.key_value_heads // 2}"],
        "one layer of the least Block Influence": ["drop-layers", "--count=1"],
        "two layers of the least Block Influence": ["drop-layers", "--count=2"],
        "embedding through 3/4 of the width": ["factorise-embedding", f"--inner={3 * config.width // 4}"],
        "embedding through 1/2 of the width": ["factorise-embedding", f"--inner={config.width // 2}"],
        "30 % of the weights zero, by magnitude": ["sparsify", "--share=0.3"],
        "50 % of the weights zero, by magnitude": ["sparsify", "--share=0.5"],
        "2:4 by magnitude": ["sparsify", "--pattern=2:4"],
        "3/4 of the neurons": ["prune-neurons", f"--keep={3 * width // 4}"],
        "1/2 of the neurons": ["prune-neurons", f"--keep={width // 2}"],
    }


def run(model: Path, data: str, max_batches: int) -> list[list[str]]:
    """Rows of the table, one for each reduction."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, arguments) in enumerate(reductions(moe_reduce.load(model).config).items()):
            out = Path(scratch) / str(number)
            common = [f"--model={model}", f"--out={out}", f"--data={data}", "--sequence-length=128"]
            common += [f"--max-batches={max_batches}", f"--cache={scratch}/tokens"]
            if moe_reduce_command([*arguments, *common]):
                sys.exit(f"{' '.join(arguments)} failed")
            step = moe_reduce.load(out).chain[-1]
            assert step.quality is not None
            before, after = step.quality["loss_before"], step.quality["loss"]
            share = step.parameters_after / step.parameters_before
            rows.append(
                [
                    name,
                    f"`{' '.join(arguments)}`",
                    f"{share:.1%}",
                    f"{before:.4f}",
                    f"{after:.4f}",
                    f"{after - before:+.4f}",
                ]
            )
    return rows


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a trained dense model")
    parser.add_argument("--data", required=True, help="text that the model has not seen")
    parser.add_argument("--max-batches", type=int, default=64, help="batches to measure (default: 64)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/architecture/summary.json", help="result")
    arguments = parser.parse_args()
    content = {
        "title": "Reductions of a dense model, without retraining",
        "command": f"python launch/architecture_costs.py --model=DENSE --data={Path(arguments.data).name}",
        "columns": ["reduction", "command", "parameters left", "loss before", "loss after", "cost"],
        "rows": run(arguments.model, arguments.data, arguments.max_batches),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, content)
    print(json.dumps(content["rows"], indent=1))


if __name__ == "__main__":
    main()
