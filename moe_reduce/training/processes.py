"""Runs of several processes: joining them, and ending all when one is lost.

A process that waits for a lost one, in a collective or in a checkpoint's barrier, would wait for many minutes, or the
runtime would abort it with a page of addresses. So every process writes a heartbeat to the shared key-value store every
few seconds, and watches the heartbeats of all others.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # gives the processes' key-value store, which Orbax uses as well

from moe_reduce.core.errors import PeerLost, UserError

PULSE_SECONDS = 2.0
SILENCE_SECONDS = 20.0  # a process without a heartbeat for this long counts as lost
KEYS = "moe_reduce/alive/"
LEFT, FAILED = "left", "failed"
# words in the errors of gloo, NCCL and the coordination service when a process is lost during an exchange
SIGNS = ("closed by peer", "connection reset", "connection refused", "gloo", "nccl", "socket closed", "coordination")


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the processes of a run.

    coordinator: HOST:PORT of the first process; None: found through the platform (TPU metadata, SLURM).
    Raises UserError when the other processes are not found.
    """
    jax.config.update("jax_enable_recoverability", True)  # otherwise the runtime aborts before our message
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        where = "no TPU metadata and no SLURM job says where they are" if coordinator is None else f"at {coordinator}"
        said = str(error).splitlines()[0]
        raise UserError(f"the other processes are not found, {where} ({said}): give --coordinator=HOST:PORT") from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Watch the other processes inside the context.

    When one is lost, raise PeerLost; if this process is waiting for it, print the same line and exit. Tell the others
    when this process fails or is interrupted, so that they end as well.
    """
    if jax.process_count() == 1:
        yield
        return
    client = distributed.global_state.client
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, over), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:  # KeyboardInterrupt and SystemExit too: the others would wait for this process
        _end(watcher, over)
        if isinstance(error, Exception) and _tells_of_a_lost_process(error):
            _keep_store(client)
            raise PeerLost(_line("another one, whose log says why")) from error
        _say(client, FAILED)
        _keep_store(client)
        raise
    _end(watcher, over)
    _say(client, LEFT)


def _end(watcher: threading.Thread, over: threading.Event) -> None:
    """End the heartbeat, so that it cannot overwrite the last word of this process."""
    over.set()
    watcher.join(PULSE_SECONDS)


def _tells_of_a_lost_process(error: Exception) -> bool:
    return any(sign in f"{error} {error.__cause__ or ''}".lower() for sign in SIGNS)


def _watch(client: Any, over: threading.Event) -> None:
    pulses: dict[str, tuple[str, float]] = {}
    number = 0
    while not over.is_set():
        try:
            _say(client, str(number := number + 1))
            found = {key.rsplit("/", 1)[-1]: value for key, value in client.key_value_dir_get(KEYS)}
        except Exception:  # any error: the first process, which holds the store, is lost
            found = {"0": FAILED}
        for process, value in found.items():
            since = pulses[process][1] if pulses.get(process, ("", 0.0))[0] == value else time.monotonic()
            pulses[process] = (value, since)
            silent = value != LEFT and time.monotonic() - since > SILENCE_SECONDS
            if (value == FAILED or silent) and not over.is_set():
                print(f"moe-reduce: {_line(f'process {process}, whose log says why')}", file=sys.stderr, flush=True)
                _keep_store(client)
                os._exit(PeerLost.status)  # the main thread may be waiting for the lost process
        over.wait(PULSE_SECONDS)


def _keep_store(client: Any) -> None:
    """Delay the end of the first process, which holds the store, until the others have read that it failed.

    Without the store the runtime aborts them before their message.
    """
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
