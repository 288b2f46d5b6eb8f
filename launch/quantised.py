"""Quality, size and speed of a model in each format of quantised weights and of the KV cache. Run it by quantised.sh.

Perplexity is that of the first sequences of a text. Changes are relative to fp32, with 95 % intervals of a bootstrap
over the same sequences. The KV cache is measured on the second half of each sequence, read token by token.
"""

import argparse
import contextlib
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
from decoding import Decoder
from side_by_side import RESULTS, Run, apart

from moe_reduce.core import disk
from moe_reduce.core.errors import UserError

WIKITEXT2 = "hub:Salesforce/wikitext:wikitext-2-v1"
TASKS = {"arc_easy": ("ARC easy", "acc_norm"), "lambada_openai": ("LAMBADA", "acc")}
CACHES = ("int8", "int4")
LENGTH, BATCH = 512, 4
CALIBRATION = 4  # batches
BASE = "fp32"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Format:
    """A row of the table: scheme, method and range of values as `moe-reduce quantize` takes them, and a dtype.

    decodes_as: an earlier row that holds matrices of the same schemes, and therefore has the same speed. caches: True
    to measure its loss with a quantised KV cache too.
    """

    scheme: str | None = None
    method: str = "rtn"
    clip: str = "min-max"
    dtype: str = "float32"
    decodes_as: str | None = None
    caches: bool = False


INT4 = "int4,embedding=int8"  # the token table, a fifth of this model, is not calibrated by any method
FORMATS = {
    BASE: Format(caches=True),
    "bf16": Format(dtype="bfloat16"),
    "int8": Format("int8", caches=True),
    "fp8": Format("fp8"),
    "int4, nearest": Format(INT4),
    "int4, nearest, least squares": Format(INT4, clip="mse", decodes_as="int4, nearest"),
    "int4, GPTQ": Format(INT4, "gptq", decodes_as="int4, nearest", caches=True),
    "int4, GPTQ, least squares": Format(INT4, "gptq", "mse", decodes_as="int4, nearest"),
    "int4, AWQ": Format(INT4, "awq", decodes_as="int4, nearest"),
    "int4, nearest, table too": Format("int4"),
    "nf4": Format("nf4,embedding=int8"),
    "mxfp4": Format("mxfp4,embedding=int8"),
    "ternary": Format("ternary,embedding=int8", clip="mse"),
}
COLUMNS = [
    "weights", "on disk", "in memory", "perplexity", "change", "ARC easy", "LAMBADA", "cache int8", "cache int4",
    "decoding", "peak memory",
]  # fmt: skip


def main() -> int:
    """Measures what is missing, writing the table after each figure; returns 2 after a line that says what is wrong."""
    given = _arguments()
    names = given.formats.split(";") if given.formats else list(FORMATS)
    try:
        for name in names:
            if name not in FORMATS:
                raise UserError(f"--formats: {name!r} is not one of {'; '.join(FORMATS)}")
        for name, step in _steps(given, names):
            print(f"{name}: {step.__name__} …", file=sys.stderr)
            if step(given, name):
                _write(given)
    except UserError as error:
        print(f"quantised.sh: {error}", file=sys.stderr)
        return error.status
    return 0


