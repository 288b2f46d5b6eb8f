"""moe-reduce monitor: record the load of the machine while models, local or of an Ollama server, answer a prompt."""

import argparse
import csv
import importlib.util
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import adapter_arguments, model_arguments
from moe_reduce.core import outputs
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import parameter_count

if TYPE_CHECKING:
    from moe_reduce.inference.monitor import Measured, Monitor

TABLE, SAMPLES = "monitor.csv", "samples.csv"
PEAKS = ("cpu_percent", "ram_percent", "gpu_percent", "vram_mb")
LIMIT = 300.0  # seconds for an answer of one of our models, as for Ollama's
COLUMNS = (
    "name", "family", "parameters", "quantisation", "peak_cpu_percent", "peak_ram_percent", "peak_gpu_percent",
    "peak_vram_mb", "seconds_to_first_token", "prompt_tokens_per_second", "decode_tokens_per_second",
    "share_on_gpu_percent", "failure",
)  # fmt: skip


def _files(table: Path) -> tuple[str, ...] | None:
    """Files of a result of monitor; None if the table is none of monitor's."""
    with open(table, encoding="utf-8", errors="replace") as stream:
        ours = stream.readline().startswith(",".join(COLUMNS[:4]))
    return (TABLE, SAMPLES, "monitor*.png") if ours else None


KIND = outputs.Kind("a record of monitor", TABLE, _files)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", action="append", type=Path, default=[], help="a model directory or .gguf file; may be repeated"
    )
    adapter_arguments.add_adapter(parser, each="--model")
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
    """Prints a line for each model; writes monitor.csv, whose path it returns, samples.csv and monitor.png.

    A model that fails is a row with the reason, and the others are measured all the same; UserError if all fail.
    """
    model_arguments.no_overrides(overrides)
    if not arguments.model and not arguments.ollama:
        raise UserError("give --model=DIR or --ollama=NAME; both may be repeated")
    model_arguments.check_positive(arguments, "max_tokens", "pause")
    model_arguments.check_utf8("--prompt", arguments.prompt)
    if importlib.util.find_spec("psutil") is None:
        raise UserError("monitor needs psutil: pip install -e '.[monitor]'")
    adapters = adapter_arguments.one_for_each(arguments.adapter, len(arguments.model), "--model")
    adapter_arguments.check_adapters(adapters)
    model_arguments.check_out(arguments, KIND)
    model_arguments.tensor_mesh(arguments)
    wanted = [(name, partial(_ollama, arguments, name)) for name in _ollama_names(arguments)]
    for pair in zip(arguments.model, adapters, strict=True):
        wanted.append((_name(*pair), partial(_ours, arguments, *pair)))
    measured = [found for name, measure in wanted if (found := _attempt(name, measure)) is not None]
    failures = [found.row["failure"] for found in measured if "failure" in found.row]
    if len(failures) == len(measured):
        raise UserError("; ".join(dict.fromkeys(failures)) or "no model is left: give one that generates text")
    with outputs.directory(arguments.out, KIND, arguments.overwrite) as unfinished:
        _write(unfinished, measured)
    return arguments.out / TABLE


def _attempt(name: str, measure: Callable[[], "Measured"]) -> "Measured | None":
    """Measures a model and prints its line; None for one that generates no text, which is named and left out."""
    from moe_reduce.inference.monitor import Measured
    from moe_reduce.inference.ollama import GeneratesNoText

    try:
        found = measure()
    except GeneratesNoText as error:
        print(f"left out: {error}")
        return None
    except (UserError, MemoryError, RuntimeError) as error:  # RuntimeError: JAX, when the memory of a device is full
        found = Measured({"name": name, "failure": " ".join(str(error).split()) or type(error).__name__}, [])
    print("  ".join(f"{column}={value}" for column in COLUMNS if (value := found.row.get(column)) not in (None, "")))
    return found


def _write(out: Path, measured: list["Measured"]) -> None:
    """Writes the tables and the picture into an empty directory."""
    from moe_reduce.reports.monitor_picture import picture

    lines = [(found.row["name"], *sample) for found in measured for sample in found.samples]
    names = ("name", "seconds", "cpu_percent", "ram_percent", "gpu_percent", "vram_mb")
    (out / SAMPLES).write_text(_csv(names, lines))
    picture(measured, out / "monitor.png")
    (out / TABLE).write_text(_csv(COLUMNS, [[found.row.get(name) for name in COLUMNS] for found in measured]))


