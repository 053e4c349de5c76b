"""The demo: scenes, questions, facts, and the two pretrained towers in the repository."""

import colorsys
import dataclasses
import json
import math
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from dvc.repo import Repo
from PIL import Image
from torch.nn import functional
from transformers import AutoTokenizer

from helpers import ROOT
from panollava.config import Pretrained, PretrainedEncoder
from panollava.data.dialogue import Dialogue
from panollava.data.images import roll
from panollava.demo import encoder, language_model
from panollava.demo.context import context_tokens, token_words
from panollava.demo.dataset import _draw_rolls, make_scenes
from panollava.demo.encoder import VIEWS, probe
from panollava.demo.facts import read_facts
from panollava.demo.language_model import (
    accuracy,
    make_language_model,
    make_tokenizer,
    with_context,
)
from panollava.demo.questions import QUERIES, TEMPLATES, answer, has_answer, rows
from panollava.demo.render import render
from panollava.demo.scenes import (
    COLORS,
    DIRECTIONS,
    EYE,
    KINDS,
    SHAPES,
    Object,
    Scene,
    make_scene,
    offset,
    roll_scene,
)
from panollava.demo.settings import (
    MAX_PER_OBJECT,
    STREAMS,
    DemoSettings,
    Lesson,
    load_demo_settings,
)
from panollava.errors import UserError
from panollava.model.encoder import load_encoder
from panollava.model.language_model import load_language_model

DEMO = ROOT / "data/demo"
TOWERS = DEMO / "towers"
ENCODER = PretrainedEncoder(str(TOWERS / "encoder"), None, False, None)


@pytest.fixture
def settings() -> DemoSettings:
    return load_demo_settings(DEMO / "params.yaml")


def place(item: Object, height: int) -> tuple[int, int]:
    """Row and column of the panorama's pixel a little below an object's center, because a cone is
    thin at the top."""
    pitch = math.degrees(math.atan2(0.4 * item.size - EYE, item.distance))
    return int((0.5 - pitch / 180) * height), int((item.yaw / 360 + 0.5) % 1 * 2 * height)


