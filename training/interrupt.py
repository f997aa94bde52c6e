"""Ctrl-C and SIGTERM as a question the training loop asks between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether a signal has asked to stop; a second one stops at once, as it does everywhere."""

    signum: int | None = None

    def _on(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def interrupt() -> Iterator[Interrupt]:
    """While inside, SIGINT and SIGTERM are noted instead of ending the program. Main thread only."""
    asked = Interrupt()
    handlers = {signum: signal.signal(signum, asked._on) for signum in (signal.SIGINT, signal.SIGTERM)}  # noqa: SLF001
    try:
        yield asked
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
