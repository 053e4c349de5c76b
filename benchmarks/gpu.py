"""The real profile (`presets/quic360.yaml`) on one CUDA GPU, in bf16, with random weights: training
steps, a training as `panollava train` runs it, and answers.

Our steps are measured with the profile's settings and with the fast ones (`trainer.compile: true`,
`trainer.deterministic: false`). The usual way is one padded sequence per row through
`transformers`' model with logits everywhere, and one `generate` per row; under the same autocast,
not compiled, with nondeterministic kernels."""

import contextlib
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import evaluation
import real_size
from measure import ROOT, Line, options_parser, report, time_alternately
from panollava import config, paths
from panollava.files import write_array, write_csv
from panollava.geometry.overlap import correspondences, matched_tokens
from panollava.geometry.views import token_centers
from panollava.model.precision import autocast, cast_frozen_linears
from panollava.stages import STAGES
from panollava.training import losses
from panollava.training.tower_layers import compile_layers
from training import Steps
from training_loop import step_times

PROFILE = ROOT / "presets/quic360.yaml"
ROWS = len(real_size.ANSWERS)  # per panorama
# Panoramas per step: about as many as in the profile, and more.
SIZES = {"resampler": (5, 16, 48), "finetune": (2, 16), "vision": (32,)}
FAST = {"trainer.compile": True, "trainer.deterministic": False}
TOLERANCE = 5e-3  # relative difference of losses in half precision
GOALS = {"resampler": 0.5}  # share of the matrix product's rate
WORDS = ["red", "blue", "green"]  # one token each


def main() -> None:
    options = options_parser(__doc__, repeats=5).parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write(f"torch {torch.__version__} finds no GPU; nothing was measured\n")
        return
    device = torch.device("cuda")
    name, version = torch.cuda.get_device_name(), torch.version.cuda
    sys.stderr.write(f"{name}, torch {torch.__version__}, CUDA {version}\n")
    precision = config.load_settings(PROFILE).trainer.precision
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Lightning sets it
    lines: list[Line] = []
    for stage in SIZES:
        lines += measure_steps(stage, device, precision, options.repeats)
        report(lines, options.out)
    # In fp32: with random weights the likeliest tokens are so close that half precision changes
    # their order.
    lines.append(evaluation.measure_real_size(1, panoramas=4, device=device))
    report(lines, options.out)
    lines += measure_training()
    report(lines, options.out)


def measure_steps(stage: str, device: torch.device, precision: str, repeats: int) -> list[Line]:
    """Steps without a training loop: rows per second, FLOP/s, and peak memory."""
    lines: list[Line] = []
    product = matrix_product(device)
    for panoramas in SIZES[stage]:
        example = real_size.make_example(panoramas=panoramas)
        make = partial(Steps, example=example, device=device, precision=precision)
        rows, unit = panoramas * ROWS, "rows/s"
        way: Callable[[], Tensor]
        usual_seconds = usual_peak = None
        if stage == "vision":
            rows, unit = panoramas, "panoramas/s"
            ours = make("resampler")
            way = vision_loss(ours)
        else:
            torch.use_deterministic_algorithms(False)
            usual = make(stage)
            loss = value(usual, usual.our_loss)
            try:
                usual_seconds, usual_peak = timed(usual, usual.usual_loss, repeats)
                assert abs(value(usual, usual.usual_loss) - loss) < TOLERANCE * loss
            except torch.OutOfMemoryError:  # 33 and 96 GB for 5 and 16 panoramas
                pass
            del usual
            gc.collect()
            ours = make(stage)
            way = ours.our_loss
        flops, loss = ours.operations(way), value(ours, way)
        cast_frozen_linears(ours.model, precision, keep=STAGES["resampler"].saves)
        usual_rate = None if usual_seconds is None else rows / usual_seconds
        for fast in (False, True):
            torch.use_deterministic_algorithms(not fast)
            if fast:
                compile_layers(ours.model)
            seconds, peak = timed(ours, way, repeats)
            assert abs(value(ours, way) - loss) < TOLERANCE * loss
            what = f"GPU, step of {stage}, {panoramas} panoramas" + ", fast" * fast
            our_rate, flop_rate = rows / seconds, flops / seconds / 1e12
            ratio = None if usual_rate is None else our_rate / usual_rate
            lines += [
                Line(what, unit, our_rate, usual_rate, ratio=ratio),
                Line(
                    f"{what}, rate against a matrix product's",
                    "TFLOP/s",
                    flop_rate,
                    limit=product,
                    ratio=flop_rate / product,
                    at_least=GOALS.get(stage),
                ),
                Line(f"{what}, peak memory", "GB", peak, usual_peak),
            ]
        del ours, way
        gc.collect()
    return lines


