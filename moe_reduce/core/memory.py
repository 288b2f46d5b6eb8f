"""Limits of this process's memory, and errors that say that it has run out.

XLA and LLVM abort the process, or wait for threads that never start, where an address space limit (ulimit -v) stops an
allocation; so the room is checked before they need it.
"""

import errno
import resource
from pathlib import Path

from moe_reduce.core.errors import UserError

LEAST = 2 * 10**9  # bytes of address space with which JAX starts reliably; with less, its threads may fail to start
SPARE = 2**28  # bytes for compiled programs and activations beside the weights
STATM = Path("/proc/self/statm")  # its first number is the pages of address space in use
EXHAUSTED = ("RESOURCE_EXHAUSTED", "failed to map segment", "std::bad_alloc", "can't start new thread")


def check_start() -> None:
    """Raise UserError when the limit of address space is too low to import JAX."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < LEAST:
        raise UserError(f"ulimit -v allows {_megabytes(limit)} of memory, too little for JAX: raise it to 2 GB or more")


def check_room(needed: int, what: str) -> None:
    """Raise UserError when `needed` bytes exceed what the limit of address space leaves. what: needs them."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit < 0 or not STATM.exists():
        return
    left = limit - int(STATM.read_text().split()[0]) * resource.getpagesize()
    if needed + SPARE > left:
        raise UserError(
            f"{what} takes {_megabytes(needed)} and ulimit -v leaves {_megabytes(max(left, 0))} of memory: raise it"
        )


def is_exhausted(error: BaseException) -> bool:
    """True for an error that says that memory has run out: Python's, the system's or XLA's."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, MemoryError) or any(words in str(error) for words in EXHAUSTED)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
