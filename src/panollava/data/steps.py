"""The plan of an epoch: which panoramas, and which of their rows, make each optimizer step.

A plan is a function of (seed, epoch) alone, so that nothing has to be remembered to go on."""

import numpy as np

Step = list[tuple[int, list[int]]]  # (panorama, its rows), each panorama once

_LOOK_AHEAD = 64  # panoramas searched for one that fills a step


def plan_epoch(
    rows: dict[int, list[int]], batch_size: int, seed: int, epoch: int | None
) -> list[Step]:
    """Divide all rows into steps of at most `batch_size` rows.

    A panorama's rows stay together in a step unless there are more than `batch_size` of them.
    `rows` maps each panorama to its rows; `epoch` None keeps their order (validation).
    """
    order = list(rows)
    if epoch is not None:
        order = [order[i] for i in np.random.default_rng((seed, epoch)).permutation(len(order))]
    pending = [
        (panorama, rows[panorama][at : at + batch_size])
        for panorama in order
        for at in range(0, len(rows[panorama]), batch_size)
    ]
    steps: list[Step] = []
    while pending:
        step: Step = []
        room, at = batch_size, 0
        while room and at < min(len(pending), _LOOK_AHEAD):
            panorama, own = pending[at]
            if len(own) <= room and all(panorama != other for other, _ in step):
                step.append(pending.pop(at))
                room -= len(own)
            else:
                at += 1
        steps.append(step)
    return steps


def divide(step: Step, parts: int) -> list[Step]:
    """Divide a step's panoramas into at most `parts` non-empty parts of about equal rows."""
    shares: list[Step] = [[] for _ in range(parts)]
    loads = [0] * parts
    for panorama, rows in sorted(step, key=lambda item: -len(item[1])):
        lightest = loads.index(min(loads))
        shares[lightest].append((panorama, rows))
        loads[lightest] += len(rows)
    return [share for share in shares if share]
