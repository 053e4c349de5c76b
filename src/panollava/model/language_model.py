"""The language model: loading it, and its end-of-sequence tokens."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from panollava import config
from panollava.model.pretrained import from_pretrained_arguments, load_from, load_model


def end_tokens(language_model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens with which it ends what it says, by its generation_config.json."""
    ends = language_model.generation_config.eos_token_id
    return (ends,) if isinstance(ends, int) else tuple(ends or ())


def load_language_model(pretrained: config.Pretrained, weights: bool = True):  # type: ignore[no-untyped-def]
    """A causal language model in fp32, and its tokenizer."""
    tokenizer = load_from(AutoTokenizer, from_pretrained_arguments(pretrained))
    language = load_model(AutoModelForCausalLM, pretrained, weights, dtype=torch.float32)
    return language, tokenizer
