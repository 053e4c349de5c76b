"""`data.store: panoramas`: prepare keeps panoramas as JPEG, and views are sampled when they are
read."""

import io
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import (
    ROOT,
    Killed,
    change,
    outputs,
    read_array,
    run_stage,
    save_panorama,
    write_rows,
)
from panollava import config, paths
from panollava.config import Settings
from panollava.data.batches import gather
from panollava.data.images import read_panorama, roll
from panollava.data.prepare import prepare_project
from panollava.data.shards import Shards, open_views
from panollava.errors import UserError
from panollava.evaluation.evaluate import evaluate
from panollava.geometry.views import Sampler, layout
from panollava.provenance import code_digest
from panollava.serving.report import write_report
from panollava.stages import STAGES
from panollava.training import curves
from panollava.training import features as features_module
from panollava.training.features import write_features

TRAIN = paths.PREPARED / "train" / paths.PANORAMAS
STORED = {  # width of the picture, and of the stored one
    "narrow.jpg": (300, 300),
    "middle.png": (1600, 1600),
    "wide.jpg": (3002, 1501),
    "wide.png": (4500, 1500),
    "huge.jpg": (6006, 1502),
}
VIEWS = config.Views("e2p", 64, 90.0, 0.5, 0.0, False)


def stored(settings: Settings) -> Settings:
    return change(settings, data__store="panoramas", trainer__threads=1)