def _steps(given: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, Callable[..., bool]]]:
    """What there is to do, cheap figures of all formats first."""
    for step in (perplexity, cached, questions):
        if given.only is None or step.__name__ in given.only.split(","):
            yield from ((name, each) for name in names for each in (made, step))
    if given.only is None or "decoding" in given.only.split(","):
        yield "all", decoding


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quantised.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=ROOT / "runs/smollm2", help="model directory (%(default)s)")
    parser.add_argument("--text", default=f"{WIKITEXT2}:test", help="text of the perplexity (%(default)s)")
    parser.add_argument("--calibration", default=WIKITEXT2, help="text of GPTQ and AWQ (%(default)s)")
    parser.add_argument("--questions", type=Path, help="directory of copies of the questions (default: from the hub)")
    parser.add_argument("--sequences", type=int, default=16, help=f"sequences of {LENGTH} tokens (%(default)s)")
    parser.add_argument("--limit", type=int, default=50, help="questions of each task (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="decoded texts of which the median counts (%(default)s)")
    parser.add_argument("--formats", help="some of the rows, separated by semicolons (default: all)")
    parser.add_argument(
        "--only", help="some of perplexity, cached, questions, decoding, comma separated (default: all)"
    )
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs/quantised", help="models (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantised_smollm2", help="result (%(default)s)")
    return parser.parse_args()


def _place(given: argparse.Namespace, name: str) -> Path:
    return given.workdir / name.replace(", ", "-").replace(" ", "_")


def _model(given: argparse.Namespace, name: str) -> Path:
    return given.model if name == BASE else _place(given, name) / "model"


def made(given: argparse.Namespace, name: str) -> bool:
    """Writes the model in a format."""
    out, chosen = _model(given, name), FORMATS[name]
    if out.exists():
        return False
    if chosen.scheme is None:
        apart(_converted, given.model, chosen.dtype, out)
        return False
    arguments = [f"--model={given.model}", f"--scheme={chosen.scheme}", f"--method={chosen.method}"]
    arguments += [f"--clip={chosen.clip}", f"--out={out}"]
    if chosen.method != "rtn":
        cache = given.workdir / "tokens"
        arguments += [f"--data={given.calibration}", f"--cache={cache}", f"--sequence-length={LENGTH}"]
        arguments += [f"--max-batches={CALIBRATION}", f"--batch-size={BATCH}"]
    apart(_command, ["quantize", *arguments])
    return False


def _converted(model: Path, dtype: str, out: Path) -> None:
    import moe_reduce

    moe_reduce.save(moe_reduce.load(model, dtype), out)


def _command(arguments: list[str]) -> None:
    from moe_reduce.__main__ import main as run

    with contextlib.redirect_stdout(sys.stderr):
        if run(arguments):
            raise UserError(f"moe-reduce {arguments[0]} failed: see the line above")


def perplexity(given: argparse.Namespace, name: str) -> bool:
    """Measures the loss of each sequence."""
    return _once(_place(given, name) / "perplexity.json", _losses, given, _model(given, name), FORMATS[name].dtype)


def cached(given: argparse.Namespace, name: str) -> bool:
    """Measures the loss of the second half of each sequence with a cache in the compute dtype, int8 and int4."""
    if not FORMATS[name].caches:
        return False
    found = [
        _once(_place(given, name) / f"cached_{cache}.json", _losses, given, _model(given, name), "float32", cache)
        for cache in ("auto", *CACHES)
    ]
    return any(found)


def _once(file: Path, measure: Callable[..., Any], *arguments: Any) -> bool:
    """Writes what a measurement in a process of its own returns, unless it is there."""
    if file.is_file():
        return False
    found = apart(measure, *arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    disk.write_json(file, found)
    return True


def _losses(given: argparse.Namespace, directory: Path, dtype: Any, cache: Any = None) -> dict[str, Any]:
    """{nll: sum of each sequence, tokens: targets of each}; with a cache, of its second half."""
    import moe_reduce
    from moe_reduce.core.config import DataConfig, ExecutionConfig
    from moe_reduce.data.batches import WholeSplit
    from moe_reduce.data.prepare import prepare
    from moe_reduce.inference.cached_losses import cached_losses
    from moe_reduce.inference.evaluate import evaluate
    from moe_reduce.inference.generate import prepared

    data = DataConfig(
        source=given.text, tokenizer=str(given.model), sequence_length=LENGTH, validation_fraction=0.0,
        cache=str(given.workdir / "tokens"),
    )  # fmt: skip
    model = moe_reduce.load(directory, execution=ExecutionConfig(compute_dtype=dtype).resolve("cpu"))
    if cache is None:
        sums = evaluate(model, data, BATCH, given.sequences // BATCH)
        return {"nll": sums.nll.tolist(), "tokens": sums.weight.tolist()}
    batches = WholeSplit(prepare(data, model.config.vocab_size)[0], data, given.sequences)
    losses = cached_losses(prepared(model), batches[0], LENGTH // 2, cache)
    return {"nll": losses.sum(axis=1).tolist(), "tokens": [losses.shape[1]] * losses.shape[0]}


def questions(given: argparse.Namespace, name: str) -> bool:
    """Asks the first questions of each task."""
    out = _place(given, name) / "questions"
    if out.exists():
        return False
    arguments = [f"--model={_model(given, name)}", f"--tasks={','.join(TASKS)}", f"--limit={given.limit}"]
    arguments += [f"--compute-dtype={FORMATS[name].dtype}", f"--out={out}"]
    if given.questions is not None:
        arguments += [f"--task-path={ROOT / 'launch/benchmarks'}", f"--task-data={given.questions}"]
    apart(_command, ["evaluate", *arguments])
    return True


def decoding(given: argparse.Namespace, name: str) -> bool:
    """Decodes one text with each format in turn, each in its own process."""
    del name
    file = given.workdir / "decoding.json"
    if file.is_file():
        return False
    timed = [one for one, chosen in FORMATS.items() if chosen.decodes_as is None and _model(given, one).exists()]
    builds = {one: (_decoder, _model(given, one), FORMATS[one].dtype, given.tokens) for one in timed}
    seconds, facts = side_by_side.compare(builds, given.repeats)
    disk.write_json(file, {one: facts[one] | {"tokens_per_second": given.tokens / seconds[one]} for one in timed})
    return True


def _decoder(directory: Path, dtype: Any, tokens: int) -> tuple[Run, dict[str, float]]:
    """Decoding, and the bytes that it takes."""
    decoder = Decoder(directory, dtype, tokens)
    decoder.run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return decoder.run, decoder.facts() | {"peak": peak}


def _write(given: argparse.Namespace) -> None:
    """Writes the result of what has been measured so far, and its picture."""
    from moe_reduce.reports import quantised_picture

    measured = {name: found for name in FORMATS if (found := _measured(given, name))}
    count = given.sequences * LENGTH
    result = {
        "title": f"{given.model.name} in each format: perplexity of {count:,} tokens of WikiText-2, the first "
        f"{given.limit} questions of two tasks, decoding of {given.tokens} tokens at batch 1",
        "command": "./launch/quantised.sh",
        "columns": COLUMNS,
        "rows": [_row(name, found) for name, found in measured.items()],
        "formats": measured,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: metadata.version(name) for name in ("jax", "numpy")},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    disk.write_json(given.out / "summary.json", result)
    points = {name: (found["disk"], found["perplexity"]["perplexity"]) for name, found in measured.items()}
    quantised_picture.picture(points, given.out / "quality.png")


def _measured(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """Figures of a format; {} before its perplexity is known."""
    place = _place(given, name)
    if not (place / "perplexity.json").is_file():
        return {}
    base = disk.read_json(_place(given, BASE) / "perplexity.json")
    found: dict[str, Any] = {
        "disk": sum(file.stat().st_size for file in _model(given, name).glob("*.safetensors")),
        "perplexity": _compared(disk.read_json(place / "perplexity.json"), base),
    }
    plain = place / "cached_auto.json"
    for cache in CACHES:
        if (place / f"cached_{cache}.json").is_file():
            found[f"cache_{cache}"] = _compared(disk.read_json(place / f"cached_{cache}.json"), disk.read_json(plain))
    if (place / "questions").is_dir():
        found["questions"] = _answers(place / "questions")
    if (given.workdir / "decoding.json").is_file():
        found["decoding"] = disk.read_json(given.workdir / "decoding.json").get(FORMATS[name].decodes_as or name)
    return found


def _compared(ours: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Perplexity, and its relative change from the base's with an interval."""
    from moe_reduce.inference.retained import lost

    arrays = (np.asarray(values, np.float64) for values in (ours["nll"], base["nll"], ours["tokens"]))
    found = lost(*arrays)
    changes = {
        name: math.expm1(found[key]) for name, key in (("change", "difference"), ("low", "low"), ("high", "high"))
    }
    return {"perplexity": math.exp(found["model"]), **changes}


def _answers(place: Path) -> dict[str, dict[str, float]]:
    """Share of right answers of each task, with its interval."""
    from moe_reduce.inference import task_files, tasks

    results = task_files.read(place / "questions.json")
    bounds = tasks.intervals(results)
    return {task: {"score": results[task][name].figure, **bounds[task][name]} for task, (_, name) in TASKS.items()}


def _row(name: str, found: dict[str, Any]) -> list[str]:
    speed, answers = found.get("decoding"), found.get("questions", {})
    return [
        name,
        f"{found['disk'] / 1e6:.1f} MB",
        "" if speed is None else f"{speed['bytes'] / 1e6:.1f} MB",
        f"{found['perplexity']['perplexity']:,.2f}",
        _change(found["perplexity"]) if name != BASE else "",
        *(_score(answers.get(task)) for task in TASKS),
        *(_change(found.get(f"cache_{cache}")) for cache in CACHES),
        "" if speed is None else f"{speed['tokens_per_second']:.1f} tokens/s",
        "" if speed is None else f"{speed['peak'] / 1e6:,.0f} MB",
    ]


def _change(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['change']:+.1%} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def _score(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['score']:.0%} ({100 * found['low']:.0f}–{100 * found['high']:.0f})"


if __name__ == "__main__":
    sys.exit(main())
