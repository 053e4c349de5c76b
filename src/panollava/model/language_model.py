"""The language model: loading it, its end-of-sequence tokens, and a check of its tokenizer."""

from typing import Any

import torch
import transformers

from panollava import config
from panollava.data.dialogue import Dialogue
from panollava.errors import UserError
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


def check_embedding(language_model: transformers.PreTrainedModel, dialogue: Dialogue) -> None:
    """Raises UserError if a token that a text, the prompt or padding may have has no row in the
    embedding. Control tokens that the prompt does not have may be beyond it, as Gemma 3's."""
    embedding: Any = language_model.get_input_embeddings()
    rows, tokenizer = len(embedding.weight), dialogue.tokenizer
    prompt = {*dialogue.text_prefix, *dialogue.query(""), dialogue.stop, dialogue.pad}
    added = tokenizer.added_tokens_decoder.items()
    unused = {i for i, token in added if token.special or not token.normalized} - prompt
    ids = tokenizer.get_vocab().items()
    beyond = sorted((i, token) for token, i in ids if i >= rows and i not in unused)
    if beyond:
        index, token = beyond[0]
        raise UserError(
            f"model.language_model.path: {tokenizer.name_or_path}: the tokenizer has {token!r} as "
            f"token {index}, but the embedding has {rows} rows; remove such tokens, or enlarge the "
            "model by resize_token_embeddings"
        )
