"""Curves on Weights & Biases, for those who ask for it (`machine.wandb`); it is installed and
imported for them alone."""

from collections.abc import Callable, Mapping
from typing import Any

from panollava.errors import UserError

Track = Callable[[int, Mapping[str, float]], None]


def open_tracker(project: str | None, name: str, settings: dict[str, Any]) -> Track:
    """What writes the values of a step to a new run `name`; nothing where there is no project.
    A run ends when the next one starts, or with the process.

    Raises UserError if wandb isn't installed."""
    if project is None:
        return lambda step, values: None
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(
            f"machine.wandb: '{project}' asks for Weights & Biases, which isn't installed: "
            "pip install wandb, or set machine.wandb to null"
        ) from None
    run = wandb.init(project=project, name=name, config=settings, reinit="finish_previous")
    return lambda step, values: run.log(dict(values), step=step)
