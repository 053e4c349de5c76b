"""Curves: their steps, and no metrics.json before the stage is published."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import change, curve, run_stage
from panollava import paths
from panollava.config import Settings
from panollava.training import curves


def steps(name: str) -> list[int]:
    lines = (paths.curves_folder("vision") / f"plots/metrics/{name}.tsv").read_text().splitlines()
    return [int(line.split("\t")[0]) for line in lines[1:]]


def test_a_curve_has_the_first_step_every_nth_and_the_last_of_each_epoch(
    settings: Settings,
) -> None:
    # An epoch has three steps.
    settings = change(settings, stage__vision__batch_size=2, stage__vision__epochs=3)
    run_stage("vision", change(settings, trainer__log_every=4))
    assert steps("train/loss") == [1, 3, 4, 6, 8, 9]
    assert steps("val/loss") == steps("val/accuracy") == [0, 3, 6, 9]
    assert len(curve("vision", "train/learning_rate/encoder")) == 6


def test_no_metrics_are_shown_while_a_stage_trains(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = paths.metrics_file("vision")
    file.parent.mkdir(parents=True)
    file.write_text('{"val_loss": 0.1}')  # of an earlier run
    shown = []

    def look(*_: Any) -> None:
        shown.append(file.exists())

    monkeypatch.setattr(curves.Speed, "on_train_batch_end", look)
    monkeypatch.setattr(curves.Speed, "on_validation_end", look)
    run_stage("vision", settings)
    assert shown and not any(shown)
    assert json.loads(file.read_text()).keys() == {"best", "val_loss", "val_accuracy"}


def test_speed_is_apart_from_the_curves(settings: Settings) -> None:
    run_stage("vision", settings)
    speed = paths.speed_folder("vision")
    names = {file.stem for file in (speed / "plots/metrics").iterdir()}
    assert names == {"rows_per_second", "peak_memory_gb"}
    assert names < json.loads((speed / "metrics.json").read_text()).keys()
    assert not list((paths.curves_folder("vision") / "plots").rglob("rows_per_second*"))


def test_speed_counts_the_rows_of_all_parts_since_the_last_value(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = change(settings, stage__resampler__epochs=1, stage__resampler__accumulate=2)
    run_stage("vision", change(settings, stage__vision__epochs=0))
    clock = itertools.count(step=2)  # two seconds between values
    monkeypatch.setattr(curves, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run_stage("resampler", change(settings, trainer__log_every=2))
    file = paths.speed_folder("resampler") / "plots/metrics/rows_per_second.tsv"
    speeds = [float(line.split("\t")[1]) for line in file.read_text().splitlines()[1:]]
    rows = len((paths.PREPARED / "train/rows.csv").read_text().splitlines()) - 1
    assert len(speeds) > 1 and 2 * sum(speeds) == rows
