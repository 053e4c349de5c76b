"""Batched decoding: all queries of a panorama share its prefix's key-value cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from panollava.data.dialogue import Dialogue
from panollava.model.network import Network


class Answer(NamedTuple):
    text: str
    cut: bool  # at `max_new_tokens`, without an end token


class Sampling(NamedTuple):
    """How the next token is chosen. The default is greedy: the one with the largest logit."""

    temperature: float = 0.0  # divides the logits; 0: greedy
    top_p: float = 1.0  # of the likeliest tokens, those that have this probability together
    # Of the first query, and the next ones have the next seeds; or that of each query.
    seed: int | tuple[int, ...] = 0


GREEDY = Sampling()
# Called with the index of an answer, and its tokens so far. True: stop this answer.
Report = Callable[[int, list[int]], bool | None]


@torch.inference_mode()
def answer(
    model: Network,
    dialogue: Dialogue,
    features: Tensor | None,
    queries: list[list[str]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    report: Report | None = None,
) -> list[list[Answer]]:
    """Answer every query of every panorama.

    `features`: (panoramas, ...), see `Network.features`, or None to ask without vision tokens;
    `queries[i]` are those of panorama i. The result has the same nesting. `report` is called for
    each new token, with the answers numbered through all panoramas."""
    prefix = _embed_prefix(model, dialogue, features, len(queries))
    prompts = [dialogue.query(text) for texts in queries for text in texts]
    longest = prefix.shape[1] + max(map(len, prompts), default=0) + max_new_tokens
    model.check_length(longest, "lower evaluate.max_new_tokens")
    sequences = _Sequences(model, len(prefix))
    if prefix.shape[1]:  # a chat template may have no text before the image
        sequences.read(prefix, torch.full((len(prefix),), prefix.shape[1], device=prefix.device))
    sequences.select([panorama for panorama, texts in enumerate(queries) for _ in texts])
    rows = [torch.tensor(prompt) for prompt in prompts]
    tokens = pad_sequence(rows, batch_first=True, padding_value=dialogue.pad).to(prefix.device)
    lengths = torch.tensor(list(map(len, prompts)), device=prefix.device)
    last = sequences.read(model.embed(tokens), lengths)
    choose = _Greedy(model) if sampling.temperature == 0 else _Sampler(model, sampling, len(rows))
    answers = iter(_decode(sequences, last, dialogue.ends, max_new_tokens, choose, report))

    def text_of(tokens: list[int]) -> Answer:
        return Answer(dialogue.decode(tokens), cut=len(tokens) == max_new_tokens)

    return [[text_of(next(answers)) for _ in texts] for texts in queries]


def _embed_prefix(
    model: Network, dialogue: Dialogue, features: Tensor | None, panoramas: int
) -> Tensor:
    """[text before the image][vision tokens]: (panoramas, length, hidden)."""
    device = model.language_model.device
    before = torch.tensor(dialogue.text_prefix, dtype=torch.int64, device=device)
    text = model.embed(before).expand(panoramas, -1, -1)
    if features is None:
        return text
    return torch.cat([text, model.vision_tokens(features).to(text.dtype)], dim=1)


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


class _Sequences:
    """A batch of sequences that tokens are appended to, and their key-value cache."""

    def __init__(self, model: Network, batch: int) -> None:
        self.model, device = model, model.language_model.device
        self.cache = DynamicCache(config=model.language_model.config)
        self.cache.layers = [
            _PreallocatedLayer() if type(layer) is DynamicLayer else layer
            for layer in self.cache.layers
        ]
        # (batch, cached tokens): whether a token is read, not padding.
        self.mask = torch.ones(batch, 0, dtype=torch.bool, device=device)
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)  # of the next token

    def read(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """Append `lengths`, (batch,), tokens, padded on the right: (batch, longest, hidden).
        Returns the hidden states of the last ones, (batch, hidden)."""
        cached, longest = self.mask.shape[1], embedded.shape[1]
        index = torch.arange(longest, device=embedded.device)
        self.mask = torch.cat([self.mask, index < lengths[:, None]], dim=1)
        causal = self.mask.new_ones(longest, cached + longest).tril(cached)
        # Padding attends to earlier tokens, because attention over nothing is not a number.
        mask = (self.mask[:, None] & causal)[:, None]
        positions = self.positions[:, None] + index
        hidden = self.model.hidden_states(embedded, mask, positions, cache=self.cache)
        self.positions = self.positions + lengths
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]

    def select(self, rows: list[int]) -> None:
        """Keep these rows of the batch, in this order. A row may be repeated."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.positions = self.mask[index], self.positions[index]


class _Greedy:
    def __init__(self, model: Network) -> None:
        self.model = model

    def __call__(self, hidden: Tensor, batch: list[int]) -> Tensor:
        """The next token of each row, (rows,); `batch`: of each row, the index of its answer."""
        return self.model.logits(hidden).argmax(dim=-1)


class _Sampler(_Greedy):
    """Samples with a separate random generator for each answer, so that an answer does not depend
    on the others in its batch."""

    def __init__(self, model: Network, sampling: Sampling, answers: int) -> None:
        super().__init__(model)
        self.sampling = sampling
        seed = sampling.seed
        seeds = range(seed, seed + answers) if isinstance(seed, int) else seed
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, hidden: Tensor, batch: list[int]) -> Tensor:
        scaled = self.model.logits(hidden).double() / self.sampling.temperature
        likeliest, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = likeliest.cumsum(dim=-1) - likeliest
        kept = likeliest.where(before < self.sampling.top_p, 0.0)  # the first one at least
        kept[:, 0] = likeliest[:, 0]
        drawn = [torch.rand((), generator=self.streams[index]).item() for index in batch]
        sums = kept.cumsum(dim=-1)
        place = torch.tensor(drawn, device=sums.device)[:, None] * sums[:, -1:]
        chosen = (sums <= place).sum(dim=-1, keepdim=True).clamp(max=tokens.shape[-1] - 1)
        return tokens.gather(-1, chosen).squeeze(-1)


def _decode(
    sequences: _Sequences,
    last: Tensor,
    ends: frozenset[int],
    max_new_tokens: int,
    choose: _Greedy,
    report: Report | None,
) -> list[list[int]]:
    """Tokens of each answer, without the one that ends it. `last`: hidden states of the prompts'
    last tokens."""
    model = sequences.model
    answers: list[list[int]] = [[] for _ in range(len(last))]
    finished: set[int] = set()
    batch = list(range(len(answers)))  # of each row, the index of its answer
    for step in range(max_new_tokens):
        tokens = choose(last, batch)
        for index, token in zip(batch, tokens.tolist(), strict=True):
            if token in ends:
                finished.add(index)
            elif index not in finished:
                answers[index].append(token)
                if report and report(index, answers[index]):
                    finished.add(index)
        unfinished = [row for row, index in enumerate(batch) if index not in finished]
        if not unfinished or step + 1 == max_new_tokens:
            break
        if 2 * len(unfinished) <= len(batch):  # dropping rows copies the cache: not at every step
            batch = [batch[row] for row in unfinished]
            sequences.select(unfinished)
            tokens = tokens[unfinished]
        last = sequences.read(model.embed(tokens[:, None]), torch.ones_like(tokens))
    return answers
