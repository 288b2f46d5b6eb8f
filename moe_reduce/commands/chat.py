"""moe-reduce chat: talk with a model, line by line; its adapter may change from one turn to the next."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_reduce.commands import adapter_arguments, hypernetwork_arguments, model_arguments, sampling_arguments
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from moe_reduce.data.library_tokenizer import LibraryTokenizer
    from moe_reduce.inference.chat import Message
    from moe_reduce.models.model import Model

PROMPT = "> "
HELP = """/task DESCRIPTION  answer with the adapter that --hypernetwork writes for this description
/adapter DIR       answer with this adapter
/adapter none      answer with the model alone
/new               forget the conversation
/quit              end; so does the end of the input"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file"
    )
    parser.add_argument("--system", help="system message at the start of the conversation")
    adapter_arguments.add_adapter(parser)
    hypernetwork_arguments.add_hypernetwork(parser)
    sampling_arguments.add(parser)
    model_arguments.add_compute_dtype(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Answers each line of stdin until its end. Lines that begin with / are commands; /help lists them."""
    model_arguments.no_overrides(overrides)
    sampling_arguments.settings(arguments).check()
    if arguments.adapter and arguments.task:
        raise UserError("--adapter and --task both give an adapter: choose one")
    if len(arguments.task) > 1:
        raise UserError(f"there are {len(arguments.task)} --task: give one, and others by /task during the chat")
    conversation = Conversation(arguments)
    for line in _lines():
        try:
            if not conversation.take(line):
                break
        except UserError as error:  # this line had no effect, and the chat goes on
            print(f"moe-reduce chat: {error}", file=sys.stderr, flush=True)
    return ""


class Conversation:
    """Messages so far, and the model that answers the next one."""

    def __init__(self, arguments: argparse.Namespace):
        """Loads model and tokenizer; UserError as in `generate`."""
        from moe_reduce.inference.chat import chat_tokenizer
        from moe_reduce.inference.text import end_ids

        self._arguments = arguments
        self._place: Path = arguments.tokenizer or arguments.model
        self._tokenizer: LibraryTokenizer = chat_tokenizer(self._place)
        self._messages: list[Message] = []
        self._base: Model = model_arguments.load_model(arguments)
        self._settings = sampling_arguments.settings(arguments, end_ids(self._base, self._tokenizer))
        self._new()
        first = self._with_task(arguments.task[0]) if arguments.task else self._with(arguments.adapter)
        self._answering: Model = first
        sampling_arguments.name_unapplied(arguments)

    def take(self, line: str) -> bool:
        """Obeys a command or answers a message. Returns False when the chat ends; UserError leaves all as it was."""
        model_arguments.check_utf8("a line", line)
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/quit":
                return False
            case "/new":
                self._new()
            case "/task":
                self._answering = self._with_task(rest.strip())
            case "/adapter":
                self._answering = self._with(rest.strip() or None)
            case _ if command.startswith("/"):
                print(HELP, file=sys.stderr)
            case _:
                self._answer(line.strip())
        return True

    def _new(self) -> None:
        system = self._arguments.system
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def _with(self, adapter: str | None) -> "Model":
        """The base with an adapter's directory active, ready to answer: on a CPU, a copy of the base."""
        from moe_reduce.inference.generate import ready

        return ready(adapter_arguments.with_adapter(self._base, adapter, self._arguments.model))

    def _with_task(self, description: str) -> "Model":
        if self._arguments.hypernetwork is None:
            raise UserError("a task needs --hypernetwork=DIR, which writes its adapter: start the chat with it")
        self._arguments.task = [description]
        (adapter,) = hypernetwork_arguments.written(self._arguments, self._arguments.model)
        return self._with(str(adapter))

    def _answer(self, text: str) -> None:
        """Prints the answer to a message as it is made, and adds both to the conversation."""
        from moe_reduce.inference.chat import encode_chat, user
        from moe_reduce.inference.text import Continuation, stream

        messages = [*self._messages, user(text)]
        ids = encode_chat(self._tokenizer, self._place, messages)
        longest = self._base.config.context
        if len(ids) + self._settings.max_tokens > longest:
            raise UserError(
                f"the conversation ({len(ids)} tokens) and --max-tokens={self._settings.max_tokens} exceed the "
                f"model's context of {longest}: /new starts another"
            )
        row = Continuation(self._tokenizer, ids, self._arguments.stop)
        for (piece,) in stream(self._answering, [row], self._settings, steps=sampling_arguments.SHOWN_AT_ONCE):
            print(piece, end="", flush=True)
        print(flush=True)
        self._messages = [*messages, {"role": "assistant", "content": row.text}]


def _lines() -> Iterator[str]:
    """Yields lines of stdin, after a prompt where a person types them."""
    if not sys.stdin.isatty():
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not UTF-8 ({error.reason}): convert it") from None
        return
    import readline  # noqa: F401  input() edits lines once it is imported

    print("/help lists the commands", file=sys.stderr)
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            return
