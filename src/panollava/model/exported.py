"""A model from a folder that `export` wrote."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from panollava.errors import UserError
from panollava.model.encoder import Encoder
from panollava.model.header import Header, parse_header
from panollava.model.network import Network, make_resampler


def is_exported(folder: Path) -> bool:
    """Whether this is a folder written by `export`, or by `save_pretrained` of its model."""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "panollava"


def load_exported(folder: Path) -> tuple[Network, PreTrainedTokenizerBase, Header]:
    """The network in float32, on the processor. Raises UserError for a folder that was not written
    by `export`, or refers to a language model that is missing or another one."""
    # By its name: these classes are not part of any stage's code.
    hf: Any = importlib.import_module("panollava.hf")
    try:
        exported = hf.PanoLLaVAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from error
    config, parts = exported.config, exported.model
    header = parse_header(config.panollava or {}, folder)
    layer = header.model.encoder.layer or -1
    encoder = Encoder(parts.vision_tower, layer, config.image_mean, config.image_std)
    resampler = make_resampler(header.model, header.views, encoder)
    state = parts.resampler.state_dict()
    if header.model.resampler.position != "view":  # the others are computed
        state.pop("directions", None)
    resampler.load_state_dict(state)
    with no_init_weights():
        language_model = AutoModelForCausalLM.from_config(config.text_config)
    decoder, head = language_model.get_decoder(), language_model.get_output_embeddings()
    decoder.load_state_dict(parts.language_model.state_dict(), assign=True)
    head.load_state_dict(exported.lm_head.state_dict(), assign=True)
    language_model.generation_config = exported.generation_config
    return Network(encoder, resampler, parts.projector, language_model), tokenizer, header
