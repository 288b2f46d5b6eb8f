"""JAX's persistent compilation cache: programs compiled by one command are reused by the next.

The cache lives in $XDG_CACHE_HOME/moe_reduce/jax, by default ~/.cache/moe_reduce/jax. `MOE_REDUCE_CACHE=DIR` moves it
and `MOE_REDUCE_CACHE=off` turns it off. Where JAX_COMPILATION_CACHE_DIR is set, JAX's own settings apply.
"""

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

VARIABLE = "MOE_REDUCE_CACHE"
MINIMUM_SECONDS = 0.5  # of compilation; faster programs are not worth a file
LOCK_SECONDS = 10.0  # longest wait for another process, as in JAX
MAXIMUM_BYTES = 5 * 2**30  # beyond this JAX removes the least recently used programs
FAILED = re.compile(  # JAX's warnings about one entry
    "Error (?P<doing>reading|writing) persistent compilation cache entry for '(?P<program>[^']+)': (?P<why>.*)", re.S
)
OUTCOMES = {"reading": "compiled again", "writing": "not kept"}


def enable() -> None:
    """Turn the cache on for this process. An unusable directory is one warning line, and the run continues without it.

    Call it before the first compilation. JAX is not imported here, since a command may still end before it needs JAX.
    """
    wanted = os.environ.get(VARIABLE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moe_reduce/jax")
    if wanted == "off" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        directory = Path(wanted).expanduser().absolute()
        _prepare(directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory, or no file locks
        why = (error.strerror if isinstance(error, OSError) else None) or error
        _warn(f"compiled programs cannot be kept in {wanted} ({why}): set {VARIABLE} to another directory, or to off")
        return
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_compilation_cache_max_size": MAXIMUM_BYTES,  # with a limit, JAX also locks the cache to read and write
        "jax_persistent_cache_min_compile_time_secs": MINIMUM_SECONDS,
    }
    for name, value in settings.items():
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)
        else:  # JAX reads its settings from the environment when it is imported
            os.environ[name.upper()] = str(value)
    _replace_failed_entries(directory)


def _prepare(directory: Path) -> None:
    """Make the directory; raise OSError or RuntimeError unless it can be locked and written."""
    import filelock  # as JAX does; slow to import for commands that compile nothing

    directory.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(directory / ".lockfile", timeout=LOCK_SECONDS):
        # JAX fails to write any entry while one lacks its access time, which a kill between two writes can cause
        for entry in directory.glob("*-cache"):
            entry.with_name(f"{entry.name.removesuffix('cache')}atime").touch()


def _replace_failed_entries(directory: Path) -> None:
    """Remove entries that JAX fails to read or write, and print one line for each.

    JAX itself warns at every run and keeps the damaged entry. Once it is removed, JAX writes it again.
    """
    show = warnings.showwarning

    def remove(message: Warning | str, *rest: Any, **named: Any) -> None:
        failed = FAILED.match(str(message))
        if failed is None:
            show(message, *rest, **named)
            return
        for entry in directory.glob(f"{failed['program']}-*-cache"):
            entry.unlink(missing_ok=True)
        why = " ".join(failed["why"].split())[:200]
        doing, program = failed["doing"], failed["program"]
        _warn(f"{doing} the compiled program {program} in {directory} failed ({why}): it is {OUTCOMES[doing]}")

    warnings.showwarning = remove


def _warn(message: str) -> None:
    print(f"moe-reduce: warning: {message}", file=sys.stderr, flush=True)
