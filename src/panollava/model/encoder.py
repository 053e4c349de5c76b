"""The vision encoder: a pretrained tower that maps views to grids of patch tokens."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from panollava.config import Pretrained
from panollava.errors import UserError
from panollava.geometry.sphere import Array
from panollava.model.pretrained import describe_config, load_from, load_model


class Encoder(nn.Module):
    """A pretrained vision tower without its pooling head."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.tower = tower
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
        if tokens.ndim != 3 or tokens.shape[1] < grid * grid or tokens.shape[2] != self.width:
            kind = self.tower.config.model_type  # type: ignore[union-attr]
            shape = " x ".join(map(str, tokens.shape[1:]))
            raise UserError(
                f"model.encoder.path: a '{kind}' model gives features of shape {shape} for "
                f"{grid} x {grid} patches; use an encoder with one token per patch, such as "
                "google/siglip-base-patch16-224"
            )
        # Class and register tokens, where a tower has them, come before the patches.
        tokens = tokens[:, -grid * grid :]
        return tokens.reshape(batch, count, grid, grid, -1)

    def describe(self) -> dict[str, Any]:
        """What determines its results, except its weights."""
        scale = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return {"config": describe_config(self.tower), **scale}


class EncoderOnly(nn.Module):
    """A model with an encoder only, under the name that it has in PanoLLaVA."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder


def load_encoder(pretrained: Pretrained, view_size: int, weights: bool = True) -> Encoder:
    """Load a tower from a hub id or a folder: SigLIP, SigLIP 2, CLIP, DINOv2 and similar ones.
    Without `weights`, only the shapes of its tensors.

    Raises:
        UserError: it cannot be loaded, is no vision tower, or needs views of another size.
    """
    config = load_from(AutoConfig.from_pretrained, pretrained)
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "image_size") or not hasattr(vision, "patch_size"):
        raise UserError(
            f"model.encoder.path: {pretrained.path} is a '{config.model_type}' model without an "
            "image size; use a vision encoder such as google/siglip-base-patch16-224"
        )
    if view_size != vision.image_size:
        raise UserError(
            f"views.size is {view_size}, but the encoder {pretrained.path} takes images of "
            f"{vision.image_size} x {vision.image_size} pixels; set views.size to "
            f"{vision.image_size}, or use an encoder for {view_size} pixels"
        )
    model = load_model(AutoModel, pretrained, weights)
    tower = getattr(model, "vision_model", model)
    if getattr(tower, "use_head", False):  # SigLIP's pooling head
        tower.use_head, tower.head = False, None
    processor, _ = load_from(ImageProcessingMixin.get_image_processor_dict, pretrained)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not (mean and std and len(mean) == len(std) == 3):
        raise UserError(
            f"{pretrained.path}: preprocessor_config.json needs image_mean and image_std of three "
            f"values, found {mean!r} and {std!r}; images must be normalized as in pretraining"
        )
    return Encoder(tower.float(), mean, std)


def encoder_grid(encoder: Encoder, view_size: int, pool: int = 1) -> int:
    """Tokens along a view's side, after pooling."""
    return len(token_centers(encoder, view_size, pool))


def token_centers(encoder: Encoder, view_size: int, pool: int = 1) -> Array:
    """Centers of the tokens along a view's side, after pooling, as fractions of the side from its
    left or upper end. Patches that do not fill the view leave a margin at the other end, and the
    last token may cover fewer patches."""
    patches = view_size // encoder.patch
    first = np.arange(0, patches, pool)
    last = np.minimum(first + pool, patches)
    return (first + last) / 2 / (view_size / encoder.patch)
