"""PanoLLaVA: encoder, resampler and projector in front of a language model, which is frozen but
for an optional adapter."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from panollava import config
from panollava.data.packing import Packed, Row, attention_mask, pack
from panollava.errors import UserError
from panollava.model.encoder import Encoder, load_encoder
from panollava.model.language_model import load_language_model
from panollava.model.lora import add_adapter
from panollava.model.perceiver import PerceiverResampler
from panollava.model.resampler import LinearResampler, MLPResampler, Pooling, Resampler

# By their names in config.Resampler. Exported folders need each in hf/resampler_panollava.py too.
RESAMPLERS: dict[str, type[Resampler]] = {
    "mlp": MLPResampler,
    "linear": LinearResampler,
    "perceiver": PerceiverResampler,
}


class Network(nn.Module):
    """Its children are the parts that stages freeze or train."""

    language_model: PreTrainedModel

    def __init__(
        self,
        encoder: nn.Module,
        resampler: Any,  # a Resampler
        projector: nn.Module,
        language_model: PreTrainedModel,
        lora: nn.Module | None = None,  # the language model's adapter, see `add_adapter`
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.resampler = resampler
        self.projector = projector
        if lora is not None:  # before the model: parameters are named after their first place
            self.lora = lora
        self.language_model = language_model

    def features(self, views: Tensor) -> Tensor:
        """uint8 (batch, views, size, size, 3) -> (batch, *shape, features), see `Pooling`."""
        return self.resampler.pooling(self.encoder(views))

    def vision_tokens(self, features: Tensor) -> Tensor:
        """(batch, *shape, features) -> (batch, tokens, hidden)."""
        return self.projector(self.resampler(features))

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 (batch, length) -> (batch, length, hidden)."""
        return self.language_model.get_input_embeddings()(tokens)

    def hidden_states(
        self, embedded: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Last hidden states of the language model, before its head. A `cache` is extended.

        `mask`: bool (batch, 1, queries, keys); `positions`: (batch, queries)."""
        decoder = self.language_model.get_decoder()
        if decoder.config._attn_implementation != "sdpa":  # others add the mask to their scores
            lowest = torch.finfo(embedded.dtype).min
            mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(~mask, lowest)
        caching = {"use_cache": False} if cache is None else {"use_cache": True, "cache": cache}
        output = decoder(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, **caching
        )
        return output.last_hidden_state

    @property
    def window(self) -> int:
        """Tokens that the language model attends to. A sliding window counts as a limit, because
        packed sequences do not support one."""
        config = self.language_model.config.get_text_config()
        limits = [
            getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")
        ]
        return min((limit for limit in limits if limit), default=sys.maxsize)

    def check_length(self, tokens: int, remedy: str) -> None:
        """Raises UserError if a sequence of `tokens` is longer than the window."""
        if tokens > self.window:
            kind = self.language_model.config.get_text_config().model_type
            raise UserError(
                f"model.language_model.path: a '{kind}' model attends to {self.window} "
                f"tokens, but a panorama with its text has {tokens}; {remedy}, "
                f"{self.resampler.fewer_tokens}, or use "
                "another language model"
            )

    def loss_sum(self, features: Tensor, packed: Packed, text_prefix: int) -> Tensor:
        """Cross-entropy, summed over the answer tokens. Training compares no logits, so autocast
        applies to the head too: at the real size, it is one of the largest products of a step."""
        hidden = self._answer_states(features, packed, text_prefix)
        logits = self._scale(self.language_model.get_output_embeddings()(hidden).float())
        return functional.cross_entropy(logits, packed.labels, reduction="sum")

    def answer_logits(self, features: Tensor, packed: Packed, text_prefix: int) -> Tensor:
        """Logits at the answer tokens only: float32 (answer tokens, vocabulary).

        `text_prefix`: number of text tokens before the image."""
        return self.logits(self._answer_states(features, packed, text_prefix))

    def _answer_states(self, features: Tensor, packed: Packed, text_prefix: int) -> Tensor:
        vision = self.vision_tokens(features)
        text = self.embed(packed.tokens)
        rows = text[:, text_prefix + vision.shape[1] :]
        embedded = torch.cat([text[:, :text_prefix], vision.to(text.dtype), rows], dim=1)
        return self.packed_states(embedded, packed)

    def packed_states(self, embedded: Tensor, packed: Packed) -> Tensor:
        """Hidden states that predict the answer tokens, (answer tokens, hidden), of embedded
        sequences, (batch, length, hidden)."""
        mask = attention_mask(packed.segments)
        hidden = self.hidden_states(embedded, mask, packed.positions)
        return hidden.flatten(0, 1)[packed.predicts]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary), computed in float32 also under autocast, for logits
        that are compared: in bf16, several are often equal to the largest."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self._scale(self.language_model.get_output_embeddings()(hidden.float()))

    def _scale(self, logits: Tensor) -> Tensor:
        """As the language model scales the logits of its head."""
        config = self.language_model.config.get_text_config()
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if factor := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * factor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits


def build_model(
    settings: config.Model,
    view_settings: config.Views,
    seed: int = 0,
    weights: bool = True,
    trained: bool = False,
    lora: bool = False,
) -> tuple[Network, PreTrainedTokenizerBase]:
    """Load the pretrained towers, and make a resampler and a projector from `seed`. Without
    `weights`, only the shapes of the towers' tensors. `trained`: for a result, whose training has
    checked the language model. `lora`: add an adapter to the language model. Raises UserError for
    towers that cannot be loaded or do not fit."""
    encoder = load_encoder(settings.encoder, view_settings.size, weights)
    language_model, tokenizer = load_language_model(settings.language_model, weights)
    hidden = language_model.get_input_embeddings().weight.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        resampler = make_resampler(settings, view_settings, encoder)
        projector = nn.Linear(resampler.width, hidden)
        if weights:
            _scale_to_text(projector, language_model, resampler.mean_square)
    adapter = add_adapter(language_model, settings.lora, seed) if lora else None
    model = Network(encoder, resampler, projector, language_model, adapter)
    if weights and not trained:
        _check_packed_rows(model, settings.language_model.path)
    return model, tokenizer


def make_resampler(settings: config.Model, views: config.Views, encoder: Encoder) -> Resampler:
    """Raises UserError for settings that do not fit."""
    pooling = Pooling(settings, views, encoder.patch)
    return RESAMPLERS[settings.resampler.type](encoder.width, settings.resampler, pooling)


@torch.no_grad()
def _scale_to_text(
    projector: nn.Linear, language_model: PreTrainedModel, mean_square: float
) -> None:
    """Initialize `projector`, whose inputs have this `mean_square`, so that vision tokens have the
    standard deviation of the text embeddings, which is about 0.02 in many language models."""
    embeddings: Any = language_model.get_input_embeddings()  # some scale their weights
    vocabulary = len(embeddings.weight)
    text = embeddings(torch.arange(0, vocabulary, max(1, vocabulary // 4096)))
    nn.init.normal_(
        projector.weight, std=text.std().item() / (mean_square * projector.in_features) ** 0.5
    )
    nn.init.zeros_(projector.bias)


@torch.no_grad()
def _check_packed_rows(model: Network, path: str) -> None:
    """Raises UserError if the language model gives packed rows other logits than separate ones."""
    # Rows of one length, so that a batch without padding holds the separate ones.
    prefix, rows = [1, 2, 3], [Row([4, 5], [6, 7]), Row([8], [9, 10, 11])]
    packed = pack(prefix, 0, [rows], pad=0)
    sequences = torch.tensor([prefix + row.query + row.answer for row in rows])
    name = f"model.language_model.path: {path}, a '{model.language_model.config.model_type}' model,"
    remedy = "use another, such as Qwen/Qwen2.5-0.5B-Instruct"
    try:
        packed_logits = model.logits(model.packed_states(model.embed(packed.tokens), packed))
        logits = model.language_model(input_ids=sequences, use_cache=False).logits
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot process packed rows: {error}; {remedy}") from error
    separate_logits = torch.cat(
        [logits[i, -len(row.answer) - 1 : -1] for i, row in enumerate(rows)]
    )
    difference = (packed_logits - separate_logits).abs().max() / separate_logits.std()
    if not difference < 0.01:
        raise UserError(
            f"{name} computes different logits for packed rows than for separate ones (difference "
            f"{difference:.2g} standard deviations); it cannot be trained on packed sequences, so "
            f"{remedy}"
        )
