"""JAX's persistent compilation cache: programs compiled by one command are reused by the next.

The cache lives in $XDG_CACHE_HOME/moe_reduce/jax, by default ~/.cache/moe_reduce/jax. `MOE_REDUCE_CACHE=DIR` moves it
and `MOE_REDUCE_CACHE=off` turns it off. Where JAX_COMPILATION_CACHE_DIR is set, JAX's own settings apply.
"""

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

VARIABLE = "MOE_REDUCE_CACHE"
MINIMUM_SECONDS = 0.5  # of compilation; faster programs are not worth a file
MAXIMUM_BYTES = 5 * 2**30  # beyond this JAX removes the least recently used programs
# JAX's warnings about an entry
FAILED = re.compile(
    "Error (?P<doing>reading|writing) persistent compilation cache entry for '(?P<program>[^']+)': (?P<why>.*)", re.S
)


def enable() -> None:
    """Turn the cache on for this process. An unusable directory is one warning line, and the run goes on without it.

    Call it before the first compilation. JAX is not imported here: not every command that may compile does.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    directory = Path(wanted).expanduser().absolute() if wanted else _user_directory()
    try:
        _prepare(directory)
    except OSError as error:
        _warn(f"compiled programs cannot be kept in {directory} ({error.strerror or error}): set {VARIABLE}=DIR or off")
        return
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_compilation_cache_max_size": MAXIMUM_BYTES,  # also makes JAX lock the directory while it reads or writes
        "jax_persistent_cache_min_compile_time_secs": MINIMUM_SECONDS,
    }
    for name, value in settings.items():
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)
        else:  # read when JAX is imported
            os.environ[name.upper()] = str(value)
    _tend(directory)


def _user_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_reduce" / "jax"


def _prepare(directory: Path) -> None:
    """Make the directory, and raise OSError unless files can be written there."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass
    for entry in directory.glob("*-cache"):  # a kill can leave an entry without its access time, at which JAX stumbles
        entry.with_name(f"{entry.name.removesuffix('cache')}atime").touch()


def _tend(directory: Path) -> None:
    """Remove entries that JAX fails to read or write, so that they are compiled and written anew.

    JAX itself only warns, at every run, and would never replace them. Its warning becomes one line.
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
        _warn(
            f"{failed['doing']} the compiled program {failed['program']} in {directory} failed ({why}): compiled anew"
        )

    warnings.showwarning = remove


def _warn(message: str) -> None:
    print(f"moe-reduce: warning: {message}", file=sys.stderr, flush=True)