def _csv(columns: tuple[str, ...], rows: list[Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _measured(described: tuple[Any, ...], monitor: "Monitor", rates: tuple[float, float], **known: Any) -> "Measured":
    """Row of a model that answered. described: the first columns; rates: of the prompt and of decoding, tokens/s."""
    from moe_reduce.inference.monitor import Measured

    row = dict(zip(COLUMNS, described, strict=False))
    row |= {f"peak_{name}": monitor.peak(name) for name in PEAKS}
    names = ("prompt_tokens_per_second", "decode_tokens_per_second")
    row |= {name: round(rate, 1) for name, rate in zip(names, rates, strict=True)}
    return Measured(row | known, monitor.samples)


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 1)


def _ollama_names(arguments: argparse.Namespace) -> list[str]:
    if not arguments.ollama:
        return []
    from moe_reduce.inference import ollama

    names = ollama.models(arguments.address)  # also where models are named: a server that is not there ends the command
    return names if "all" in arguments.ollama else arguments.ollama


def _ollama(arguments: argparse.Namespace, name: str) -> "Measured":
    from moe_reduce.inference import ollama
    from moe_reduce.inference.monitor import Monitor

    described = ollama.describe(name, arguments.address)
    with Monitor(arguments.pause) as monitor:
        _, *rates = ollama.generate(name, arguments.prompt, arguments.max_tokens, arguments.address)
    share = ollama.gpu_share(name, arguments.address)
    return _measured(described, monitor, (rates[0], rates[1]), share_on_gpu_percent=_percent(share))


def _name(directory: Path, adapter: str) -> str:
    return str(directory) if adapter == adapter_arguments.NONE else f"{directory} + {adapter}"


def _ours(arguments: argparse.Namespace, directory: Path, adapter: str) -> "Measured":
    from moe_reduce.data.tokenizers import load_tokenizer
    from moe_reduce.inference import text
    from moe_reduce.inference.generate import GenerateConfig, compile_for, ready
    from moe_reduce.inference.monitor import Monitor

    mesh = model_arguments.tensor_mesh(arguments, directory)
    model = model_arguments.load_model(arguments, directory, mesh)
    tokenizer = load_tokenizer(directory)
    settings = GenerateConfig(max_tokens=arguments.max_tokens, end_ids=text.end_ids(model, tokenizer))
    row = text.Continuation(tokenizer, tokenizer.encode_prompt(arguments.prompt))
    described = (_name(directory, adapter), _family(model), parameter_count(model.config), _stored(model))
    model = adapter_arguments.with_adapter(model, adapter, directory, arguments.tensor)
    prepared = ready(model, mesh)
    compile_for(prepared, [row.prompt], settings)
    times = [time.perf_counter()]
    with Monitor(arguments.pause) as monitor:
        for _ in text.stream(prepared, [row], settings):
            times.append(time.perf_counter())
            if times[-1] - times[0] > LIMIT:
                raise UserError(f"{directory} is not done after {LIMIT:g} seconds: lower --max-tokens")
    decoded = (len(row.ids) - 1) / (times[-1] - times[1]) if len(row.ids) > 1 else float("nan")
    first = times[1] - times[0]
    known = {"seconds_to_first_token": round(first, 4), "share_on_gpu_percent": _percent(_on_gpu(prepared))}
    return _measured(described, monitor, (len(row.prompt) / first, decoded), **known)


def _on_gpu(model: Any) -> float:
    """Share of the bytes of a model's parameters that lies in GPU memory."""
    import jax

    leaves = jax.tree.leaves(model.params)
    on_gpu = sum(leaf.nbytes for leaf in leaves if next(iter(leaf.devices())).platform == "gpu")
    return on_gpu / sum(leaf.nbytes for leaf in leaves)


def _family(model: Any) -> str:
    from moe_reduce.families import of_config

    return of_config(model.config).name


def _stored(model: Any) -> str:
    from moe_reduce.core import trees

    return "+".join(sorted({str(leaf.dtype) for leaf in trees.flatten(model.params).values()}))
