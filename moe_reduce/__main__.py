"""The command line: moe-reduce COMMAND, with one module of moe_reduce.commands for each command."""

import argparse
import importlib
import os
import sys
from typing import Any, NoReturn

from moe_reduce.core import compilation_cache, hub, memory
from moe_reduce.core.errors import PeerLost, UserError

COMMANDS = {
    "train": "pretrain a model, or several side by side",
    "reduce": "shrink a mixture of experts stage by stage: pool, score, prune, recover",
    "adapt": "train an adapter or a whole model on a text or on completions, then merge it",
    "text-to-lora": "train adapters of tasks, or a hypernetwork that writes an adapter from a description",
    "merge": "merge an adapter into its base model",
    "generate": "continue a prompt",
    "chat": "talk with a model, whose adapter may change from turn to turn",
    "evaluate": "measure loss and accuracy on a corpus, or on tasks of the EleutherAI harness",
    "evaluate-tasks": "compare prompts, adapters and hypernetworks on described tasks",
    "monitor": "record CPU, memory and GPU load while models answer",
    "inspect": "describe a model directory and its history",
    "plan": "count parameters, bytes and FLOPs without loading a weight, and tell whether a device has room",
    "pool": "pool the experts of all layers, so that every layer can call each of them",
    "score": "rank the experts of a model under several criteria",
    "prune": "keep the best experts of a model, from file to file",
    "group-heads": "merge key/value heads into fewer (grouped-query attention)",
    "drop-layers": "drop layers: those named, or those with the least Block Influence",
    "factorise-embedding": "factorise the tied embedding into two thin matrices",
    "sparsify": "zero the smallest weights",
    "quantize": "store the matrices of a model in fewer bits, from file to file",
    "prune-neurons": "drop the smallest neurons of feed-forward blocks or experts",
    "export": "export a model as StableHLO or ONNX",
    "compare": "set models of finished runs side by side: size, quality, speed, and one prompt continued",
    "report": "collect finished runs into a result, or fill the tables of a document from results",
}


MODELS = ("model", "baseline")  # arguments that name a model
RESUMED = {"train", "reduce", "adapt", "text-to-lora"}  # go on where an earlier call was interrupted
INTERRUPTED = 130  # exit status by convention: 128 + SIGINT
COMPILES_NOTHING = {"inspect", "report"}
MEMORY = "free some, raise its limit (ulimit -v), or lower the batch size"
PURPOSE = "Make a language model smaller, and show what it cost."


class Parser(argparse.ArgumentParser):
    """Parser that reports a mistake as a UserError in one line, without its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with the message."""
        raise UserError(f"{message} (see {self.prog} --help)")


class Version(argparse.Action):
    """--version: prints the installed version and exits. Looked up only when asked for, which takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Prints the version and exits with status 0."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"{parser.prog} {version('moe_reduce')}")
        except PackageNotFoundError:
            print(f"{parser.prog}, not installed: run from {os.path.dirname(__file__)}")
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0 done, 2 a user's mistake, 1 a lost process, 130 interrupted.

    Mistakes, lost processes and interrupts are one line on stderr.
    """
    arguments = sys.argv[1:] if argv is None else argv
    wanted = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        if wanted:
            memory.check_start()
        parsed, overrides = _parser(arguments, wanted).parse_known_args(arguments)
        _resolve(parsed)
        if parsed.command not in COMPILES_NOTHING:
            compilation_cache.enable()
        print(_module(parsed.command).run(parsed, overrides))
    except UserError as error:
        print(f"moe-reduce{f' {wanted}' if wanted else ''}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, PeerLost):
            os._exit(error.status)  # Python and JAX would wait at exit for the lost process
        return error.status
    except KeyboardInterrupt:
        remedy = "run the same command again to go on" if wanted in RESUMED else "run the same command again"
        print(f"moe-reduce{f' {wanted}' if wanted else ''}: interrupted: {remedy}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout, such as head, has seen enough
        sys.stdout = None
    except Exception as error:
        if not memory.is_exhausted(error):
            raise
        reason = " ".join(str(error).split())[:200]
        print(f"moe-reduce {wanted}: out of memory{reason and f' ({reason})'}: {MEMORY}", file=sys.stderr, flush=True)
        return UserError.status
    return 0


def _resolve(parsed: argparse.Namespace) -> None:
    """Replaces names of models on the Hugging Face hub by their directories."""
    for name in MODELS:
        value = getattr(parsed, name, None)
        if isinstance(value, list):
            setattr(parsed, name, [hub.local(path) for path in value])
        elif value is not None:
            setattr(parsed, name, hub.local(value))


def _parser(arguments: list[str], wanted: str | None) -> Parser:
    """The parser of all commands; only the wanted one, whose module is imported, knows its arguments."""
    parser = Parser(prog="moe-reduce", description=PURPOSE, allow_abbrev=False)
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    if arguments and not arguments[0].startswith("-") and wanted is None:
        parser.error(_unknown(arguments[0]))
    choices = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, purpose in COMMANDS.items():
        description = f"{purpose[0].upper()}{purpose[1:]}."
        command = choices.add_parser(name, help=purpose, description=description, allow_abbrev=False)
        if name == wanted:
            _module(name).add_arguments(command)
    return parser


def _unknown(name: str) -> str:
    """A message that offers the commands with the nearest names."""
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=2)
    return f"unknown command {name!r}" + (f": did you mean {' or '.join(near)}?" if near else "")


def _module(command: str) -> Any:
    return importlib.import_module(f"moe_reduce.commands.{command.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
