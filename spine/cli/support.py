"""What every command shares: its options, the database it works on, and errors told in one line."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

from spine.kernel.printable import printable

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
    print(f"spine: {printable(message, longest=2_000)}", file=sys.stderr, flush=True)


def quiet_logs(*, level: str = "warning") -> None:
    """Send the Spine's log of this process to stderr from ``level`` on, unless the application configured its own.

    With SPINE_TRACE set, everything that it asks for is shown.
    """
    import structlog

    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("debug" if os.environ.get("SPINE_TRACE") else level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def shown_url(url: str) -> str:
    """Return a database URL as it may be printed: without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def guarded(command: Callable[P, int]) -> Callable[P, int]:
    """Wrap a command: its errors become one line and an exit code, never a traceback (``SPINE_DEBUG=1`` shows it)."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
            return code
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001  the last boundary before the operator
            return _ended_by(_innermost(error))

    return run


def _innermost(error: BaseException) -> BaseException:
    """The one error in a task group's wrapping."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _ended_by(error: BaseException) -> int:
    from spine.kernel.errors import SpineError

    match error:
        case CommandError():
            complain(str(error))
            return error.code
        case SpineError():
            complain(str(error))
            return EXIT_USAGE
        case BrokenPipeError():
            # The reader has gone; without this the interpreter would complain when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _EXIT_BROKEN_PIPE
        case KeyboardInterrupt():
            complain("interrupted")
            return EXIT_INTERRUPTED
        case OSError():
            complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
            return EXIT_USAGE
    if os.environ.get("SPINE_DEBUG"):
        raise error
    complain(f"unexpected {type(error).__name__}: {error} (SPINE_DEBUG=1 shows where)")
    return _EXIT_UNEXPECTED
