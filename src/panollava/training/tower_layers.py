"""The layers of the pretrained towers: gradient checkpointing (recompute activations in the
backward pass instead of storing them) and torch.compile."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from panollava.errors import UserError

# Compiled programs for both towers: with and without gradients, the first shape and others, one
# sequence and several. Beyond its default limit of 8, torch silently stops compiling.
_PROGRAMS = 64


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


def compile_layers(model: nn.Module) -> None:
    """Compile each layer of all towers in `model`, in place, when it is first called. Parameters
    keep their names."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(recompile_limit=_PROGRAMS)


def _unusable(tower: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"trainer.gradient_checkpointing: the layers of a '{tower.config.model_type}' model "
        f"{reason}; set it to false, and raise the stage's accumulate where memory is short"
    )