@pytest.fixture
def panoramas(settings: Settings) -> Settings:
    """Settings in a folder in which prepare has stored panoramas."""
    settings = stored(settings)
    prepare_project(settings)
    return settings


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows about panoramas of all sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    for seed, (name, (width, _)) in enumerate(STORED.items()):
        save_panorama(folder / "images" / name, seed, width // 2)
    rows = [(f"images/{name}", "what", "a box.") for name in STORED]
    for split in ("train", "valid", "test"):
        write_rows(folder / f"{split}.csv", rows if split == "train" else rows[:1])
    return folder


@pytest.mark.parametrize(
    "views",
    [
        VIEWS,
        replace(VIEWS, pitch=20.0, global_view=True),
        replace(VIEWS, strategy="cubemap"),
        replace(VIEWS, strategy="sliding_window"),
        replace(VIEWS, strategy="resize"),
        replace(VIEWS, size=448),
    ],
    ids=lambda views: f"{views.strategy} {views.size} {views.pitch:g}",
)
def test_views_of_a_stored_panorama_are_those_of_the_picture_but_for_jpeg(
    settings: Settings, sizes: Path, views: config.Views
) -> None:
    settings = change(settings, data__dir=str(sizes), views=views, evaluate__rolls=[])
    prepare_project(settings)
    expected = read_array(TRAIN)
    prepare_project(stored(settings))
    jpegs, sampled = Shards(TRAIN), open_views(TRAIN, views)
    assert (sampled.shape, sampled.dtype) == (expected.shape, np.uint8)
    sampler = Sampler(layout(views), views.size)
    for panorama, (name, (_, width)) in enumerate(STORED.items()):
        size = Image.open(io.BytesIO(jpegs[panorama])).size
        if views.size == 64:
            assert size == (width, (width + 1) // 2), name
        assert size[0] >= min(sampler.panorama_width, STORED[name][0]), name
        pixels = read_panorama(jpegs[panorama], sampler.panorama_width)
        whole = read_panorama(sizes / "images" / name, sampler.panorama_width)
        # Other formats than JPEG are not only scaled by powers of 2.
        assert abs(len(pixels) / len(whole) - 1) < (0.01 if name.endswith(".jpg") else 0.5), name
        assert np.array_equal(sampled[panorama], sampler.sample(pixels))
        # The coarse original of middle.png has steps, which another scale softens.
        difference = sampled[panorama].astype(float) - expected[panorama]
        assert np.sqrt(np.square(difference).mean()) < (6 if name == "middle.png" else 2), name


def test_rolled_panoramas_are_those_of_the_stored_ones(panoramas: Settings) -> None:
    settings = panoramas
    sampler = Sampler(layout(settings.views), settings.views.size)
    jpegs, rolled = Shards(paths.PREPARED / "test" / paths.PANORAMAS), Shards(paths.ROLLED)
    assert len(jpegs) == 3 and len(rolled) == 3
    for panorama in range(3):
        pixels = read_panorama(jpegs[panorama], sampler.panorama_width)
        assert np.array_equal(rolled[panorama], sampler.sample(roll(pixels, 20)))


def test_all_stages_run_and_give_the_same_bytes_with_any_number_of_workers(
    panoramas: Settings,
) -> None:
    expected: dict[str, dict[str, bytes]] = {}
    for workers in (0, 1, 2):
        settings = change(panoramas, machine__loader_workers=workers)
        for stage in ("vision", "resampler"):
            run_stage(stage, settings)
            assert outputs(stage) == expected.setdefault(stage, outputs(stage)), workers
        shutil.rmtree(paths.RESUME)
    digests = set()
    for threads in (1, 3):
        write_features(change(panoramas, machine__decode_threads=threads))
        digests.add((paths.FEATURES / "train/digest.txt").read_text())
        shutil.rmtree(paths.RESUME)
    assert len(digests) == 1
    run_stage("finetune", panoramas)
    evaluate(panoramas)
    write_report(panoramas)
    assert paths.EVALUATION.is_file() and "data:image/jpeg" in paths.REPORT.read_text()
    views = gather(open_views(TRAIN, panoramas.views), [*range(6)])
    written = torch.from_numpy(read_array(paths.FEATURES / "train"))
    model = features_module._Model(panoramas, None)
    with torch.inference_mode():
        assert torch.allclose(written, model.pooling(model.encoder(views)), atol=1e-5)


@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_a_killed_stage_resumes_to_the_same_bytes(
    panoramas: Settings, stage: str, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    settings = change(panoramas, machine__loader_workers=2, stage__resampler__turn=True)
    run_stage("vision", settings)
    run_stage(stage, settings)
    expected = outputs(stage)
    shutil.rmtree(paths.RESUME)

    def die(callback: object, trainer: object, module: object, *_: object) -> None:
        if module.step == 2:  # type: ignore[attr-defined]
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_end", die, raising=False)
        with pytest.raises(Killed):
            run_stage(stage, settings)
    with caplog.at_level(logging.INFO):
        run_stage(stage, settings)
    assert "resuming from step" in caplog.text
    assert outputs(stage) == expected


def damage(shard: Path, at: int) -> None:
    """Without a sign in the file's size or time of change."""
    status = shard.stat()
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(bytes(64))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_in_a_shard_is_named(panoramas: Settings, workers: int) -> None:
    (first, _) = Shards(TRAIN).files
    picture = Shards(TRAIN)[1]
    damage(first, first.read_bytes().index(picture) + len(picture) // 2)
    settings = change(panoramas, machine__loader_workers=workers)
    message = r"train/panoramas/000000\.tar: picture 1 cannot be decoded \(.*\), but is in .*man"
    with pytest.raises(UserError, match=message):
        run_stage("vision", settings)


def test_a_damaged_shard_is_named(panoramas: Settings) -> None:
    (first, second) = Shards(TRAIN).files
    damage(second, 0)  # the header of the first picture
    with pytest.raises(UserError, match=r"000001\.tar: 0 pictures instead of the 2 in .*manifest"):
        open_views(TRAIN, panoramas.views)[4]
    os.utime(first)
    damage(first, 700)
    os.utime(first)
    with pytest.raises(UserError, match=r"000000\.tar: other content than in .*manifest\.json"):
        run_stage("vision", panoramas)
    first.unlink()
    with pytest.raises(UserError, match=r"000000\.tar: no such file, but it is in .*manifest\.js"):
        run_stage("vision", panoramas)


def test_a_picture_that_cannot_be_read_is_rejected(settings: Settings, small_data: Path) -> None:
    shutil.copytree(small_data, "data")
    broken = Path("data/images/train_1.jpg")
    broken.write_bytes(broken.read_bytes()[:-100])
    settings = change(stored(settings), data__dir="data", data__max_rejected=0.5)
    prepare_project(settings)
    assert len(Shards(TRAIN)) == 5
    assert "cut off" in (paths.PREPARED / "train/rejects.csv").read_text()


def test_the_code_that_reads_panoramas_counts_only_if_they_are_stored(
    project: Path, tmp_path: Path
) -> None:
    """In the digests on which the trainings depend."""
    code = tmp_path / "code"
    shutil.copytree(ROOT / "src", code, ignore=shutil.ignore_patterns("__pycache__"))
    digests: dict[str, list[bytes]] = {"views": [], "panoramas": []}
    trainings = []

    def run(command: str) -> None:
        subprocess.run(
            [sys.executable, str(code / "run.py"), command],
            env={**os.environ, "PYTHONPATH": str(code)},
            check=True,
        )

    for _ in range(2):
        run("digest")
        for store, found in digests.items():
            text = paths.PARAMS.read_text()
            for other in digests:
                text = text.replace(f"store: {other}\n", f"store: {store}\n")
            paths.PARAMS.write_text(text)
            run("prepare")
            found.append((TRAIN / "digest.txt").read_bytes())
        folder = project / "runs/digest"
        trainings.append([(folder / f"{stage}.txt").read_bytes() for stage in STAGES])
        images = code / "panollava/data/images.py"
        images.write_text(images.read_text().replace("_READ_AHEAD = 16", "_READ_AHEAD = 15"))
    assert trainings[0] == trainings[1]
    assert digests["views"][0] == digests["views"][1]
    assert digests["panoramas"][0] != digests["panoramas"][1]


def test_features_of_panoramas_that_other_code_has_read_are_not_used_again(
    panoramas: Settings, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    settings = change(
        panoramas,
        data__store_dir="store",
        stage__vision__epochs=0,
        stage__resampler__epochs=0,
    )
    prepare_project(settings)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    caplog.set_level(logging.INFO)
    write_features(settings)
    assert "5 of 5 shards are finished already" in caplog.text
    caplog.clear()
    digest = code_digest.digest

    def changed(stage: str) -> str:
        return digest(stage) + "other" * (stage == "prepare")

    monkeypatch.setattr(code_digest, "digest", changed)
    prepare_project(settings)
    caplog.clear()
    write_features(settings)
    assert "1 of 5 shards are finished already" in caplog.text  # the rolled panoramas are views
