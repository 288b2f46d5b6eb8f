"""Chat prompts: turns of a conversation, formatted by the Jinja template in a model's tokenizer directory."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import is_gguf
from moe_reduce.data import library_reader
from moe_reduce.data.gguf_tokenizer import read_gguf_tokenizer
from moe_reduce.data.library_tokenizer import TEMPLATE_FILE, LibraryTokenizer
from moe_reduce.data.tokenizer_files import JSON_FILE, SETTINGS_FILE
from moe_reduce.inference.template_process import rendered

Message = dict[str, str]  # role: system, user or assistant; content: its text
WITHOUT = "`moe-reduce generate` needs none if you leave out --chat"


def user(content: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": content}


def chat_tokenizer(place: Path) -> LibraryTokenizer:
    """Load the tokenizer that recognises special tokens in a template's text, with its template.

    place: a tokenizer's directory, its tokenizer.json, beside which the template lies, or a .gguf file. UserError if
    there is no tokenizer.
    """
    place = place.parent if place.name == JSON_FILE else place
    try:
        return read_gguf_tokenizer(place) if is_gguf(place) else library_reader.read_directory(place)
    except UserError as error:
        raise UserError(f"{error}; {WITHOUT}") from error


def chat_prompt(directory: Path, message: str) -> str:
    """Format a user's message as `format_chat` does, with the tokenizer of the directory."""
    return format_chat(chat_tokenizer(directory), directory, [user(message)])


def encode_chat(tokenizer: LibraryTokenizer, directory: Path, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that `format_chat` formats."""
    return tokenizer.encode(format_chat(tokenizer, directory, messages))


def format_chat(tokenizer: LibraryTokenizer, directory: Path, messages: Sequence[Message]) -> str:
    """Format a conversation, followed by the start of the next answer, as transformers' apply_chat_template does.

    directory: named in errors. Templates are untrusted: they run in Jinja's sandbox, in a process with limits on time
    and memory. UserError if there is no template, if it refuses the messages or exceeds a limit, or if Jinja is not
    installed.
    """
    names = tokenizer.names
    if names.chat_template is None:
        raise UserError(f"{directory} has no chat template in {TEMPLATE_FILE} or {SETTINGS_FILE}: {WITHOUT}")
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("a chat template needs Jinja: pip install -e '.[chat]'")
    try:
        return rendered(names.chat_template, dict(names.special_tokens), list(messages))
    except ValueError as error:
        raise UserError(f"the chat template of {directory} does not take this prompt: {error}") from error
