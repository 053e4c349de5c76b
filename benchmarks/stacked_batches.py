"""Batches of several replicas as one, with a new first axis, padded to the largest."""

import torch
from torch import Tensor

from panollava.data.batches import TextBatch
from panollava.data.packing import IGNORED, PADDING, Packed


def stack_batches(batches: list[TextBatch]) -> tuple[Tensor, Packed]:
    """Views or features and packed rows of several batches, padded to the largest, with a new first
    axis. Padding is panoramas without tokens, and answers that are IGNORED."""
    panoramas = max(len(batch.vision) for batch in batches)
    length = max(batch.packed.tokens.shape[1] for batch in batches)
    answers = max(len(batch.packed.labels) for batch in batches)
    sequences = (panoramas, length)
    packs = []
    for batch in batches:
        packed = batch.packed
        width = packed.tokens.shape[1]
        moved = packed.predicts // width * length + packed.predicts % width
        packs.append(
            Packed(
                tokens=_pad(packed.tokens, sequences, 0),
                positions=_pad(packed.positions, sequences, 0),
                segments=_pad(packed.segments, sequences, PADDING),
                predicts=_pad(moved, (answers,), 0),
                labels=_pad(packed.labels, (answers,), IGNORED),
            )
        )
    vision = [_pad(b.vision, (panoramas, *b.vision.shape[1:]), 0) for b in batches]
    return torch.stack(vision), Packed(*map(torch.stack, zip(*packs, strict=True)))


def _pad(tensor: Tensor, shape: tuple[int, ...], value: int) -> Tensor:
    """`tensor` in the corner of a larger one."""
    padded = tensor.new_full(shape, value)
    padded[tuple(map(slice, tensor.shape))] = tensor
    return padded
