"""Trained weights on disk: `model_final.safetensors`, its header, and the tensors of Lightning's
`.ckpt` files; loaded strictly, all expected tensors and no other."""

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from panollava import paths
from panollava.errors import UserError
from panollava.files import atomic_write
from panollava.stages import STAGES, Stage

_CHECKPOINT_PREFIX = "objective.model."  # of the model's parameters in a checkpoint


def save_weights(
    path: Path, model: nn.Module, parts: Iterable[str], header: dict[str, Any]
) -> None:
    """Write the named children of `model`. `header` must hold `stage` and can hold anything that
    JSON can."""
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part in parts
        for name, tensor in getattr(model, part).state_dict().items()
    }
    # One key of metadata: safetensors writes several in no fixed order.
    data = save(tensors, metadata={"panollava": json.dumps(header, sort_keys=True)})
    with atomic_write(path) as beside:
        beside.write_bytes(data)


def read_header(path: Path) -> dict[str, Any]:
    """Raises UserError if there is no such file, it is damaged, or not this project's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that makes it: dvc repro") from None
    except SafetensorError as error:
        raise UserError(
            f"{path}: damaged or no safetensors file ({error}); remove it and run: "
            "make verify, then dvc repro"
        ) from None
    if "panollava" not in metadata:
        raise UserError(
            f"{path}: not written by PanoLLaVA (its header has no 'panollava' entry); "
            "expected a stage's model_final.safetensors"
        )
    return json.loads(metadata["panollava"])


def load_weights(
    path: Path, model: nn.Module, parts: tuple[str, ...], stage: Stage
) -> dict[str, Any]:
    """Load `parts`, all or some of those that `stage` saves, from its model_final.safetensors into
    `model`, and return the file's header.

    Raises:
        UserError: the file is of another stage, or its tensors are not exactly those of the parts.
    """
    header = read_header(path)
    if header.get("stage") != stage.name:
        raise UserError(
            f"{path}: holds the result of stage '{header.get('stage')}', expected '{stage.name}'"
        )
    skipped = tuple(f"{part}." for part in stage.saves if part not in parts)
    with safe_open(path, framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(skipped)}  # noqa: SIM118
    expected = {
        f"{part}.{name}": tensor
        for part in parts
        for name, tensor in getattr(model, part).state_dict().items()
    }
    try:
        copy_strictly(found, expected, path)
    except UserError as error:
        settings = json.dumps(header.get("settings"))
        raise UserError(f"{error}; the file was trained with {settings}") from None
    return header


def load_start(path: Path, model: nn.Module, parts: tuple[str, ...], stage: Stage) -> None:
    """Load `parts`, all or some of those that `stage` saves, from its model_final.safetensors or
    from one of its checkpoints.

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
            f"{path}: {reason}; {expected}; run the stage that writes it: dvc repro"
        ) from None
    try:
        if path.suffix == ".safetensors":
            load_weights(path, model, parts, stage)
        elif path.suffix == ".ckpt":
            _load_from_checkpoint(path, model, parts, stage)
        else:
            raise UserError(f"{path}: neither .safetensors nor .ckpt")
    except UserError as error:
        raise UserError(f"{error}; {expected}") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values alone. Raises UserError for a missing, damaged or foreign file."""
    try:
        if not zipfile.is_zipfile(path) and path.is_file():  # torch.load fails on such in many ways
            raise EOFError("no zip archive, as torch.save writes it, or cut off")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: damaged, or no checkpoint ({reason}); a run that goes on leaves it out"
        ) from None
    if not isinstance(saved, dict) or not {"state_dict", "epoch_step", "best"} <= saved.keys():
        raise UserError(f"{path}: not a checkpoint of PanoLLaVA")
    return saved


def copy_strictly(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors `found` in `path` into those `expected` of the same names.

    Raises:
        UserError: a tensor is missing, unexpected, or has another shape; nothing is copied then.
    """
    problems = [f"'{key}' is missing" for key in expected.keys() - found.keys()]
    problems += [f"'{key}' is not in the model" for key in found.keys() - expected.keys()]
    problems += [
        f"'{key}' has shape {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected.keys() & found.keys()
        if found[key].shape != expected[key].shape
    ]
    if problems:
        raise UserError(
            f"{path}: does not match the model of params.yaml ({len(problems)} tensors differ: "
            f"{min(problems)})"
        )
    for key, tensor in expected.items():
        tensor.detach().copy_(found[key])


def _load_from_checkpoint(
    path: Path, model: nn.Module, parts: tuple[str, ...], stage: Stage
) -> None:
    weights: dict[str, Tensor] = {
        key.removeprefix(_CHECKPOINT_PREFIX): value
        for key, value in read_checkpoint(path)["state_dict"].items()
        if key.startswith(_CHECKPOINT_PREFIX)  # not the objective's, such as VICReg's expander
    }
    trained = {key.split(".")[0] for key in weights}
    if trained != set(stage.trains):
        writers = [other.name for other in STAGES.values() if set(other.trains) == trained]
        raise UserError(
            f"{path}: holds {', '.join(sorted(trained)) or 'no parts of the model'}, as a "
            f"checkpoint of {f'stage {writers[0]!r}' if writers else 'no stage'} does"
        )
    if missing := [part for part in parts if part not in trained]:
        raise UserError(f"{path}: a checkpoint of '{stage.name}' has no {missing[0]}")
    # Buffers are not learned: a checkpoint does not hold them.
    expected = {
        f"{part}.{name}": parameter
        for part in parts
        for name, parameter in getattr(model, part).named_parameters()
    }
    found = {key: value for key, value in weights.items() if key.split(".")[0] in parts}
    copy_strictly(found, expected, path)
