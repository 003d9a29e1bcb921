"""SIGTERM and SIGINT as a request that the training loop answers between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state.

    Args:
        signum: The signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopRequest:
    """Inside the `with`, SIGTERM and SIGINT are noted and not acted on; a second SIGINT kills as usual."""

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, signal._HANDLER] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signum = signum

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
