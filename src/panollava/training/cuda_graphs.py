"""CUDA graphs: the forward and backward pass of each shape of a part, and the update of the
weights, are recorded once and then replayed, so that no GPU waits for kernels to be launched.

A recorded program reads and writes fixed buffers and never waits for the GPU. A step's values are
therefore read only every few steps, also whether they are finite."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from panollava.config import Trainer
from panollava.data.batches import StepBatch, tree_sum
from panollava.model.device import choose_device
from panollava.training.objective import Gather, StageObjective

log = logging.getLogger(__name__)

Program = Callable[[], None]

_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recorder:
    """Records programs as CUDA graphs that share one memory pool."""

    replays = True

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.side, self.copies = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def warm_up(self, program: Program) -> None:
        """Run it. The first run loads kernels and compiles layers, which cannot be recorded."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            program()
        torch.cuda.current_stream().wait_stream(self.side)

    def record(self, program: Program) -> Program:
        """A function that replays it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches in memory, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            program()
        return graph.replay

    def transfer(self, batch: Any, device: torch.device) -> Any:
        """Copy a batch from pinned memory while earlier steps still run."""
        with torch.cuda.stream(self.copies):
            moved = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
        current = torch.cuda.current_stream()
        current.wait_stream(self.copies)
        for tensor in _tensors(moved):
            tensor.record_stream(current)
        return moved


class Rerun:
    """Runs programs again instead of replaying them: for a model that cannot be recorded."""

    replays = False

    def warm_up(self, program: Program) -> None:
        program()

    def record(self, program: Program) -> Program:
        return program

    def transfer(self, batch: Any, device: torch.device) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def make_recorder(device: torch.device) -> Recorder | Rerun | None:
    """None for a processor, whose steps run as usual."""
    return Recorder(device) if device.type == "cuda" else None


def needs_few_shapes(trainer: Trainer) -> bool:
    """Whether each shape of a part is a program of its own, so that parts are padded to few."""
    repeats = trainer.cuda_graphs or trainer.compile
    return repeats and choose_device(trainer.accelerator).type == "cuda"


class Fault(NamedTuple):
    """A step whose loss or gradient norm is not finite."""

    step: int
    loss: float
    norm: float


class StepGraphs:
    """The programs of a stage's steps, and the buffers that they share."""

    def __init__(
        self,
        objective: StageObjective,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        step: int,
        gather: Gather,
        recorder: Recorder | Rerun,
    ) -> None:
        """`step`: completed steps."""
        self.objective, self.optimizer, self.trainer = objective, optimizer, trainer
        self.gather, self.recorder = gather, recorder
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = device = self.trained[0].device
        self.gradients = [torch.zeros_like(p) for p in self.trained]
        self.values = torch.zeros(len(objective.curves), device=device)  # of the last step
        self.results = [*self.gradients, self.values]
        self.norm = torch.zeros((), device=device)
        self.step = torch.tensor(step, device=device)
        self.fault = torch.zeros(3, dtype=torch.float64, device=device)  # the first one; 0: none
        # Fused AdamW reads the learning rate from a tensor, on a GPU in single precision.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self.rates = [torch.zeros((), dtype=dtype, device=device) for _ in optimizer.param_groups]
        self.differentiate: dict[Any, _Differentiate] = {}  # by the shapes of inputs
        self.replay_update: Program | None = None
        self.seeds: list[int | None] = []  # that the programs set, see `StageObjective.terms`

    def parts(self, batch: StepBatch, seeds: Sequence[int]) -> Iterator[list[Tensor] | None]:
        """Of each part, its gradients, and after them its terms of the step's values. Parts that
        depend on each other are one program: the first one stands for all."""
        units = [batch.parts] if self.objective.joint else [[part] for part in batch.parts]
        for number, unit in enumerate(units):
            if unit[0] is None:  # empty parts are the last ones
                yield None
                continue
            self.seeds = [None] * len(unit)
            inputs = _tensors(unit)
            key = tuple(tensor.shape for tensor in inputs)
            if key not in self.differentiate:
                self.differentiate[key] = self._differentiate(unit)
            buffers, divisor, replay = self.differentiate[key]
            for buffer, tensor in zip(buffers, inputs, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            divisor.fill_(batch.divisor)
            # While a program is replayed, only the state of its start can be set.
            of_unit = seeds[number : number + len(unit)]
            if not self.recorder.replays:
                self.seeds = [*of_unit]
            torch.manual_seed(of_unit[0])
            replay()
            # The next part's program writes into the same buffers.
            yield self.results if len(units) == 1 else [each.clone() for each in self.results]
        yield from [None] * (len(seeds) - len(units))

    def update(self, total: list[Tensor]) -> None:
        """Clip the gradients and update the weights. `total`: the sum over `parts`."""
        if total is not self.results:
            torch._foreach_copy_(self.results, total)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.replay_update:
            return self.replay_update()
        self.recorder.warm_up(self._update)  # the first update; it creates the moments
        self.replay_update = self._record(self._update)

    def find_fault(self) -> Fault | None:
        """The first step that is not finite. Waits for the GPU."""
        step, loss, norm = self.fault.tolist()
        return Fault(int(step), loss, norm) if step else None

    def _differentiate(self, unit: list[Any]) -> "_Differentiate":
        parts = tree_map_only(Tensor, torch.clone, unit)
        divisor = torch.ones((), dtype=torch.int64, device=self.device)
        batch = StepBatch(parts, divisor, 0)  # type: ignore[arg-type]
        precision = self.trainer.precision

        def program() -> None:
            half = torch.bfloat16 if precision.startswith("bf16") else None
            # A cache would keep casts of the weights as they are now.
            with torch.autocast(
                self.device.type, half, enabled=half is not None, cache_enabled=False
            ):
                terms = self.objective.terms(batch, self.seeds, self.gather)
                sums = (
                    each and [*torch.autograd.grad(each[0], self.trained), each[1]]
                    for each in terms
                )
                total = tree_sum(sums, len(parts))
            torch._foreach_copy_(self.results, total)

        self.recorder.warm_up(program)  # the first run may move constants to the GPU
        if self.recorder.replays and not self.differentiate:
            self._check(program, random=sum(part is not None for part in parts) < 2)
        return _Differentiate(_tensors(parts), divisor, self._record(program))

    def _update(self) -> None:
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            parameter.grad = gradient
        self.norm.copy_(torch.nn.utils.clip_grad_norm_(self.trained, self.trainer.clip))
        self.step += 1
        loss = self.values[0]
        fault = torch.stack([self.step.double(), loss.double(), self.norm.double()])
        first = (self.fault[0] == 0) & ~torch.isfinite(loss + self.norm)
        self.fault.copy_(torch.where(first, fault, self.fault))
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        self.optimizer.step()
        for group, value in zip(groups, rates, strict=True):
            group["lr"] = value

    def _record(self, program: Program) -> Program:
        try:
            return self.recorder.record(program)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._give_up(str(error))
            return program

    def _check(self, program: Program, random: bool) -> None:
        try:
            check_recordable(program, self.device, random)
        except CannotRecord as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        first_line = reason.strip().partition("\n")[0]
        log.warning("trainer.cuda_graphs: steps are not recorded: %s", first_line)
        self.recorder = Rerun()


class _Differentiate(NamedTuple):
    """The program of a part's gradients, or of all parts'."""

    buffers: list[Tensor]
    divisor: Tensor
    replay: Program


class CannotRecord(Exception):
    """Says which operation cannot be part of a CUDA graph."""


def check_recordable(
    program: Callable[[], object], device: torch.device, random: bool = True
) -> None:
    """Run a program, on any device. Raises CannotRecord for operations that wait for the GPU, and
    unless `random` for random numbers."""
    before = _random_state(device)
    with torch.compiler.set_stance("force_eager"), _Watch():
        program()
    if not (random or torch.equal(before, _random_state(device))):
        raise CannotRecord("parts that depend on each other use random numbers")


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class _Watch(TorchDispatchMode):
    """Raises CannotRecord for operations that wait for the GPU or copy a value to it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = _tensors((args, kwargs))
        masks = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1:2]))
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = masks
        else:
            waits = not _WAITS.isdisjoint(func.tags)
        if waits or name == "lift_fresh":  # torch.tensor(...)
            raise CannotRecord(f"the operation {func} waits for the GPU")
        result = func(*args, **(kwargs or {}))
        if len({tensor.device for tensor in (*tensors, *_tensors(result)) if tensor.ndim}) > 1:
            raise CannotRecord(f"the operation {func} copies between devices")
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
