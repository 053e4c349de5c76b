"""A training stage as a Lightning module.

Uses Lightning's manual optimization: a step's loss is one mean over all its parts, whereas
Lightning's gradient accumulation averages the means of parts of unequal size."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from panollava.config import Settings
from panollava.data.batches import PlanSize, StepBatch, StepDataset, StepLoader, plan_size, tree_sum
from panollava.errors import UserError
from panollava.model import ranks
from panollava.model.weights import copy_strictly
from panollava.stages import Stage
from panollava.training.objective import StageObjective, checked_groups


class LitStage(pl.LightningModule):
    """One optimizer step per batch.

    Counts epochs and steps and restores checkpoints itself instead of leaving that to Lightning, so
    that an interrupted run gives the same bytes as an uninterrupted one."""

    def __init__(self, objective: StageObjective, settings: Settings, stage: Stage) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective, self.settings = objective, settings.trainer
        self.loader_workers, self.seed = settings.machine.loader_workers, settings.seed
        stage_settings = getattr(settings.stage, stage.name)
        self.accumulate = stage_settings.accumulate
        self.rank, self.ranks = ranks.rank(), ranks.count()
        share = self.accumulate // self.ranks
        self.own_parts = range(self.rank * share, (self.rank + 1) * share)
        train = objective.readers["train"]
        self.groups = checked_groups(objective)
        sizes = [plan_size(train.plan(epoch)) for epoch in range(stage_settings.epochs)]
        self.epoch_steps = [size.steps for size in sizes]
        self.size = PlanSize(*map(sum, zip(PlanSize(0, 0, 0), *sizes, strict=True)))
        self.total_steps = self.size.steps
        self.epoch = 0  # the current one
        self.epoch_step = 0  # completed steps of this epoch
        self.step = 0  # completed steps
        self.values: dict[str, Tensor | float] = {}  # the curves' values at the last step
        self.history: list[tuple[int, dict[str, float]]] = []  # (step, the curves' values)
        self.best: list[tuple[float, int]] = []  # (validation loss, epoch) of the best epochs
        self._validation: list[tuple[dict[str, Tensor], int]] = []
        self._restored: tuple[dict, dict] | None = None  # states of optimizer and scheduler

    def train_dataloader(self) -> DataLoader:
        steps = slice(self.epoch_step, None)
        return self._loader("train", self.epoch, steps, self.own_parts)

    def val_dataloader(self) -> DataLoader:
        steps = slice(self.rank, None, self.ranks)  # ranks take them in turn
        return self._loader("valid", None, steps, range(self.accumulate))

    def _loader(self, split: str, epoch: int | None, steps: slice, parts: range) -> DataLoader:
        dataset = StepDataset(self.objective.readers[split], epoch, self.accumulate, steps, parts)
        return StepLoader(dataset, self.loader_workers, pin_memory=self.device.type == "cuda")

    def configure_optimizers(self) -> Any:
        groups = [
            {**group, "params": chosen, "weight_decay": decay}
            for group in self.groups
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
        if self._restored is not None:
            optimizer, scheduler = self._restored
            self.optimizers().optimizer.load_state_dict(optimizer)  # type: ignore[union-attr]
            self.lr_schedulers().load_state_dict(scheduler)  # type: ignore[union-attr]
            self._restored = None

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        trained = [p for group in optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        seeds = part_seeds(self.seed, self.step, self.own_parts)
        terms = self.objective.terms(batch, seeds, self._gather)
        sums = (self._differentiate(each, trained) for each in terms)
        own = total = tree_sum(sums, len(batch.parts))
        if self.ranks > 1:
            values = torch.empty(len(self.objective.curves), device=self.device)
            total = ranks.sum_in_pairs(own, [*trained, values])
        *gradients, values = total
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        result = dict(zip(self.objective.curves, values, strict=True))
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.clip)
        if not torch.isfinite(result["loss"] + norm):
            raise UserError(
                f"step {self.step + 1}{_who(own)}: loss is {result['loss'].item()} (gradient norm "
                f"{norm.item()}); this run is discarded. Lower the stage's learning rate, or set "
                "trainer.precision to 32-true"
            )
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr]
        self.values = {
            **{f"train/{name}": value for name, value in result.items()},
            **{f"train/learning_rate/{name}": rate for name, rate in rates.items()},
            "train/gradient_norm": norm,
        }
        self.step += 1
        self.epoch_step += 1
        self.log("loss", result["loss"], prog_bar=True, logger=False)

    def _gather(self, tensors: list[Tensor]) -> tuple[Tensor, int]:
        if self.ranks == 1:
            return one_device(tensors)
        return ranks.gather_rows(tensors, self.device)

    def _differentiate(
        self, terms: tuple[Tensor, Tensor] | None, trained: list[torch.nn.Parameter]
    ) -> list[Tensor | None] | None:
        """A part's gradients, and after them its terms of the step's values."""
        if terms is None:
            return None
        loss, values = terms
        self.manual_backward(loss)
        gradients = [p.grad for p in trained]
        for parameter in trained:
            parameter.grad = None
        return [*gradients, values]

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        parts = [part for part in batch.parts if part is not None]
        self._validation.append(self.objective.validate(parts))

    def on_validation_epoch_end(self) -> None:
        steps = len(self.objective.readers["valid"].plan(None))
        own = [({name: v.cpu() for name, v in sums.items()}, n) for sums, n in self._validation]
        of_ranks = ranks.gather(own)
        of_steps = [of_ranks[step % self.ranks][step // self.ranks] for step in range(steps)]
        sums, counts = zip(*of_steps, strict=True)
        self._validation = []
        for name in sums[0]:
            of_each = torch.stack([values[name] for values in sums]).to(self.device)
            mean = of_each.sum() / sum(counts)
            self.log(f"val_{name}", mean, prog_bar=True, logger=False)
            if not torch.isfinite(mean):
                raise UserError(
                    f"after step {self.step}: validation {name} is {mean.item()}; this run is "
                    "discarded. Lower the stage's learning rate, or at step 0 check the weights "
                    "that the stage starts from"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained parts, the optimizer and the progress; drop what differs between equal
        runs, such as paths, times and the number of restarts."""
        trained = self._trained()
        kept = {
            "epoch": self.epoch,
            "global_step": self.step,
            "pytorch-lightning_version": pl.__version__,
            "state_dict": {k: v for k, v in checkpoint["state_dict"].items() if k in trained},
            "optimizer_states": checkpoint["optimizer_states"],
            "lr_schedulers": checkpoint["lr_schedulers"],
            "epoch_step": self.epoch_step,
            "history": self.history,
            "best": self.best,
        }
        checkpoint.clear()
        checkpoint.update(_canonical(kept))

    def resume_from(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Restore weights, optimizer and progress from `checkpoint`, the content of `path`.

        Raises:
            UserError: the checkpoint does not match this model.
        """
        self.load_trained(checkpoint["state_dict"], path)
        self.epoch, self.epoch_step = checkpoint["epoch"], checkpoint["epoch_step"]
        self.step = checkpoint["global_step"]
        self.history = [(step, values) for step, values in checkpoint["history"]]
        self.best = [(loss, epoch) for loss, epoch in checkpoint["best"]]
        self._restored = checkpoint["optimizer_states"][0], checkpoint["lr_schedulers"][0]

    def load_trained(self, weights: dict[str, Tensor], path: Path) -> None:
        """Load the trained parameters from `weights`, which must hold exactly those.

        Raises:
            UserError: a parameter is missing, unexpected, or has another shape.
        """
        copy_strictly(weights, self._trained(), path)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def part_seeds(seed: int, step: int, parts: range) -> list[int]:
    """Seeds of the random numbers of a step's parts: functions of seed, step and the part's number.
    They differ in the 32 bits that a processor's generator reads."""
    return [seed * 1_000_003 + step + 2_654_435_769 * part for part in parts]


def _who(own: list[Tensor] | None) -> str:
    """Which ranks have values that are not finite, if there are several. All ranks ask together."""
    if ranks.count() == 1:
        return ""
    each = ranks.gather(all(t is None or bool(t.isfinite().all()) for t in own or []))
    faulty = [str(rank) for rank, finite in enumerate(each) if not finite]
    return f", rank {', '.join(faulty)}" if faulty else ", sum over ranks"


def one_device(tensors: list[Tensor]) -> tuple[Tensor, int]:
    """All rows, and the number of this device's first one."""
    return torch.cat(tensors), 0


def _by_decay(parameters: list, decay: float) -> list[tuple[list, float]]:
    """Weight decay applies to trained matrices, but not to biases and the scales of norms."""
    trained = [p for p in parameters if p.requires_grad]
    return [([p for p in trained if p.ndim > 1], decay), ([p for p in trained if p.ndim < 2], 0.0)]


def _canonical(tree: Any) -> Any:
    """A copy whose pickle depends only on its values. Pickle writes a repeated object as a
    reference, so that equal trees differ if one of them shares strings or tuples."""
    if isinstance(tree, dict):
        return {_canonical(key): _canonical(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_canonical(value) for value in tree]
    if isinstance(tree, Tensor):
        tensor = tree.detach().cpu()
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    return sys.intern(tree) if type(tree) is str else tree


SCHEDULES: dict[str, Callable[[float], float]] = {  # of the progress after the warm-up, 0 to 1
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
