"""A result and its header alone rebuild the model, which answers as the evaluation does."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import panollava
from helpers import ROOT, read_array, save_language_model, save_towers
from panollava import PanoLLaVA, paths
from panollava.cli import main as cli
from panollava.data.images import PictureError
from panollava.errors import UserError
from panollava.model.weights import read_header


@pytest.fixture(scope="module")
def evaluated(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """A project with an evaluation, whose language model answers in words: its predictions, with
    `attrs["folder"]`."""
    folder = tmp_path_factory.mktemp("evaluated")
    save_towers(folder / "towers")
    save_language_model(folder / "towers/language_model", spread=0.2)
    shutil.copytree(small_data, folder / "data")
    text = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("dir: data/demo", "dir: data"),
        ("data/demo/towers", "towers"),
        ("size: 64", "size: 32"),
        ("features: float32", "features: float16"),
        ("max_new_tokens: 48", "max_new_tokens: 6"),
        ("rolls: [20, 45, 90, 180, 270]", "rolls: []"),
    ):
        assert old in text
        text = text.replace(old, new)
    text = re.sub(r"epochs: \d+", "epochs: 0", text)
    (folder / "params.yaml").write_text(
        re.sub(r"max_text_length: \d+", "max_text_length: 99", text)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["train", "all"])
        cli.main(["evaluate"])
        table = pd.read_csv(paths.PREDICTIONS, keep_default_na=False)
    table.attrs["folder"] = folder
    return table


def folder_of(table: pd.DataFrame) -> Path:
    return Path(table.attrs["folder"])


def ask_all(model: PanoLLaVA, table: pd.DataFrame) -> list[str]:
    """As a user would, one picture after the other."""
    answers: dict[tuple[str, str], str] = {}
    for url, rows in table.groupby("url"):
        queries = rows["query"].tolist()
        texts = model.answer(folder_of(table) / "data" / str(url), queries, max_new_tokens=6)
        answers |= {(str(url), q): text for q, text in zip(queries, texts, strict=True)}
    return [answers[url, q] for url, q in zip(table["url"], table["query"], strict=True)]


@pytest.mark.parametrize("stage", ["finetune", "resampler"])
def test_a_result_alone_answers_as_the_evaluation_does(
    evaluated: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Without params.yaml and from another working directory. After 0 epochs both stages hold the
    same weights."""
    monkeypatch.chdir(tmp_path)
    model = PanoLLaVA.from_pretrained(folder_of(evaluated) / f"runs/vlm_{stage}")
    predictions = evaluated["prediction"].tolist()
    assert ask_all(model, evaluated) == predictions and len(set(predictions)) > 2
    assert not any(tmp_path.iterdir())


def test_the_features_are_those_of_the_command(evaluated: pd.DataFrame) -> None:
    """Rounded to float16 as there."""
    folder = folder_of(evaluated)
    model = PanoLLaVA.from_pretrained(folder / "runs/vlm_finetune/model_final.safetensors")
    pictures = [folder / "data" / url for url in dict.fromkeys(evaluated["url"])]
    views = np.stack([model.views(picture) for picture in pictures])
    assert np.array_equal(views, read_array(folder / "runs/prepared/test/panoramas"))
    expected = read_array(folder / "runs/features/test")
    features = model.features(pictures).numpy()
    assert expected.dtype == np.float16 and np.abs(features - expected).max() < 2e-3
    assert np.array_equal(features, features.astype(np.float16))


def test_a_panorama_may_be_a_file_an_image_or_an_array(evaluated: pd.DataFrame) -> None:
    model = PanoLLaVA.from_pretrained(folder_of(evaluated) / "runs/vlm_finetune")
    file = folder_of(evaluated) / "data/images/test_0.jpg"
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    before = image.tobytes()
    given = [str(file), file, image, np.asarray(image)]
    answers = {tuple(model.answer(each, ["what"], max_new_tokens=6)) for each in given}
    assert len(answers) == 1 and image.tobytes() == before
    with pytest.raises(PictureError, match="picture: not 2:1: 90 x 90 pixels"):
        model.answer(Image.new("RGB", (90, 90)), ["what"])
    for wrong in (np.zeros((4, 8)), np.zeros((4, 8, 3)), np.zeros((4, 8, 4), np.uint8)):
        with pytest.raises(UserError, match="panorama: expected a file, a PIL image or a uint8"):
            model.answer(wrong, ["what"])
    with pytest.raises(PictureError, match="nowhere.jpg: picture missing"):
        model.answer("nowhere.jpg", ["what"])


