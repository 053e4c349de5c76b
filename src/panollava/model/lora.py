"""LoRA: a low-rank adapter of the language model's linear layers, made by peft."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from panollava.config import Lora
from panollava.errors import UserError
from panollava.model.pretrained import layer_stacks

_NAME = "default"  # of the only adapter, as peft calls it
_PEFT_PREFIX = "base_model.model."  # of tensors in peft's files


def add_adapter(language_model: PreTrainedModel, settings: Lora, seed: int) -> nn.Module:
    """Wrap the linear layers that `targets` matches, in place. Returns the adapter: a module whose
    children are the matrices A and B, below the names of their layers. B is 0, so that the model
    computes the same as before. Frozen or not, matrices stay in float32.

    Raises:
        UserError: peft is not installed, or `targets` matches no layer.
    """
    targets = _matching_layers(language_model, settings.targets)
    peft = _import_peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(peft, settings, targets), language_model)
    adapter = nn.Module()
    for name, layer in adapted_layers(language_model):
        place = adapter
        for part in name.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.lora_A, place.lora_B = layer.lora_A[_NAME], layer.lora_B[_NAME]
    return adapter


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Peft's layers in `module`, with their names."""
    return ((name, each) for name, each in module.named_modules() if hasattr(each, "lora_A"))


def merged_state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The state dict of `module` with the adapter's products added to the weights."""
    state = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in module.state_dict(prefix=prefix).items()
        if ".lora_" not in key
    }
    for name, layer in adapted_layers(module):
        state[f"{prefix}{name}.weight"] = layer.weight + layer.get_delta_weight(_NAME)
    return state


def save_adapter(
    folder: Path, model: nn.Module, settings: Lora, base: str, revision: str | None
) -> None:
    """Write the adapter as peft's folder. `model`: a network that has one; `base`: hub id or folder
    of the language model."""
    peft = _import_peft()
    targets = sorted(name for name, _ in adapted_layers(model.language_model))  # type: ignore[arg-type]
    config = _peft_config(peft, settings, targets)
    config.base_model_name_or_path, config.revision = base, revision
    config.inference_mode = True
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    state = model.lora.state_dict(prefix=_PEFT_PREFIX)  # type: ignore[union-attr]
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


def _matching_layers(language_model: PreTrainedModel, pattern: str) -> list[str]:
    """Names of the linear layers in the decoder's stacks that `pattern` matches completely. A model
    may also contain a vision tower, which is outside of them, as are embeddings and head."""
    stacks = layer_stacks(language_model.get_decoder())
    inside = {id(each) for stack in stacks for each in stack.modules()}
    names = [
        name
        for name, each in language_model.named_modules()
        if isinstance(each, nn.Linear) and id(each) in inside
    ]
    matching = [name for name in names if re.fullmatch(pattern, name)]
    if not matching:
        raise UserError(
            f"model.lora.targets: '{pattern}' matches no complete name of a linear layer of the "
            f"language model, such as {' or '.join(names[:2])}"
        )
    return matching


def _peft_config(peft: Any, settings: Lora, targets: list[str]) -> Any:
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        lora_dropout=0.0,  # a step depends on nothing but its rows
        bias="none",
        task_type="CAUSAL_LM",
    )


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"LoRA needs peft and accelerate ({error}); install them: pip install -e .[lora]"
        ) from None
    return peft
