"""JSON from files that others may have written: parsed whole, or refused in one line that names the file."""

import json
from pathlib import Path
from typing import Any

from moe_reduce.core.errors import UserError

DEEPEST = 100  # levels of nesting: far more than any file has, and far fewer than recursive functions can visit


def parse(text: str | bytes, name: str | Path, remedy: str = "fetch it again", unique_keys: bool = False) -> Any:
    """Parse JSON. UserError, with the remedy, for invalid JSON, invalid UTF-8 or values that are nested too deeply.

    name: the file, for messages. unique_keys: also refuse an object that has a key twice.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
        if _is_deep(found):
            raise RecursionError
    except RecursionError:
        raise UserError(f"{name} is nested too deeply: {remedy}") from None
    except ValueError as error:  # includes bytes that are not UTF-8
        raise UserError(f"{name} is not JSON ({error}): {remedy}") from None
    return found


def _is_deep(value: Any) -> bool:
    """Tell whether objects and lists are nested in more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            child
            for holder in level
            if isinstance(holder, dict | list)
            for child in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def read_object(file: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """Read a JSON object; UserError, with the remedy, for anything else."""
    raw = parse(file.read_bytes(), file, remedy)
    if not isinstance(raw, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(raw).__name__}: {remedy}")
    return raw


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line, without a last line that a kill cut short; [] where there is no file.

    UserError names the line for any other damage.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    found = []
    for number, line in enumerate(lines, start=1):
        raw = parse(line, f"{file}:{number}", "restore the file, or remove that line")
        if not isinstance(raw, dict):
            raise UserError(f"{file}:{number} holds no JSON object: restore the file, or remove that line")
        found.append(raw)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is given twice")
        found[key] = value
    return found
