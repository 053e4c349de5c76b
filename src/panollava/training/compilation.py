"""torch.compile of the towers' layers: their many small operations become few, which is what a
GPU's steps wait for. All layers of a tower share one compiled program."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# For both towers together: with a gradient and without, the first shape and any other, a single
# sequence and more. Beyond its own limit of 8 torch goes on without compiling.
_PROGRAMS = 64


def compile_layers(model: nn.Module) -> None:
    """Compile each layer of all towers in `model`, in place, when it is first called. Parameters
    keep their names."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(recompile_limit=_PROGRAMS)
