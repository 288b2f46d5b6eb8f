"""Regular expressions from files of others, with a limit on the time that they may take.

A short expression can need more time than the age of the universe for a short name. The library `regex` finds what
Python's own `re` finds, and stops after a time. It writes counted repetitions out, so their number is limited as well.
"""

import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import regex

from moe_reduce.core.errors import UserError

SECONDS = 3.0  # for all matches of a file; real adapters take milliseconds
REPETITIONS = 10_000  # of nested counts, such as (a{100}){100}
COUNT = re.compile(r"\{(\d*),?(\d*)\}")
SHOWN = 80  # characters of an expression in messages


class Expressions:
    """Matches of one file's expressions. UserError once they have taken more than SECONDS together."""

    def __init__(self, file: Path):
        self._file, self._left = file, SECONDS

    def match(self, expression: str, name: str) -> Any:
        """Match the start of a name, as re.match does."""
        return self._timed(regex.match, expression, name)

    def fullmatch(self, expression: str, name: str) -> Any:
        """Match a whole name, as re.fullmatch does."""
        return self._timed(regex.fullmatch, expression, name)

    def _timed(self, function: Callable[..., Any], expression: str, name: str) -> Any:
        start = time.monotonic()
        try:
            found = function(expression, name, timeout=max(self._left, 0.001))
        except TimeoutError:
            raise UserError(
                f"{self._file}: {_short(expression)} takes more than {SECONDS:.0f} seconds: list the modules by name"
            ) from None
        self._left -= time.monotonic() - start
        return found


def check(key: str, expressions: Iterable[str], template: str = "{}") -> None:
    """Raise UserError for the first expression that is none. key: where they stand. template: what completes them."""
    for expression in expressions:
        try:
            re.compile(template.format(expression))  # refuses what `regex` has beyond it, such as recursion
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{key}: {_short(expression)} is no regular expression ({error}): correct it") from None
        if _repetitions(expression) > REPETITIONS:
            raise UserError(f"{key}: {_short(expression)} repeats too often: list the modules by name")


def _repetitions(expression: str) -> float:
    """Upper bound of the number of times that counts such as {100} repeat something."""
    counts = (max(float(least or 1), float(most or 1), 1) for least, most in COUNT.findall(expression))
    return math.prod(counts)


def _short(expression: str) -> str:
    return repr(expression if len(expression) <= SHOWN else f"{expression[:SHOWN]}...")
