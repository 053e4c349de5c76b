"""Many trainings of one stage at once: replicas that differ in seed or in the weights they start
from, computed together by `torch.func.vmap` over the package's own modules.

Parameters that are trained, or that differ between replicas, are stacked in one tensor each; the
frozen language model is shared. Each replica has the objective, the plan, the optimizer and the
schedule that `panollava train` gives it, and so the same losses and weights to rounding."""

import copy
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map_only

from helpers import save_shards
from panollava import paths
from panollava.config import Settings
from panollava.data.batches import gather
from panollava.data.epoch_plan import Step
from panollava.data.packing import IGNORED
from panollava.data.shards import open_views
from panollava.errors import UserError
from panollava.model.generate import answer
from panollava.model.precision import autocast
from panollava.model.weights import load_start, parts_in
from panollava.stages import STAGES, Stage
from panollava.training.lightning_module import LitStage
from panollava.training.objective import load_objective, prepare_parts
from stacked_batches import stack_batches

ENCODED = 8  # panoramas encoded at once
VALIDATED = 4  # steps of validation in one batch; their loss is a sum over tokens


class Replicas:
    """Replicas of `stage`, one for each of `settings` (equal but for the seed) and `starts`."""

    def __init__(
        self,
        stage: Stage,
        settings: Sequence[Settings],
        starts: Sequence[Path | None],
        device: torch.device,
    ) -> None:
        parts = () if starts[0] is None else parts_in(starts[0])
        stage = stage.configured(getattr(settings[0].stage, stage.name), parts)
        self.stage, self.settings, self.device = stage, settings[0], device
        self.seeds = [each.seed for each in settings]
        self.objectives = [
            self._objective(each, start) for each, start in zip(settings, starts, strict=True)
        ]
        self.objective = self.objectives[0]  # its modules compute for all
        self.modules: list[LitStage] = []
        self._each_settings = settings
        self._validation: list[tuple[Any, Tensor]] = []
        self._stack()

    def _objective(self, settings: Settings, start: Path | None) -> Any:
        objective = load_objective(self.stage, settings)
        if start is not None:
            before = STAGES[self.stage.starts_from or ""]
            load_start(start, objective.model, (*parts_in(start),), before)
        prepare_parts(objective.model, self.stage, settings.trainer.precision, False)
        return objective.to(self.device)

    def _stack(self) -> None:
        """Stack parameters; those of each objective become slices, those that are equal are
        shared."""
        self.stacked: dict[str, Tensor] = {}
        named = [dict(objective.named_parameters()) for objective in self.objectives]
        for name, first in named[0].items():
            each = [parameters[name] for parameters in named]
            if not first.requires_grad and all(torch.equal(first, other) for other in each):
                for other in each:
                    other.data = first.data
                continue
            stack = torch.stack([parameter.detach() for parameter in each])
            self.stacked[name] = stack.requires_grad_(first.requires_grad)
            for parameter, values in zip(each, stack.detach(), strict=True):
                parameter.data = values
        self.trained = {n: stack for n, stack in self.stacked.items() if stack.requires_grad}
        self.parameters = [{name: p[name] for name in self.trained} for p in named]

    def compute(self, function: Callable, *inputs: Any, shared: bool = False) -> Any:
        """`function(objective, *inputs)` of every replica. The tensors in `inputs` and in the
        result have a leading axis of replicas; `shared` inputs have none."""
        caller = _Caller(self.objective, function)

        def of_one(parameters: dict[str, Tensor], inputs: Any) -> Any:
            # An adapter is one module at two places: replaced at both, it would not be restored.
            return functional_call(caller, parameters, inputs, tie_weights=False)

        stacked = {f"objective.{name}": stack for name, stack in self.stacked.items()}
        axes = (0, None if shared else 0)
        with autocast(self.device, self.settings.trainer.precision):
            return vmap(of_one, in_dims=axes, randomness="error")(stacked, inputs)

    def train(self) -> list[list[float]]:
        """Train all epochs, and keep the weights with the lowest validation loss. Returns the
        validation losses of the start and of each epoch, by replica; none without an epoch."""
        if not getattr(self.settings.stage, self.stage.name).epochs:
            return [[] for _ in self.objectives]
        self.open()
        history = [self.validate()]
        best = {name: stack.detach().clone() for name, stack in self.trained.items()}
        for epoch in range(len(self.modules[0].epoch_steps)):
            running = self._running(torch.stack(history))
            plans = [
                objective.readers["train"].plan(epoch) if runs else []
                for objective, runs in zip(self.objectives, running, strict=True)
            ]
            if not any(running):
                break
            for steps in zip_longest(*plans, fillvalue=()):
                self.step([list(step) for step in steps], epoch)
            losses = self.validate()
            better = losses < torch.stack(history).amin(dim=0)
            history.append(losses)
            for name, stack in self.trained.items():
                best[name][better] = stack.detach()[better]
        for name, stack in self.trained.items():
            stack.detach().copy_(best[name])
        return torch.stack(history, dim=1).tolist()

    def _running(self, losses: Tensor) -> list[bool]:
        """Whether each replica goes on, by `stage.*.patience`. `losses`: (epochs, replicas)."""
        patience = self.modules[0].patience
        waited = len(losses) - 1 - losses.argmin(dim=0)
        return [patience is None or epochs < patience for epochs in waited.tolist()]

    def open(self) -> None:
        """Open the readers of each replica, for the frozen encoder with its own features, and make
        its optimizer."""
        features = {}
        if self.stage.reads_features:
            features = {split: self.features(split) for split in ("train", "valid")}
        for replica, objective in enumerate(self.objectives):
            for split, values in features.items():
                save_shards(paths.FEATURES / split, values[replica], len(values[replica]))
            objective.open_readers()
            for split, values in features.items():  # those of the next replica take their place
                objective.readers[split].array = values[replica]
        self.modules = [
            LitStage(objective, settings, self.stage)
            for objective, settings in zip(self.objectives, self._each_settings, strict=True)
        ]
        self.optimizers = [module.configure_optimizers() for module in self.modules]

    def step(self, steps: list[Step], epoch: int) -> Tensor:
        """One optimizer step of each replica that has one; the others' steps are empty. Returns
        the losses, (replicas,)."""
        batch, counts = self._load("train", steps, epoch)
        losses = self.compute(_loss_sum, batch) / counts
        losses.sum().backward()
        for replica, step in enumerate(steps):
            if step:
                self._update(replica)
        for stack in self.trained.values():
            stack.grad = None
        return losses.detach()

    def _update(self, replica: int) -> None:
        parameters = self.parameters[replica]
        for name, parameter in parameters.items():
            gradient = self.trained[name].grad
            parameter.grad = None if gradient is None else gradient[replica]
        nn.utils.clip_grad_norm_(parameters.values(), self.settings.trainer.clip)
        optimization = self.optimizers[replica]
        optimization["optimizer"].step()
        optimization["lr_scheduler"].step()
        for parameter in parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def validate(self) -> Tensor:
        """Validation losses, (replicas,). Raises UserError for one that is not finite."""
        if not self._validation:
            steps = self.objective.readers["valid"].plan(None)
            joined = VALIDATED if hasattr(self.objective, "dialogue") else 1
            for at in range(0, len(steps), joined):
                part = [item for step in steps[at : at + joined] for item in step]
                self._validation.append(self._load("valid", [part] * len(self.objectives), None))
        sums = sum(self.compute(_loss_sum, batch) for batch, _ in self._validation)
        losses = sums / sum(counts for _, counts in self._validation)
        for seed, loss in zip(self.seeds, losses.tolist(), strict=True):
            if not np.isfinite(loss):
                raise UserError(
                    f"stage {self.stage.name}, seed {seed}: validation loss is {loss}; lower the "
                    "learning rate"
                )
        return losses

    def _load(self, split: str, steps: list[Step], epoch: int | None) -> tuple[Any, Tensor]:
        """A step of each replica as one batch, and what each replica's loss is divided by."""
        readers = [objective.readers[split] for objective in self.objectives]
        busy = next(at for at, step in enumerate(steps) if step)
        # A replica without a step repeats another one's, and is not updated.
        batches = [
            reader.load(step, epoch) if step else readers[busy].load(steps[busy], epoch)
            for reader, step in zip(readers, steps, strict=True)
        ]
        if isinstance(batches[0], Tensor):  # views, and every replica has the same number
            views = torch.stack(batches).to(self.device)
            return views, torch.full((len(views),), views.shape[1], device=self.device)
        stacked = stack_batches(batches)
        vision, packed = tree_map_only(Tensor, lambda each: each.to(self.device), stacked)
        return (vision, packed), (packed.labels != IGNORED).sum(dim=1)

    @torch.no_grad()
    def features(self, split: str) -> np.ndarray:
        """Features of a split's panoramas, or of the "rolled" ones, as `panollava features` rounds
        them: (replicas, panoramas, *shape, features)."""
        folder = paths.ROLLED if split == "rolled" else paths.PREPARED / split / paths.PANORAMAS
        views = open_views(folder, self.settings.views)
        chunks = [
            self.compute(
                lambda objective, views: objective.model.features(views),
                gather(views, [*range(at, min(at + ENCODED, len(views)))]).to(self.device),
                shared=True,
            )
            .float()
            .cpu()
            .numpy()
            .astype(self.settings.model.features)
            for at in range(0, len(views), ENCODED)
        ]
        return np.concatenate(chunks, axis=1)

    @torch.no_grad()
    def answers(self, features: np.ndarray, queries: list[list[str]]) -> list[list[list[str]]]:
        """Greedy answers of each replica to `queries[i]` about panorama i: [replica][panorama].
        `features`: (replicas, panoramas, ...)."""
        limit, results = self.settings.evaluate.max_new_tokens, []
        with autocast(self.device, self.settings.trainer.precision):
            if self._language_models_differ():
                # The cache of keys and values is written in place, which cannot be stacked.
                for objective, values in zip(self.objectives, features, strict=True):
                    given = torch.from_numpy(values).float().to(self.device)
                    results += answer(objective.model, objective.dialogue, given, queries, limit)
            else:
                given = torch.from_numpy(features).float().to(self.device)
                vision = self.compute(
                    lambda objective, features: objective.model.vision_tokens(features), given
                )
                # The language model is shared, so replicas are more panoramas of one batch.
                decoder = copy.copy(self.objective.model)
                decoder.vision_tokens = lambda tokens: tokens
                many = queries * len(self.objectives)
                results = answer(
                    decoder, self.objective.dialogue, vision.flatten(0, 1), many, limit
                )
        texts = [[each.text for each in of_panorama] for of_panorama in results]
        count = len(queries)
        return [texts[at : at + count] for at in range(0, len(texts), count)]

    def _language_models_differ(self) -> bool:
        """True if they have trained parts, such as adapters."""
        own = {id(parameter) for parameter in self.objective.model.language_model.parameters()}
        named = dict(self.objective.named_parameters())
        return any(id(named[name]) in own for name in self.stacked)


class _Caller(nn.Module):
    """Calls a function of a module, so that `functional_call` can replace its parameters."""

    def __init__(self, objective: nn.Module, function: Callable) -> None:
        super().__init__()
        self.objective, self.function = objective, function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.objective, *inputs)


def _loss_sum(objective: Any, batch: Any) -> Tensor:
    """Of one replica, summed over answer tokens or panoramas."""
    if isinstance(batch, Tensor):  # the same loss in training and in validation
        sums, _ = objective.validate([batch])
        return sums["loss"]
    vision, packed = batch
    features = vision if objective.reads_features else objective.model.features(vision)
    return objective.model.loss_sum(features, packed, objective.text_prefix)
