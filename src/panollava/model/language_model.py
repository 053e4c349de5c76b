"""The language model: loading it, and its end-of-sequence tokens."""

from typing import Any

import torch
import transformers

from panollava import config
from panollava.model.pretrained import check_weights, load_from, load_model


def load_language_model(
    pretrained: config.Pretrained, weights: bool = True
) -> tuple[Any, transformers.PreTrainedTokenizerBase]:
    """A causal language model in float32, and its tokenizer. Without `weights`, only the shapes of
    its tensors. Raises UserError if it cannot be loaded, or its weights do not fit it."""
    tokenizer = load_from(transformers.AutoTokenizer.from_pretrained, pretrained)
    loader = transformers.AutoModelForCausalLM
    model, report = load_model(loader, pretrained, weights, dtype=torch.float32)
    check_weights(report, model, "", f"model.language_model.path: {pretrained.path}")
    return model, tokenizer


def end_tokens(language_model: transformers.PreTrainedModel) -> tuple[int, ...]:
    """End-of-sequence token ids from generation_config.json."""
    ends = language_model.generation_config.eos_token_id
    return (ends,) if isinstance(ends, int) else tuple(ends or ())
