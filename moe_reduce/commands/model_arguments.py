"""What several commands on artifacts share."""

import argparse
import json
from pathlib import Path
from typing import Any

from moe_reduce.config import ModelConfig
from moe_reduce.errors import UserError


def add_out(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--out and --overwrite."""
    parser.add_argument("--out", type=Path, default=default, help=f"directory to write (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError when --out exists and may not be replaced."""
    if out.exists() and not overwrite:
        raise UserError(f"--out={out} exists: choose another directory or add --overwrite")


def no_overrides(overrides: list[str]) -> None:
    """Raises UserError when arguments are left over."""
    if overrides:
        raise UserError(f"unknown argument {overrides[0]}: see --help")


def show(content: dict[str, Any], as_json: bool) -> str:
    """Nested values as indented lines for people, or as JSON for machines."""
    return json.dumps(content, indent=2) if as_json else "\n".join(_lines(content, 0))


def _lines(content: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{key}", *_lines(value, depth + 1)]
        elif isinstance(value, list):
            lines += [f"{'  ' * depth}{key}", *(f"{'  ' * (depth + 1)}{item}" for item in value)]
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            lines.append(f"{'  ' * depth}{key}: {shown}")
    return lines


def directory_config(directory: Path) -> ModelConfig:
    """The architecture of a model directory, from its config.json alone."""
    from moe_reduce.storage.hf_config import read_config

    return read_config(directory)[0]
