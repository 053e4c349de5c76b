"""Vision towers of many types, small and with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from panollava.config import PretrainedEncoder
from panollava.errors import UserError
from panollava.model.encoder import Encoder, load_encoder
from panollava.model.pretrained import layer_stacks

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


def save(folder: Path, kind: str, **values: Any) -> None:
    torch.manual_seed(0)
    kind_of_config: Any = CONFIG_MAPPING[kind.split(",")[0]]
    AutoModel.from_config(kind_of_config(**values)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )


def open_encoder(folder: Path, layer: int | None = None, size: int = SIZE) -> Encoder:
    return load_encoder(PretrainedEncoder(str(folder), None, False, layer), size).eval()


def load(folder: Path, kind: str, **values: Any) -> Encoder:
    """Its last layer is read, if it has any."""
    save(folder, kind, **values)
    return open_encoder(folder, layer=-1)


def transformers_output(folder: Path, views: torch.Tensor) -> Any:
    """What the whole tower computes for the views of one panorama, hidden states included."""
    model = AutoModel.from_pretrained(folder)
    tower = getattr(model, "vision_model", model).eval()
    pixels = (views[0].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    return tower(pixel_values=pixels, output_hidden_states=True)


def random_views(size: int = SIZE) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(256, (1, 2, size, size, 3), dtype=torch.uint8)


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
    with pytest.raises(
        UserError, match=rf"model.encoder.path: a '{kind}' model.*one token per patch"
    ):
        load(tmp_path, kind, **values)


def test_incomplete_weights_are_an_error(tmp_path: Path) -> None:
    load(tmp_path, "siglip_vision_model", **SMALL)
    file = tmp_path / "model.safetensors"
    for content in (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        file.read_bytes()[:1000],
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot load '{tmp_path}'"):
            open_encoder(tmp_path)


DEEP: dict[str, Any] = {**SMALL, "num_hidden_layers": 3}
DEEP_KINDS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": DEEP,
    "siglip": {"vision_config": DEEP, "text_config": {**TEXT, "num_attention_heads": 2}},
    "clip_vision_model": DEEP,
    "clip": {"vision_config": DEEP, "text_config": {**TEXT, "num_attention_heads": 2}},
    "chinese_clip_vision_model": DEEP,
    "dinov2": DEEP,
    "dinov2_with_registers": {**DEEP, "num_register_tokens": 4},
    "dinov3_vit": {**DEEP, "num_register_tokens": 4},
    "vit": DEEP,
}
CLASS_TOKEN_ONLY = {"clip_vision_model", "clip", "chinese_clip_vision_model", "vit"}


@pytest.mark.parametrize("kind", DEEP_KINDS)
def test_features_are_the_output_of_the_layer(kind: str, tmp_path: Path) -> None:
    """Without the norm that follows the last layer, where it is not the last one."""
    save(tmp_path, kind, **DEEP_KINDS[kind])
    views = random_views()
    with torch.no_grad():
        output = transformers_output(tmp_path, views)
        last = -2 if kind in CLASS_TOKEN_ONLY else -1
        for layer in (None, -1, -2, -3):
            encoder = open_encoder(tmp_path, layer)
            assert encoder.layer == encoder.describe()["layer"] == (layer or last)
            tokens = output.hidden_states[encoder.layer]
            if encoder.layer == -1:
                tokens = output.last_hidden_state
            expected = tokens[:, -16:].reshape(1, 2, 4, 4, 32)
            assert torch.allclose(encoder(views), expected, atol=1e-5), layer


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", DEEP_KINDS)
def test_every_parameter_is_trained_by_the_patch_tokens(
    kind: str, weights: bool, tmp_path: Path
) -> None:
    """Dropped: layers after the one that is read, pooling heads, mask tokens."""
    save(tmp_path, kind, **DEEP_KINDS[kind])
    settings = PretrainedEncoder(str(tmp_path), None, False, None)
    encoder = load_encoder(settings, SIZE, weights)
    layers = sum(len(stack) for stack in layer_stacks(encoder))
    assert layers == (2 if kind in CLASS_TOKEN_ONLY else 3)
    if not weights:
        assert encoder.state_dict().keys() == load_encoder(settings, SIZE).state_dict().keys()
        return
    encoder(random_views()).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        if "k_proj.bias" not in name and "key.bias" not in name:  # softmax does not depend on it
            assert parameter.grad.abs().max() > 0, name


def test_a_layer_that_the_tower_does_not_have_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, "siglip_vision_model", **DEEP)
    with pytest.raises(UserError, match=r"model.encoder.layer: .*no layer -4.*from -3 to -1"):
        open_encoder(tmp_path, layer=-4)
    save(tmp_path, "clip_vision_model", **{**DEEP, "num_hidden_layers": 1})
    with pytest.raises(UserError, match=r"model.encoder.layer: .*no layer -2.*from -1 to -1"):
        open_encoder(tmp_path)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("size", [16, 48, 50])
def test_a_tower_that_interpolates_takes_views_of_any_size(
    kind: str, size: int, tmp_path: Path
) -> None:
    """And its position embeddings have gradients that are deterministic on a GPU too."""
    save(tmp_path, kind, **DEEP_KINDS[kind])
    encoder = open_encoder(tmp_path, size=size)
    views, grid = random_views(size), size // 8
    features = encoder(views)
    expected = transformers_output(tmp_path, views).last_hidden_state[:, -grid * grid :]
    assert torch.allclose(features, expected.view(1, 2, grid, grid, 32), atol=1e-5)
    operations = {type(node).__name__ for node in nodes_of(features)}
    assert not any("Upsample" in name for name in operations)


def nodes_of(tensor: torch.Tensor) -> set[Any]:
    """Of its autograd graph."""
    nodes, pending = set(), [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending += [before for before, _ in node.next_functions]
    return nodes


@pytest.mark.parametrize("kind", ["siglip_vision_model", "clip_vision_model", "vit"])
@pytest.mark.parametrize("size", [16, 34, 48])  # of 34 pixels, two would be left out
def test_another_tower_takes_views_of_one_size(kind: str, size: int, tmp_path: Path) -> None:
    save(tmp_path, kind, **DEEP_KINDS[kind])
    with pytest.raises(UserError, match=rf"views.size is {size}.*32 x 32 pixels; set views.size"):
        open_encoder(tmp_path, size=size)


def test_a_tower_that_needs_more_than_views_is_an_error(tmp_path: Path) -> None:
    text = {**TEXT, "num_attention_heads": 2, "max_position_embeddings": 64}
    with pytest.raises(UserError, match=r"a 'vilt' model, cannot process views"):
        load(tmp_path, "vilt", **{**DEEP, **text})
