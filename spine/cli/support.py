"""What every command shares: its options, the database it works on, and errors told in one line."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141
_EXIT_UNEXPECTED = 70
_DEFAULT_DATABASE = "sqlite+aiosqlite:///spine.db"

Database = Annotated[
    str | None,
    typer.Option("--db", metavar="URL", help="Database URL or file (else SPINE_DATABASE_URL, else ./spine.db)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

P = ParamSpec("P")


class CommandError(Exception):
    """Ends the command with one line on stderr and ``code`` as exit code."""

    def __init__(self, message: str, code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.code = code


def database_url(given: str | None) -> str:
    """Return the URL of the database to work on; a plain file name means SQLite."""
    url = given or os.environ.get("SPINE_DATABASE_URL") or _DEFAULT_DATABASE
    return url if "://" in url else f"sqlite+aiosqlite:///{url}"


def complain(message: str) -> None:
    """Tell ``message`` as one line on stderr, whatever it holds."""
    from spine.explain.text import printable

    print(f"spine: {printable(message, longest=2_000)}", file=sys.stderr, flush=True)


def guarded(command: Callable[P, int]) -> Callable[P, int]:
    """Wrap a command: its errors become one line and an exit code, never a traceback (``SPINE_DEBUG=1`` shows it)."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        from spine.kernel.errors import SpineError

        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
            return code
        except CommandError as error:
            complain(str(error))
            return error.code
        except SpineError as error:
            complain(str(error))
            return EXIT_USAGE
        except BrokenPipeError:
            # The reader has gone; without this the interpreter would complain when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _EXIT_BROKEN_PIPE
        except KeyboardInterrupt:
            complain("interrupted")
            return EXIT_INTERRUPTED
        except OSError as error:
            complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
            return EXIT_USAGE
        except Exception as error:
            if os.environ.get("SPINE_DEBUG"):
                raise
            complain(f"unexpected {type(error).__name__}: {error} (SPINE_DEBUG=1 shows where)")
            return _EXIT_UNEXPECTED

    return run
