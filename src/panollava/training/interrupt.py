"""Ctrl-C, SIGTERM and SIGUSR1 (SLURM's, before a job's time ends) during training: the first one
requests a stop after the current step, the second one stops at once."""

import logging
import signal
from typing import Any

from panollava.model import ranks

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """Handles the signals between `listen` and `restore`. Lightning's handlers would stop in the
    middle of a step, or before its validation."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        self.restore()  # if it listens already
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Restore the previous handlers."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, *_: Any) -> None:
        if ranks.rank():  # rank 0 tells the others when to stop
            return
        if self.requested:
            self.restore()
            raise KeyboardInterrupt
        self.requested = True
        log.info("stopping after this step; press Ctrl-C again to stop now")
