"""The resamplers: from pooled patch tokens and their directions to features for the projector."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_PERCEIVER_LAYERS = 2
_PERCEIVER_HEAD = 64  # features of an attention head


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
        self.layers = nn.ModuleList(_PerceiverLayer(width) for _ in range(_PERCEIVER_LAYERS))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        context = super().forward(features)
        queries: Tensor = self.queries
        if self.position is not None:
            shape = (*features.shape[1:-1], -1)  # a learned vector is that of a whole view
            directions = self.directions.expand(shape).flatten(0, -2)
            places = torch.linspace(0, len(directions) - 1, len(queries)).round().long()
            directions = directions[places].to(self.position.weight.dtype)
            queries = queries + self.position(directions)
        queries = queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, context)
        return self.norm(queries)


class _PerceiverLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        normalized = self.norm(queries)
        keys, values = self.key_value(torch.cat([context, normalized], dim=1)).chunk(2, dim=-1)
        query, keys, values = (
            each.unflatten(-1, (-1, _PERCEIVER_HEAD)).transpose(1, 2)
            for each in (self.query(normalized), keys, values)
        )
        read = functional.scaled_dot_product_attention(query, keys, values)
        queries = queries + self.out(read.transpose(1, 2).flatten(2))
        return queries + self.feed_forward(queries)


RESAMPLERS = {"mlp": MLPResampler, "linear": LinearResampler, "perceiver": PerceiverResampler}
