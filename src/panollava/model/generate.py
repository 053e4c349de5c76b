"""Greedy answers, batched: all queries of a panorama share its prefix's key-value cache."""

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from panollava.data.dialogue import Dialogue
from panollava.model.panollava import PanoLLaVA


@torch.inference_mode()
def answer(
    model: PanoLLaVA,
    dialogue: Dialogue,
    features: Tensor,
    queries: list[list[str]],
    max_new_tokens: int,
) -> list[list[str]]:
    """Answer every query of every panorama.

    `features`: (panoramas, views, grid, grid, features); `queries[i]` are those of panorama i.
    The result has the same nesting."""
    cache, prefix = _read_prefix(model, dialogue, features)
    owners = [panorama for panorama, own in enumerate(queries) for _ in own]
    cache.batch_select_indices(torch.tensor(owners, device=features.device))
    asked = [dialogue.query(text) for own in queries for text in own]
    longest = prefix + max(map(len, asked), default=0) + max_new_tokens
    model.check_length(longest, "lower evaluate.max_new_tokens")
    produced = _decode(model, dialogue, cache, prefix, asked, max_new_tokens)
    texts = iter([dialogue.decode(tokens) for tokens in produced])
    return [[next(texts) for _ in own] for own in queries]


class _RoomyLayer(DynamicLayer):
    """A layer of a cache that has room: a new token doesn't copy all that came before."""

    ROOM = 64  # tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        self.is_initialized = True
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        """What stands in `name`, (batch, heads, tokens, size), and `new` after it."""
        old = getattr(self, name) if self.is_initialized else new[:, :, :0]
        room = getattr(self, f"_{name}", old)
        start, end = old.shape[2], old.shape[2] + new.shape[2]
        # Other rows may have been selected since: then what stands isn't in the room.
        if room.data_ptr() != old.data_ptr() or room.shape[2] < end:
            room = new.new_empty(*new.shape[:2], end + self.ROOM, new.shape[3])
            room[:, :, :start] = old
            setattr(self, f"_{name}", room)
        room[:, :, start:end] = new
        return room[:, :, :end]


def _read_prefix(
    model: PanoLLaVA, dialogue: Dialogue, features: Tensor
) -> tuple[DynamicCache, int]:
    """The cache of [text before the image][vision tokens], and its length."""
    vision = model.vision_tokens(features)
    before = torch.tensor(dialogue.text_prefix, dtype=torch.int64, device=features.device)
    text = model.embed(before).expand(len(features), -1, -1)
    embedded = torch.cat([text, vision.to(text.dtype)], dim=1)
    length = embedded.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=features.device).tril()
    cache = DynamicCache(config=model.language_model.config)
    cache.layers = [
        _RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    positions = torch.arange(length, device=features.device)[None]
    mask = mask.expand(len(features), 1, -1, -1)
    model.hidden_states(embedded, mask, positions, cache=cache, use_cache=True)
    return cache, length


def _decode(
    model: PanoLLaVA,
    dialogue: Dialogue,
    cache: DynamicCache,
    prefix: int,
    asked: list[list[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Tokens of each answer, up to and without the token that ends it."""
    head = model.language_model.get_output_embeddings()
    device = head.weight.device
    lengths = torch.tensor([len(query) for query in asked], device=device)
    longest = int(lengths.max())
    tokens = torch.full((len(asked), longest), dialogue.pad, device=device)
    for row, query in enumerate(asked):
        tokens[row, : len(query)] = torch.tensor(query)
    # Queries are padded on the right; the padding stays in the cache and is never attended to.
    index = torch.arange(longest, device=device)
    seen = torch.ones(len(asked), prefix, dtype=torch.bool, device=device)
    seen = torch.cat([seen, index < lengths[:, None]], dim=1)
    causal = torch.cat(
        [torch.ones_like(seen[:1, :prefix]).expand(longest, -1), index[:, None] >= index], dim=1
    )
    # A padded position sees the prefix at least, so that its attention is a number.
    mask = (seen[:, None, :] & causal)[:, None]
    hidden = model.hidden_states(
        model.embed(tokens), mask, (prefix + index)[None], cache=cache, use_cache=True
    )
    last = hidden[torch.arange(len(asked), device=device), lengths - 1]
    positions = prefix + lengths
    answers: list[list[int]] = [[] for _ in asked]
    ended: set[int] = set()
    rows = list(range(len(asked)))  # the answers that are in the batch
    for step in range(max_new_tokens):
        chosen = head(last).argmax(dim=-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if token in dialogue.ends:
                ended.add(row)
            elif row not in ended:
                answers[row].append(token)
        speaking = [at for at, row in enumerate(rows) if row not in ended]
        if not speaking or step + 1 == max_new_tokens:
            break
        if 2 * len(speaking) <= len(rows):  # most have ended: go on without them
            rows = [rows[at] for at in speaking]
            kept = torch.tensor(speaking, device=device)
            cache.batch_select_indices(kept)
            seen, positions, chosen = seen[kept], positions[kept], chosen[kept]
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        hidden = model.hidden_states(
            model.embed(chosen[:, None]),
            seen[:, None, None],
            positions[:, None],
            cache=cache,
            use_cache=True,
        )
        last, positions = hidden[:, -1], positions + 1
    return answers
