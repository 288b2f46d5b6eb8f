"""moe-reduce <command>: command name -> module of moe_reduce.commands."""

import argparse
import importlib
import sys

from moe_reduce.errors import UserError

COMMANDS = {
    "train": "pretrain a model, or several side by side",
    "evaluate": "loss, perplexity and next-token accuracy of a model on a corpus",
    "inspect": "what a model directory holds and how it came to be",
    "plan": "exact parameter counts, bytes and FLOPs, without loading a weight",
    "report": "the results table of a document, from summary.json files",
}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user's mistake (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="moe-reduce", description="Make a language model smaller, and show the cost.")
    choices = parser.add_subparsers(dest="command", required=True, metavar="command")
    arguments = sys.argv[1:] if argv is None else argv
    wanted = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, purpose in COMMANDS.items():
        command = choices.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        if name == wanted:  # only the chosen command is imported
            importlib.import_module(f"moe_reduce.commands.{name}").add_arguments(command)
    parsed, overrides = parser.parse_known_args(arguments)
    try:
        print(importlib.import_module(f"moe_reduce.commands.{parsed.command}").run(parsed, overrides))
    except UserError as error:
        print(f"moe-reduce {parsed.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
