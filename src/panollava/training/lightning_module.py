"""A training stage as a Lightning module.

Optimization is by hand, because a step's loss is one mean over all its parts: Lightning would
average the means of parts of unequal size."""

import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from panollava.config import Machine, Trainer
from panollava.data.batches import StepDataset, StepLoader
from panollava.errors import UserError
from panollava.model.weights import copy_strictly
from panollava.training.objective import StageObjective

log = logging.getLogger(__name__)


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
        return StepLoader(dataset, self.loader_workers, pin_memory=self.device.type == "cuda")

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": chosen, "lr": group["lr"], "weight_decay": decay}
            for group in self.objective.parameter_groups()
            for chosen, decay in _by_decay(group["params"], self.settings.weight_decay)
            if chosen
        ]
        betas = (self.settings.beta1, self.settings.beta2)
        fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused)
        warmup = max(1, round(self.settings.warmup * self.total_steps))
        decay = SCHEDULES[self.settings.schedule]

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

    def resume_from(self, saved: dict[str, Any], path: Path) -> None:
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
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        copy_strictly(weights, trained, path)

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


def _by_decay(parameters: list, decay: float) -> list[tuple[list, float]]:
    """Trained weights decay; biases and the scales of norms do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [([p for p in trained if p.ndim > 1], decay), ([p for p in trained if p.ndim < 2], 0.0)]


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
