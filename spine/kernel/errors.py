"""Every error Spine raises, in one tree.

SpineError
|-- ConfigurationError      the embedding program's fault: fix the declaration and start again
|   `-- RegistrationError   an operation was declared twice, or after the start
|-- NotRunning              the Spine is not started, already stopped, or asked from another event loop
|-- SpineFailed             supervision gave up: restart the process and read the crash report
|-- Overloaded              the spine mailbox is full: ask again later or with ``wait=True``
|-- DeadlineExceeded        the answer did not come in time; the work may have ended since
|-- ActorCrashed            the actor crashed on a message; the message is not retried
|-- MailboxClosed           the mailbox takes no more messages: the Spine is stopping
|-- LoopThreadError         a synchronous shim was called on an event loop's thread
`-- JournalError            the record
    |-- JournalUnavailable  the database refuses writes: see its cause and free it
    |-- JournalBroken       the stored record contradicts itself: run ``spine verify``
    `-- SchemaMismatch      the database was written by another version of Spine
"""

from __future__ import annotations


def message_of(error: BaseException) -> str:
    """The text of an exception, even of a foreign one whose text cannot be made."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  foreign code: an error about an error must not hide it
        return "<its text cannot be shown>"


def describe(error: BaseException) -> str:
    """The type and text of an exception."""
    text = message_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def with_code(code: str | None, text: str | None) -> str:
    """A code and the text it stands for; a text that already begins with it, as ``describe`` makes one, as it is."""
    return text if text is not None and f"{text}: ".startswith(f"{code}: ") else f"{code}: {text}"


class SpineError(Exception):
    """Root of every error that Spine raises."""


class ConfigurationError(SpineError):
    """A declaration is wrong; the message names it and the remedy."""


class RegistrationError(ConfigurationError, RuntimeError):
    """An operation or rule was registered twice or after the start."""


class NotRunning(SpineError, RuntimeError):
    """The Spine cannot take a call in its present state."""


class SpineFailed(SpineError):
    """A child restarted more often than its supervisor allows; nothing is answered any more."""


class Overloaded(SpineError):
    """The bounded spine mailbox has no admission credit left."""


class DeadlineExceeded(SpineError, TimeoutError):
    """The deadline of a message passed before its reply."""


class ActorCrashed(SpineError):
    """The actor crashed while it held the message; restart ``restart`` follows. The message is not retried."""

    def __init__(self, actor: str, msg_id: str, restart: int, detail: str = "") -> None:
        cause = f" ({detail})" if detail else ""
        super().__init__(
            f"actor {actor!r} crashed while it held message {msg_id}{cause}; it is being restarted ({restart}), "
            "the message is not retried: ask again"
        )
        self.actor = actor
        self.msg_id = msg_id
        self.restart = restart
        self.detail = detail

    def __reduce__(self) -> tuple[type[ActorCrashed], tuple[str, str, int, str]]:
        return (ActorCrashed, (self.actor, self.msg_id, self.restart, self.detail))


class MailboxClosed(SpineError):
    """The mailbox is closed to new messages."""


class LoopThreadError(SpineError, RuntimeError):
    """A blocking call was made on the thread of a running event loop."""


class JournalError(SpineError):
    """The journal cannot do what was asked."""


class JournalUnavailable(JournalError):
    """The database does not take or give the record now."""


class JournalBroken(JournalError):
    """The stored record contradicts itself."""


class SchemaMismatch(JournalError):
    """The database's schema version is not the one this Spine writes."""
