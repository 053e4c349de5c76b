"""The language model: loading it, and its end-of-sequence tokens."""

from typing import Any

import torch
import transformers

from panollava import config
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
