"""The perceiver: learned queries read the tokens by cross-attention (Flamingo, Qwen-VL)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from panollava import config
from panollava.errors import UserError
from panollava.model.resampler import Pooling, Resampler

_HEAD = 64  # features of an attention head


class PerceiverResampler(Resampler):
    """A fixed number of tokens, whatever the views: one layer of cross-attention from learned
    queries to all pooled tokens. As in Qwen-VL, queries have positions too: those of tokens at
    equal intervals."""

    mean_square = 1.0
    places: Tensor  # of those tokens

    def __init__(self, features: int, settings: config.Resampler, pooling: Pooling) -> None:
        width = settings.width
        if width % _HEAD:
            raise UserError(
                f"model.resampler.width: perceiver has heads of {_HEAD} features; expected a "
                f"multiple of {_HEAD}, found {width}"
            )
        super().__init__(features, settings, pooling)
        self.queries = nn.Parameter(0.02 * torch.randn(settings.queries, width))
        places = torch.linspace(0, super().tokens - 1, settings.queries).round().long()
        self.register_buffer("places", places, persistent=False)
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    @property
    def tokens(self) -> int:
        return len(self.queries)

    @property
    def fewer_tokens(self) -> str:
        return "lower model.resampler.queries"

    def forward(self, features: Tensor) -> Tensor:
        keys, values = self.key_value(super().forward(features)).chunk(2, dim=-1)
        queries: Tensor = self.queries
        if self.position is not None:
            shape = (*self.pooling.shape, -1)  # a learned vector is that of a whole view
            directions = self.directions.expand(shape).flatten(0, -2)[self.places]
            queries = queries + self.position(directions)
        query = self.query(queries).expand(len(features), -1, -1)
        query, keys, values = _heads(query), _heads(keys), _heads(values)
        read = functional.scaled_dot_product_attention(query, keys, values)
        return self.norm(queries + self.out(read.transpose(1, 2).flatten(2)))


def _heads(tensor: Tensor) -> Tensor:
    """(batch, tokens, width) -> (batch, heads, tokens, features)."""
    return tensor.unflatten(-1, (-1, _HEAD)).transpose(1, 2)
