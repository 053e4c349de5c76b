"""The language model: loading it, its end-of-sequence tokens and its longest sequence."""

from typing import Any

import torch
import transformers

from panollava import config
from panollava.errors import UserError
from panollava.model.pretrained import load_from, load_model


def load_language_model(
    pretrained: config.Pretrained, weights: bool = True
) -> tuple[Any, transformers.PreTrainedTokenizerBase]:
    """A causal language model in float32, and its tokenizer. Without `weights`, only the shapes of
    its tensors."""
    tokenizer = load_from(transformers.AutoTokenizer.from_pretrained, pretrained)
    model = load_model(transformers.AutoModelForCausalLM, pretrained, weights, dtype=torch.float32)
    return model, tokenizer


def end_tokens(language_model: transformers.PreTrainedModel) -> tuple[int, ...]:
    """End-of-sequence token ids from generation_config.json."""
    ends = language_model.generation_config.eos_token_id
    return (ends,) if isinstance(ends, int) else tuple(ends or ())


def check_length(language_model: transformers.PreTrainedModel, tokens: int, remedy: str) -> None:
    """Raises UserError if a sequence of `tokens` is longer than what the language model attends to.
    A sliding window counts as a limit, because packed sequences do not support one."""
    config = language_model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    longest = min((limit for limit in limits if limit), default=tokens)
    if tokens > longest:
        raise UserError(
            f"model.language_model.path: a '{config.model_type}' model attends to {longest} "
            f"tokens, but a panorama with its text has {tokens}; {remedy}, use fewer views, raise "
            "model.resampler.pool, or use another language model"
        )
