"""Greedy decoding, batched: all queries of a panorama share its prefix's key-value cache."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from panollava.data.dialogue import Dialogue
from panollava.model.language_model import check_length
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
    cache = _read_prefix(model, dialogue, features)
    prefix = cache.get_seq_length()
    panoramas = [panorama for panorama, texts in enumerate(queries) for _ in texts]
    cache.batch_select_indices(torch.tensor(panoramas, device=features.device))
    prompts = [dialogue.query(text) for texts in queries for text in texts]
    longest = prefix + max(map(len, prompts), default=0) + max_new_tokens
    check_length(model.language_model, longest, "lower evaluate.max_new_tokens")
    sequences, last = _read_prompts(model, cache, prompts, dialogue.pad)
    answers = iter(_decode(model, sequences, last, dialogue.ends, max_new_tokens))
    return [[dialogue.decode(next(answers)) for _ in texts] for texts in queries]


class _PreallocatedLayer(DynamicLayer):
    """A cache layer with spare capacity, so that a new token does not copy all earlier ones."""

    CHUNK = 64  # tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        self.is_initialized = True
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        """Append `new` to the tensor `name`: (batch, heads, tokens, size)."""
        old = getattr(self, name) if self.is_initialized else new[:, :, :0]
        buffer = getattr(self, f"_{name}", old)
        start, end = old.shape[2], old.shape[2] + new.shape[2]
        # Selecting rows replaces `old` with a copy, which is not in the buffer.
        if buffer.data_ptr() != old.data_ptr() or buffer.shape[2] < end:
            buffer = new.new_empty(*new.shape[:2], end + self.CHUNK, new.shape[3])
            buffer[:, :, :start] = old
            setattr(self, f"_{name}", buffer)
        buffer[:, :, start:end] = new
        return buffer[:, :, :end]


def _read_prefix(model: PanoLLaVA, dialogue: Dialogue, features: Tensor) -> DynamicCache:
    """The cache of [text before the image][vision tokens], one row per panorama."""
    vision = model.vision_tokens(features)
    before = torch.tensor(dialogue.text_prefix, dtype=torch.int64, device=features.device)
    text = model.embed(before).expand(len(features), -1, -1)
    embedded = torch.cat([text, vision.to(text.dtype)], dim=1)
    length = embedded.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=features.device).tril()
    cache = DynamicCache(config=model.language_model.config)
    cache.layers = [
        _PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    positions = torch.arange(length, device=features.device)[None]
    mask = mask.expand(len(features), 1, -1, -1)
    model.hidden_states(embedded, mask, positions, cache=cache, use_cache=True)
    return cache


@dataclass
class _Sequences:
    """The sequences being decoded. Shorter prompts are padded, so a cached token may be masked."""

    cache: DynamicCache
    mask: Tensor  # bool (batch, cached tokens): the sequence attends to the token
    positions: Tensor  # int64 (batch,): of the next token

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]


def _read_prompts(
    model: PanoLLaVA, cache: DynamicCache, prompts: list[list[int]], pad: int
) -> tuple[_Sequences, Tensor]:
    """Read the prompts, padded on the right, behind the prefixes in `cache`. Returns the sequences
    and the hidden states of their last tokens, (batch, hidden)."""
    prefix, device = cache.get_seq_length(), model.language_model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = [torch.tensor(prompt) for prompt in prompts]
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad).to(device)
    longest = tokens.shape[1]
    index = torch.arange(longest, device=device)
    mask = torch.ones(len(prompts), prefix, dtype=torch.bool, device=device)
    mask = torch.cat([mask, index < lengths[:, None]], dim=1)
    causal = torch.ones(longest, prefix + longest, dtype=torch.bool, device=device).tril(prefix)
    # Padding attends to the prefix, because attention over nothing is not a number.
    hidden = model.hidden_states(
        model.embed(tokens),
        (mask[:, None] & causal)[:, None],
        (prefix + index)[None],
        cache=cache,
        use_cache=True,
    )
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    return _Sequences(cache, mask, prefix + lengths), last


def _read_token(model: PanoLLaVA, sequences: _Sequences, tokens: Tensor) -> Tensor:
    """Append one token to each sequence: (batch,) -> its hidden state, (batch, hidden)."""
    sequences.mask = torch.cat([sequences.mask, torch.ones_like(sequences.mask[:, :1])], dim=1)
    hidden = model.hidden_states(
        model.embed(tokens[:, None]),
        sequences.mask[:, None, None],
        sequences.positions[:, None],
        cache=sequences.cache,
        use_cache=True,
    )
    sequences.positions = sequences.positions + 1
    return hidden[:, -1]


def _decode(
    model: PanoLLaVA,
    sequences: _Sequences,
    last: Tensor,
    ends: frozenset[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Tokens of each answer, without the one that ends it. `last`: hidden states of the prompts'
    last tokens."""
    head = model.language_model.get_output_embeddings()
    answers: list[list[int]] = [[] for _ in range(len(last))]
    finished: set[int] = set()
    batch = list(range(len(answers)))  # of each row, the index of its answer
    for step in range(max_new_tokens):
        tokens = head(last).argmax(dim=-1)
        for index, token in zip(batch, tokens.tolist(), strict=True):
            if token in ends:
                finished.add(index)
            elif index not in finished:
                answers[index].append(token)
        unfinished = [row for row, index in enumerate(batch) if index not in finished]
        if not unfinished or step + 1 == max_new_tokens:
            break
        if 2 * len(unfinished) <= len(batch):  # dropping rows copies the cache: not at every step
            batch = [batch[row] for row in unfinished]
            rows = torch.tensor(unfinished, device=tokens.device)
            sequences.select(rows)
            tokens = tokens[rows]
        last = _read_token(model, sequences, tokens)
    return answers
