"""moe-reduce monitor: record the load of the machine while models, local or of an Ollama server, answer a prompt."""

import argparse
import csv
import importlib.util
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import model_arguments
from moe_reduce.core import outputs
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import parameter_count

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_reduce.inference.monitor import Monitor, Sample

TABLE, SAMPLES = "monitor.csv", "samples.csv"
COLUMNS = (
    "name", "family", "parameters", "quantisation", "peak_cpu_percent", "peak_ram_percent", "peak_gpu_percent",
    "peak_vram_mb", "seconds_to_first_token", "prompt_tokens_per_second", "decode_tokens_per_second",
)  # fmt: skip


def _files(table: Path) -> tuple[str, ...] | None:
    """Files of a result of monitor; None if the table is none of monitor's."""
    with open(table, encoding="utf-8", errors="replace") as stream:
        ours = stream.readline().startswith(",".join(COLUMNS[:4]))
    return (TABLE, SAMPLES, "monitor*.png") if ours else None


KIND = outputs.Kind("a record of monitor", TABLE, _files)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--model", action="append", type=Path, default=[], help="a model directory; may be repeated")
    parser.add_argument(
        "--ollama",
        action="append",
        default=[],
        metavar="NAME",
        help="a model of the Ollama server, or all; may be repeated",
    )
    parser.add_argument(
        "--address", default="http://127.0.0.1:11434", help="address of the Ollama server (default: %(default)s)"
    )
    parser.add_argument("--prompt", default="Once upon a time", help="prompt to continue (default: %(default)r)")
    parser.add_argument("--max-tokens", type=int, default=128, help="most tokens of an answer (default: 128)")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two samples (default: 0.5)")
    model_arguments.add_compute_dtype(parser)
    model_arguments.add_tensor(parser)
    model_arguments.add_out(parser, "runs/monitor")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Prints a line for each model; writes monitor.csv, whose path it returns, samples.csv and monitor.png."""
    model_arguments.no_overrides(overrides)
    if not arguments.model and not arguments.ollama:
        raise UserError("give --model=DIR or --ollama=NAME; both may be repeated")
    model_arguments.check_positive(arguments, "max_tokens", "pause")
    model_arguments.check_utf8("--prompt", arguments.prompt)
    if importlib.util.find_spec("psutil") is None:
        raise UserError("monitor needs psutil: pip install -e '.[monitor]'")
    model_arguments.check_out(arguments, KIND)
    mesh = model_arguments.tensor_mesh(arguments, *arguments.model)
    measured = [(name, *_ollama(arguments, name)) for name in _ollama_names(arguments)]
    measured += [(str(directory), *_ours(arguments, directory, mesh)) for directory in arguments.model]
    rows = [row for _, row, _ in measured]
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in zip(COLUMNS, row, strict=True) if value != ""))
    with outputs.directory(arguments.out, KIND, arguments.overwrite) as unfinished:
        _write(unfinished, rows, [(name, monitor.samples) for name, _, monitor in measured])
    return arguments.out / TABLE


def _write(out: Path, rows: list[list[Any]], samples: list[tuple[str, list["Sample"]]]) -> None:
    """Writes the tables and the picture into an empty directory."""
    from moe_reduce.reports.monitor_picture import picture

    lines = [(name, *sample) for name, found in samples for sample in found]
    names = ("name", "seconds", "cpu_percent", "ram_percent", "gpu_percent", "vram_mb")
    (out / SAMPLES).write_text(_csv(names, lines))
    picture(samples, out / "monitor.png")
    (out / TABLE).write_text(_csv(COLUMNS, rows))


def _csv(columns: tuple[str, ...], rows: list[Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _row(
    described: tuple[Any, ...], monitor: "Monitor", seconds: float | None, prompt_rate: float, decode_rate: float
) -> list[Any]:
    """One row of monitor.csv. seconds: until the first token; None if unknown."""
    found = [monitor.peak(name) for name in ("cpu_percent", "ram_percent", "gpu_percent", "vram_mb")]
    found.append(None if seconds is None else round(seconds, 4))
    return [*described, *("" if one is None else one for one in found), round(prompt_rate, 1), round(decode_rate, 1)]


def _ollama_names(arguments: argparse.Namespace) -> list[str]:
    if "all" not in arguments.ollama:
        return arguments.ollama
    from moe_reduce.inference import ollama

    return [model.name for model in ollama.models(arguments.address)]


def _ollama(arguments: argparse.Namespace, name: str) -> tuple[list[Any], "Monitor"]:
    from moe_reduce.inference import ollama
    from moe_reduce.inference.monitor import Monitor

    described = ollama.describe(name, arguments.address)
    with Monitor(arguments.pause) as monitor:
        _, *rates = ollama.generate(name, arguments.prompt, arguments.max_tokens, arguments.address)
    return _row(described, monitor, None, *rates), monitor


def _ours(arguments: argparse.Namespace, directory: Path, mesh: "Mesh | None") -> tuple[list[Any], "Monitor"]:
    from moe_reduce.data.tokenizers import load_tokenizer
    from moe_reduce.inference import text
    from moe_reduce.inference.generate import GenerateConfig, compile_for, ready
    from moe_reduce.inference.monitor import Monitor

    model = model_arguments.load_model(arguments, directory, mesh)
    tokenizer = load_tokenizer(directory)
    settings = GenerateConfig(max_tokens=arguments.max_tokens, end_ids=text.end_ids(model, tokenizer))
    row = text.Continuation(tokenizer, tokenizer.encode_prompt(arguments.prompt))
    described = (directory, _family(model), parameter_count(model.config), _stored(model))
    prepared = ready(model, mesh)
    compile_for(prepared, [row.prompt], settings)
    times = [time.perf_counter()]
    with Monitor(arguments.pause) as monitor:
        for _ in text.stream(prepared, [row], settings):
            times.append(time.perf_counter())
    decoded = (len(row.ids) - 1) / (times[-1] - times[1]) if len(row.ids) > 1 else float("nan")
    first = times[1] - times[0]
    return _row(described, monitor, first, len(row.prompt) / first, decoded), monitor


def _family(model: Any) -> str:
    from moe_reduce.families import of_config

    return of_config(model.config).name


def _stored(model: Any) -> str:
    from moe_reduce.core import trees

    return "+".join(sorted({str(leaf.dtype) for leaf in trees.flatten(model.params).values()}))
