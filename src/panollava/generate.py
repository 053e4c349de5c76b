"""Greedy answers, batched: all queries of a panorama share its prefix's key-value cache."""

import torch
from torch import Tensor
from transformers import DynamicCache

from panollava.dialogue import Dialogue
from panollava.model import PanoLLaVA


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
    device = features.device
    cache, prefix = _read_prefix(model, dialogue, features)
    owners = [panorama for panorama, own in enumerate(queries) for _ in own]
    cache.batch_select_indices(torch.tensor(owners, device=device))
    asked = [dialogue.query(text) for own in queries for text in own]
    produced = _decode(model, dialogue, cache, prefix, asked, max_new_tokens, device)
    texts = iter([dialogue.decode(tokens) for tokens in produced])
    return [[next(texts) for _ in own] for own in queries]


def _read_prefix(
    model: PanoLLaVA, dialogue: Dialogue, features: Tensor
) -> tuple[DynamicCache, int]:
    """The cache of [text before the image][vision tokens], and its length."""
    vision = model.vision_tokens(features)
    before = torch.tensor(dialogue.prefix, dtype=torch.int64, device=features.device)
    text = model.embed(before).expand(len(features), -1, -1)
    embedded = torch.cat([text, vision.to(text.dtype)], dim=1)
    length = embedded.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=features.device).tril()
    cache = DynamicCache(config=model.language_model.config)
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
    device: torch.device,
) -> list[list[int]]:
    """Tokens of each answer, up to and without what follows its stop token."""
    head = model.language_model.get_output_embeddings()
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
    produced: list[Tensor] = []
    done = torch.zeros(len(asked), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        chosen = head(last).argmax(dim=-1)
        produced.append(chosen)
        done |= chosen == dialogue.stop
        if done.all() or step + 1 == max_new_tokens:
            break
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        positions = (prefix + lengths + step)[:, None]
        hidden = model.hidden_states(
            model.embed(chosen[:, None]),
            seen[:, None, None],
            positions,
            cache=cache,
            use_cache=True,
        )
        last = hidden[:, -1]
    rows = torch.stack(produced, dim=1).tolist()
    return [row[: row.index(dialogue.stop)] if dialogue.stop in row else row for row in rows]
