"""moe-reduce <command>: command name -> module of moe_reduce.commands."""

import argparse
import importlib
import os
import sys
from typing import Any, NoReturn

from moe_reduce.core import compilation_cache
from moe_reduce.core.errors import PeerLost, UserError

COMMANDS = {
    "train": "pretrain a model, or several side by side",
    "reduce": "a mixture of experts made smaller, stage by stage",
    "adapt": "an adapter, or the whole model, trained on a text or on completions, and merged",
    "merge": "a base and its adapter as one plain model",
    "generate": "what a model writes behind a prompt",
    "evaluate": "loss, perplexity and next-token accuracy of a model on a corpus",
    "monitor": "what a machine does while models answer, ours and Ollama's",
    "inspect": "what a model directory holds and how it came to be",
    "plan": "exact parameter counts, bytes and FLOPs, without loading a weight",
    "pool": "the experts of all layers as one pool that every layer can call",
    "score": "how much each expert matters, under several criteria",
    "prune": "a model of the best experts only, from file to file",
    "group-heads": "fewer key/value heads, each the mean of those it replaces",
    "drop-layers": "fewer layers: those named, or those of the least Block Influence",
    "factorise-embedding": "the tied token table as two thin factors",
    "sparsify": "zeros in place of the smallest weights",
    "prune-neurons": "narrower feed-forward blocks or experts",
    "export": "a model as StableHLO or ONNX, for other programs to run",
    "report": "the results table of a document, from summary.json files",
}
COMPILES_NOTHING = {"inspect", "report"}


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line too, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user's mistake, 1 another process is lost (one line on stderr)."""
    parser = Parser(prog="moe-reduce", description="Make a language model smaller, and show the cost.")
    choices = parser.add_subparsers(dest="command", required=True, metavar="command")
    arguments = sys.argv[1:] if argv is None else argv
    wanted = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, purpose in COMMANDS.items():
        command = choices.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        if name == wanted:  # only the chosen command is imported
            _module(name).add_arguments(command)
    try:
        parsed, overrides = parser.parse_known_args(arguments)
        if parsed.command not in COMPILES_NOTHING:
            compilation_cache.enable()
        print(_module(parsed.command).run(parsed, overrides))
    except UserError as error:
        print(f"moe-reduce{f' {wanted}' if wanted else ''}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, PeerLost):
            os._exit(error.status)  # what Python and jax do at the end waits for the process that is gone
        return error.status
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stdout = None
    return 0


def _module(command: str) -> Any:
    return importlib.import_module(f"moe_reduce.commands.{command.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
