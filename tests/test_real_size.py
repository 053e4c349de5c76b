"""The real profile at its real size, with random weights: one optimizer step of each stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from conftest import CHATML, ROOT, SHARED, save_tokenizer

MINI = SHARED / "quic360_mini"


def save_real_towers(folder: Path) -> tuple[int, int]:
    """SigLIP-base-patch16-224 and Qwen2.5-0.5B in shape; returns their numbers of parameters."""
    torch.manual_seed(0)
    encoder = SiglipVisionModel(SiglipVisionConfig())  # the defaults are base-patch16-224
    encoder.save_pretrained(folder / "encoder")
    (folder / "encoder/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    tokenizer = save_tokenizer(folder / "language_model")
    assert tokenizer.chat_template == CHATML
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    language = Qwen2ForCausalLM(config)
    language.save_pretrained(folder / "language_model")
    return encoder.num_parameters(), language.num_parameters()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not MINI.is_dir(), reason="needs the small QuIC-360 sample beside the project")
def test_the_real_profile_takes_a_step_of_each_stage(tmp_path: Path) -> None:
    encoder, language = save_real_towers(tmp_path / "towers")
    assert encoder == pytest.approx(93e6, rel=0.01) and language == pytest.approx(494e6, rel=0.01)
    profile = (ROOT / "presets/quic360.yaml").read_text()
    # One panorama with three rows in train and in valid: one step of every stage.
    for split, source in (("train", "train"), ("valid", "valid"), ("test", "test")):
        table = (MINI / f"{source}.csv").read_text(encoding="utf-8").splitlines()
        rows = [line.replace("images/", f"{MINI}/images/", 1) for line in table[1:4]]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{split}.csv").write_text("\n".join([table[0], *rows]) + "\n")
    for old, new in (
        ("google/siglip-base-patch16-224", "towers/encoder"),
        ("Qwen/Qwen2.5-0.5B", "towers/language_model"),
        ("dir: data/quic360", "dir: data"),
        ("accelerator: gpu", "accelerator: cpu"),
        ("precision: bf16-mixed", "precision: 32-true"),
        ("workers: 4", "workers: 0"),
        ("threads: 8", "threads: 2"),
        ("epochs: 3", "epochs: 1"),
        ("epochs: 5", "epochs: 1"),
        ("epochs: 10", "epochs: 1"),
        # The small tokenizer knows few words, so that sentences are long in it.
        ("max_text_length: 64", "max_text_length: 100"),
    ):
        assert old in profile
        profile = profile.replace(old, new, 1)
    (tmp_path / "params.yaml").write_text(profile)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for command in ("prepare", "train vision", "train resampler", "features", "train finetune"):
        run = [sys.executable, str(ROOT / "src/run.py"), *command.split()]
        subprocess.run(run, cwd=tmp_path, env=environment, check=True)
    for stage in ("vision", "resampler", "finetune"):
        metrics = json.loads((tmp_path / f"metrics/{stage}/metrics.json").read_text())
        assert metrics["step"] == 1 and metrics["val"]["loss"] > 0
