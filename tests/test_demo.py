"""Promises of the demo's world: scenes, questions, facts, and the two towers that are shipped."""

import colorsys
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dvc.repo import Repo
from transformers import AutoTokenizer

from conftest import ROOT
from panollava.config import Pretrained
from panollava.data.dialogue import Dialogue
from panollava.data.images import roll
from panollava.demo.dataset import make_scenes
from panollava.demo.encoder import VIEWS, probe
from panollava.demo.facts import read_facts
from panollava.demo.language_model import (
    _place_facts,
    _right,
    make_language_model,
    make_tokenizer,
    with_context,
)
from panollava.demo.questions import QUERIES, TEMPLATES, answer, has_answer, rows, spell
from panollava.demo.scenes import COLORS, DIRECTIONS, EYE, Object, Scene, make_scene, render, turn
from panollava.demo.settings import STREAMS, DemoSettings, Lesson, load_demo_settings
from panollava.errors import UserError
from panollava.model.encoder import load_encoder
from panollava.model.language_model import load_language_model

DEMO = ROOT / "data/demo"
TOWERS = DEMO / "towers"


@pytest.fixture
def settings() -> DemoSettings:
    return load_demo_settings(DEMO / "params.yaml")


def place(item: Object, height: int) -> tuple[int, int]:
    """Row and column of the panorama's pixel at an object's center, a little below it: a cone is
    thin above."""
    pitch = math.degrees(math.atan2(0.4 * item.size - EYE, item.distance))
    return int((0.5 - pitch / 180) * height), int((item.yaw / 360 + 0.5) % 1 * 2 * height)


