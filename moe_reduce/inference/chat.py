"""Chat prompts: turns of a conversation, formatted by the Jinja template in a model's tokenizer directory."""

import datetime
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any, NoReturn

from moe_reduce.core import disk
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import JSON_FILE, SETTINGS_FILE, Tokenizer, load_tokenizer

TEMPLATE_FILE, TEMPLATE_KEY = "chat_template.jinja", "chat_template"


def chat_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer that recognises special tokens in a template's text. UserError if there is none."""
    if not (directory / JSON_FILE).is_file():
        raise UserError(f"{directory} has no {JSON_FILE}, which defines a chat template's tokens: leave out --chat")
    return load_tokenizer(directory / JSON_FILE)


def chat_prompt(directory: Path, message: str) -> str:
    """Format a user's message, followed by the start of the answer, with the template.

    Templates are untrusted: they run in Jinja's sandbox, with the variables and functions that transformers provides.
    UserError if there is no template, if it refuses the message, or if Jinja is not installed.
    """
    template, settings = _template(directory), _settings(directory)
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("--chat needs Jinja: pip install -e '.[chat]'")
    tokens = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
    given: dict[str, Any] = {name: token for name, token in tokens.items() if isinstance(token, str)}
    given |= {"messages": [{"role": "user", "content": message}], "add_generation_prompt": True}
    given |= {"tools": None, "documents": None}
    try:
        return _environment().from_string(template).render(given)
    except Exception as error:  # a template is a program, which may raise anything
        raise UserError(f"the chat template of {directory} does not take this prompt: {error}") from error


def _environment() -> Any:
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} marks the text that a model learns from; it has no effect on a prompt."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's own filter escapes HTML
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.datetime.now().strftime}
    return environment


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _template(directory: Path) -> str:
    file = directory / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = ({TEMPLATE_KEY: None} | _settings(directory))[TEMPLATE_KEY]
    if isinstance(found, str):
        return found
    named = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    defaults = [entry["template"] for entry in named if {"name": "default"}.items() <= entry.items()]
    if not defaults:
        raise UserError(f"{directory} has no chat template in {TEMPLATE_FILE} or {SETTINGS_FILE}: leave out --chat")
    return defaults[0]


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / SETTINGS_FILE
    return disk.read_json(file) if file.is_file() else {}


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) and "content" in token else token
