"""The real profile (`presets/quic360.yaml`) on one CUDA GPU, in bf16, with random weights: steps of
the stages, a training as `panollava train` runs it, and answers.

Ours are taken as that profile has them, and the fast way: layers compiled, any kernels
(`trainer.compile: true`, `trainer.deterministic: false`). The usual way is one padded sequence a
row through `transformers`' model with logits everywhere, and one `generate` a row; under the same
autocast, not compiled, any kernels."""

import argparse
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import evaluation
import real_size
from measure import Line, in_turns, write
from panollava import config, paths
from panollava.files import write_array, write_csv
from panollava.geometry.overlap import correspondences, matched_tokens
from panollava.model.device import autocast, cast_frozen_linears
from panollava.model.encoder import token_centers
from panollava.stages import find_stage
from panollava.training import losses
from panollava.training.tower_layers import compile_layers
from pipeline import gaps
from training import Steps

ROOT = Path(__file__).parents[1]
PROFILE = ROOT / "presets/quic360.yaml"
ROWS = len(real_size.ANSWERS)  # of a panorama
# Panoramas a step: about as many as the profile has, and more.
SIZES = {"resampler": (5, 16, 48), "finetune": (2, 16), "vision": (32,)}
FAST = {"trainer.compile": True, "trainer.deterministic": False}
NEAR = 5e-3  # losses, relative: what half precision explains
GOALS = {"resampler": 0.5}  # of the matrix product's rate
WORDS = ["red", "blue", "green"]  # a token each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write(f"no GPU that torch {torch.__version__} can use: nothing is measured\n")
        return
    device = torch.device("cuda")
    name, version = torch.cuda.get_device_name(), torch.version.cuda
    sys.stderr.write(f"{name}, torch {torch.__version__}, CUDA {version}\n")
    precision = config.load_settings(PROFILE).trainer.precision
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Lightning sets it
    lines: list[Line] = []
    for stage in SIZES:
        lines += of_stage(stage, device, precision, options.turns)
        write(options.out, lines)
    out = options.out.resolve()  # the folder changes
    lines += answers(device)
    write(out, lines)
    lines += training()
    write(out, lines)


def of_stage(stage: str, device: torch.device, precision: str, turns: int) -> list[Line]:
    """Steps without a loop around them: rows a second, the rate, and peak memory."""
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
                usual_seconds, usual_peak = timed(usual, usual.usual_loss, turns)
                assert abs(value(usual, usual.usual_loss) - loss) < NEAR * loss
            except torch.OutOfMemoryError:  # 33 and 96 GB for 5 and 16 panoramas
                pass
            del usual
            gc.collect()
            ours = make(stage)
            way = ours.our_loss
        flops, loss = ours.operations(way), value(ours, way)
        cast_frozen_linears(ours.model, precision, keep=find_stage("resampler").saves)
        theirs = None if usual_seconds is None else rows / usual_seconds
        for fast in (False, True):
            torch.use_deterministic_algorithms(not fast)
            if fast:
                compile_layers(ours.model)
            seconds, peak = timed(ours, way, turns)
            assert abs(value(ours, way) - loss) < NEAR * loss
            what = f"GPU, step of {stage}, {panoramas} panoramas" + ", fast" * fast
            own, rate = rows / seconds, flops / seconds / 1e12
            lines += [
                Line(what, unit, own, theirs, ratio=None if theirs is None else own / theirs),
                Line(
                    f"{what}, rate against a matrix product's",
                    "TFLOP/s",
                    rate,
                    limit=product,
                    ratio=rate / product,
                    at_least=GOALS.get(stage),
                ),
                Line(f"{what}, peak memory", "GB", peak, usual_peak),
            ]
        del ours, way
        gc.collect()
    return lines


def vision_loss(steps: Steps) -> Callable[[], Tensor]:
    """VICReg on exact overlaps, of the encoder alone."""
    encoder: Any = steps.model.encoder
    own = config.load_settings(PROFILE).stage.vision
    centers = token_centers(encoder, real_size.SIZE)
    pairs = correspondences(real_size.LAYOUT, centers, own.overlap).to(steps.device)
    del steps.model.language_model  # which that stage doesn't load
    steps.trained = list(encoder.parameters())
    steps.optimizer = torch.optim.AdamW(steps.trained, lr=1e-9, fused=True)

    def loss() -> Tensor:
        x, y = matched_tokens(encoder(steps.example.views), pairs)
        return losses.vicreg(x, y, own.invariance, own.variance, own.covariance)["loss"]

    return loss


def value(steps: Steps, way: Callable[[], Tensor]) -> float:
    with torch.no_grad(), autocast(steps.device, steps.precision):
        return way().item()


def timed(steps: Steps, way: Callable[[], Tensor], turns: int) -> tuple[float, float]:
    """Median seconds of a step, and the peak memory in GB of all that is there."""
    for _ in range(2):  # the second one has the optimizer's moments
        steps.take(way)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    (seconds,) = in_turns(lambda: steps.take(way), turns=turns, warm=True)
    return seconds, torch.cuda.max_memory_allocated() / 1e9


def matrix_product(device: torch.device, side: int = 8192) -> float:
    """TFLOP/s of a large product in bf16, of random numbers."""
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        for _ in range(4):
            product = square @ square
        product[0, 0].item()  # waits for it

    (seconds,) = in_turns(multiply, turns=8)
    return 4 * 2 * side**3 / seconds / 1e12


def answers(device: torch.device) -> list[Line]:
    """In fp32: of random weights the likeliest tokens are so close that half precision changes
    their order."""
    return [evaluation.of_real_size(1, panoramas=4, device=device)]


def training() -> list[Line]:
    """Stage `resampler` by Lightning, with its loader's workers, in steps of the profile's size."""
    where = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            make_project()
            changes: dict[str, Any] = {
                "model.encoder.path": "encoder",
                "model.language_model.path": "language_model",
                **FAST,
            }
            settings = config.load_settings(PROFILE, changes=changes)
            between, inside = gaps(settings)
        finally:
            os.chdir(where)
    rows = settings.stage.resampler.batch_size // ROWS * ROWS
    what = f"GPU, training of resampler by Lightning, {rows} rows a step, fast"
    return [
        Line(what, "rows/s", rows / (between + inside)),
        Line(f"{what}, between two steps", "ms", 1e3 * between, limit=1e3 * inside, at_most=0.02),
    ]


def make_project(panoramas: int = 160) -> None:
    """Towers in the real size with random weights, and what `prepare` would have left."""
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
