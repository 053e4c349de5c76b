"""A training stage as a Lightning module, and the callbacks that write curves and checkpoints.

Optimization is by hand, because a step's loss is one mean over all its parts: Lightning would
average the means of parts of unequal size."""

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from dvclive import Live
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from panollava.config import Trainer
from panollava.data import Reader, StepDataset
from panollava.errors import UserError


class StageObjective(Protocol):
    """What a stage optimises: see `vicreg` and `autoregressive`."""

    model: nn.Module
    readers: dict[str, Reader]

    def parameter_groups(self) -> list[dict]: ...
    def count(self, batch: Any) -> int: ...
    def step(self, parts: list, backward: Callable[[Tensor], None]) -> dict[str, Tensor]: ...
    def validate(self, parts: list) -> tuple[Tensor, int]: ...


class LitStage(pl.LightningModule):
    """One optimizer step a batch; a batch is a list of parts."""

    def __init__(
        self, objective: StageObjective, trainer: Trainer, epochs: int, accumulate: int
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective = objective
        self.settings = trainer
        self.accumulate = accumulate
        train = objective.readers["train"]
        self.total_steps = sum(len(train.plan(epoch)) for epoch in range(epochs))
        self.values: dict[str, float] = {}  # of the last step, for the curves
        self._validation: list[tuple[Tensor, int]] = []

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.current_epoch)

    def val_dataloader(self) -> DataLoader:
        return self._loader("valid", None)

    def _loader(self, split: str, epoch: int | None) -> DataLoader:
        dataset = StepDataset(self.objective.readers[split], epoch, self.accumulate)
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.settings.workers,
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

    def training_step(self, batch: list, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        result = self.objective.step(batch, self.manual_backward)
        trained = [p for group in optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.clip)
        if not torch.isfinite(result["loss"] + norm):
            raise UserError(
                f"step {self.global_step}: the loss is {result['loss'].item()} and its "
                f"gradient's norm {norm.item()}; nothing of this run is kept. Lower the stage's "
                "learning rate, or use trainer.precision 32-true"
            )
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr, call-arg]
        self.values = {
            **{f"train/{name}": value for name, value in result.items()},  # type: ignore[dict-item]
            "train/learning_rate": rate,
            "train/gradient_norm": norm,  # type: ignore[dict-item]
        }
        self.log("loss", result["loss"], prog_bar=True, logger=False)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self._validation.append(self.objective.validate(batch))

    def on_validation_epoch_end(self) -> None:
        total, count = zip(*self._validation, strict=True)
        self._validation = []
        loss = torch.stack(total).sum() / sum(count)
        if not torch.isfinite(loss):
            raise UserError(
                f"after step {self.global_step}: the validation loss is {loss.item()}; "
                "nothing of this run is kept. Lower the stage's learning rate"
            )
        self.log("val_loss", loss, prog_bar=True, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Frozen parts stay out of the checkpoint: they come from their own files."""
        trained = self._trained()
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in trained
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, trained = checkpoint["state_dict"], self._trained()
        if saved.keys() != trained:
            odd = sorted(saved.keys() ^ trained)[0]
            raise UserError(f"the checkpoint is of another model: '{odd}' is in one of them alone")
        checkpoint["state_dict"] = {**self.state_dict(), **saved}

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


def _by_decay(parameters: list, decay: float) -> list[tuple[list, float]]:
    """Trained weights decay; biases and the scales of norms do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [([p for p in trained if p.ndim > 1], decay), ([p for p in trained if p.ndim < 2], 0.0)]


SCHEDULES: dict[str, Callable[[float], float]] = {  # by the share of steps done after warm-up
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


class Curves(pl.Callback):
    """DVCLive's curves of a stage, the same for the same inputs."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.live = open_live(folder)

    def write(self, step: int, values: dict[str, float], plot: bool = True) -> None:
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value, plot=plot)
        self.live.make_summary()

    def on_train_batch_end(self, trainer: pl.Trainer, module: LitStage, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step == 1 or step % self.every == 0 or trainer.is_last_batch:
            self.write(trainer.global_step, {k: float(v) for k, v in module.values.items()})

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.write(trainer.global_step, {"val/loss": float(trainer.callback_metrics["val_loss"])})


class Speed(pl.Callback):
    """Rows a second and peak memory, which differ from run to run, in a folder of their own."""

    def __init__(self, folder: Path, every: int) -> None:
        self.every, self.live = every, open_live(folder)
        self.rows, self.since = 0, time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.rows, self.since = 0, time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: LitStage, outputs: Any, batch: list, batch_idx: int
    ) -> None:
        self.rows += sum(module.objective.count(part) for part in batch)
        if trainer.global_step % self.every == 0 or trainer.is_last_batch:
            now = time.perf_counter()
            self.live.step = trainer.global_step
            self.live.log_metric("rows_per_second", self.rows / (now - self.since))
            self.live.log_metric("peak_memory_gb", peak_memory(module.device) / 1e9)
            self.live.make_summary()
            self.rows, self.since = 0, now


class BestEpochs(ModelCheckpoint):
    """Keeps the best epochs by validation loss. Its own state names paths, so none is saved."""

    def __init__(self, folder: Path, keep: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="{epoch:02d}-{val_loss:.3f}",
            monitor="val_loss",
            save_top_k=keep,
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def open_live(folder: Path) -> Live:
    return Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU that trains, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
