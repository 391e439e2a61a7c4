"""The doors: `python -m pipeline fit`, `generate` and the rest.

Importing torch takes seconds, so a door imports what it needs as it runs: help comes at once.
"""

import argparse
import difflib
import importlib
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from pipeline.errors import UserError, code_of

__all__ = ["main"]

FULL = re.compile("out of memory|can't allocate memory", re.IGNORECASE)
DOORS = ("fit", "generate", "demo", "sample", "evaluate", "export", "reference", "show")


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are sentences; options are not abbreviated."""

    def __init__(self, **how: object) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **how)  # type: ignore

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; see --help.")


def main(argv: Sequence[str]) -> int:
    """Run a command; bad input ends in one sentence and exit code 2."""
    argv = list(argv)
    parser = Parser(
        prog="python -m pipeline",
        description="Train a model that draws from p(x | u), and draw from it: prompt in, "
        "picture out.",
        epilog="Each command has a --help of its own.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    doors = {name: importlib.import_module(f"pipeline.doors.{name}") for name in DOORS}
    parsers = {}
    for name, door in doors.items():
        own = parsers[name] = commands.add_parser(
            name,
            help=door.SUMMARY,
            usage=getattr(door, "USAGE", None),
            description=door.DESCRIPTION,
            epilog=door.EPILOG,
        )
        door.add_arguments(own)
        if argv == [name] and hasattr(door, "USAGE"):  # nothing was said that it could do
            own.print_help()
            return 0
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signum, asked)
    try:
        dotted, rest = split(argv)
        args, unknown = parser.parse_known_args(rest)
        for name, value in vars(args).items():
            if isinstance(value, str) and value.startswith("~/"):  # as --out=~/x leaves it
                setattr(args, name, os.path.expanduser(value))
        door, options = doors[args.command], unknown + dotted
        check(options, door.FREE, parsers[args.command])
        line = shlex.join(["python", "-m", "pipeline", *argv])
        return door.run(args, options, line)
    except UserError as error:
        if os.environ.get("PIPELINE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if os.environ.get("PIPELINE_TRACEBACK") or not error.strerror:
            raise
        print(f"error: {error.filename or 'A file'}: {error.strerror}.", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if os.environ.get("PIPELINE_TRACEBACK") or (error.name or "pipeline")[:8] == "pipeline":
            raise
        print(
            f"error: {sys.executable} has no module {error.name}: `make setup` makes an "
            "environment that has it, which `. .venv/bin/activate` enters.",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        full = isinstance(error, MemoryError) or FULL.search(reason)
        if os.environ.get("PIPELINE_TRACEBACK") or not full:
            raise
        print(
            f"error: The memory does not hold it ({reason or 'Python has none left'}): ask for "
            "less at once, such as a smaller --micro-batch, --number, --chains or --draws.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        signum = stop.args[0] if stop.args else signal.SIGINT
        print(f"\nStopped by {signal.Signals(signum).name}.", file=sys.stderr)
        return code_of(signum)


def asked(signum: int, frame: object) -> NoReturn:
    """Stop as at Ctrl-C: what is under way is put in order on the way out."""
    raise KeyboardInterrupt(signum)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options with a dot, each with its value, and the rest: a prompt may stand behind them."""
    dotted, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        is_dotted = word.startswith("--") and "." in word.partition("=")[0]
        (dotted if is_dotted else rest).append(word)
        if is_dotted and "=" not in word and words:
            dotted.append(words.pop(0))
    return dotted, rest


def check(options: Sequence[str], free: Sequence[str], parser: Parser) -> None:
    """Raise `UserError` for what is no option of a door; `free` is how further ones begin."""
    if options and not options[0].startswith("--"):
        raise UserError(f"{options[0]!r} belongs to no option; see --help.")
    for word in options:
        name = word.partition("=")[0]
        if name.startswith("--") and not name[2:].startswith(tuple(free)):
            near = difflib.get_close_matches(name, parser._option_string_actions, n=3)
            meant = f"did you mean {' or '.join(near)}?" if near else "see --help."
            raise UserError(f"There is no option {name}; {meant}")
