"""Chat prompts: turns of a conversation, formatted by the Jinja template in a model's tokenizer directory."""

import importlib.util
from pathlib import Path

from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import is_gguf
from moe_reduce.data import library_reader
from moe_reduce.data.gguf_tokenizer import read_gguf_tokenizer
from moe_reduce.data.library_tokenizer import TEMPLATE_FILE, LibraryTokenizer
from moe_reduce.data.tokenizer_files import SETTINGS_FILE
from moe_reduce.inference.template_process import rendered


def chat_tokenizer(directory: Path) -> LibraryTokenizer:
    """Load the tokenizer that recognises special tokens in a template's text, with its template.

    UserError if there is none.
    """
    try:
        return read_gguf_tokenizer(directory) if is_gguf(directory) else library_reader.read_directory(directory)
    except UserError as error:
        raise UserError(f"{error}; or leave out --chat") from error


def chat_prompt(directory: Path, message: str) -> str:
    """Format a user's message, followed by the start of the answer, as transformers' apply_chat_template does.

    Templates are untrusted: they run in Jinja's sandbox, in a process with limits on time and memory.
    UserError if there is no template, if it refuses the message or exceeds a limit, or if Jinja is not installed.
    """
    return format_message(chat_tokenizer(directory), directory, message)


def format_message(tokenizer: LibraryTokenizer, directory: Path, message: str) -> str:
    """Format a message as `chat_prompt` does, with a tokenizer that is loaded already. directory: for messages."""
    names = tokenizer.names
    if names.chat_template is None:
        raise UserError(f"{directory} has no chat template in {TEMPLATE_FILE} or {SETTINGS_FILE}: leave out --chat")
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("--chat needs Jinja: pip install -e '.[chat]'")
    try:
        return rendered(names.chat_template, dict(names.special_tokens), [{"role": "user", "content": message}])
    except ValueError as error:
        raise UserError(f"the chat template of {directory} does not take this prompt: {error}") from error
