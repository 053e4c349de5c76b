"""A training stage as a Lightning module, and the callbacks that write curves and checkpoints.

Optimization is by hand, because a step's loss is one mean over all its parts: Lightning would
average the means of parts of unequal size."""

import logging
import math
import pickle
import resource
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from dvclive import Live
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from panollava.config import Machine, Trainer
from panollava.data import Reader, StepDataset
from panollava.errors import UserError
from panollava.files import whole
from panollava.tracking import Track

log = logging.getLogger(__name__)


class StageObjective(Protocol):
    """What a stage optimises: see `vicreg` and `autoregressive`."""

    model: nn.Module
    readers: dict[str, Reader]

    def open_readers(self) -> None: ...
    def blank(self, panoramas: list) -> Any: ...
    def parameter_groups(self) -> list[dict]: ...
    def count(self, batch: Any) -> int: ...
    def step(self, parts: list, backward: Callable[[Tensor], None]) -> dict[str, Tensor]: ...
    def validate(self, parts: list) -> tuple[dict[str, Tensor], int]: ...


class LitStage(pl.LightningModule):
    """One optimizer step a batch; a batch is a list of parts.

    It counts its own epochs and steps and goes on from any of its checkpoints by itself, so that
    a run in several pieces leaves the same bytes as a run in one."""

    def __init__(
        self,
        objective: StageObjective,
        trainer: Trainer,
        machine: Machine,
        epochs: int,
        accumulate: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective = objective
        self.settings = trainer
        self.loader_workers = machine.loader_workers
        self.accumulate = accumulate
        self.seed = seed
        train = objective.readers["train"]
        self.epoch_steps = [len(train.plan(epoch)) for epoch in range(epochs)]
        self.total_steps = sum(self.epoch_steps)
        self.epoch = 0  # that is being trained
        self.epoch_step = 0  # steps done of it
        self.step = 0  # steps done in all
        self.values: dict[str, Tensor | float] = {}  # of the last step, for the curves
        self.history: list[tuple[int, dict[str, float]]] = []  # the curves so far
        self.best: list[tuple[float, int]] = []  # (validation loss, epoch), the best first
        self._validation: list[tuple[dict[str, Tensor], int]] = []
        self._optimizer_state: dict[str, Any] | None = None

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.epoch, self.epoch_step)

    def val_dataloader(self) -> DataLoader:
        return self._loader("valid", None, 0)

    def _loader(self, split: str, epoch: int | None, start: int) -> DataLoader:
        dataset = StepDataset(self.objective.readers[split], epoch, self.accumulate, start)
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.loader_workers,
            pin_memory=self.device.type == "cuda",
        )

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": chosen, "lr": group["lr"], "weight_decay": decay}
            for group in self.objective.parameter_groups()
            for chosen, decay in _by_decay(group["params"], self.settings.weight_decay)
            if chosen
        ]
        betas = (self.settings.beta1, self.settings.beta2)
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused)
        warmup = max(1, round(self.settings.warmup * self.total_steps))
        decay = SCHEDULES.get(self.settings.schedule)
        if decay is None:
            raise UserError(
                f"trainer.schedule: unknown schedule '{self.settings.schedule}'; "
                f"known are {', '.join(SCHEDULES)}"
            )

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return decay((step - warmup) / max(1, self.total_steps - warmup))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        if self._optimizer_state is not None:
            self.optimizers().optimizer.load_state_dict(self._optimizer_state["optimizer"])  # type: ignore[union-attr]
            self.lr_schedulers().load_state_dict(self._optimizer_state["scheduler"])  # type: ignore[union-attr]
            self._optimizer_state = None

    def training_step(self, batch: list, batch_idx: int) -> None:
        # Whatever is random in a step depends on the seed and the step alone.
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        result = self.objective.step(batch, self.manual_backward)
        trained = [p for group in optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.clip)
        if not torch.isfinite(result["loss"] + norm):
            raise UserError(
                f"step {self.step + 1}: the loss is {result['loss'].item()} and its "
                f"gradient's norm {norm.item()}; nothing of this run is kept. Lower the stage's "
                "learning rate, or use trainer.precision 32-true"
            )
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr]
        self.values = {
            **{f"train/{name}": value for name, value in result.items()},
            "train/learning_rate": rate,
            "train/gradient_norm": norm,
        }
        self.step += 1
        self.epoch_step += 1
        self.log("loss", result["loss"], prog_bar=True, logger=False)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self._validation.append(self.objective.validate(batch))

    def on_validation_epoch_end(self) -> None:
        sums, counts = zip(*self._validation, strict=True)
        self._validation = []
        for name in sums[0]:
            mean = torch.stack([own[name] for own in sums]).sum() / sum(counts)
            self.log(f"val_{name}", mean, prog_bar=True, logger=False)
            if not torch.isfinite(mean):
                raise UserError(
                    f"after step {self.step}: the validation {name} is {mean.item()}; "
                    "nothing of this run is kept. Lower the stage's learning rate"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds the trained parts, the optimizer and where the run stands, and
        nothing that differs between equal runs: no path, no time, no count of restarts."""
        trained = self._trained()
        weights = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        kept = {
            "epoch": self.epoch,
            "global_step": self.step,
            "pytorch-lightning_version": pl.__version__,
            "state_dict": weights,
            "optimizer_states": checkpoint["optimizer_states"],
            "lr_schedulers": checkpoint["lr_schedulers"],
            "epoch_step": self.epoch_step,
            "history": self.history,
            "best": self.best,
        }
        checkpoint.clear()
        checkpoint.update(_canonical(kept))

    def go_on_from(self, saved: dict[str, Any], path: Path) -> None:
        """Take up a run where its checkpoint left it. `saved` is what `path` holds.

        Raises:
            UserError: the checkpoint is of another model.
        """
        self.load_trained(saved["state_dict"], path)
        self.epoch, self.epoch_step = saved["epoch"], saved["epoch_step"]
        self.step = saved["global_step"]
        self.history = [(step, values) for step, values in saved["history"]]
        self.best = [(loss, epoch) for loss, epoch in saved["best"]]
        self._optimizer_state = {
            "optimizer": saved["optimizer_states"][0],
            "scheduler": saved["lr_schedulers"][0],
        }

    def load_trained(self, weights: dict[str, Tensor], path: Path) -> None:
        """Load the trained parameters of a checkpoint, all of them and no other."""
        own = dict(self.named_parameters())
        if odd := sorted(weights.keys() ^ self._trained()):
            raise UserError(f"{path}: of another model: '{odd[0]}' is in one of them alone")
        for name, value in weights.items():
            if own[name].shape != value.shape:
                raise UserError(
                    f"{path}: of another model: '{name}' has shape {tuple(value.shape)}, "
                    f"expected {tuple(own[name].shape)}"
                )
            own[name].data.copy_(value)

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


def _by_decay(parameters: list, decay: float) -> list[tuple[list, float]]:
    """Trained weights decay; biases and the scales of norms do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [([p for p in trained if p.ndim > 1], decay), ([p for p in trained if p.ndim < 2], 0.0)]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values alone. Raises UserError for a missing, damaged or foreign file."""
    try:
        if not zipfile.is_zipfile(path) and path.is_file():  # torch.load fails on such in many ways
            raise EOFError("no zip archive, as torch.save writes it, or cut off")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: damaged, or no checkpoint ({reason}); a run that goes on leaves it out"
        ) from None
    if not isinstance(saved, dict) or not {"state_dict", "epoch_step", "best"} <= saved.keys():
        raise UserError(f"{path}: not a checkpoint of PanoLLaVA")
    return saved


def _canonical(tree: Any) -> Any:
    """Equal values in equal bytes: pickle writes an object that it has met before as a reference,
    so that equal trees differ where one of them shares a string or a tuple."""
    if isinstance(tree, dict):
        return {_canonical(key): _canonical(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_canonical(value) for value in tree]
    if isinstance(tree, Tensor):
        own = tree.detach().cpu()
        return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
    return sys.intern(tree) if type(tree) is str else tree


SCHEDULES: dict[str, Callable[[float], float]] = {  # by the share of steps done after warm-up
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


class Curves(pl.Callback):
    """DVCLive's curves of a stage, the same for the same inputs."""

    def __init__(self, folder: Path, every: int, track: Track) -> None:
        self.every, self.track = every, track
        self.live = open_live(folder)

    def write(self, step: int, values: dict[str, float], plot: bool = True) -> None:
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value, plot=plot)
        self.live.make_summary()
        self.track(step, values)

    def _record(self, module: LitStage, values: dict[str, float]) -> None:
        module.history.append((module.step, values))
        self.write(module.step, values)

    def on_train_batch_end(self, trainer: pl.Trainer, module: LitStage, *_: Any) -> None:  # type: ignore[override]
        last = module.epoch_step == module.epoch_steps[module.epoch]
        if module.step == 1 or module.step % self.every == 0 or last:
            self._record(module, {name: float(value) for name, value in module.values.items()})

    def on_validation_end(self, trainer: pl.Trainer, module: LitStage) -> None:  # type: ignore[override]
        values = trainer.callback_metrics
        names = (name for name in values if name.startswith("val_"))
        self._record(module, {name.replace("_", "/", 1): float(values[name]) for name in names})


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
                log.warning("%s", error)
                continue
            module.go_on_from(saved, file)
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
        module.best = sorted([*module.best, entry])[: max(1, self.keep)]
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
        with whole(Path(path)) as beside, beside.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own, on top of the file's
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


class Speed(pl.Callback):
    """Rows a second and peak memory, which differ from run to run, in a folder of their own."""

    def __init__(self, folder: Path, every: int, track: Track) -> None:
        self.every, self.live, self.track = every, open_live(folder), track
        self.rows, self.since = 0, time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.rows, self.since = 0, time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: LitStage, outputs: Any, batch: list, batch_idx: int
    ) -> None:
        self.rows += sum(module.objective.count(part) for part in batch)
        if module.step % self.every == 0 or trainer.is_last_batch:
            now = time.perf_counter()
            values = {
                "rows_per_second": self.rows / (now - self.since),
                "peak_memory_gb": peak_memory(module.device) / 1e9,
            }
            self.live.step = module.step
            for name, value in values.items():
                self.live.log_metric(name, value)
            self.live.make_summary()
            self.track(module.step, values)
            self.rows, self.since = 0, now


def open_live(folder: Path) -> Live:
    return Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU that trains, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
