"""Read --config=FILE and its --config.key=value overrides as runs; every invalid input gives one line."""

import argparse
import contextlib
import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

from moe_reduce.core import config, hub
from moe_reduce.core.config import run_from_dict
from moe_reduce.core.errors import UserError

T = TypeVar("T")
PACKAGE = "configs"
INSTALLED = Path(__file__).parents[2] / PACKAGE  # beside the package moe_reduce, in a checkout and where pip puts it


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --config, which names a configuration; `read` takes its overrides."""
    shown = "a Python file, or the name of one of the project's configurations, such as reduce"
    parser.add_argument("--config", required=required, metavar="FILE.py", help=shown)
    parser.epilog = "Any key of the configuration can be overridden: --config.train.steps=10 --config.model.width=64"


def read(file: str, overrides: list[str], reader: Callable[[dict[str, Any]], T] = run_from_dict) -> dict[str, T]:
    """Returns the runs of a configuration file by name, after overrides of the form --config.a.b=value.

    reader: builds a run from nested values; raises UserError at the first wrong one.
    """
    for override in overrides:
        if not override.startswith("--config."):
            raise UserError(f"unknown argument {override}: overrides look like --config.train.steps=10")
    described = _read_config_dict(file, overrides)
    _refuse_hidden(described, overrides)
    return {name: _with_local_model(run) for name, run in config.parse(described, reader).items()}


def _with_local_model(run: Any) -> Any:
    """The run with the directory of its model, where it names one of the Hugging Face hub."""
    model = getattr(run, "model", None)
    return dataclasses.replace(run, model=str(hub.local(Path(model)))) if isinstance(model, str) and model else run


def _refuse_hidden(described: ml_collections.ConfigDict, overrides: list[str]) -> None:
    """Raises UserError for an override of a key that a variant sets itself: it would have no effect."""
    for override in overrides:
        key = override.removeprefix("--config.").split("=")[0]
        variants: Any = described.get("variants", {})
        for name, variant in variants.items():
            value = variant
            for part in key.split("."):
                value = value.get(part) if isinstance(value, (ml_collections.ConfigDict, dict)) else None
            if value is not None:
                raise UserError(f"{override}: variant {name} sets {key} itself; use --config.variants.{name}.{key}=…")


def _read_config_dict(file: str, overrides: list[str]) -> ml_collections.ConfigDict:
    values = flags.FlagValues()
    words = ["moe-reduce", *overrides]
    described = _execute(find(file))
    try:
        # without sys_argv, ml_collections reads overrides from the command line of the process
        holder = config_flags.DEFINE_config_dict("config", described, flag_values=values, sys_argv=words)
        values(words)
        return holder.value
    except KeyError as error:
        raise UserError(f"{_culprit(overrides, str(error))}: {file} sets no {error.args[0]}: add it there") from error
    except (flags.Error, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{_culprit(overrides, str(error))}: {str(error).strip() or type(error).__name__}") from error


def find(name: str) -> Path:
    """Find the file that --config names: a path, or one of the project's own as reduce, reduce.py or configs/reduce.py.

    Raises UserError where there is none.
    """
    file = Path(name)
    if file.is_file():
        return file
    own = INSTALLED / f"{file.name.removesuffix('.py')}.py"
    if file.parent in (Path(), Path(PACKAGE)) and own.is_file():
        return own
    known = ", ".join(sorted(path.stem for path in INSTALLED.glob("[!_]*.py")))
    raise UserError(f"--config={name} does not exist: name a file, or one of the project's configurations ({known})")


def _execute(file: Path) -> ml_collections.ConfigDict:
    """Calls get_config() of a file, which may import its neighbours and the project's own files as `configs.…`."""
    specification = importlib.util.spec_from_file_location("moe_reduce_config", file)
    if specification is None or specification.loader is None:
        raise UserError(f"--config={file} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        with _importable(file.absolute().parent):
            specification.loader.exec_module(module)
            described = module.get_config()
    except Exception as error:  # any exception of the user's file is a mistake in that file
        raise UserError(f"--config={file} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(described, ml_collections.ConfigDict):
        raise UserError(f"--config={file}: get_config() must return a ConfigDict, got {described!r}")
    return described


@contextlib.contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Make `configs` mean this directory, then the project's own files, whatever else of that name is on the path."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}
    for name in before:
        del sys.modules[name]
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(directory), str(INSTALLED)]
    sys.modules[PACKAGE] = package
    root = str(directory.parent)  # for neighbours in a directory of another name
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(before)


def _culprit(overrides: list[str], message: str) -> str:
    """The override that an error message of the flag parser names, or all of them."""
    for override in overrides:
        name = override.removeprefix("--").split("=")[0]
        if name in message or name.rsplit(".", 1)[-1] in message:
            return override
    return " ".join(overrides) or "--config"
