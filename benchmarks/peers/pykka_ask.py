"""Pykka's nested ask: a caller asks actor A, which asks actor B and replies with its answer."""

from __future__ import annotations

from typing import Any

import pykka

from benchmarks.side import arguments, report, thread_rate


class Inner(pykka.ThreadingActor):
    """Answers at once."""

    def on_receive(self, message: Any) -> Any:
        return message


class Outer(pykka.ThreadingActor):
    """Asks the inner actor and hands its answer on."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._inner = inner

    def on_receive(self, message: Any) -> Any:
        return self._inner.ask(message)


def main() -> None:
    options = arguments()
    inner = Inner.start()
    outer = Outer.start(inner)
    message = {"n": 1}
    try:
        thread_rate(lambda: outer.ask(message), 1, options.seconds / 5)
        alone = thread_rate(lambda: outer.ask(message), 1, options.seconds)
        many = thread_rate(lambda: outer.ask(message), 100, options.seconds)
    finally:
        outer.stop()
        inner.stop()
    report({"ask_alone_us": 1e6 / alone, "ask_100": many})


if __name__ == "__main__":
    main()