def nearest_color(pixel: np.ndarray) -> str:
    """By hue and saturation, whatever the light."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*pixel / 255)

    def distance(name: str) -> float:
        other, s, _ = colorsys.rgb_to_hsv(*COLORS[name])
        return abs((hue - other + 0.5) % 1 - 0.5) + 0.2 * abs(saturation - s)

    return min(COLORS, key=distance)


def test_objects_are_seen_where_and_as_the_scene_says() -> None:
    across = 0
    for index in range(40):
        scene = make_scene(7, index)
        picture = render(scene, 128)
        assert len({item.color for item in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            direction = DIRECTIONS.index(item.direction) * 90
            assert abs((item.yaw - direction + 180) % 360 - 180) <= 30
            row, column = place(item, 128)
            assert nearest_color(picture[row, column]) == item.color, (index, item)
            if 180 - abs(item.yaw) < math.degrees(item.size / 4 / item.distance):
                across += 1  # the object goes on beyond the seam
                assert nearest_color(picture[row, 0]) == item.color
                assert nearest_color(picture[row, -1]) == item.color
    assert across


def test_a_scene_is_a_function_of_its_seed_and_the_streams_share_nothing(
    settings: DemoSettings,
) -> None:
    assert make_scene(3, 5) == make_scene(3, 5)
    scenes = [make_scene(settings.stream(name), i) for name in STREAMS for i in range(50)]
    assert len(set(scenes)) == len(scenes)
    others = [make_scene(10 * len(STREAMS) + n, i) for n in range(len(STREAMS)) for i in range(50)]
    assert not set(scenes) & set(others)  # another seed has other streams


def true_facts(scene: Scene, topic: str) -> set:
    """What the query of `topic` asks for, from the scene itself."""
    if topic in DIRECTIONS:
        item = scene.at(topic)
        return {(topic, item.color, item.shape)} if item else set()
    numbers = ("no", "one", "two", "three", "four")
    largest = max(scene.objects, key=lambda item: item.size)
    asked: dict[str, set] = {
        "scene": {(scene.kind,)},
        "colors": {(item.color,) for item in scene.objects},
        "count": {(numbers[len(scene.objects)],)},
        "largest": {(largest.color, largest.shape, largest.direction)},
        "around": {(item.direction, item.color, item.shape) for item in scene.objects},
    }
    return asked[topic]


def test_every_answer_states_exactly_the_facts_of_its_scene() -> None:
    for index in range(100):
        scene = make_scene(1, index)
        for topic, query in QUERIES.items():
            for template in range(TEMPLATES):
                said = spell(answer(scene, topic, template))
                facts = read_facts(spell(query), said)
                kind = "color_shape_by_direction" if topic in DIRECTIONS else topic
                assert facts[kind] == true_facts(scene, topic), said
                if topic in DIRECTIONS:
                    assert facts["color_by_direction"] == {f[:2] for f in facts[kind]}


def test_a_turned_panorama_is_asked_what_has_an_answer_alone() -> None:
    """Its objects are where they are seen; one between two directions is in none of them."""
    between = 0
    for index in range(40):
        degrees = 9.0 * index
        scene = turn(make_scene(7, index), degrees)
        picture = roll(render(make_scene(7, index), 128), degrees)
        asked = {query for _, query, _ in rows(scene, "x.jpg", 1, choice=index)}
        for item in scene.objects:
            row, column = place(item, 128)
            colors = {nearest_color(picture[row, (column + shift) % 256]) for shift in (-1, 0, 1)}
            assert item.color in colors, (index, item)
            off = [abs((item.yaw - 90 * place + 180) % 360 - 180) for place in range(4)]
            if min(off) > 30:
                between += 1
                assert item.direction is None
                assert spell(QUERIES["around"]) not in asked
            for direction, apart in zip(DIRECTIONS, off, strict=True):
                if 30 < apart < 60:
                    assert spell(QUERIES[direction]) not in asked
                elif apart <= 30 and spell(QUERIES[direction]) in asked:
                    assert item.direction == direction
        assert {spell(QUERIES[topic]) for topic in ("scene", "colors", "count")} <= asked
    assert between > 10


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_scene_turned_by_quarters_is_asked_everything(quarters: int) -> None:
    for index in range(40):
        scene = make_scene(7, index)
        turned = turn(scene, 90 * quarters)
        assert all(has_answer(turned, topic) for topic in QUERIES)
        for item, other in zip(scene.objects, turned.objects, strict=True):
            step = DIRECTIONS.index(item.direction) + quarters
            assert other.direction == DIRECTIONS[step % 4]


def test_who_is_asked_how_many_names_them_first() -> None:
    said = spell(answer(make_scene(7, 3), "count", 0))
    *named, number = re.split(r", | and ", said.removesuffix("."))
    assert set(named) == {item.color for item in make_scene(7, 3).objects}
    assert number == f"{('one', 'two', 'three', 'four')[len(named) - 1]} objects"
    assert len(named) > 1


def test_a_query_has_several_references_that_differ() -> None:
    said = rows(make_scene(1, 0), "x.jpg", 3, choice=0)
    for query in QUERIES.values():
        own = [text for _, asked, text in said if asked == spell(query)]
        assert len(own) == len(set(own)) == 3


def test_the_tokenizer_as_loaded_keeps_every_query_and_answer() -> None:
    """`AutoTokenizer` may load another class than was saved."""
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "language_model")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    dialogue = Dialogue(tokenizer, 128)
    for index in range(50):
        for _, query, text in rows(make_scene(1, index), "", TEMPLATES, index):
            tokens = dialogue.row(query, text)
            assert dialogue.decode(tokens.answer) == text
            assert len(tokens.answer) <= len(re.findall(r"\w+|[^\w\s]", text)) + 1  # words


def test_the_scenes_are_files_of_the_same_bytes_each_time(
    settings: DemoSettings, tmp_path: Path
) -> None:
    small = {"train": 3, "valid": 1, "test": 2}
    settings = change(settings, scenes=change(settings.scenes, **small))
    written = []
    for name in ("one", "two"):
        make_scenes(settings, tmp_path / name)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        written.append({p.relative_to(tmp_path / name): p.read_bytes() for p in files})
    assert written[0] == written[1]
    assert len(written[0]) == 6 + 3
    test = (tmp_path / "one/test.csv").read_text().splitlines()
    assert len(test) == 1 + 2 * len(QUERIES) * settings.scenes.references


def change(settings: Any, **changes: Any) -> Any:
    return dataclasses.replace(settings, **changes)


def test_the_shipped_towers_are_small_and_load_as_any_other() -> None:
    files = [path for path in TOWERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    encoder = load_encoder(Pretrained(str(TOWERS / "encoder"), None, False), VIEWS.size)
    views = torch.zeros((1, 8, VIEWS.size, VIEWS.size, 3), dtype=torch.uint8)
    assert encoder(views).shape == (1, 8, 8, 8, 128)


def test_the_shipped_towers_are_their_pipeline_s_recorded_output() -> None:
    with Repo(str(ROOT)) as repo:
        for name in ("encoder", "language_model"):
            (stage,) = repo.stage.load_all(str(DEMO / "dvc.yaml"), name)
            (out,) = stage.outs
            assert not out.changed_checksum(), f"{out}: not what data/demo/dvc.lock records"


def test_the_shipped_encoder_sees_color_and_shape(settings: DemoSettings) -> None:
    tower = load_encoder(Pretrained(str(TOWERS / "encoder"), None, False), VIEWS.size).tower
    seen = probe(tower.eval(), settings)
    report = json.loads((TOWERS / "encoder/report.json").read_text())
    for name in ("probe_color", "probe_shape"):
        assert seen[name] == pytest.approx(report[name], abs=0.01)
        assert seen[name] >= 0.94


def test_the_shipped_language_model_speaks_from_its_context(settings: DemoSettings) -> None:
    language, tokenizer = load_language_model(
        Pretrained(str(TOWERS / "language_model"), None, False)
    )
    model, dialogue = with_context(language), Dialogue(tokenizer, 128)
    report = json.loads((TOWERS / "language_model/report.json").read_text())
    for name, turned in (("right", False), ("right_turned", True)):
        assert _right(model, dialogue, settings, count=20, turned=turned) >= 0.98
        assert report[name] >= 0.98


def test_a_lesson_has_room_for_all_objects_of_a_scene(
    settings: DemoSettings, tmp_path: Path
) -> None:
    most = 24  # of 128 tokens, a quarter of which may be silent, for four objects
    drawn = SimpleNamespace(permutation=range, integers=lambda low, high: high - 1)
    full = next(scene for i in range(50) if len((scene := make_scene(1, i)).objects) == 4)
    assert len(_place_facts(full, most, drawn)) == 128  # type: ignore[arg-type]
    for lessons, found in (([(12, 8), (12, most + 1)], "lesson 2 has places: 25"), ([], "none")):
        taught = [Lesson(steps, places, 0.5) for steps, places in lessons]
        wrong = change(settings, language_model=change(settings.language_model, lessons=taught))
        with pytest.raises(UserError, match=found):
            make_language_model(wrong, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "tower"),
    [("demo-encoder", "encoder"), ("demo-language-model", "language_model")],
)
def test_the_towers_recipe_runs_and_learns(command: str, tower: str, tmp_path: Path) -> None:
    """At a small size; twice to the same bytes, and further than after one step."""
    text = (DEMO / "params.yaml").read_text()
    for old, new in (
        (r"scenes: \d+", "scenes: 30"),
        (r"steps: \d+", "steps: 12"),
        (r"batch_size: \d{3}", "batch_size: 32"),
        (r"batch_size: 16", "batch_size: 4"),
    ):
        text, count = re.subn(old, new, text)
        assert count, old
    weights, losses = [], []
    for name, steps in (("one", 12), ("two", 12), ("first", 1)):
        folder = tmp_path / name / "data/demo"
        folder.mkdir(parents=True)
        (folder / "params.yaml").write_text(text.replace("steps: 12", f"steps: {steps}"))
        subprocess.run(
            [sys.executable, str(ROOT / "src/run.py"), command],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        weights.append((folder / "towers" / tower / "model.safetensors").read_bytes())
        report = json.loads((folder / "towers" / tower / "report.json").read_text())
        losses.append(report["loss"])
        (log,) = (tmp_path / name / "logs").iterdir()
        assert log.name.startswith(command)
    assert weights[0] == weights[1]
    assert losses[0] < 0.95 * losses[2]
