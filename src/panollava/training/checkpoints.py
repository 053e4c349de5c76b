"""A training stage's checkpoints: when they are written and how, and which are kept and read."""

import logging
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from panollava.errors import UserError
from panollava.files import atomic_write
from panollava.model.weights import read_checkpoint
from panollava.training.lightning_module import LitStage

log = logging.getLogger(__name__)


class Checkpoints(pl.Callback):
    """Keeps the best epochs by validation loss, and the point from which a killed run goes on.

    It comes after `Curves`, so that a checkpoint holds the curves up to itself. While it trains,
    Ctrl-C (or SIGTERM) ends the run with KeyboardInterrupt after the step, or the validation, that
    is being computed, and after that is saved; a second one ends it at once."""

    def __init__(self, folder: Path, keep: int, every: int) -> None:
        self.folder, self.keep, self.every = folder, keep, every
        self.progress = folder / "progress.ckpt"
        self.stopping = False
        self._handlers: dict[int, Any] = {}

    def files(self, best: list[tuple[float, int]]) -> list[Path]:
        """The checkpoints of the best epochs, the best first."""
        return [self.folder / f"epoch={epoch:02d}-val_loss={loss:.3f}.ckpt" for loss, epoch in best]

    def restore(self, module: LitStage) -> bool:
        """Take up the latest saved point whose files are all whole; False: there is none. Every
        epoch's checkpoint is such a point. Damaged ones are named in a warning."""
        epochs = sorted(self.folder.glob("epoch=*.ckpt"), reverse=True)
        for file in filter(Path.is_file, [self.progress, *epochs]):
            try:
                saved = read_checkpoint(file)
                for best in self.files(saved["best"]):
                    read_checkpoint(best)
            except UserError as error:
                log.warning("%s; resuming skips it", error)
                continue
            module.resume_from(saved, file)
            return True
        return False

    def on_train_start(self, *_: Any) -> None:
        # Lightning's own handlers stop in the middle of a step, or before its validation.
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        if self.stopping:
            self._restore_handlers()
            raise KeyboardInterrupt
        self.stopping = True
        log.info("stopping after this step; Ctrl-C once more stops at once")

    def _restore_handlers(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_train_end(self, *_: Any) -> None:
        self._restore_handlers()

    def on_exception(self, *_: Any) -> None:
        self._restore_handlers()

    def on_train_batch_end(self, trainer: pl.Trainer, module: LitStage, *_: Any) -> None:  # type: ignore[override]
        last = module.epoch_step == module.epoch_steps[module.epoch]
        if (module.step % self.every == 0 or self.stopping) and not last:
            trainer.save_checkpoint(self.progress)  # after the last comes validation
            self._stop_if_asked(module)

    def on_validation_end(self, trainer: pl.Trainer, module: LitStage) -> None:  # type: ignore[override]
        entry = (float(trainer.callback_metrics["val_loss"]), module.epoch)
        module.best = sorted([*module.best, entry])[: self.keep]
        module.epoch, module.epoch_step = module.epoch + 1, 0
        files = self.files(module.best)
        if entry in module.best:  # and what `restore` finds when there is no later progress
            trainer.save_checkpoint(files[module.best.index(entry)])
            self.progress.unlink(missing_ok=True)
        else:
            trainer.save_checkpoint(self.progress)
        for file in self.folder.glob("epoch=*.ckpt"):
            if file not in files:
                file.unlink()
        self._stop_if_asked(module)

    def _stop_if_asked(self, module: LitStage) -> None:
        if self.stopping:
            log.info("step %d of %d is saved (%s)", module.step, module.total_steps, self.folder)
            raise KeyboardInterrupt


class WholeFiles(TorchCheckpointIO):
    """Lightning's own goes through the system's folder for temporary files, which may be small,
    and leaves a copy there when it is killed."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        # To an opened file: what is written then doesn't depend on its name.
        with atomic_write(Path(path)) as beside, beside.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own, on top of the file's
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