def test_another_tower_is_an_error_that_names_the_file(
    evaluated: pd.DataFrame, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(folder_of(evaluated), project)
    result = project / "runs/vlm_finetune"
    config = project / "towers/encoder/config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match=r"config.json: SHA-256 \w{16}, expected \w{16}: not the"):
        PanoLLaVA.from_pretrained(result)
    (project / "towers/encoder").rename(tmp_path / "encoder")
    with pytest.raises(UserError, match="towers/encoder: no such folder; .* pass encoder="):
        PanoLLaVA.from_pretrained(result)
    with pytest.raises(UserError, match="config.json: SHA-256"):
        PanoLLaVA.from_pretrained(result, encoder=tmp_path / "encoder")
    config = tmp_path / "encoder/config.json"
    config.write_text(config.read_text()[:-1])
    (project / "towers/encoder").mkdir()  # the given place counts, not the one of the training
    model = PanoLLaVA.from_pretrained(result, encoder=tmp_path / "encoder")
    assert ask_all(model, evaluated) == evaluated["prediction"].tolist()
    extra = project / "towers/language_model/added_tokens.json"
    extra.write_text("{}")
    with pytest.raises(UserError, match="added_tokens.json: SHA-256 .*, expected no such file"):
        PanoLLaVA.from_pretrained(result, encoder=tmp_path / "encoder")


def test_results_that_cannot_answer_are_errors(evaluated: pd.DataFrame, tmp_path: Path) -> None:
    folder = folder_of(evaluated)
    with pytest.raises(UserError, match="result of stage 'vision' has no language model"):
        PanoLLaVA.from_pretrained(folder / "runs/vlm_vision")
    with pytest.raises(UserError, match="no such file"):
        PanoLLaVA.from_pretrained(tmp_path / "nowhere")
    file = folder / "runs/vlm_finetune/model_final.safetensors"
    header = read_header(file)
    del header["settings"]["model"]["prompt"]
    with pytest.raises(UserError, match="the header is of another version"):
        PanoLLaVA.from_pretrained(copy_with(header, file, tmp_path))
    header = read_header(file)
    header["settings"]["model"]["encoder"]["trust_remote_code"] = True
    changed = copy_with(header, file, folder / "runs/vlm_finetune", "code.safetensors")
    with pytest.raises(UserError, match="runs code that comes with its weights; .* pass trust"):
        PanoLLaVA.from_pretrained(changed)
    assert PanoLLaVA.from_pretrained(changed, trust_remote_code=True)
    changed.unlink()


def copy_with(header: dict, file: Path, folder: Path, name: str = paths.WEIGHTS) -> Path:
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, folder / name, metadata={"panollava": json.dumps(header)})
    return folder / name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pitch: 0", "pitch: 5", "trained with views.pitch 0.0, params.yaml has 5.0"),
        ('"{query}"', '"a {query}"', "trained with model.prompt '{query}', params.yaml has"),
        ("degree: 4", "degree: 3", "trained with model.resampler.direction_degree 4"),
    ],
)
def test_an_evaluation_with_other_settings_is_an_error(
    evaluated: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    message: str,
) -> None:
    monkeypatch.chdir(folder_of(evaluated))
    text = paths.PARAMS.read_text()
    assert old in text
    paths.PARAMS.write_text(text.replace(old, new))
    try:
        with pytest.raises(SystemExit):
            cli.main(["evaluate"])
    finally:
        paths.PARAMS.write_text(text)
    assert message in capsys.readouterr().err


def test_importing_the_package_imports_no_library_of_models() -> None:
    code = (
        "import sys, panollava; assert not {'torch', 'transformers'} & sys.modules.keys(); "
        "panollava.PanoLLaVA.from_pretrained; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "src")})
    with pytest.raises(AttributeError, match="no attribute 'PanoLLama'"):
        panollava.PanoLLama  # noqa: B018


def test_the_model_stays_in_single_precision_on_a_processor(evaluated: pd.DataFrame) -> None:
    file = folder_of(evaluated) / "runs/vlm_finetune/model_final.safetensors"
    header = {**read_header(file), "precision": "bf16-mixed"}
    changed = copy_with(header, file, file.parent, "half.safetensors")
    model = PanoLLaVA.from_pretrained(changed, accelerator="cpu")
    assert model.precision == "32-true"
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    half = PanoLLaVA.from_pretrained(changed, accelerator="cpu", precision="bf16-mixed")
    assert torch.bfloat16 in {p.dtype for p in half.network.parameters()}
    changed.unlink()
