"""PanoLLaVA: encoder, resampler and projector in front of a frozen language model."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from panollava import config
from panollava.data.packing import Packed, Row, attention_mask, pack
from panollava.errors import UserError
from panollava.geometry import sphere, views
from panollava.model.encoder import load_encoder, pool_tokens, token_centers
from panollava.model.language_model import load_language_model
from panollava.model.resampler import build_resampler


class PanoLLaVA(nn.Module):
    """Its children are the parts that the stages freeze and train."""

    language_model: PreTrainedModel

    def __init__(
        self,
        encoder: nn.Module,
        resampler: nn.Module,
        projector: nn.Module,
        language_model: PreTrainedModel,
        pool: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.resampler = resampler
        self.projector = projector
        self.language_model = language_model
        self.pool = pool

    def features(self, views: Tensor) -> Tensor:
        """uint8 (batch, views, size, size, 3) -> (batch, views, grid, grid, features), pooled."""
        return pool_tokens(self.encoder(views), self.pool)

    def vision_tokens(self, features: Tensor) -> Tensor:
        """(batch, views, grid, grid, features) -> (batch, tokens, hidden)."""
        return self.projector(self.resampler(features))

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 (batch, length) -> (batch, length, hidden)."""
        return self.language_model.get_input_embeddings()(tokens)

    def hidden_states(self, embedded: Tensor, mask: Tensor, positions: Tensor, **cache) -> Tensor:  # type: ignore[no-untyped-def]
        """Last hidden states of the language model, before its head.

        `mask`: bool (batch, 1, queries, keys); `positions`: (batch, queries)."""
        decoder = self.language_model.get_decoder()
        if decoder.config._attn_implementation != "sdpa":  # the others add their mask to the scores
            least = torch.finfo(embedded.dtype).min
            mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(~mask, least)
        output = decoder(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, **cache
        )
        return output.last_hidden_state

    def loss_sum(self, features: Tensor, packed: Packed, prefix: int) -> Tensor:
        """Cross-entropy summed over the answer tokens."""
        logits = self.answer_logits(features, packed, prefix)
        return functional.cross_entropy(logits, packed.labels, reduction="sum")

    def answer_logits(self, features: Tensor, packed: Packed, prefix: int) -> Tensor:
        """float32 (answer tokens, vocabulary): logits exist at those alone.

        `prefix`: number of text tokens before the image."""
        vision = self.vision_tokens(features)
        text = self.embed(packed.tokens)
        rest = text[:, prefix + vision.shape[1] :]
        embedded = torch.cat([text[:, :prefix], vision.to(text.dtype), rest], dim=1)
        hidden = self.hidden_states(
            embedded, attention_mask(packed.segments), packed.positions, use_cache=False
        )
        return self.logits(hidden.flatten(0, 1)[packed.predicts])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> float32 (..., vocabulary), in the language model's own scale."""
        logits = self.language_model.get_output_embeddings()(hidden).float()
        config = self.language_model.config.get_text_config()
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if factor := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * factor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    def check_length(self, tokens: int, remedy: str) -> None:
        """Raises UserError if a sequence of so many tokens is longer than what the language model
        attends to: packed rows and the cache of a panorama know no sliding window."""
        config = self.language_model.config.get_text_config()
        limits = (
            getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")
        )
        most = min((limit for limit in limits if limit), default=tokens)
        if tokens > most:
            raise UserError(
                f"model.language_model.path: a '{config.model_type}' model attends to {most} "
                f"tokens at once, but a panorama with its text takes {tokens}; {remedy}, use fewer "
                "views, raise model.resampler.pool, or name another language model"
            )


def build_model(
    settings: config.Model, layout_settings: config.Views, seed: int = 0, weights: bool = True
) -> tuple[PanoLLaVA, PreTrainedTokenizerBase]:
    """Load the pretrained towers (without `weights`: their shapes alone), and make a resampler and
    projector whose start is a function of `seed`. Raises UserError for towers, views or a
    resampler that don't fit."""
    encoder = load_encoder(settings.encoder, layout_settings.size, weights)
    language, tokenizer = load_language_model(settings.language_model, weights)
    centers = token_centers(encoder, layout_settings.size, settings.resampler.pool)
    rays = views.token_rays(views.layout(layout_settings), centers)
    encoding = sphere.encode_direction(rays, settings.resampler.direction_degree)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        resampler = build_resampler(settings.resampler, encoder.width, torch.from_numpy(encoding))
        projector = nn.Linear(
            settings.resampler.width, language.get_input_embeddings().weight.shape[1]
        )
    model = PanoLLaVA(encoder, resampler, projector, language, settings.resampler.pool)
    if weights:
        _check_rows_apart(model, settings.language_model.path)
    return model, tokenizer


@torch.no_grad()
def _check_rows_apart(model: PanoLLaVA, path: str) -> None:
    """Raises UserError if the language model gives packed rows other logits than each by itself."""
    # Rows of one length, so that one batch without padding holds them.
    prefix, rows = [1, 2, 3], [Row([4, 5], [6, 7]), Row([8], [9, 10, 11])]
    packed = pack(prefix, 0, [rows], pad=0)
    own = f"model.language_model.path: {path}, a '{model.language_model.config.model_type}' model,"
    other = "name another, such as Qwen/Qwen2.5-0.5B-Instruct"
    try:
        hidden = model.hidden_states(
            model.embed(packed.tokens),
            attention_mask(packed.segments),
            packed.positions,
            use_cache=False,
        )
        together = model.logits(hidden.flatten(0, 1)[packed.predicts])
        separate = torch.tensor([prefix + row.query + row.answer for row in rows])
        logits = model.language_model(input_ids=separate, use_cache=False).logits
        alone = torch.cat(
            [own[-len(row.answer) - 1 : -1] for own, row in zip(logits, rows, strict=True)]
        )
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{own} can't read packed rows: {error}; {other}") from error
    apart = (together - alone).abs().max() / alone.std()
    if not apart < 0.01:
        raise UserError(
            f"{own} gives packed rows other logits than each by itself (by {apart:.2g} of their "
            f"spread), so that it wouldn't learn what it is asked; {other}"
        )
