"""Remedies that messages name: every flag is an option of a command, and every key is a key of a configuration."""

import argparse
import ast
import dataclasses
import importlib
import re
import typing
from pathlib import Path

import pytest

from moe_reduce.__main__ import COMMANDS
from moe_reduce.core.config import AdaptConfig, AdapterConfig, ModelConfig, ReduceConfig, RunConfig

PACKAGE = Path(__file__).resolve().parent.parent / "moe_reduce"
RAISES = {"UserError", "PeerLost", "writing"}  # calls whose strings a user reads
FLAG = re.compile(r"--[a-z][a-z0-9-]*")
OTHER_PROGRAMS = re.compile(r"(?:pip install|llama-gguf-split) --[a-z-]+")  # their flags are not ours
RUNS = (RunConfig, ReduceConfig, AdaptConfig)
GROUPS = "model|train|data|mesh|execution|balance|adapter"
KEY = re.compile(rf"(?<![\w/.])(?:{GROUPS})(?:\.[a-z_]+)+(?![\w/(])")
FILES = re.compile(r"(?:model|adapter)[\w.-]*\.(?:safetensors|json|stablehlo|onnx)")
LOAD_ARGUMENT = re.compile(r"(?<![\w.])dtype=")  # an argument of moe_reduce.load, which no command has


def text_of(node: ast.AST) -> str:
    """The literal text of a message, with `{}` where a value stands."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return " ".join(one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str))


def messages() -> list[tuple[str, str]]:
    """(place, text) of each message of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name in RAISES:
                found += [(f"{path.relative_to(PACKAGE)}:{node.lineno}", text_of(argument)) for argument in node.args]
    return found


def flags() -> set[str]:
    found = {"--help", "--version"}
    for command in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"moe_reduce.commands.{command.replace('-', '_')}").add_arguments(parser)
        found |= {option for action in parser._actions for option in action.option_strings}
    return found


def keys() -> set[str]:
    """Paths of the keys of every configuration, such as model.moe.experts."""
    found: set[str] = set()

    def add(kind: type, prefix: str) -> None:
        for name, hint in typing.get_type_hints(kind).items():
            found.add(f"{prefix}{name}")
            for one in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(one) and isinstance(one, type):
                    add(one, f"{prefix}{name}.")

    for run in RUNS:
        add(run, "")
    add(ModelConfig, "model.")
    add(AdapterConfig, "adapter.")
    return found


MESSAGES, FLAGS, KEYS = messages(), flags(), keys()


def wrong_remedies(found: list[tuple[str, str]]) -> list[str]:
    wrong = []
    for place, text in found:
        wrong += [
            f"{place}: no command has {flag}"
            for flag in FLAG.findall(OTHER_PROGRAMS.sub("", text))
            if flag not in FLAGS
        ]
        keys_named = KEY.findall(FILES.sub("", text))
        wrong += [f"{place}: no configuration has {key}" for key in keys_named if key.rstrip(".") not in KEYS]
        wrong += [f"{place}: dtype= is no option of a command"] * bool(LOAD_ARGUMENT.search(text))
    return wrong


def test_every_flag_and_key_that_a_message_names_exists():
    assert len(MESSAGES) > 250
    assert not wrong_remedies(MESSAGES)


@pytest.mark.parametrize(
    "text", ["give --colour=red", "set model.colour", "set train.steps.more", "choose with dtype="]
)
def test_a_remedy_that_does_not_exist_is_found(text):
    assert wrong_remedies([("here", text)])
