"""A training stage's checkpoints: when and how they are written, which are kept, and restoring the
latest."""

import logging
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from panollava.errors import UserError
from panollava.files import atomic_write
from panollava.model import ranks
from panollava.model.weights import read_checkpoint
from panollava.training.interrupt import Interrupt
from panollava.training.lightning_module import LitStage

log = logging.getLogger(__name__)


class Checkpoints(pl.Callback):
    """Saves the start with its validation, every `every` steps and after each epoch. Keeps the
    start and the `keep` best epochs by validation loss.

    Must come after `Curves`, so that a checkpoint holds the curves up to its step. After an
    `Interrupt` it saves the current step or validation, and raises KeyboardInterrupt."""

    def __init__(self, folder: Path, keep: int, every: int) -> None:
        self.folder, self.keep, self.every = folder, keep, every
        self.progress = folder / "progress.ckpt"
        self.start = folder / "start.ckpt"
        self.interrupt = Interrupt()

    def files(self, best: list[tuple[float, int]]) -> list[Path]:
        """The checkpoints of the best epochs, given as (validation loss, epoch)."""
        return [self.folder / f"epoch={epoch:02d}-val_loss={loss:.3f}.ckpt" for loss, epoch in best]

    def result(self, module: LitStage) -> Path:
        """The checkpoint with the lowest validation loss: the start, unless an epoch has a lower
        one than it."""
        _, start = module.history[0]
        best = module.best[0][0] < start["val/loss"]
        return self.files(module.best)[0] if best else self.start

    def restore(self, module: LitStage) -> bool:
        """Restore the latest intact checkpoint. Returns whether there was one.

        A checkpoint also counts as damaged if the start or one of its best epochs is. Damaged files
        are reported in a warning."""
        epochs = sorted(self.folder.glob("epoch=*.ckpt"), key=_epoch, reverse=True)
        for file in filter(Path.is_file, [self.progress, *epochs, self.start]):
            try:
                checkpoint = read_checkpoint(file)
                for needed in (self.start, *self.files(checkpoint["best"])):
                    read_checkpoint(needed)
            except UserError as error:
                log.warning("%s; resuming skips it", error)
                continue
            module.resume_from(checkpoint, file)
            return True
        return False

    def on_sanity_check_start(self, *_: Any) -> None:
        self.interrupt.listen()

    def on_train_start(self, *_: Any) -> None:
        self.interrupt.listen()

    def on_train_end(self, *_: Any) -> None:
        self.interrupt.restore()

    def on_exception(self, *_: Any) -> None:
        self.interrupt.restore()

    def on_train_batch_end(self, trainer: pl.Trainer, module: LitStage, *_: Any) -> None:  # type: ignore[override]
        stop = ranks.share(self.interrupt.requested)
        if (stop or module.step % self.every == 0) and not trainer.is_last_batch:
            trainer.save_checkpoint(self.progress)  # the last step is saved after validation
            self._raise_if(stop, module)

    def on_validation_end(self, trainer: pl.Trainer, module: LitStage) -> None:  # type: ignore[override]
        if trainer.sanity_checking:  # before the first step
            trainer.save_checkpoint(self.start)
            return self._raise_if(ranks.share(self.interrupt.requested), module)
        entry = (float(trainer.callback_metrics["val_loss"]), module.epoch)
        module.best = sorted([*module.best, entry])[: self.keep]
        module.epoch, module.epoch_step = module.epoch + 1, 0
        best, [file] = self.files(module.best), self.files([entry])
        trainer.save_checkpoint(file if file in best else self.progress)
        if trainer.is_global_zero:
            if file in best:  # it serves as the epoch's checkpoint and as progress
                self.progress.unlink(missing_ok=True)
            for other in {*self.folder.glob("epoch=*.ckpt")}.difference(best):
                other.unlink()
        trainer.should_stop = ranks.share(module.stops_early)  # rank 0 has the history
        self._raise_if(ranks.share(self.interrupt.requested), module)

    def _raise_if(self, stop: bool, module: LitStage) -> None:
        if stop:
            log.info("step %d of %d is saved (%s)", module.step, module.total_steps, self.folder)
            raise KeyboardInterrupt


def _epoch(file: Path) -> int:
    return int(re.findall(r"\d+", file.name)[0])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically next to their place. Lightning's own writer uses the system's
    temporary folder, which may be small, and leaves a copy there when it is killed."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        # Given a path, torch.save would write the file's name into it; given a file, it does not.
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own error hides that of the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