def vision_loss(steps: Steps) -> Callable[[], Tensor]:
    """VICReg of the encoder on exact overlaps."""
    encoder: Any = steps.model.encoder
    vision = config.load_settings(PROFILE).stage.vision
    centers = token_centers(encoder.patch, real_size.SIZE)
    pairs = correspondences(real_size.LAYOUT, centers, vision.overlap).to(steps.device)
    del steps.model.language_model  # this stage does not load it
    steps.trained = list(encoder.parameters())
    steps.optimizer = torch.optim.AdamW(steps.trained, lr=1e-9, fused=True)

    def loss() -> Tensor:
        x, y = matched_tokens(encoder(steps.example.views), pairs)
        return losses.vicreg(x, y, vision.invariance, vision.variance, vision.covariance)["loss"]

    return loss


def value(steps: Steps, way: Callable[[], Tensor]) -> float:
    with torch.no_grad(), autocast(steps.device, steps.precision):
        return way().item()


def timed(steps: Steps, way: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """Median seconds of a step, and torch's peak memory in GB."""
    for _ in range(2):  # the first one allocates the optimizer's moments
        steps.take(way)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    (seconds,) = time_alternately(lambda: steps.take(way), repeats=repeats, warm=True)
    return seconds, torch.cuda.max_memory_allocated() / 1e9


def matrix_product(device: torch.device, side: int = 8192) -> float:
    """TFLOP/s of a large product of random matrices in bf16."""
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        for _ in range(4):
            product = square @ square
        product[0, 0].item()  # wait for the result

    (seconds,) = time_alternately(multiply, repeats=8)
    return 4 * 2 * side**3 / seconds / 1e12


def measure_training() -> list[Line]:
    """Stage `resampler` by Lightning, with loader workers, in steps of the profile's size."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_project()
        changes: dict[str, Any] = {
            "model.encoder.path": "encoder",
            "model.language_model.path": "language_model",
            **FAST,
        }
        settings = config.load_settings(PROFILE, changes=changes)
        between, inside = step_times(settings)
    rows = settings.stage.resampler.batch_size // ROWS * ROWS
    what = f"GPU, training of resampler by Lightning, {rows} rows a step, fast"
    return [
        Line(what, "rows/s", rows / (between + inside)),
        Line(f"{what}, between two steps", "ms", 1e3 * between, limit=1e3 * inside, at_most=0.02),
    ]


def make_project(panoramas: int = 160) -> None:
    """Towers of the real size with random weights, and the files that `prepare` would write."""
    model: Any = real_size.build()
    model.encoder.tower.save_pretrained("encoder")
    model.language_model.save_pretrained("language_model")
    demo = ROOT / "data/demo/towers"
    shutil.copy(demo / "encoder/preprocessor_config.json", "encoder")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / "language_model" / file, "language_model")
    random = np.random.default_rng(0)
    shape = (len(real_size.LAYOUT.projections), real_size.SIZE, real_size.SIZE, 3)
    for split, count in (("train", panoramas), ("valid", 1)):
        folder = paths.PREPARED / split
        folder.mkdir(parents=True)
        with write_array(folder / "views.npy") as append:
            for _ in range(count):
                append(random.integers(0, 256, (1, *shape), dtype=np.uint8))
        rows = [
            (panorama, ROWS * panorama + row, f"{panorama}.jpg", "red", _text(random, length - 1))
            for panorama in range(count)
            for row, length in enumerate(real_size.ANSWERS)
        ]
        table = pd.DataFrame(rows, columns=["panorama", "row", "url", "query", "annotation"])
        write_csv(folder / "rows.csv", table)


def _text(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


if __name__ == "__main__":
    main()