def nearest_color(pixel: np.ndarray) -> str:
    """By hue and saturation, regardless of the light."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*pixel / 255)

    def distance(name: str) -> float:
        other, s, _ = colorsys.rgb_to_hsv(*COLORS[name])
        return abs((hue - other + 0.5) % 1 - 0.5) + 0.2 * abs(saturation - s)

    return min(COLORS, key=distance)


def test_objects_are_rendered_at_their_yaw_and_in_their_color() -> None:
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
                across += 1  # the object crosses the seam
                assert nearest_color(picture[row, 0]) == item.color
                assert nearest_color(picture[row, -1]) == item.color
    assert across


def test_the_side_that_faces_the_light_is_brighter() -> None:
    # An edge points to the camera, and the right side faces away from the light.
    box = Object("red", "box", "front", yaw=0, distance=2.5, size=1, rotation=45)
    row, column = place(box, 256)
    picture = render(Scene("room", (box,), light=(-135, 0), shade=1), 256).astype(float)
    left, right = picture[row, column - 10, 0], picture[row, column + 10, 0]
    assert right == pytest.approx(0.6 * left, abs=1)
    ball = dataclasses.replace(box, shape="ball")
    row = int((0.5 - math.atan2(0.5 - EYE, 2.5) / math.pi) * 256)
    bright, dark = (
        render(Scene("room", (ball,), light=(yaw, 15), shade=1), 256)[row, 256, 0]
        for yaw in (180, 0)
    )
    assert dark == pytest.approx(0.6 * bright, abs=3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_solid_stands_on_the_ground_and_has_a_shadow(shape: str) -> None:
    item = Object("blue", shape, "front", yaw=0, distance=2.5, size=1.25, rotation=0)
    picture, empty = (
        render(Scene("garden", objects, light=(0, 45), shade=1), 256).astype(int)
        for objects in ((item,), ())
    )

    def row(height: float, distance: float) -> int:
        return int((0.5 - math.atan2(height - EYE, distance) / math.pi) * 256)

    above, ground = row(1.6, 2.5), row(0, 1.7)
    assert (picture[above, 246:266] == empty[above, 246:266]).all()
    assert nearest_color(picture[row(0.4, 2.5), 256]) == "blue"
    assert nearest_color(picture[ground, 256]) == nearest_color(empty[ground, 256]) != "blue"
    assert picture[ground, 256].sum() < 0.9 * empty[ground, 256].sum()
    assert (picture[ground, :128] == empty[ground, :128]).all()


def test_a_scene_is_a_function_of_its_seed_and_streams_are_disjoint(
    settings: DemoSettings,
) -> None:
    assert make_scene(3, 5) == make_scene(3, 5)
    scenes = [make_scene(settings.stream(name), i) for name in STREAMS for i in range(50)]
    assert len(set(scenes)) == len(scenes)
    others = [make_scene(10 * len(STREAMS) + n, i) for n in range(len(STREAMS)) for i in range(50)]
    assert not set(scenes) & set(others)  # the streams of another seed
    streams = {change(settings, seed=seed).stream(name) for seed in range(4) for name in STREAMS}
    assert len(streams) == 4 * len(STREAMS)


def test_objects_of_a_scene_are_45_degrees_apart() -> None:
    for index in range(100):
        yaws = [item.yaw for item in make_scene(7, index).objects]
        apart = [abs((a - b + 180) % 360 - 180) for a, b in combinations(yaws, 2)]
        assert all(angle > 44.99 for angle in apart)


@pytest.mark.parametrize("order", [1, -1])
def test_the_nearer_object_hides_the_other(order: int) -> None:
    near = Object("red", "ball", "front", yaw=5, distance=2.5, size=2.4, rotation=0)
    far = dataclasses.replace(near, color="blue", distance=6)
    scene = Scene("room", (near, far)[::order], light=(0, 45), shade=1)
    assert nearest_color(render(scene, 128)[place(near, 128)]) == "red"


def expected_facts(scene: Scene, topic: str) -> set:
    """The facts that the query of `topic` asks for, computed from the scene."""
    if topic in DIRECTIONS:
        item = scene.at(topic)
        return {(topic, item.color, item.shape)} if item else set()
    numbers = ("no", "one", "two", "three", "four")
    largest = max(scene.objects, key=lambda item: item.size)
    facts: dict[str, set] = {
        "scene": {(scene.kind,)},
        "colors": {(item.color,) for item in scene.objects},
        "count": {(numbers[len(scene.objects)],)},
        "largest": {(largest.color, largest.shape, largest.direction)},
        "around": {(item.direction, item.color, item.shape) for item in scene.objects},
    }
    return facts[topic]


def test_every_answer_states_exactly_the_facts_of_its_scene() -> None:
    for index in range(100):
        scene = make_scene(1, index)
        for topic, query in QUERIES.items():
            for template in range(TEMPLATES):
                text = answer(scene, topic, template)
                facts = read_facts(query, text)
                kind = "color_shape_by_direction" if topic in DIRECTIONS else topic
                assert facts[kind] == expected_facts(scene, topic), text
                if topic in DIRECTIONS:
                    assert facts["color_by_direction"] == {f[:2] for f in facts[kind]}


def test_only_the_first_thing_that_an_answer_about_one_thing_names_counts() -> None:
    text = "in front there is a red ball and a blue box."
    assert read_facts(QUERIES["front"], text)["color_by_direction"] == {("front", "red")}
    text = "the largest is the red ball behind, or the blue box on the left."
    assert read_facts(QUERIES["largest"], text)["largest"] == {("red", "ball", "behind")}


def test_articles_fit_their_nouns() -> None:
    scenes = [make_scene(1, index) for index in range(20)]
    texts = [text for scene in scenes for _, text in rows(scene, 1, choice=0)]
    articles = {match for text in texts for match in re.findall(r"\b(an?) (\w)", text)}
    assert {article for article, letter in articles if letter in "aeiou"} == {"an"}
    assert {article for article, letter in articles if letter not in "aeiou"} == {"a"}


def test_a_rolled_panorama_has_only_queries_with_an_unambiguous_answer() -> None:
    between = 0
    for index in range(40):
        degrees = 9.0 * index
        scene = roll_scene(make_scene(7, index), degrees)
        picture = roll(render(make_scene(7, index), 128), degrees)
        queries = {query for query, _ in rows(scene, 1, choice=index)}
        for item in scene.objects:
            row, column = place(item, 128)
            colors = {nearest_color(picture[row, (column + shift) % 256]) for shift in (-1, 0, 1)}
            assert item.color in colors, (index, item)
            offsets = [abs((item.yaw - 90 * place + 180) % 360 - 180) for place in range(4)]
            if min(offsets) > 30:
                between += 1
                assert item.direction is None
                assert QUERIES["around"] not in queries
            for direction, angle in zip(DIRECTIONS, offsets, strict=True):
                if 30 < angle < 60:
                    assert QUERIES[direction] not in queries
                elif angle <= 30 and QUERIES[direction] in queries:
                    assert item.direction == direction
        assert {QUERIES[topic] for topic in ("scene", "colors", "count")} <= queries
    assert between > 10


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_scene_rolled_by_a_multiple_of_90_degrees_keeps_all_queries(quarters: int) -> None:
    for index in range(40):
        scene = make_scene(7, index)
        rolled = roll_scene(scene, 90 * quarters)
        assert all(has_answer(rolled, topic) for topic in QUERIES)
        for item, other in zip(scene.objects, rolled.objects, strict=True):
            step = DIRECTIONS.index(item.direction) + quarters
            assert other.direction == DIRECTIONS[step % 4]


def test_the_answer_to_how_many_lists_the_objects_before_their_number() -> None:
    text = answer(make_scene(7, 3), "count", 0)
    *colors, number = re.split(r", | and ", text.removesuffix("."))
    assert set(colors) == {item.color for item in make_scene(7, 3).objects}
    assert number == f"{('one', 'two', 'three', 'four')[len(colors) - 1]} objects"
    assert len(colors) > 1


def test_the_references_of_a_query_differ() -> None:
    answers: dict[str, list[str]] = {}
    for query, text in rows(make_scene(1, 0), 3, choice=0):
        answers.setdefault(query, []).append(text)
    assert set(answers) == set(QUERIES.values())
    assert all(len(texts) == len(set(texts)) == 3 for texts in answers.values())


def test_the_loaded_tokenizer_preserves_every_query_and_answer() -> None:
    """`AutoTokenizer` may load a different class than was saved."""
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "language_model")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    dialogue = Dialogue(tokenizer, 128)
    for index in range(50):
        for query, text in rows(make_scene(1, index), TEMPLATES, index):
            tokens = dialogue.row(query, text)
            assert dialogue.decode(tokens.answer) == text
            assert len(tokens.answer) <= len(re.findall(r"\w+|[^\w\s]", text)) + 1  # words


def test_the_dataset_is_reproduced_byte_for_byte(settings: DemoSettings, tmp_path: Path) -> None:
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


def test_a_rolled_picture_has_the_answers_of_the_rolled_scene(
    settings: DemoSettings, tmp_path: Path
) -> None:
    counts = change(settings.scenes, train=6, valid=1, test=2, turned=1.0, references=2)
    settings = change(settings, scenes=counts)
    make_scenes(settings, tmp_path)
    for split, count in (("train", 6), ("valid", 1), ("test", 2)):
        table = pd.read_csv(tmp_path / f"{split}.csv")
        for index, degrees in enumerate(_draw_rolls(split, settings)):
            scene = roll_scene(make_scene(settings.stream(split), index), degrees)
            url = f"images/{split}_{index:04d}.jpg"
            picture = np.asarray(Image.open(tmp_path / url))
            for item in scene.objects:
                assert nearest_color(picture[place(item, settings.height)]) == item.color
            asked = [topic for topic in QUERIES if has_answer(scene, topic)]
            lines = table[table["url"] == url]
            assert lines["query"].nunique() == len(asked)
            assert len(lines) == len(asked) * (1 if split == "train" else 2)
            for topic in asked:
                for text in lines["annotation"][lines["query"] == QUERIES[topic]]:
                    facts = read_facts(QUERIES[topic], text)
                    kind = "color_shape_by_direction" if topic in DIRECTIONS else topic
                    assert facts[kind] == expected_facts(scene, topic), text
        assert table["url"].nunique() == count
        rolled = split == "train"
        assert all((degrees != 0) == rolled for degrees in _draw_rolls(split, settings))
        if rolled:  # phrasings differ between panoramas
            texts = table["annotation"][table["query"] == QUERIES["scene"]]
            assert len({text.split()[0] for text in texts}) > 1


def change(settings: Any, **changes: Any) -> Any:
    return dataclasses.replace(settings, **changes)


def test_the_towers_are_small_and_load_like_other_pretrained_models() -> None:
    files = [path for path in TOWERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    tower = load_encoder(ENCODER, VIEWS.size)
    views = torch.zeros((1, 8, VIEWS.size, VIEWS.size, 3), dtype=torch.uint8)
    assert tower(views).shape == (1, 8, 8, 8, 128)


def test_the_towers_are_the_output_that_dvc_lock_records() -> None:
    with Repo(str(ROOT)) as repo:
        for name in ("encoder", "language_model"):
            (stage,) = repo.stage.load_all(str(DEMO / "dvc.yaml"), name)
            (out,) = stage.outs
            assert not out.changed_checksum(), f"{out}: not what data/demo/dvc.lock records"


def test_the_loss_is_lowest_for_the_captions_that_match() -> None:
    torch.manual_seed(0)
    model = encoder._build_model().eval()
    texts = [("room", "red", "ball", "left"), ("desert",), ("hall", "blue", "cone", "middle")]
    ids = torch.tensor([[encoder._WORDS.index(w) for w in t] + [0] * (10 - len(t)) for t in texts])
    with torch.no_grad():
        features = model.text_model(ids).pooler_output
        right, wrong = (
            encoder._sigmoid_loss(model, features, texts, matches)
            for matches in ([0, 1, 2], [1, 2, 0])
        )
    assert right < wrong


def test_a_wrong_caption_differs_in_one_word_of_the_same_kind() -> None:
    random = np.random.default_rng(0)
    caption = ("room", "red", "ball", "left", "blue", "box", "middle")
    wrong = [encoder._corrupt(caption, random) for _ in range(100)]
    for text in wrong:
        ((old, new),) = [(a, b) for a, b in zip(caption, text, strict=True) if a != b]
        kinds = (KINDS, COLORS, SHAPES, ("left", "middle", "right"))
        assert any(old in words and new in words for words in kinds)
    assert len(set(wrong)) > 10


def test_the_encoder_represents_color_and_shape(settings: DemoSettings) -> None:
    tower = load_encoder(ENCODER, VIEWS.size).tower
    measured = probe(tower.eval(), settings)
    report = json.loads((TOWERS / "encoder/report.json").read_text())
    for name in ("probe_color", "probe_shape"):
        assert measured[name] == pytest.approx(report[name], abs=0.008)  # two objects
        assert measured[name] >= 0.94


def test_the_language_model_answers_from_context_tokens(settings: DemoSettings) -> None:
    language, tokenizer = load_language_model(
        Pretrained(str(TOWERS / "language_model"), None, False)
    )
    model, dialogue = with_context(language), Dialogue(tokenizer, 128)
    report = json.loads((TOWERS / "language_model/report.json").read_text())
    for name, rolled in (("right", False), ("right_turned", True)):
        assert accuracy(model, dialogue, settings, count=20, rolled=rolled) >= 0.98
        assert report[name] >= 0.98


def test_the_context_holds_all_objects_of_a_scene(tmp_path: Path) -> None:
    most = 24  # 96 of the 128 tokens can describe objects, and a scene has up to four
    assert most == MAX_PER_OBJECT
    largest = SimpleNamespace(permutation=range, integers=lambda low, high: high - 1)
    full = next(scene for i in range(50) if len((scene := make_scene(1, i)).objects) == 4)
    words = token_words(full, most, largest)  # type: ignore[arg-type]
    assert len(words) == 128
    assert all(sum(item.color in token for token in words) == most for item in full.objects)
    path, text = tmp_path / "params.yaml", (DEMO / "params.yaml").read_text()
    path.write_text(text.replace("places: 8", f"places: {most + 1}"))
    with pytest.raises(UserError, match=r"lessons\[1\]\.places: .* at most 24, found 25"):
        load_demo_settings(path)
    path.write_text(
        re.sub(r"lessons:.*?\n  batch_size", "lessons: []\n  batch_size", text, flags=re.S)
    )
    with pytest.raises(UserError, match=r"language_model\.lessons: .* at least 1 item"):
        load_demo_settings(path)


def test_a_context_token_is_the_sum_of_its_words_and_noise() -> None:
    language, tokenizer = load_language_model(
        Pretrained(str(TOWERS / "language_model"), None, False)
    )
    model, dialogue = with_context(language), Dialogue(tokenizer, 128)
    scenes = [make_scene(1, index) for index in range(2)]

    def made(noise: float) -> torch.Tensor:
        random = np.random.default_rng(0)
        with torch.no_grad():
            return context_tokens(model, dialogue, scenes, noise, 8, random)

    random, tokens = np.random.default_rng(0), made(noise=0)
    for scene, context in zip(scenes, tokens, strict=True):
        listed = token_words(scene, 8, random)
        assert listed != sorted(listed)
        for words, token in zip(listed, context, strict=True):
            ids = [tokenizer.get_vocab()[f"Ġ{word}"] for word in words]
            summed = language.get_input_embeddings().weight[ids].sum(dim=0)
            assert torch.allclose(token, functional.normalize(summed, dim=0) * 128**0.5, atol=1e-5)
    assert (made(noise=0.5) - tokens).std().item() == pytest.approx(0.5, rel=0.02)


def test_the_words_of_a_scene_are_in_random_order_and_place_its_objects() -> None:
    full = make_scene(1, next(i for i in range(50) if len(make_scene(1, i).objects) == 4))
    turned = [roll_scene(full, degrees) for degrees in range(360)]
    between = next(scene for scene in turned if not has_answer(scene, "around"))
    for scene in (full, between):
        words = token_words(scene, 8, np.random.default_rng(0))
        assert words[:20] != [[]] * 20 and len({tuple(token) for token in words[:20]}) > 3
        for item in scene.objects:
            (token,) = {tuple(token) for token in words if item.color in token}
            near = [name for name in DIRECTIONS if name in token]
            offsets = {name: offset(item.yaw, name) for name in DIRECTIONS}
            assert len(near) == (1 if min(offsets.values()) <= 30 else 2)
            assert all(offsets[name] < 60 for name in near)
            assert ("largest" in token) == (item is scene.largest)


def test_lessons_have_different_scenes_and_roll_their_share(
    settings: DemoSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the training itself."""
    lessons = [Lesson(steps=3, places=8, turned=0.0), Lesson(steps=2, places=8, turned=0.5)]
    parameters = change(settings.language_model, lessons=lessons, batch_size=4)
    made: list[Scene] = []
    rolls: list[float] = []

    def fit(model: Any, loss_of_step: Any, steps: range, *_: Any) -> float:
        return max(loss_of_step(step).item() for step in steps)

    def make(seed: int, index: int) -> Scene:
        scene = make_scene(seed, index)
        if seed == settings.stream("language_model"):  # not those of the tokenizer
            made.append(scene)
        return scene

    def turn(scene: Scene, degrees: float) -> Scene:
        rolls.append(degrees)
        return roll_scene(scene, degrees)

    monkeypatch.setattr(language_model, "fit", fit)
    monkeypatch.setattr(language_model, "make_scene", make)
    monkeypatch.setattr(language_model, "roll_scene", turn)
    monkeypatch.setattr(language_model, "accuracy", lambda *_, **__: 0.0)
    make_language_model(change(settings, language_model=parameters), tmp_path)
    assert len(made) == len(set(made)) == 5 * 4
    assert len(rolls) == len(set(rolls)) == 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "tower"),
    [("demo-encoder", "encoder"), ("demo-language-model", "language_model")],
)
def test_pretraining_is_reproducible_and_learns(command: str, tower: str, tmp_path: Path) -> None:
    """At a small size: two runs give the same bytes, and the loss falls from that of one step."""
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
