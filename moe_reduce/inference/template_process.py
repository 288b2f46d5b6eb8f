"""Rendering of a chat template in a process of its own, because a template may loop for ever or fill memory."""

import contextlib
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moe_reduce.data.tokenizing import bare_main

SECONDS = 10.0  # for a template; real ones take milliseconds
START_SECONDS = 300.0  # for the process to start, on a busy machine
MEMORY = 1 << 28  # bytes beyond those that the process starts with
CHARACTERS = 1 << 20  # of the text
SHOWN = 200  # characters of a template's own message
READY = "ready"


def rendered(template: str, special_tokens: dict[str, str], messages: list[dict[str, str]]) -> str:
    """Render messages and the start of an answer with a template. special_tokens: by the name that templates use.

    Raises ValueError with one line if the template fails, or takes too much time, memory or text.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, template, special_tokens, messages), daemon=True)
    with bare_main():
        process.start()
    there.close()
    try:
        if not here.poll(START_SECONDS) or here.recv() != READY:
            raise ValueError("the process that renders it does not start")
        if not here.poll(SECONDS):
            raise ValueError(f"it takes more than {SECONDS:.0f} seconds")
        text, problem = here.recv()
    except EOFError:
        raise ValueError("the process that renders it has died, probably for lack of memory") from None
    finally:
        process.kill()
        process.join()
        here.close()
    if problem is not None:
        raise ValueError(problem)
    return text


def _work(answers: Connection, template: str, special_tokens: dict[str, str], messages: list[dict[str, str]]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    answers.send(READY)
    text = problem = None
    try:
        _limit_memory()
        given: dict[str, Any] = {**special_tokens, "add_generation_prompt": True}
        ((text,), _) = render_jinja_template(conversations=[messages], chat_template=template, **given)
    except MemoryError:
        problem = f"it takes more than {MEMORY >> 20} MiB of memory"
    except Exception as error:  # a template is a program, which may raise anything
        problem = " ".join(str(error)[:SHOWN].split()) or type(error).__name__
    if text is not None and len(text) > CHARACTERS:
        text, problem = None, f"it writes more than {CHARACTERS:,} characters"
    answers.send((text, problem))


def _limit_memory() -> None:
    """Limit this process to MEMORY bytes more than it has, where the system tells how many it has."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
