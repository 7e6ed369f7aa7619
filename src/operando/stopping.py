"""Ctrl-C and SIGTERM: what trains ends its step, saves it, and says how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Asked to stop by a signal; what was to be saved is saved. Its text is for the user.

    No KeyboardInterrupt: of one typer makes an exit of 130 without a word.
    """

    def __init__(self, signum: int, text: str = "") -> None:
        super().__init__(text)
        self.exit_code = 128 + signum


def stop_now(signum: int, _frame: FrameType | None) -> None:
    """Signal handler: unwind from wherever the program is, so that nothing is left half-written."""
    raise Stopped(signum)


@contextmanager
def stops_after_step() -> Iterator[Callable[[], int]]:
    """Hold SIGINT and SIGTERM back; give a function that returns the one that came, or 0.

    The same signal again acts at once. Outside the main thread, where no handler can be set, none
    is held back.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def hold(signum: int, frame: FrameType | None) -> None:
        if signum in came:
            stop_now(signum, frame)
        came.append(signum)
        sys.stderr.write("stopping after this step (again: now)\n")

    former = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
