"""One optimizer step of a training stage at the real profile's size: one panorama with three rows.

Ours packs the rows behind one panorama and makes logits at answers alone. The usual way trains on a
sequence a row: each with its panorama's encoder run, logits at every position, and all padded to
the longest."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import real_size
from measure import Line, in_turns, write
from panollava.geometry.views import Layout
from panollava.model.device import autocast, keep_freed_memory
from real_size import Example

THREADS = 2
GOALS = {"resampler": 2.8, "finetune": 3.2}  # how many times faster


def attention(query: tuple, key: tuple, value: tuple, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward(
    gradient: tuple, query: tuple, key: tuple, value: tuple, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# Of a processor's kernels, which torch leaves out.
COUNTS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


class Steps:
    """The ways to take the same step, on one model and with one optimizer."""

    def __init__(
        self,
        stage: str,
        example: Example | None = None,
        layout: Layout = real_size.LAYOUT,
        device: torch.device | None = None,
        precision: str = "32-true",
    ) -> None:
        torch.set_num_threads(THREADS)
        keep_freed_memory()
        self.device, self.precision = device or torch.device("cpu"), precision
        self.model = real_size.build(layout, self.device)
        self.example = (example or real_size.make_example()).to(self.device)
        self.rows = sum(map(len, self.example.rows))
        # Of each panorama, as the usual way sees them: once for each of its rows.
        self.times = torch.tensor([len(rows) for rows in self.example.rows], device=self.device)
        self.trains_encoder = stage == "resampler"
        self.model.encoder.requires_grad_(self.trains_encoder)
        with torch.no_grad(), autocast(self.device, precision):  # what `features` has kept
            self.features = self.model.features(self.example.views).float()
        parts = [self.model.resampler, self.model.projector]
        parts += [self.model.encoder] if self.trains_encoder else []
        self.trained = [parameter for part in parts for parameter in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-9, betas=(0.9, 0.98), fused=True)

    def _see(self, views: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.trains_encoder):
            return self.model.features(views)

    def our_loss(self) -> Tensor:
        features = self._see(self.example.views) if self.trains_encoder else self.features
        return real_size.our_loss(self.model, features, self.example)

    def usual_loss(self) -> Tensor:
        features = self._see(self.example.views.repeat_interleave(self.times, dim=0))
        return real_size.usual_loss(self.model, features, self.example)

    def usual_loss_from_features(self) -> Tensor:
        features = self.features.repeat_interleave(self.times, dim=0)
        return real_size.usual_loss(self.model, features, self.example)

    def take(self, loss: Callable[[], Tensor]) -> float:
        self.optimizer.zero_grad()
        with autocast(self.device, self.precision):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 0.5)
        self.optimizer.step()
        return value.item()

    def operations(self, loss: Callable[[], Tensor]) -> int:
        """Floating-point operations of a step. Layers that are to be compiled come after it: under
        a counter they are not."""
        with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
            self.take(loss)
        return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=GOALS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    write(options.out, time(options.stage, options.turns))


def time(stage: str, turns: int) -> list[Line]:
    steps = Steps(stage)
    name = f"step of {stage}, 1 panorama, {steps.rows} rows"
    ways = {"": steps.usual_loss}
    if not steps.trains_encoder:
        ways[", both from features"] = steps.usual_loss_from_features
    with torch.no_grad():
        ours, *others = (way().item() for way in (steps.our_loss, *ways.values()))
    assert all(abs(ours - other) < 1e-5 * ours for other in others), (ours, others)
    operations = steps.operations(steps.our_loss)
    square = torch.randn(2048, 2048)

    def multiply() -> None:
        for _ in range(8):
            square @ square

    functions = [lambda way=way: steps.take(way) for way in (steps.our_loss, *ways.values())]
    own, *usual, product = in_turns(*functions, multiply, turns=turns)
    lines = [
        Line(name + what, "s", own, other, at_least=None if what else GOALS[stage])
        for what, other in zip(ways, usual, strict=True)
    ]
    rate, most = operations / own / 1e9, 8 * 2 * 2048**3 / product / 1e9
    what = f"{name}, rate against a matrix product's"
    return [*lines, Line(what, "GFLOP/s", rate, limit=most, ratio=rate / most, at_least=0.75)]


if __name__ == "__main__":
    main()
