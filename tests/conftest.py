"""Small real towers, panoramas and rows, made once a session."""

import csv
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from panollava import paths
from panollava.config import Settings, load_settings
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.data.prepare import prepare_project
from panollava.model.panollava import PanoLLaVA
from panollava.stages import find_stage

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "a the what where is red blue green box ball front left right behind one two none .".split()


def save_encoder(folder: Path, size: int, patch: int = 8, width: int = 32) -> Path:
    """A SigLIP vision tower with random weights, as save_pretrained writes it."""
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], '
        f'"size": {{"height": {size}, "width": {size}}}}}'
    )
    return folder


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Words, bytes for everything else, and a ChatML template."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = special + alphabet + ["Ġ" + word for word in WORDS] + WORDS
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return fast


def save_language_model(folder: Path, width: int = 32, spread: float = 0.02) -> Path:
    """Random weights of standard deviation `spread`: the wider, the more a prefix can change."""
    torch.manual_seed(2)
    tokenizer = save_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=spread,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[tuple[str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "query", "annotation"), *rows])


def save_panorama(path: Path, seed: int, height: int = 64) -> None:
    """A smooth random panorama, 2:1."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 255, (4, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((2 * height, height), Image.Resampling.BICUBIC).save(path)


ROWS = [
    [("what", "the red box"), ("where", "left ."), ("what is", "a green ball")],
    [("where is the ball", "right")],
]


def random_views(panoramas: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (panoramas, 8, 32, 32, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def packed_loss(
    model: PanoLLaVA, dialogue: Dialogue, views: torch.Tensor, rows: list
) -> torch.Tensor:
    """Loss of packed rows, summed over answer tokens."""
    tokenized = [[dialogue.row(*row) for row in panorama] for panorama in rows]
    features = model.features(views)
    packed = pack(dialogue.text_prefix, features[0, ..., 0].numel(), tokenized, dialogue.pad)
    return model.loss_sum(features, packed, len(dialogue.text_prefix))


def separate_losses(model: PanoLLaVA, dialogue: Dialogue, views: torch.Tensor) -> list[float]:
    """Losses of ROWS, one row per sequence, computed by transformers' causal model."""
    losses = []
    vision = model.vision_tokens(model.features(views))
    embed = model.language_model.get_input_embeddings()
    for panorama, rows in enumerate(ROWS):
        for query, text in rows:
            row = dialogue.row(query, text)
            before = embed(torch.tensor([dialogue.text_prefix]))
            after = embed(torch.tensor([row.query + row.answer]))
            embedded = torch.cat([before, vision[panorama : panorama + 1], after], dim=1)
            labels = torch.full(embedded.shape[:2], -100)
            labels[0, -len(row.answer) :] = torch.tensor(row.answer)
            output = model.language_model(inputs_embeds=embedded, labels=labels)
            losses.append(float(output.loss) * len(row.answer))
    return losses


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    save_encoder(folder / "encoder", size=32)
    save_language_model(folder / "language_model")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six panoramas with one to four rows each in train, two in valid and three in test."""
    folder = tmp_path_factory.mktemp("data")
    seed = 0
    for split, count in (("train", 6), ("valid", 2), ("test", 3)):
        rows = []
        for index in range(count):
            name = f"images/{split}_{index}.jpg"
            save_panorama(folder / name, seed)
            seed += 1
            for row in range(1 + index % 4):
                rows.append(
                    (name, WORDS[row], f"the {WORDS[5 + index % 3]} box is {WORDS[11 + row]}.")
                )
        write_rows(folder / f"{split}.csv", rows)
    return folder


@pytest.fixture
def project(
    towers: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder with a params.yaml for small towers and data, in which nothing has run."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("dir: data/demo", f"dir: {small_data}"),
        ("data/demo/towers", str(towers)),
        ("size: 64", "size: 32"),
        ("save_every: 50", "save_every: 1"),
    ):
        assert old in text
        text = text.replace(old, new)
    text = re.sub(r"max_text_length: \d+", "max_text_length: 99", text)
    text = re.sub(r"epochs: \d+", "epochs: 1", text)
    Path("params.yaml").write_text(re.sub(r"batch_size: \d+", "batch_size: 4", text))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def settings_for(towers: Path) -> Settings:
    settings = load_settings(ROOT / "params.yaml")
    model = dataclasses.replace(
        settings.model,
        encoder=dataclasses.replace(settings.model.encoder, path=str(towers / "encoder")),
        language_model=dataclasses.replace(
            settings.model.language_model, path=str(towers / "language_model")
        ),
    )
    views = dataclasses.replace(settings.views, size=32)
    return dataclasses.replace(settings, model=model, views=views)


def change(settings: Any, **changes: Any) -> Any:
    """`stage__vision__lr=1` sets settings.stage.vision.lr."""
    for name, value in changes.items():
        first, _, rest = name.partition("__")
        part = getattr(settings, first)
        settings = dataclasses.replace(
            settings, **{first: change(part, **{rest: value}) if rest else value}
        )
    return settings


@pytest.fixture
def settings(
    towers: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """Settings for small towers and data, in a folder in which prepare has run."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    settings = change(
        settings_for(towers),
        data__dir=str(small_data),
        stage__vision__batch_size=3,
        stage__resampler__batch_size=4,
        stage__resampler__epochs=3,
        stage__finetune__batch_size=4,
        stage__resampler__max_text_length=99,
        stage__finetune__max_text_length=99,
        trainer__log_every=1,
        machine__save_every=1,
    )
    prepare_project(settings)
    yield settings
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def run_stage(name: str, settings: Settings) -> None:
    from panollava.training.train import train  # Lightning is slow to import

    train(find_stage(name), settings)


def weights(stage: str) -> dict[str, torch.Tensor]:
    return load_file(paths.weights_file(stage))


def curve(stage: str, name: str) -> list[float]:
    lines = (paths.curves_folder(stage) / f"plots/metrics/{name}.tsv").read_text().splitlines()
    return [float(line.split("\t")[1]) for line in lines[1:]]


def outputs(stage: str) -> dict[str, bytes]:
    """All that DVC records of a stage."""
    return {
        str(path): path.read_bytes()
        for folder in (paths.run_folder(stage), paths.curves_folder(stage))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
