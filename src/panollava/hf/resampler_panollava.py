"""The resamplers: from pooled patch tokens and their directions to features for the projector."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_HEAD = 64  # features of a perceiver's attention head


class Resampler(nn.Module):
    """Normalized features of each token, to which an encoding of its position is added."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.content = self.normalize(config.vision_config.hidden_size, config.resampler_width)
        self.position = None
        if config.position != "none":
            views = config.pooled_shape[0]
            # Learned vectors of the views, or encoded directions of the tokens.
            leading = (views, 1, 1) if config.position == "view" else config.pooled_shape
            directions = torch.zeros(*leading, config.direction_size)
            if config.position == "view":
                self.directions = nn.Parameter(directions)
            else:
                self.register_buffer("directions", directions)
            self.position = nn.Linear(config.direction_size, config.resampler_width, bias=False)

    def normalize(self, features: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))

    def forward(self, features: Tensor) -> Tensor:
        """(images, *pooled_shape, features) -> (images, tokens, width)."""
        hidden = self.content(features)
        if self.position is not None:
            hidden = hidden + self.position(self.directions.to(self.position.weight.dtype))
        return hidden.flatten(1, -2)


class MLPResampler(Resampler):
    def forward(self, features: Tensor) -> Tensor:
        return functional.gelu(super().forward(features))


class LinearResampler(Resampler):
    def normalize(self, features: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(features))


class PerceiverResampler(Resampler):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.resampler_width
        self.queries = nn.Parameter(torch.zeros(config.queries, width))
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        keys, values = self.key_value(super().forward(features)).chunk(2, dim=-1)
        queries: Tensor = self.queries
        if self.position is not None:
            shape = (*features.shape[1:-1], -1)  # a learned vector is that of a whole view
            directions = self.directions.expand(shape).flatten(0, -2)
            places = torch.linspace(0, len(directions) - 1, len(queries)).round().long()
            directions = directions[places].to(self.position.weight.dtype)
            queries = queries + self.position(directions)
        query = self.query(queries).expand(len(features), -1, -1)
        query, keys, values = _heads(query), _heads(keys), _heads(values)
        read = functional.scaled_dot_product_attention(query, keys, values)
        return self.norm(queries + self.out(read.transpose(1, 2).flatten(2)))


def _heads(tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (-1, _HEAD)).transpose(1, 2)


RESAMPLERS = {"mlp": MLPResampler, "linear": LinearResampler, "perceiver": PerceiverResampler}
