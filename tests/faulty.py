"""`panollava` with a fault: at the third step of a training, FAULT happens to one rank.

FAULT=kill python tests/faulty.py train vision"""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import torch

from panollava.cli.main import main
from panollava.model import ranks
from panollava.training.checkpoints import AtomicCheckpointIO
from panollava.training.lightning_module import LitStage

_differentiate, _save = LitStage._differentiate, AtomicCheckpointIO.save_checkpoint


done: list[str | None] = []


def differentiate(self: LitStage, *arguments: Any) -> Any:
    fault, first = os.environ.get("FAULT"), self.rank == 0
    result: Any = _differentiate(self, *arguments)
    if self.step == 2 and not done:
        done.append(fault)
        Path("fault").touch()
        if fault == "terminate" and first:
            os.kill(os.getpid(), signal.SIGTERM)
    if self.step == 2 and not first:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "error":
            raise ValueError("a fault of the program")
        if fault == "nan" and result is not None:
            result[-1] = torch.full_like(result[-1], float("nan"))
    return result


def save(self: AtomicCheckpointIO, checkpoint: dict, *arguments: Any, **named: Any) -> None:
    if os.environ.get("FAULT") == "full" and checkpoint["global_step"] == 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "progress.ckpt")
    _save(self, checkpoint, *arguments, **named)


LitStage._differentiate = differentiate  # type: ignore[method-assign, assignment]
AtomicCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]
ranks.PATIENCE = 5.0

if __name__ == "__main__":
    main()
