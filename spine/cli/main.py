"""The entry of the command ``spine``; nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from spine.cli import checks, operate, parking, questions, recording
from spine.cli.support import EXIT_USAGE, complain

app = typer.Typer(
    name="spine",
    help="Question one place, find the problem: one mailbox decides, one journal remembers, one command answers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (recording, questions, checks, operate, parking):
    module.register(app)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a character shows its escape, instead of failing the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=list(args) or ["--help"], prog_name="spine", standalone_mode=False)
    except typer.Abort:
        return 130
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _usage(message(), int(getattr(error, "exit_code", EXIT_USAGE)))
    return code if isinstance(code, int) else 0


def _usage(message: str, code: int) -> int:
    if not message:
        return code
    complain(f"{message} (spine --help lists the commands, spine COMMAND --help their options)")
    return code


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
