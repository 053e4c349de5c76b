"""Vision towers of many types, small and with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"cannot load '{tmp_path}'"):
        open_encoder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("weights", [True, False])
def test_a_git_lfs_pointer_is_recognized(name: str, weights: bool, tmp_path: Path) -> None:
    """Also before weights are loaded, so that no stage runs first."""
    save(tmp_path, "siglip_vision_model", **SMALL)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    expected = f"{name}: a git-lfs pointer: run git lfs pull"
    with pytest.raises(UserError, match=expected):
        load_encoder(PretrainedEncoder(str(tmp_path), None, False, None), SIZE, weights)


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
CHANGES = {
    "a layer is missing": lambda w: {k: v for k, v in w.items() if ".layers.1." not in k},
    "a bias is missing": lambda w: {k: v for k, v in w.items() if "0.mlp.fc1.bias" not in k},
    "other names": lambda w: {f"module.{name}": value for name, value in w.items()},
    "another shape": lambda w: {k: v[:-1] if "0.mlp.fc1.bias" in k else v for k, v in w.items()},
    "a layer more": lambda w: w | {k.replace("layers.2", "layers.3"): v for k, v in w.items()},
    "a tensor more": lambda w: w | {k.replace("fc1.bias", "gate"): v for k, v in w.items()},
}
PROBLEMS = {
    "a layer is missing": r"layers\.1\..* is missing",
    "a bias is missing": r"layers\.0\.mlp\.fc1\.bias' is missing \(1 tensors differ\)",
    "other names": "is missing",
    "another shape": r"has shape \(63,\), expected \(64,\)",
    "a layer more": r"layers\.3\..* is not in the model",
    "a tensor more": r"mlp\.gate' is not in the model",
}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict]) -> None:
    """Change the weights of a tower."""
    file = folder / "model.safetensors"
    changed = {name: value.clone() for name, value in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["siglip_vision_model", "siglip", "clip"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_weights_that_do_not_fit_are_an_error(kind: str, problem: str, tmp_path: Path) -> None:
    """transformers makes up what is missing, at random and anew in each command."""
    save(tmp_path, kind, **DEEP_KINDS.get(kind, DEEP))
    rewrite(tmp_path, CHANGES[problem])
    with pytest.raises(UserError, match=f"model.encoder.path: {tmp_path}.*{PROBLEMS[problem]}"):
        open_encoder(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in DEEP_KINDS if "lip" in kind])
def test_weights_that_nothing_reads_may_be_missing_or_more(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind, **DEEP_KINDS[kind])
    encoder, views = open_encoder(tmp_path), random_views()
    expected = encoder(views)
    prefix = "vision_model." if kind in ("siglip", "clip") else ""
    read = {prefix + name for name in encoder.tower.state_dict()}
    heads = {"classifier.weight": torch.zeros(2, 32), f"{prefix}head.extra": torch.zeros(2)}
    text = {"text_model.encoder.layers.7.mlp.fc1.weight": torch.zeros(2, 2)}

    def only_what_is_read(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in weights.items() if name in read}

    saved = load_file(tmp_path / "model.safetensors")
    names = only_what_is_read(saved)
    assert len(names) == len(read) and names.keys() < saved.keys()
    rewrite(tmp_path, lambda weights: only_what_is_read(weights) | heads | text)
    assert torch.equal(open_encoder(tmp_path)(views), expected)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov3_vit"])
def test_weights_under_names_of_older_versions_are_checked(kind: str, tmp_path: Path) -> None:
    """transformers renames the tensors of these when it saves and loads."""
    save(tmp_path, kind, **DEEP_KINDS[kind])
    rewrite(tmp_path, lambda w: w | {k.replace(".2.", ".3."): v for k, v in w.items()})
    with pytest.raises(UserError, match=r"\.3\..* is not in the model"):
        open_encoder(tmp_path)
    rewrite(tmp_path, lambda w: {k: v for k, v in w.items() if ".3." not in k and ".1." not in k})
    with pytest.raises(UserError, match=r"\.1\..* is missing"):
        open_encoder(tmp_path)


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
