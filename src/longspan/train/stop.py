"""Turns SIGTERM and Ctrl-C into a wish to stop, heard between two steps."""

import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopWish"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopWish:
    """``with StopWish() as wish``: ``wish.heard`` is true once a signal has come."""

    def __init__(self) -> None:
        self.heard = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopWish":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
