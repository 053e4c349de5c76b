"""Gradient checkpointing: what a tower's layers compute on the way forward is thrown away, and is
computed again on the way back: the same gradients with less memory, in more time."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from panollava.errors import UserError


def checkpoint_layers(model: nn.Module) -> None:
    """Checkpoint the layers of all towers in `model`, frozen ones too: gradients flow through a
    frozen language model into its prefix. Comes after the parts' modes are set.

    Raises:
        UserError: a tower that can't be checkpointed, or not without changing what it computes.
    """
    for tower in model.modules():
        if not isinstance(tower, PreTrainedModel):
            continue
        if not tower.supports_gradient_checkpointing:
            raise _unusable(tower, "can't be checkpointed")
        tower.activation_checkpointing_enable({"use_reentrant": False})
        for layer in tower.modules():
            if isinstance(layer, GradientCheckpointingLayer) and not layer.training:
                if any(value for name, value in vars(layer).items() if "dropout" in name):
                    raise _unusable(tower, "would drop values out of a frozen part")
                # A layer is checkpointed in training mode alone. It is put into that by itself:
                # what is in it stays in evaluation mode, and drops nothing out.
                layer.training = True


def _unusable(tower: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"trainer.gradient_checkpointing: the layers of a '{tower.config.model_type}' model "
        f"{reason}; set it to false, and raise the stage's accumulate where memory is short"
    )
