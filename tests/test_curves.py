"""Curves: their steps, and no metrics.json before the stage is published."""

import json
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
