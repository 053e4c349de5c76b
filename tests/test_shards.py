"""Shards: read like one array, found again after an interruption, the same whoever makes them."""

import errno
import json
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from helpers import read_array, run_stage, save_shards
from panollava import paths
from panollava.config import Settings
from panollava.data import picture_shards, shard_work, shards
from panollava.data.images import read_panorama
from panollava.data.prepare import prepare_project
from panollava.data.shard_work import Part
from panollava.data.shards import Shards, verify
from panollava.errors import UserError
from panollava.evaluation.evaluate import evaluate
from panollava.training.features import write_features

TRAIN = paths.PREPARED / "train/panoramas"


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (23, 2, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are decoded."""
    names: list[str] = []

    def read(path: Path, width: int) -> np.ndarray:
        names.append(path.name)
        return read_panorama(path, width)

    monkeypatch.setattr(picture_shards, "read_panorama", read)
    return names


def outputs(*folders: Path) -> dict[str, bytes]:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return {str(file): file.read_bytes() for file in files}


def stored_in(settings: Settings, folder: Path | None) -> Settings:
    store_dir = None if folder is None else str(folder)
    return replace(settings, data=replace(settings.data, store_dir=store_dir))


@pytest.mark.parametrize("size", [1, 4, 23, 100])
def test_shards_are_read_like_one_array(
    tmp_path: Path, array: np.ndarray, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 2)
    written = save_shards(tmp_path / "set", array, size)
    assert (len(written), written.shape, written.dtype) == (23, array.shape, array.dtype)
    assert written.starts.tolist() == [*range(0, 23, size), 23]
    for opened in (written, pickle.loads(pickle.dumps(written))):
        for panorama in (22, 0, 3, 4, 5, 21, 0):
            assert np.array_equal(opened[panorama], array[panorama])
    for panorama in (-1, 23):
        with pytest.raises(IndexError, match="of 23"):
            written[panorama]


def test_a_set_without_panoramas_is_one(tmp_path: Path) -> None:
    empty = save_shards(tmp_path / "set", np.zeros((0, 2), np.uint8))
    assert len(empty) == 0 and empty.starts.tolist() == [0]


def test_the_digest_depends_on_the_panoramas_only(tmp_path: Path, array: np.ndarray) -> None:
    first, same = (save_shards(tmp_path / name, array).digest for name in ("a", "b"))
    assert first == same == (tmp_path / "a/digest.txt").read_text().strip()
    array[5, 0, 0, 0, 0] ^= 1
    assert save_shards(tmp_path / "c", array).digest != first


def change_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)


def test_a_missing_or_changed_shard_is_named(
    tmp_path: Path, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("set")
    file = folder / "000002.npy"

    def written_again() -> Shards:
        shutil.rmtree(folder, ignore_errors=True)
        return save_shards(folder, array)

    verify([written_again()])
    change_last_byte(file)
    message = r"000002\.npy: other content than in set/manifest\.json; restore the file, or remove"
    for _ in range(2):  # a second look finds it again
        with pytest.raises(UserError, match=message):
            verify([Shards(folder)])
    written_again()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"000002\.npy: \d+ bytes instead of the \d+ in set/mani"):
        Shards(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"000002\.npy: no such file, but it is in set/manifest"):
        Shards(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest .*remove it, and run"):
        Shards(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: no such file; run the stage that"):
        Shards(folder)


def test_files_are_read_again_only_after_a_change(
    tmp_path: Path, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = save_shards(Path("set"), array)
    read: list[str] = []
    hashed = shards.file_sha256

    def counted(file: Path) -> str:
        read.append(file.name)
        return hashed(file)

    monkeypatch.setattr(shards, "file_sha256", counted)
    verify([written])
    assert not read  # what was just written is known
    content = written.files[1].read_bytes()
    written.files[1].write_bytes(content)
    for _ in range(2):
        verify([Shards(Path("set"))])
        assert read == ["000001.npy"]
    (paths.CACHE / "shards.json").write_text("{")
    verify([written])
    assert sorted(read[1:]) == [f"{number:06d}.npy" for number in range(6)]


def test_shards_outside_the_project_serve_all_stages(settings: Settings, tmp_path: Path) -> None:
    inside = {split: Shards(paths.PREPARED / split / "panoramas").digest for split in SPLITS}
    expected = _results(settings)
    shutil.rmtree("runs")
    shutil.rmtree(paths.RESUME)
    outside = stored_in(settings, tmp_path / "store")
    prepare_project(outside)
    assert not [*paths.PREPARED.rglob("*.npy"), *paths.PREPARED.rglob("*.tar")]
    assert inside == {s: Shards(paths.PREPARED / s / "panoramas").digest for s in SPLITS}
    assert _results(outside) == expected
    assert not list(paths.FEATURES.rglob("*.npy"))
    (file, *_) = Shards(TRAIN).files
    assert file.is_relative_to(tmp_path / "store")
    file.unlink()
    message = f"{file}: no such file, but it is in {TRAIN}/manifest.* --force --single-item prepare"
    with pytest.raises(UserError, match=message):
        run_stage("vision", outside)


SPLITS = ("train", "valid", "test")


def _results(settings: Settings) -> dict[str, bytes]:
    for stage in ("vision", "resampler"):
        run_stage(stage, settings)
    write_features(settings)
    run_stage("finetune", settings)
    evaluate(settings)
    files = [*Path("runs").glob("vlm_*/*.safetensors"), paths.PREDICTIONS, paths.EVALUATION_DETAILS]
    return {str(file): file.read_bytes() for file in files}


def test_a_store_may_be_moved_without_decoding_a_picture_again(
    settings: Settings, tmp_path: Path, decoded: list[str]
) -> None:
    prepare_project(stored_in(settings, tmp_path / "store"))
    before = Shards(TRAIN).digest
    decoded.clear()
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such file, but it is in"):
        Shards(TRAIN)
    prepare_project(stored_in(settings, tmp_path / "moved"))
    assert not decoded and Shards(TRAIN).digest == before


def test_an_interrupted_command_continues_with_the_missing_shards(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outputs(paths.PREPARED)
    shutil.rmtree(paths.RESUME)
    opened = []

    def interrupted(path: Path, width: int) -> Any:
        opened.append(path.name)
        if path.name == "train_5.jpg":
            raise KeyboardInterrupt
        return read_panorama(path, width)

    monkeypatch.setattr(picture_shards, "read_panorama", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_project(settings)
    assert "train_0.jpg" in opened
    opened.clear()

    def counted(path: Path, width: int) -> Any:
        opened.append(path.name)
        return read_panorama(path, width)

    monkeypatch.setattr(picture_shards, "read_panorama", counted)
    prepare_project(settings)
    assert opened and not {f"train_{number}.jpg" for number in range(4)} & {*opened}
    assert outputs(paths.PREPARED) == expected


def test_only_the_shards_of_changed_pictures_are_made_again(
    settings: Settings, decoded: list[str]
) -> None:
    picture = Path(settings.data.dir) / "images/train_5.jpg"
    content = picture.read_bytes()
    try:
        picture.write_bytes((picture.parent / "train_0.jpg").read_bytes())
        prepare_project(settings)
    finally:
        picture.write_bytes(content)
    assert sorted(decoded) == ["train_4.jpg", "train_5.jpg"]
    decoded.clear()
    prepare_project(replace(settings, evaluate=replace(settings.evaluate, rolls=[30.0])))
    assert {name.split("_")[0] for name in decoded} == {"train", "test"}  # 4, 5 and all of test


def test_a_shard_that_changed_in_the_store_is_found_by_the_next_command(
    settings: Settings, tmp_path: Path
) -> None:
    """Also by a command that makes no shard, because another one has."""
    outside = stored_in(settings, tmp_path / "store")
    prepare_project(outside)
    (_, file) = Shards(TRAIN).files
    change_last_byte(file)
    prepare_project(outside)
    with pytest.raises(UserError, match=f"{file}: other content than in {TRAIN}/manifest.json"):
        run_stage("vision", outside)
    file.unlink()
    prepare_project(outside)
    run_stage("vision", outside)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_parts_and_one_process_make_the_same_bytes(settings: Settings, count: int) -> None:
    for stage in ("vision", "resampler"):
        run_stage(stage, settings)
    write_features(settings)
    expected = outputs(paths.PREPARED, paths.FEATURES)
    shutil.rmtree(paths.PREPARED)
    shutil.rmtree(paths.FEATURES)
    shutil.rmtree(paths.RESUME)
    for work in (prepare_project, write_features):
        for number in range(count, 1, -1):
            work(settings, part=Part(number, count))
        message = r"--merge: \d of [45] shards are missing \(train .*; make them with: panollava"
        with pytest.raises(UserError, match=message):
            work(settings, merge=True)
        work(settings, part=Part(1, count))
        work(settings, merge=True)
    assert outputs(paths.PREPARED, paths.FEATURES) == expected


def test_an_unreadable_record_counts_as_missing(settings: Settings, decoded: list[str]) -> None:
    expected = outputs(paths.PREPARED)
    for number, file in enumerate(sorted(paths.RESUME.rglob("*.json"))):
        file.write_text(["", "[]", "null", '{"a": 1}'][number % 4])
    prepare_project(settings)
    assert len(decoded) == 11 and outputs(paths.PREPARED) == expected


def test_an_incomplete_shard_counts_as_missing(settings: Settings, tmp_path: Path) -> None:
    outside = stored_in(settings, tmp_path / "store")
    prepare_project(outside)
    expected = [file.read_bytes() for file in Shards(TRAIN).files]
    cut, gone = Shards(TRAIN).files
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    prepare_project(outside)
    assert [file.read_bytes() for file in Shards(TRAIN).files] == expected


def test_the_manifest_has_one_line_for_each_shard(settings: Settings) -> None:
    text = (TRAIN / "manifest.json").read_text()
    manifest = json.loads(text)
    assert [shard[:2] for shard in manifest["shards"]] == [["000000.npy", 4], ["000001.npy", 2]]
    assert (manifest["folder"], manifest["shape"]) == (None, [8, 32, 32, 3])
    assert text.count("000001.npy") == 1 and '    ["000001.npy", 2, ' in text
    assert read_array(TRAIN).shape == (6, 8, 32, 32, 3)


def with_copies(settings: Settings, folder: Path) -> Settings:
    """The data with a picture that is in two splits, and a copy of another, in shards of one."""
    shutil.copytree(settings.data.dir, folder)
    copied = folder / "images/train_5.jpg"
    copied.write_bytes((folder / "images/train_0.jpg").read_bytes())
    with (folder / "valid.csv").open("a") as file:
        file.write("images/train_4.jpg,what,the red box\n")
    changed = replace(settings.data, dir=str(folder), shard_size=1)
    return replace(settings, data=changed)


@pytest.mark.parametrize("links", [True, False])
def test_shards_of_equal_content_are_made_once_and_serve_all(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(shard_work, "_SEEN_SECONDS", 0.5)
        monkeypatch.setattr(shard_work.os, "link", fail)
        monkeypatch.setattr(shard_work.os, "replace", _replace_within_a_folder(os.replace))
    copies = with_copies(settings, tmp_path / "copies")
    for stage in (prepare_project, _train_encoder, write_features):
        stage(copies)
    for name in ("train", "valid"):
        assert len(Shards(paths.FEATURES / name)) == len(
            Shards(paths.PREPARED / name / "panoramas")
        )
    train, valid = (read_array(paths.FEATURES / name) for name in ("train", "valid"))
    assert (len(train), len(valid)) == (6, 3)
    assert np.array_equal(train[5], train[0]) and not np.array_equal(train[4], train[0])
    assert np.array_equal(valid[2], train[4])
    verify([Shards(TRAIN), Shards(paths.FEATURES / "train")])


def _replace_within_a_folder(replace: Any) -> Any:
    """os.replace where runs/ is on another file system."""

    def replacing(source: Any, target: Any) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        replace(source, target)

    return replacing


def _train_encoder(settings: Settings) -> None:
    for stage in ("vision", "resampler"):
        run_stage(stage, settings)


def test_features_are_computed_again_if_only_the_normalization_of_pixels_changes(
    settings: Settings, tmp_path: Path
) -> None:
    """It is part of the encoder's files, but not of its weights."""
    tower = tmp_path / "encoder"
    shutil.copytree(settings.model.encoder.path, tower)
    encoder = replace(settings.model.encoder, path=str(tower))
    changed = replace(settings, model=replace(settings.model, encoder=encoder))
    _train_encoder(changed)
    write_features(changed)
    before = read_array(paths.FEATURES / "train")
    file = tower / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.5, 0.5, 0.5", "0.4, 0.4, 0.4", 1))
    write_features(changed)
    assert not np.array_equal(read_array(paths.FEATURES / "train"), before)


def _count_shards(patch: pytest.MonkeyPatch) -> list[Any]:
    """The shards that are written from now on."""
    written: list[Any] = []
    write = picture_shards._write

    def counted(*arguments: Any) -> None:
        written.append(arguments)
        write(*arguments)

    patch.setattr(picture_shards, "_write", counted)
    return written


def test_a_check_that_is_stopped_reads_no_more_and_keeps_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = save_shards(Path("set"), np.arange(40, dtype=np.uint8), size=1)
    for file in written.files:
        os.utime(file, ns=(0, 0))
    read: list[str] = []
    hashed = shards.file_sha256

    def slow(file: Path) -> str:
        read.append(file.name)
        time.sleep(0.05)
        return hashed(file)

    monkeypatch.setattr(shards, "file_sha256", slow)
    change_last_byte(written.files[8])
    for count in (9, 1):
        read.clear()
        with pytest.raises(UserError, match=r"000008\.npy: other content"):
            verify([Shards(Path("set"))])
        assert count <= len(read) < 20 and ("000000.npy" in read) == (count == 9)


@pytest.mark.parametrize("store", [None, "store"])
def test_a_picture_that_could_not_be_read_is_tried_again(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    store: str | None,
) -> None:
    """Permissions, a network or an installed decoder do not change the size and time of a file."""
    expected = outputs(paths.PREPARED)
    shutil.rmtree(paths.RESUME)
    tolerant = replace(settings, data=replace(settings.data, max_rejected=0.5))
    tolerant = stored_in(tolerant, tmp_path / store if store else None)
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == "train_1.jpg":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", denied)
        decoded = _count_shards(patch)
        prepare_project(tolerant, part=Part(1, 1))
        prepare_project(tolerant, merge=True)
        assert len(Shards(TRAIN)) == 5
        decoded.clear()
        prepare_project(tolerant)
        assert not decoded  # no shard is made again for it
    prepare_project(tolerant)
    assert len(Shards(TRAIN)) == 6
    if store is None:
        assert outputs(paths.PREPARED) == expected


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"x": 1}', '"text"'])
def test_a_damaged_note_of_what_was_read_is_ignored(
    tmp_path: Path, array: np.ndarray, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written = save_shards(Path("set"), array)
    (paths.CACHE / "shards.json").write_text(content)
    verify([written])
    save_shards(Path("set"), array)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"digest": ""}'])
def test_a_manifest_without_its_fields_is_an_error(
    tmp_path: Path, array: np.ndarray, content: str
) -> None:
    save_shards(tmp_path / "set", array)
    file = tmp_path / "set/manifest.json"
    whole = json.loads(file.read_text())
    for damaged in (content, json.dumps(whole | {"shards": [["000000.npy"]]})):
        file.write_text(damaged)
        with pytest.raises(
            UserError, match=r"manifest\.json: not a manifest .*; remove it, and run"
        ):
            Shards(tmp_path / "set")


def test_shards_of_other_versions_of_the_libraries_are_made_again(
    settings: Settings, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the bytes would depend on when a store was filled."""
    prepare_project(settings)
    assert not decoded
    monkeypatch.setattr(cv2, "__version__", "0.0")
    prepare_project(settings)
    assert len(decoded) == 11
