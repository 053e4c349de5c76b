"""Mixed precision: autocast, and frozen layers held in bf16."""

import torch
from torch import nn
from transformers import PreTrainedModel


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for `trainer.precision`, as Lightning applies it in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16"))


def cast_frozen_linears(model: nn.Module, precision: str, keep: tuple[str, ...] = ()) -> None:
    """Cast the linear layers of `model` to bf16 if `precision` is bf16, except in the parts that
    `keep` names: those that are trained or saved, such as an adapter inside a frozen part.

    Autocast computes these layers in bf16 anyway. The results are the same, with half the memory
    and without a cast in each pass. Embeddings stay in float32, because autocast does not round
    them, and so does a language model's head: logits are compared in float32."""
    if not precision.startswith("bf16"):
        return
    kept = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    kept |= {id(m.get_output_embeddings().weight) for m in models if m.get_output_embeddings()}
    parts = [part for name, part in model.named_children() if name in keep]
    kept |= {id(parameter) for part in parts for parameter in part.parameters()}
    for layer in model.modules():
        if type(layer) is nn.Linear and id(layer.weight) not in kept:
            layer.to(torch.bfloat16)
