"""Small random towers, panoramas and rows, and a params.yaml for them. Benchmarks use them too, so
that nothing here may import pytest."""

import csv
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

ROOT = Path(__file__).parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "a the what where is red blue green box ball front left right behind one two none .".split()


def save_towers(folder: Path) -> Path:
    """An encoder for views of 32 pixels, and a language model."""
    save_encoder(folder / "encoder", size=32)
    save_language_model(folder / "language_model")
    return folder


def save_encoder(folder: Path, size: int, patch: int = 8, width: int = 32) -> Path:
    """A SigLIP vision tower with random weights, in `from_pretrained` format."""
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
    """Tokens for WORDS, bytes for everything else, and a ChatML template."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = special + alphabet + ["Ġ" + word for word in WORDS] + WORDS
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
    """Random weights with standard deviation `spread`: the larger it is, the more a prefix changes
    the logits."""
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


def save_data(folder: Path) -> Path:
    """Six panoramas with one to four rows each in train, two in valid and three in test."""
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


def write_params(path: Path, towers: Path, data: Path) -> None:
    """The project's params.yaml, for `save_towers` and `save_data`, with one epoch a stage."""
    text = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("dir: data/demo", f"dir: {data}"),
        ("data/demo/towers", str(towers)),
        ("size: 64", "size: 32"),
        ("save_every: 50", "save_every: 1"),
    ):
        assert old in text
        text = text.replace(old, new)
    for key, value in (("max_text_length", 99), ("epochs", 1), ("batch_size", 4)):
        text = re.sub(rf"{key}: \d+", f"{key}: {value}", text)
    path.write_text(text)
