"""Several processes as one run: how they find each other, and what each does when another is gone.

A process that waits for another in a collective, or in a checkpoint's barrier, would wait for many minutes, or be
aborted by the runtime with a page of addresses. So each says every few seconds that it lives, and watches the others.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the key-value store of the processes, which Orbax uses as well

from moe_reduce.core.errors import PeerLost, UserError

PULSE_SECONDS = 2.0
SILENCE_SECONDS = 20.0  # after which a process counts as gone
KEYS = "moe_reduce/alive/"
LEFT, FAILED = "left", "failed"
# what gloo, NCCL and the coordination service say when a process goes while something is exchanged with it
SIGNS = ("closed by peer", "connection reset", "connection refused", "gloo", "nccl", "socket closed", "coordination")


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes; without an address they are found through the platform (TPU metadata, SLURM).

    Raises UserError when they are not found.
    """
    jax.config.update("jax_enable_recoverability", True)  # else the runtime aborts before we say a word
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        where = "no TPU metadata and no SLURM job says where they are" if coordinator is None else f"at {coordinator}"
        said = str(error).splitlines()[0]
        raise UserError(f"the other processes are not found, {where} ({said}): give --coordinator=HOST:PORT") from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside, the end of another process is noticed: PeerLost, or where this one is waiting, the end with its line."""
    if jax.process_count() == 1:
        yield
        return
    client = distributed.global_state.client
    over = threading.Event()
    threading.Thread(target=_watch, args=(client, over), daemon=True).start()
    try:
        yield
    except Exception as error:
        over.set()
        if any(sign in f"{error} {error.__cause__ or ''}".lower() for sign in SIGNS):
            _keep_the_store(client)
            raise PeerLost(_line("another one, whose log says why")) from error
        _say(client, FAILED)
        _keep_the_store(client)
        raise
    over.set()
    _say(client, LEFT)


def _watch(client: Any, over: threading.Event) -> None:
    pulses: dict[str, tuple[str, float]] = {}
    number = 0
    while not over.is_set():
        try:
            _say(client, str(number := number + 1))
            found = {key.rsplit("/", 1)[-1]: value for key, value in client.key_value_dir_get(KEYS)}
        except Exception:  # whatever the client raises: the first process keeps the store
            found = {"0": FAILED}
        for process, value in found.items():
            since = pulses[process][1] if pulses.get(process, ("", 0.0))[0] == value else time.monotonic()
            pulses[process] = (value, since)
            silent = value != LEFT and time.monotonic() - since > SILENCE_SECONDS
            if (value == FAILED or silent) and not over.is_set():
                print(f"moe-reduce: {_line(f'process {process}, whose log says why')}", file=sys.stderr, flush=True)
                _keep_the_store(client)
                os._exit(PeerLost.status)  # the main thread is waiting for what will never come
        over.wait(PULSE_SECONDS)


def _keep_the_store(client: Any) -> None:
    """By the first process before it ends: without the store, the runtime aborts the others before they say a word."""
    if jax.process_index() == 0:
        _say(client, FAILED)
        time.sleep(3 * PULSE_SECONDS)


def _say(client: Any, value: str) -> None:
    with contextlib.suppress(Exception) if value in (LEFT, FAILED) else contextlib.nullcontext():
        client.key_value_set(f"{KEYS}{jax.process_index()}", value, allow_overwrite=True)


def _line(lost: str) -> str:
    return (
        f"process {jax.process_index()} of {jax.process_count()} has lost {lost}: start all again with the same "
        "command, which goes on from the last checkpoint"
    )
