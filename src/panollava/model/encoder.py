"""The vision encoder: a pretrained tower that maps views to grids of patch tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from panollava.config import PretrainedEncoder
from panollava.errors import UserError
from panollava.model.pretrained import (
    check_weights,
    describe_config,
    layer_stacks,
    load_from,
    load_model,
)

# Towers pretrained only by their class token: the patch tokens of their last layer are untrained.
_CLASS_TOKEN_ONLY = set(
    "altclip_vision_model chinese_clip_vision_model clip_vision_model clipseg_vision_model deit "
    "metaclip_2_vision_model mlcd_vision_model vit vit_msn".split()
)
# Towers that interpolate their position embeddings in each pass.
_INTERPOLATED = {"dinov2", "dinov2_with_registers"}


class Encoder(nn.Module):
    """A pretrained vision tower up to the layer that is read, without what patch tokens do not
    depend on, such as a pooling head."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, layer: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.tower, self.layer = tower, layer
        self.patch: int = tower.config.patch_size  # type: ignore[assignment, union-attr]
        self.width: int = tower.config.hidden_size  # type: ignore[assignment, union-attr]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        """uint8 (batch, views, height, width, 3) -> (batch, views, grid, grid, features)."""
        batch, count = views.shape[:2]
        pixels = views.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        tokens = self.tower(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        grid = views.shape[2] // self.patch
        # Class and register tokens, where a tower has them, come before the patches.
        return tokens[:, -grid * grid :].reshape(batch, count, grid, grid, -1)

    def describe(self) -> dict[str, Any]:
        """What determines its results, except its weights."""
        scale = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return {"config": describe_config(self.tower), "layer": self.layer, **scale}


class EncoderOnly(nn.Module):
    """A model with an encoder only, under the name that it has in Network."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder


def load_encoder(pretrained: PretrainedEncoder, view_size: int, weights: bool = True) -> Encoder:
    """Load a tower from a hub id or a folder: SigLIP, CLIP, DINOv2 and similar ones. Without
    `weights`, only the shapes of its tensors.

    Raises:
        UserError: it cannot be loaded, its weights do not fit it, it is no vision tower, needs
            views of another size, or has too few layers.
    """
    config = load_from(AutoConfig.from_pretrained, pretrained)
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "image_size") or not hasattr(vision, "patch_size"):
        raise UserError(
            f"model.encoder.path: {pretrained.path} is a '{config.model_type}' model without an "
            "image size; use a vision encoder such as google/siglip-base-patch16-224"
        )
    model, report = load_model(AutoModel, pretrained, weights)
    tower = getattr(model, "vision_model", model).float()
    used = _check_view_size(tower, pretrained.path, view_size, vision.image_size)
    if vision.image_size != view_size and tower.config.model_type in _INTERPOLATED:
        _interpolate_positions(tower, view_size)
    layer = _drop_unread(tower, pretrained, view_size, used)
    prefix = "" if tower is model else "vision_model."
    check_weights(report, tower, prefix, f"model.encoder.path: {pretrained.path}")
    processor, _ = load_from(ImageProcessingMixin.get_image_processor_dict, pretrained)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not (mean and std and len(mean) == len(std) == 3):
        raise UserError(
            f"{pretrained.path}: preprocessor_config.json needs image_mean and image_std of three "
            f"values, found {mean!r} and {std!r}; images must be normalized as in pretraining"
        )
    return Encoder(tower, layer, mean, std)


def _check_view_size(tower: Any, path: str, size: int, pretrained_size: int) -> set[str]:
    """The names of the parameters that change the patch tokens. Raises UserError if the tower does
    not give one token per patch of a view of this size."""
    kind, patch = tower.config.model_type, tower.config.patch_size
    other_size = size != pretrained_size
    try:
        tokens, used = _trace(tower, size)
        if other_size:  # it may fit by chance, because its grid is rounded down
            _trace(tower, size + patch)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if other_size:
            raise UserError(
                f"views.size is {size}, but the encoder {path} takes images of {pretrained_size} x "
                f"{pretrained_size} pixels; set views.size to {pretrained_size}, or use an encoder "
                f"for {size} pixels"
            ) from error
        raise UserError(
            f"model.encoder.path: {path}, a '{kind}' model, cannot process views: {error}; use "
            "another, such as google/siglip-base-patch16-224"
        ) from error
    grid, width = size // patch, tower.config.hidden_size
    if tokens.ndim != 3 or tokens.shape[1] < grid * grid or tokens.shape[2] != width:
        shape = " x ".join(map(str, tokens.shape[1:]))
        raise UserError(
            f"model.encoder.path: a '{kind}' model gives features of shape {shape} for "
            f"{grid} x {grid} patches; use an encoder with one token per patch, such as "
            "google/siglip-base-patch16-224"
        )
    return used


def _interpolate_positions(tower: Any, size: int) -> None:
    """Replace the position embeddings by those that the tower computes for views of this size. On a
    GPU, their gradient through the interpolation would not be deterministic."""
    patches, width = (size // tower.config.patch_size) ** 2, tower.config.hidden_size
    tokens = torch.empty(1, patches + 1, width, device="meta")
    with torch.no_grad():
        positions = tower.embeddings.interpolate_pos_encoding(tokens, size, size)
    tower.embeddings.position_embeddings = nn.Parameter(positions)


def _drop_unread(tower: Any, pretrained: PretrainedEncoder, size: int, used: set[str]) -> int:
    """Remove the layers after `model.encoder.layer`, with the norm that follows the last one, and
    all parameters that do not change the patch tokens. `used`: those that do before layers are
    removed. Returns the layer, counted from the end."""
    class_token_only = tower.config.model_type in _CLASS_TOKEN_ONLY
    layer = pretrained.layer or (-2 if class_token_only else -1)
    if layer < -1:
        stacks = layer_stacks(tower)
        count = len(stacks[0]) if len(stacks) == 1 else 1
        if layer < -count:
            raise UserError(
                f"model.encoder.layer: {pretrained.path} has no layer {layer}; use a number from "
                f"{-count} to -1"
            )
        del stacks[0][count + layer + 1 :]
        _, names = _trace(tower, size, start=stacks[0][-1])
        _remove(tower, names)
    _remove(tower, {name for name, _ in tower.named_parameters()} - used)
    return layer


@torch.enable_grad()
def _trace(tower: Any, size: int, start: nn.Module | None = None) -> tuple[Tensor, set[str]]:
    """The tokens of a view on the meta device, which computes shapes but no values, and the names
    of the parameters that change the patch tokens. `start`: count only those used after this
    module."""
    parameters = {n: p.detach().to("meta").requires_grad_() for n, p in tower.named_parameters()}
    buffers = {name: buffer.to("meta") for name, buffer in tower.named_buffers()}
    view = torch.empty(1, 3, size, size, device="meta")
    hooks = [start.register_forward_hook(_detach)] if start else []
    inputs = {"pixel_values": view}
    output = torch.func.functional_call(tower, {**parameters, **buffers}, kwargs=inputs)
    for hook in hooks:
        hook.remove()
    tokens = output.last_hidden_state
    patches = tokens[:, -((size // tower.config.patch_size) ** 2) :].sum()
    if not patches.requires_grad:
        return tokens, set()
    gradients = torch.autograd.grad(patches, list(parameters.values()), allow_unused=True)
    used = {name for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return tokens, used


def _detach(module: nn.Module, inputs: Any, output: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)


def _remove(tower: nn.Module, names: set[str]) -> None:
    """Remove these parameters; a module without others becomes the identity."""
    for path, module in [*tower.named_modules()]:  # a module comes before those inside it
        inside = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if inside and inside <= names:
            tower.set_submodule(path, nn.Identity())
            names = names - inside
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(tower.get_submodule(path), leaf, None)
