"""The layers of the pretrained towers: gradient checkpointing (recompute activations in the
backward pass instead of storing them) and torch.compile."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from panollava.errors import UserError

# Compiled programs for both towers: with and without gradients, and each shape. Beyond its default
# limit of 8, torch silently stops compiling.
_PROGRAMS = 64


def checkpoint_layers(model: nn.Module) -> None:
    """Enable gradient checkpointing in all towers of `model`. Call it after freezing.

    Frozen towers are included: gradients flow through a frozen language model to its inputs.

    Raises:
        UserError: a tower does not support it, or would compute something else.
    """
    for tower in model.modules():
        if not isinstance(tower, PreTrainedModel):
            continue
        if not tower.supports_gradient_checkpointing:
            raise _unsupported(tower, "do not support it")
        # A CUDA graph cannot save the state of random numbers.
        options = {"use_reentrant": False, "preserve_rng_state": _drops_out(tower)}
        tower.activation_checkpointing_enable(options)
        for layer in tower.modules():
            if isinstance(layer, GradientCheckpointingLayer) and not layer.training:
                if any(value for name, value in vars(layer).items() if "dropout" in name):
                    raise _unsupported(tower, "would apply dropout although they are frozen")
                # Transformers checkpoints a layer only in training mode. Its children stay in
                # evaluation mode, so that no dropout is applied.
                layer.training = True


def compile_layers(model: nn.Module, few_shapes: bool = False) -> None:
    """Compile each layer of all towers in `model`, in place, at its first call. Parameters keep
    their names. `few_shapes`: compile each shape by itself, so that a program does not depend on
    those that came before."""
    # Not the argument of `compile`, which torch 2.11 does not have.
    torch._dynamo.config.recompile_limit = _PROGRAMS
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=False if few_shapes else None)


def _drops_out(tower: nn.Module) -> bool:
    rates = (
        value
        for module in tower.modules()
        for name, value in vars(module).items()
        if "drop" in name or isinstance(module, nn.Dropout) and name == "p"
    )
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _unsupported(tower: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"trainer.gradient_checkpointing: layers of a '{tower.config.model_type}' model {reason}; "
        "set it to false. To save memory, raise the stage's accumulate"
    )
