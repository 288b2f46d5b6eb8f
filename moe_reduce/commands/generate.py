"""moe-reduce generate: continue prompts with a model."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moe_reduce.commands import adapter_arguments, hypernetwork_arguments, model_arguments, sampling_arguments
from moe_reduce.core.config import GenerateConfig, ModelConfig
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from moe_reduce.data.tokenizers import Tokenizer
    from moe_reduce.inference.text import Continuation
    from moe_reduce.models.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file"
    )
    parser.add_argument(
        "--prompt", required=True, action="append", help="text to continue; may be repeated, which makes one batch"
    )
    adapter_arguments.add_adapter(parser, each="--prompt")
    hypernetwork_arguments.add_hypernetwork(parser, each="--prompt")
    parser.add_argument(
        "--chat", action="store_true", help="treat prompts as user messages, in the model's chat template"
    )
    sampling_arguments.add(parser)
    model_arguments.add_compute_dtype(parser)
    model_arguments.add_tensor(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Streams the continuation of a single prompt; returns those of several prompts, each below its prompt."""
    model_arguments.no_overrides(overrides)
    from moe_reduce.inference.generate import ready
    from moe_reduce.inference.text import Continuation, end_ids

    sampling_arguments.settings(arguments).check()
    model_arguments.check_utf8("--prompt", *arguments.prompt)
    adapters = _adapters(arguments)
    config = model_arguments.directory_config(arguments.model)
    tokenizer, prompts = _prompts(arguments)
    rows = [Continuation(tokenizer, prompt, arguments.stop) for prompt in prompts]
    _check(prompts, config, arguments.max_tokens)
    mesh = model_arguments.tensor_mesh(arguments, arguments.model)
    model = model_arguments.load_model(arguments, mesh=mesh)
    model, entries = adapter_arguments.with_adapters(model, adapters, arguments.model, arguments.tensor)
    settings = sampling_arguments.settings(arguments, end_ids(model, tokenizer))
    sampling_arguments.name_unapplied(arguments)
    model = ready(model, mesh)  # possibly a copy, so the loaded model is let go
    if len(rows) == 1:
        print(arguments.prompt[0], end="\n" if arguments.chat else "", file=sys.stderr, flush=True)
    _print(model, rows, settings, entries)
    if len(rows) == 1:
        return ""
    titled = arguments.task or adapters
    names = adapter_arguments.one_for_each(titled, len(rows), "--prompt") if entries else [None] * len(rows)
    titles = (
        prompt if name is None else f"{prompt} [{name}]" for prompt, name in zip(arguments.prompt, names, strict=True)
    )
    return "\n".join(f"== {title}\n{row.text}" for title, row in zip(titles, rows, strict=True))


def _adapters(arguments: argparse.Namespace) -> list[str]:
    """The adapter of each prompt, given by --adapter, or written for --task."""
    hypernetwork_arguments.check(arguments)
    if not arguments.task:
        adapters = adapter_arguments.one_for_each(arguments.adapter, len(arguments.prompt), "--prompt")
        adapter_arguments.check_adapters(adapters)
        return adapters
    if arguments.adapter:
        raise UserError("--adapter and --task both give an adapter: choose one")
    if len(arguments.task) not in (1, len(arguments.prompt)):
        raise UserError(
            f"there are {len(arguments.task)} --task and {len(arguments.prompt)} --prompt: give one task for all, or "
            "one for each"
        )
    written = [str(directory) for directory in hypernetwork_arguments.written(arguments, arguments.model)]
    return adapter_arguments.one_for_each(written, len(arguments.prompt), "--prompt")


def _check(prompts: list[list[int]], config: ModelConfig, max_tokens: int) -> None:
    from moe_reduce.inference.generate import check_prompts

    check_prompts(prompts, config.vocab_size)
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + max_tokens > config.context:
            raise UserError(
                f"prompt {number} ({len(prompt)} tokens) and --max-tokens={max_tokens} exceed the model's context of "
                f"{config.context}: shorten one of them"
            )


def _prompts(arguments: argparse.Namespace) -> tuple["Tokenizer", list[list[int]]]:
    from moe_reduce.data.tokenizers import load_tokenizer
    from moe_reduce.inference.chat import chat_tokenizer, encode_chat, user

    place = arguments.tokenizer or arguments.model
    if not arguments.chat:
        tokenizer = load_tokenizer(place)
        return tokenizer, [tokenizer.encode_prompt(prompt) for prompt in arguments.prompt]
    tokenizer = chat_tokenizer(place)
    return tokenizer, [encode_chat(tokenizer, place, [user(prompt)]) for prompt in arguments.prompt]


def _print(model: "Model", rows: list["Continuation"], settings: GenerateConfig, entries: list[int] | None) -> None:
    """Prints the prompt on stderr, streams its continuation, and then prints the speed without compile time."""
    from moe_reduce.inference.generate import compile_for
    from moe_reduce.inference.text import stream

    compile_for(model, [row.prompt for row in rows], settings, entries)
    times = [time.perf_counter()]
    for pieces in stream(model, rows, settings, sampling_arguments.SHOWN_AT_ONCE, entries):
        times.append(time.perf_counter())
        if len(rows) == 1:
            print(pieces[0], end="", flush=True)
    read, made = sum(len(row.prompt) for row in rows), sum(len(row.ids) for row in rows)
    rates = f"prompt: {read:,} tokens, {read / (times[1] - times[0]):,.0f} tokens/s"
    if len(times) > 3:  # the first token comes with the prompt, and the last step makes none
        rates += f"; decode: {made:,} tokens, {(made - len(rows)) / (times[-1] - times[1]):,.1f} tokens/s"
    print(rates if len(rows) > 1 else f"\n{rates}", file=sys.stderr)
