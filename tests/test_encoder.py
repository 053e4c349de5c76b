"""Vision towers of many types, small and with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from panollava.config import Pretrained
from panollava.errors import UserError
from panollava.model.encoder import Encoder, load_encoder

SIZE = 32
SMALL = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 0,  # which would mix the tokens
    "num_attention_heads": 2,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
# With and without a class token, registers, a text tower, and a margin outside the patches.
KINDS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": SMALL,
    "siglip": {"vision_config": SMALL, "text_config": {**TEXT, "num_attention_heads": 2}},
    "clip_vision_model": SMALL,
    "clip": {"vision_config": SMALL, "text_config": {**TEXT, "num_attention_heads": 2}},
    "dinov2": SMALL,
    "dinov2_with_registers": {**SMALL, "num_register_tokens": 4},
    "vit": SMALL,
    "siglip_vision_model, 9 pixels a patch": {**SMALL, "patch_size": 9},
}


def load(folder: Path, kind: str, **values: Any) -> Encoder:
    torch.manual_seed(0)
    kind_of_config: Any = CONFIG_MAPPING[kind.split(",")[0]]
    AutoModel.from_config(kind_of_config(**values)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return load_encoder(Pretrained(str(folder), None, False), SIZE).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_in_the_order_of_their_patches(kind: str, tmp_path: Path) -> None:
    encoder = load(tmp_path, kind, **KINDS[kind])
    grid, patch = SIZE // encoder.patch, encoder.patch
    views = torch.full((1, 2, SIZE, SIZE, 3), 128, dtype=torch.uint8)
    with torch.no_grad():
        before = encoder(views)
        assert before.shape == (1, 2, grid, grid, 32)
        for row, column in ((0, 0), (1, grid - 1), (grid - 1, 0)):
            changed = views.clone()
            changed[
                0, 1, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch
            ] = 0
            moved = (encoder(changed) - before).norm(dim=-1)[0]
            assert not moved[0].any()
            assert int(moved[1].argmax()) == row * grid + column


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (
            "swin",
            {
                "image_size": SIZE,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [1, 1],
                "num_heads": [2, 2],
                "window_size": 4,
            },
        ),
        ("vit_mae", {**SMALL, "decoder_num_hidden_layers": 1}),  # hides most patches
    ],
)
def test_a_tower_without_one_token_per_patch_is_an_error(
    kind: str, values: dict[str, Any], tmp_path: Path
) -> None:
    encoder = load(tmp_path, kind, **values)
    views = torch.zeros((1, 1, SIZE, SIZE, 3), dtype=torch.uint8)
    with pytest.raises(
        UserError, match=rf"model.encoder.path: a '{kind}' model.*one token per patch"
    ):
        encoder(views)


def test_incomplete_weights_are_an_error(tmp_path: Path) -> None:
    load(tmp_path, "siglip_vision_model", **SMALL)
    file = tmp_path / "model.safetensors"
    for content in (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        file.read_bytes()[:1000],
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot load '{tmp_path}'"):
            load_encoder(Pretrained(str(tmp_path), None, False), SIZE)
