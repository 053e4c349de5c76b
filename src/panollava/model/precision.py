"""The arithmetic of `trainer.precision`."""

import torch
from torch import nn


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """As Lightning does it in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16"))


def hold_as_computed(model: nn.Module, precision: str, keep: tuple[str, ...] = ()) -> None:
    """Hold the linear layers of all parts of `model`, but those that `keep` names, in the precision
    in which autocast computes them: the same results in half the memory, and no copy in each pass.
    Not for what is trained or saved.

    An embedding's weights stay as they are, and so does a head that shares them: what is looked up
    isn't rounded under autocast."""
    if not precision.startswith("bf16"):
        return
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, part in model.named_children():
        for layer in () if name in keep else part.modules():
            if type(layer) is nn.Linear and id(layer.weight) not in looked_up:
                layer.to(torch.bfloat16)
