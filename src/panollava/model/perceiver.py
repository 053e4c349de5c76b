"""The Perceiver resampler of Flamingo (Alayrac et al., 2022): learned queries read the tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from panollava import config
from panollava.errors import UserError
from panollava.model.resampler import Pooling, Resampler

_LAYERS = 2
_HEAD = 64  # features of an attention head


class PerceiverResampler(Resampler):
    """A fixed number of tokens, whatever the views: each is a learned query, which attends to all
    pooled tokens and to the other queries. As in Qwen-VL, queries have positions too: those of
    tokens at equal intervals."""

    mean_square = 1.0

    def __init__(self, features: int, settings: config.Resampler, pooling: Pooling) -> None:
        if settings.width % _HEAD:
            raise UserError(
                f"model.resampler.width: perceiver has heads of {_HEAD} features; expected a "
                f"multiple of {_HEAD}, found {settings.width}"
            )
        super().__init__(features, settings, pooling)
        self.queries = nn.Parameter(0.02 * torch.randn(settings.queries, settings.width))
        self.layers = nn.ModuleList(_Layer(settings.width) for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(settings.width)

    @property
    def tokens(self) -> int:
        return len(self.queries)

    @property
    def fewer_tokens(self) -> str:
        return "lower model.resampler.queries"

    def forward(self, features: Tensor) -> Tensor:
        context = super().forward(features)
        queries: Tensor = self.queries
        if self.position is not None:
            shape = (*self.pooling.shape, -1)  # a learned vector is that of a whole view
            directions = self.directions.expand(shape).flatten(0, -2)
            places = torch.linspace(0, len(directions) - 1, len(queries)).round().long()
            queries = queries + self.position(directions[places])
        queries = queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, context)
        return self.norm(queries)


class _Layer(nn.Module):
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
        """(batch, queries, width), (batch, tokens, width) -> (batch, queries, width)."""
        normalized = self.norm(queries)
        keys, values = self.key_value(torch.cat([context, normalized], dim=1)).chunk(2, dim=-1)
        query, keys, values = (
            each.unflatten(-1, (-1, _HEAD)).transpose(1, 2)  # (batch, heads, tokens, features)
            for each in (self.query(normalized), keys, values)
        )
        read = functional.scaled_dot_product_attention(query, keys, values)
        queries = queries + self.out(read.transpose(1, 2).flatten(2))
        return queries + self.feed_forward(queries)
