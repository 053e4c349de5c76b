"""The real profile on real panoramas: at its full size with random weights, one optimizer step of
each stage; and with small towers, the whole pipeline over all rows."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from helpers import ROOT, SHARED, save_encoder, save_language_model, save_tokenizer
from panollava import PanoLLaVA
from real_size import language_config

MINI = SHARED / "quic360_mini"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not MINI.is_dir(), reason="needs the small QuIC-360 sample beside the project"
    ),
]
ON_THIS_MACHINE = (
    ("google/siglip-base-patch16-224", "towers/encoder"),
    ("Qwen/Qwen2.5-0.5B", "towers/language_model"),
    ("accelerator: gpu", "accelerator: cpu"),
    ("precision: bf16-mixed", "precision: 32-true"),
    ("loader_workers: 4", "loader_workers: 0"),
    ("threads: 8", "threads: 2"),
)


def save_real_towers(folder: Path) -> tuple[int, int]:
    """SigLIP-base-patch16-224 and Qwen2.5-0.5B in shape; returns their numbers of parameters."""
    torch.manual_seed(0)
    encoder = SiglipVisionModel(SiglipVisionConfig())  # the defaults are base-patch16-224
    encoder.save_pretrained(folder / "encoder")
    (folder / "encoder/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    save_tokenizer(folder / "language_model")
    language = Qwen2ForCausalLM(language_config())
    language.save_pretrained(folder / "language_model")
    return encoder.num_parameters(), language.num_parameters()


def write_profile(folder: Path, *changes: tuple[str, str]) -> None:
    """The real profile with some values changed, each once, as `folder`/params.yaml."""
    profile = (ROOT / "presets/quic360.yaml").read_text()
    for old, new in (*ON_THIS_MACHINE, *changes):
        assert old in profile, old
        profile = profile.replace(old, new, 1)
    (folder / "params.yaml").write_text(profile)


def run(folder: Path, *commands: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for command in commands:
        line = [sys.executable, str(ROOT / "src/run.py"), *command.split()]
        subprocess.run(line, cwd=folder, env=environment, check=True)


def test_the_real_profile_takes_a_step_of_each_stage(tmp_path: Path) -> None:
    encoder, language = save_real_towers(tmp_path / "towers")
    assert encoder == pytest.approx(93e6, rel=0.01) and language == pytest.approx(494e6, rel=0.01)
    # One panorama with three rows in each split: one step of every stage.
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        table = (MINI / f"{split}.csv").read_text(encoding="utf-8").splitlines()
        rows = [line.replace("images/", f"{MINI}/images/", 1) for line in table[1:4]]
        (tmp_path / f"data/{split}.csv").write_text("\n".join([table[0], *rows]) + "\n")
    write_profile(
        tmp_path,
        ("dir: data/quic360", "dir: data"),
        ("epochs: 3", "epochs: 1"),
        ("epochs: 5", "epochs: 1"),
        ("epochs: 10", "epochs: 1"),
        # The small tokenizer knows few words, so that sentences are long in it.
        ("max_text_length: 64", "max_text_length: 100"),
    )
    run(tmp_path, "prepare", "train vision", "train resampler", "features", "train finetune")
    for stage in ("vision", "resampler", "finetune"):
        metrics = json.loads((tmp_path / f"metrics/{stage}/metrics.json").read_text())
        assert metrics["best"]["step"] in (0, 1) and metrics["val_loss"] > 0


def test_all_stages_run_over_all_rows_of_real_panoramas(tmp_path: Path) -> None:
    save_encoder(tmp_path / "towers/encoder", size=224, patch=16, width=64)
    save_language_model(tmp_path / "towers/language_model", width=64, spread=0.2)
    write_profile(
        tmp_path,
        ("dir: data/quic360", f"dir: {MINI}"),
        ("max_rejected: 0.15", "max_rejected: 0.0"),
        ("epochs: 3", "epochs: 4"),
        ("epochs: 10", "epochs: 5"),
        ("lr: 5.0e-6", "lr: 1.0e-3"),
        ("lr: 2.0e-5", "lr: 2.0e-3"),
        ("lr: 1.0e-5", "lr: 2.0e-3"),
        ("max_text_length: 64", "max_text_length: 200"),
        ("max_text_length: 128", "max_text_length: 200"),
        ("log_every: 10", "log_every: 1"),
    )
    run(tmp_path, "prepare", "train vision", "train resampler", "features", "train finetune")
    run(tmp_path, "evaluate")
    for split in ("train", "valid", "test"):
        with (MINI / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            given = {number: row["annotation"] for number, row in enumerate(csv.DictReader(file))}
        found: dict[int, str] = {}
        for name in ("rows", "rejects"):
            path = tmp_path / f"runs/prepared/{split}/{name}.csv"
            with path.open(encoding="utf-8", newline="") as file:
                found |= {int(row["row"]): row["annotation"] for row in csv.DictReader(file)}
        assert found == given
    for stage in ("vision", "resampler", "finetune"):
        curve = (tmp_path / f"metrics/{stage}/plots/metrics/train/loss.tsv").read_text()
        losses = [float(line.split("\t")[1]) for line in curve.splitlines()[1:]]
        quarter = len(losses) // 4
        assert sum(losses[-quarter:]) < 0.95 * sum(losses[:quarter]), (stage, losses)
    details = json.loads((tmp_path / "runs/evaluate/details.json").read_text())
    assert details["panoramas"] == 2 and details["references"] == 33
    # Asked about a picture file, the model answers as in the evaluation.
    model = PanoLLaVA.from_pretrained(tmp_path / "runs/vlm_finetune")
    asked = pd.read_csv(tmp_path / "runs/evaluate/predictions.csv", keep_default_na=False)
    same = [
        model.answer(MINI / url, [query])[0] == prediction
        for url, query, prediction in zip(
            asked["url"], asked["query"], asked["prediction"], strict=True
        )
    ]
    assert np.mean(same) >= 0.99 and asked["prediction"].nunique() > 1, same
