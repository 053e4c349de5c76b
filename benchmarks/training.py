"""One optimizer step of a training stage at the real profile's size: one panorama with three rows.

Ours packs the rows behind one panorama and computes logits only at answers. The usual way trains on
one sequence per row, padded to the longest: it encodes the panorama for each row, and computes
logits at every position."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import real_size
from measure import Line, options_parser, report, time_alternately
from panollava import config
from panollava.model.device import keep_freed_memory
from panollava.model.precision import autocast
from real_size import Example

THREADS = 2
GOALS = {"resampler": 2.8, "finetune": 3.2}  # speedups


def attention(query: tuple, key: tuple, value: tuple, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward(
    gradient: tuple, query: tuple, key: tuple, value: tuple, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# CPU kernels that torch's counter does not know.
COUNTS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


class Steps:
    """Both ways to take a step, with one model and one optimizer."""

    def __init__(
        self,
        stage: str,
        example: Example | None = None,
        settings: config.Model = real_size.MODEL,
        view_settings: config.Views = real_size.VIEWS,
        device: torch.device | None = None,
        precision: str = "32-true",
    ) -> None:
        torch.set_num_threads(THREADS)
        keep_freed_memory()
        self.device, self.precision = device or torch.device("cpu"), precision
        self.model = real_size.build(settings, view_settings, self.device)
        self.example = (
            example or real_size.make_example(settings=settings, view_settings=view_settings)
        ).to(self.device)
        # Rows per panorama: how often the usual way encodes it.
        self.row_counts = torch.tensor([len(r) for r in self.example.rows], device=self.device)
        self.rows = int(self.row_counts.sum())
        self.trains_encoder = stage == "resampler"
        self.model.encoder.requires_grad_(self.trains_encoder)
        with torch.no_grad(), autocast(self.device, precision):  # as `features` writes them
            self.features = self.model.features(self.example.views).float()
        parts = [self.model.resampler, self.model.projector]
        parts += [self.model.encoder] if self.trains_encoder else []
        self.trained = [parameter for part in parts for parameter in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-9, betas=(0.9, 0.98), fused=True)

    def _encode(self, views: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.trains_encoder):
            return self.model.features(views)

    def our_loss(self) -> Tensor:
        features = self._encode(self.example.views) if self.trains_encoder else self.features
        return real_size.our_loss(self.model, features, self.example)

    def usual_loss(self) -> Tensor:
        features = self._encode(self.example.views.repeat_interleave(self.row_counts, dim=0))
        return real_size.usual_loss(self.model, features, self.example)

    def usual_loss_from_features(self) -> Tensor:
        features = self.features.repeat_interleave(self.row_counts, dim=0)
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
        """Floating-point operations of a step. Call it before layers are compiled: the counter
        would disable compilation."""
        with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
            self.take(loss)
        return counter.get_total_flops()


def main() -> None:
    parser = options_parser(__doc__, repeats=2)
    parser.add_argument("stage", choices=GOALS)
    options = parser.parse_args()
    report(measure_stage(options.stage, options.repeats), options.out)


def measure_stage(stage: str, repeats: int) -> list[Line]:
    steps = Steps(stage)
    name = f"step of {stage}, 1 panorama, {steps.rows} rows"
    usual_ways = {"": steps.usual_loss}
    if not steps.trains_encoder:
        usual_ways[", both from features"] = steps.usual_loss_from_features
    ways = [steps.our_loss, *usual_ways.values()]
    with torch.no_grad():
        ours, *others = (way().item() for way in ways)
    assert all(abs(ours - other) < 1e-5 * ours for other in others), (ours, others)
    operations = steps.operations(steps.our_loss)
    square = torch.randn(2048, 2048)

    def multiply() -> None:
        for _ in range(8):
            square @ square

    functions = [partial(steps.take, way) for way in ways]
    our_time, *usual_times, product_time = time_alternately(*functions, multiply, repeats=repeats)
    lines = [
        Line(name + what, "s", our_time, time, at_least=None if what else GOALS[stage])
        for what, time in zip(usual_ways, usual_times, strict=True)
    ]
    rate, peak_rate = operations / our_time / 1e9, 8 * 2 * 2048**3 / product_time / 1e9
    what, ratio = f"{name}, rate against a matrix product's", rate / peak_rate
    return [*lines, Line(what, "GFLOP/s", rate, limit=peak_rate, ratio=ratio, at_least=0.75)]


if __name__ == "__main__":
    main()
