"""The loader of batches, whose worker processes leave Ctrl-C and SIGTERM to the main one.

Both reach every process of a terminal or a job at once, but the main process needs its workers for
the step that it saves. It ends them itself, with a SIGTERM of its own where they are not done. A
worker whose main process was killed ends by itself, whatever it is at."""

import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

from torch.utils.data import DataLoader

# Elsewhere than on Linux, nothing tells a worker who has sent a signal.
_HELD = {signal.SIGINT, signal.SIGTERM} if sys.platform == "linux" else set()
_SECONDS_BETWEEN_LOOKS = 2.0


class StepLoader(DataLoader):
    """One item of the dataset is a whole batch."""

    def __init__(self, dataset: Any, workers: int, pin_memory: bool) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_obey_main,
        )

    def __iter__(self) -> Any:
        # Workers inherit what is held back, from their first moment on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_main(worker: int) -> None:
    if _HELD:
        threading.Thread(target=_end_when_main_says, daemon=True).start()


def _end_when_main_says() -> None:
    # PyTorch's own watch takes the parent that it finds for the main process, also where that is
    # gone by then, and it looks between two items only.
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        told = signal.sigtimedwait({signal.SIGTERM}, _SECONDS_BETWEEN_LOOKS)
        if told is not None and told.si_pid == parent.pid:
            break
    os._exit(0)
