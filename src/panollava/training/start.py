"""Where a stage starts: the result of the stage before it, as its weights or a checkpoint."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from panollava import paths
from panollava.errors import UserError
from panollava.model.weights import load_weights
from panollava.stages import STAGES, Stage
from panollava.training.checkpoints import read_checkpoint

_PREFIX = "objective.model."  # of the model's parameters in a checkpoint


def load_start(path: Path, model: nn.Module, parts: tuple[str, ...], stage: Stage) -> None:
    """Load `parts`, all or some of what `stage` saves, from its model_final.safetensors or from a
    checkpoint of it.

    Raises:
        UserError: missing or unreadable, not of `stage`, or of another model.
    """
    expected = (
        f"expected a result of stage '{stage.name}': {paths.weights_file(stage.name)}, or a file "
        f"of {paths.run_folder(stage.name)}/checkpoints"
    )
    try:
        path.open("rb").close()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(
            f"{path}: {reason}; {expected}; run the stage that makes it: dvc repro"
        ) from None
    try:
        if path.suffix == ".safetensors":
            load_weights(path, model, parts, stage.name, among=stage.saves)
        elif path.suffix == ".ckpt":
            _load_checkpoint(path, model, parts, stage)
        else:
            raise UserError(f"{path}: neither .safetensors nor .ckpt")
    except UserError as error:
        raise UserError(f"{error}; {expected}") from None


def _load_checkpoint(path: Path, model: nn.Module, parts: tuple[str, ...], stage: Stage) -> None:
    weights: dict[str, Tensor] = {
        key.removeprefix(_PREFIX): value
        for key, value in read_checkpoint(path)["state_dict"].items()
        if key.startswith(_PREFIX)  # not the objective's own, such as VICReg's expander
    }
    trained = {key.split(".")[0] for key in weights}
    if trained != set(stage.trains):
        own = [other.name for other in STAGES.values() if set(other.trains) == trained]
        raise UserError(
            f"{path}: holds {', '.join(sorted(trained)) or 'nothing'}, as a checkpoint of "
            f"{f'stage {own[0]!r}' if own else 'no stage'} does"
        )
    if missing := [part for part in parts if part not in trained]:
        raise UserError(f"{path}: a checkpoint of '{stage.name}' has no {missing[0]}")
    for part in parts:
        _load_part(path, part, getattr(model, part), weights)


def _load_part(path: Path, part: str, module: nn.Module, weights: dict[str, Tensor]) -> None:
    """All parameters of a part; its buffers are not learned, and stay as they are."""
    own: dict[str, Any] = {f"{part}.{name}": p for name, p in module.named_parameters()}
    found = {key: value for key, value in weights.items() if key.startswith(f"{part}.")}
    problems = [f"{key} is in one of them alone" for key in sorted(own.keys() ^ found.keys())]
    problems += [
        f"{key} has shape {tuple(found[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & found.keys())
        if own[key].shape != found[key].shape
    ]
    if problems:
        raise UserError(f"{path}: doesn't fit the model of params.yaml: {problems[0]}")
    for key, value in found.items():
        own[key].data.copy_(value)
