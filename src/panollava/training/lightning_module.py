"""A training stage as a Lightning module.

Uses Lightning's manual optimization: a step's loss is one mean over all its parts, whereas
Lightning's gradient accumulation averages the means of parts of unequal size."""

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from panollava.config import Settings
from panollava.data.batches import StepBatch, StepDataset, StepLoader, tree_sum
from panollava.data.epoch_plan import PlanSize
from panollava.data.shapes import Shape, choose_shapes, describe
from panollava.errors import UserError
from panollava.model import ranks
from panollava.model.weights import copy_strictly
from panollava.stages import Stage
from panollava.training.cuda_graphs import StepGraphs, make_recorder, needs_few_shapes
from panollava.training.objective import StageObjective, checked_groups

log = logging.getLogger(__name__)


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
        sizes: list[PlanSize] = []
        parts: Counter[Shape] = Counter()  # sizes of training parts
        # The first epoch last, because the reader keeps the last plan.
        for epoch in reversed(range(stage_settings.epochs)):
            plan = train.plan(epoch)
            sizes.insert(0, plan.size)
            if needs_few_shapes(self.settings):
                parts.update(train.sizes(plan, self.accumulate))
        self.epoch_steps = [size.steps for size in sizes]
        self.size = PlanSize(*map(sum, zip(PlanSize(0, 0, 0), *sizes, strict=True)))
        self.total_steps = self.size.steps
        self.patience = stage_settings.patience
        self.epoch = 0  # the current one
        self.epoch_step = 0  # completed steps of this epoch
        self.step = 0  # completed steps
        self.values: dict[str, Tensor | float] = {}  # the curves' values at the last step
        self.history: list[tuple[int, dict[str, float]]] = []  # (step, the curves' values)
        self.best: list[tuple[float, int]] = []  # (validation loss, epoch) of the best epochs
        self._validation: list[tuple[dict[str, Tensor], int]] = []
        self._restored: tuple[dict, dict] | None = None  # states of optimizer and scheduler
        self.graphs: StepGraphs | None = None
        self.shapes: list[Shape] = []  # that training parts are padded to; none: their own
        if parts:
            self.shapes = choose_shapes(parts)
            log.info("parts of a step have %s", describe(self.shapes, parts))

    @property
    def epochs_left(self) -> int:
        return 0 if self.stops_early else len(self.epoch_steps) - self.epoch

    @property
    def stops_early(self) -> bool:
        """Whether the lowest validation loss, that of the start included, is `patience` epochs old.
        It depends only on the history, so that a resumed run stops at the same epoch."""
        losses = [values["val/loss"] for _, values in self.history if "val/loss" in values]
        if self.patience is None or not losses or self.epoch == len(self.epoch_steps):
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def train_dataloader(self) -> DataLoader:
        steps = slice(self.epoch_step, None)
        return self._loader("train", self.epoch, steps, self.own_parts)

    def val_dataloader(self) -> DataLoader:
        steps = slice(self.rank, None, self.ranks)  # ranks take them in turn
        return self._loader("valid", None, steps, range(self.accumulate))

    def _loader(self, split: str, epoch: int | None, steps: slice, parts: range) -> DataLoader:
        reader, shapes = self.objective.readers[split], self.shapes if split == "train" else ()
        dataset = StepDataset(reader, epoch, self.accumulate, steps, parts, shapes)
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
        capturable = self.settings.cuda_graphs and self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused, capturable=capturable)
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
        recorder = self.settings.cuda_graphs and make_recorder(self.device)
        if recorder and self.ranks > 1 and self.objective.joint:
            log.warning("trainer.cuda_graphs: steps are not recorded: their devices exchange parts")
        elif recorder:
            raw: Any = self.optimizers().optimizer  # type: ignore[union-attr]
            arguments = (self.objective, raw, self.settings, self.step, self._gather, recorder)
            self.graphs = StepGraphs(*arguments)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        if self.graphs:
            return self.graphs.recorder.transfer(batch, device)
        return super().transfer_batch_to_device(batch, device, index)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}  # type: ignore[union-attr]
        values, norm = self._replay(batch) if self.graphs else self._update(batch, optimizer)
        result = dict(zip(self.objective.curves, values, strict=True))
        scheduler.step()  # type: ignore[union-attr]
        self.values = {
            **{f"train/{name}": value for name, value in result.items()},
            **{f"train/learning_rate/{name}": rate for name, rate in rates.items()},
            "train/gradient_norm": norm,
        }
        self.step += 1
        self.epoch_step += 1
        if not self.graphs or self.step % self.settings.log_every == 0:
            self.check_finite()
            self.log("loss", result["loss"], prog_bar=True, logger=False)

    def _update(self, batch: StepBatch, optimizer: Any) -> tuple[Tensor, Tensor]:
        """Take an optimizer step. Returns the step's values and its gradient norm."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        seeds = part_seeds(self.seed, self.step, self.own_parts)
        terms = self.objective.terms(batch, seeds, self._gather)
        sums = (self._differentiate(each, trained) for each in terms)
        own = tree_sum(sums, len(batch.parts))
        *gradients, values = self._sum_over_ranks(own, trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.clip)
        if not torch.isfinite(values[0] + norm):
            raise not_finite(self.step + 1, values[0].item(), norm.item(), _faulty_ranks(own))
        optimizer.step()
        return values, norm

    def _replay(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """The same step by recorded programs."""
        assert self.graphs is not None
        seeds = part_seeds(self.seed, self.step, self.own_parts)
        own = tree_sum(self.graphs.parts(batch, seeds), len(batch.parts))
        self.graphs.update(self._sum_over_ranks(own, self.graphs.trained))
        return self.graphs.values, self.graphs.norm

    def _sum_over_ranks(self, own: Any, trained: list[torch.nn.Parameter]) -> Any:
        if self.ranks == 1:
            return own
        if self.settings.compile or self.graphs:  # for shapes that are new to another rank
            ranks.expect_slow_start()
        values = torch.empty(len(self.objective.curves), device=self.device)
        return ranks.sum_in_pairs(own, [*trained, values])

    def check_finite(self) -> None:
        """Raises UserError if a loss or gradient norm was not finite since the last call."""
        if self.graphs and (fault := self.graphs.find_fault()):
            raise not_finite(*fault)

    def _gather(self, tensors: list[Tensor]) -> tuple[Tensor, int]:
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
        # Without compiled layers: a program for each of its many shapes would take long.
        eager = torch.compiler.set_stance("force_eager") if self.shapes else nullcontext()
        with eager:
            self._validation.append(self.objective.validate(parts))

    def on_validation_start(self) -> None:
        self.check_finite()

    def on_validation_epoch_end(self) -> None:
        steps = len(self.objective.readers["valid"].plan(None))
        own = [({name: v.cpu() for name, v in sums.items()}, n) for sums, n in self._validation]
        of_ranks = ranks.gather(own) if self.ranks > 1 else [own]
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
        self.check_finite()
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


def _faulty_ranks(own: list[Tensor] | None) -> str:
    """Names the ranks whose values are not finite, if there are several. All ranks call it."""
    if ranks.count() == 1:
        return ""
    each = ranks.gather(all(t is None or bool(t.isfinite().all()) for t in own or []))
    faulty = [str(rank) for rank, finite in enumerate(each) if not finite]
    return f", rank {', '.join(faulty)}" if faulty else ", sum over ranks"


def not_finite(step: int, loss: float, norm: float, who: str = "") -> UserError:
    return UserError(
        f"step {step}{who}: loss is {loss} (gradient norm {norm}); this run is discarded. Lower "
        "the stage's learning rate, or set trainer.precision to 32-true"
    )


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
