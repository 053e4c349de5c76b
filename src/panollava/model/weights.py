"""Trained weights on disk, loaded strictly: all expected tensors and no others.

A stage ends in a `model_final.safetensors`. The next one starts from it, or from one of the
stage's Lightning checkpoints (`.ckpt`)."""

import json
import pickle
import zipfile
from collections import Counter
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
    """Write these parts of `model`. `header`: JSON values, `stage` among them."""
    state = _only(parts, model.state_dict())
    # Tied tensors are written each by itself, as safetensors requires.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    tensors = {
        name: tensor.clone() if places[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in tensors.items()
    }
    # One key of metadata: safetensors writes several in no fixed order.
    data = save(tensors, metadata={"panollava": json.dumps(header, sort_keys=True)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def parts_in(path: Path) -> set[str]:
    """The parts of the model in a result or checkpoint. None if it is unreadable: `load_start`
    says why."""
    try:
        if path.suffix == ".ckpt":
            return {name.split(".")[0] for name in _checkpoint_parameters(path)}
        return set(read_header(path).get("parts", ()))
    except UserError:
        return set()


def load_start(path: Path, model: nn.Module, parts: tuple[str, ...], stage: Stage) -> None:
    """Load `parts`, all or some of those that it holds, from the model_final.safetensors of `stage`
    or from one of its checkpoints.

    Raises:
        UserError: the file is missing, unreadable, not of `stage` or does not match the model.
    """
    loaders = {".safetensors": load_weights, ".ckpt": _load_checkpoint}
    try:
        if path.suffix not in loaders:
            raise UserError(f"{path}: neither .safetensors nor .ckpt")
        loaders[path.suffix](path, model, parts, stage)
    except UserError as error:
        raise UserError(
            f"{error}; expected a result of stage '{stage.name}': {paths.weights_file(stage.name)}"
            f", or a file of {paths.run_folder(stage.name)}/checkpoints"
        ) from None


def load_weights(
    path: Path, model: nn.Module, parts: tuple[str, ...], stage: Stage
) -> dict[str, Any]:
    """Load `parts`, all or some of those that the header lists, from the model_final.safetensors of
    `stage`. Returns the file's header.

    Raises:
        UserError: the file is missing, unreadable, not of `stage` or does not match the model.
    """
    header = read_header(path)
    if header.get("stage") != stage.name:
        raise UserError(
            f"{path}: holds the result of stage '{header.get('stage')}', expected '{stage.name}'"
        )
    skipped = tuple(f"{part}." for part in header.get("parts", stage.saves) if part not in parts)
    with safe_open(path, framework="pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(skipped)}  # noqa: SIM118
    copy_strictly(saved, _only(parts, model.state_dict()), path)
    return header


def read_header(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is missing, unreadable or not written by `save_weights`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that writes it: dvc repro") from None
    except (SafetensorError, OSError) as error:  # OSError: a folder
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); remove it and run: "
            "make verify, then dvc repro"
        ) from None
    if "panollava" not in metadata:
        raise UserError(
            f"{path}: not written by PanoLLaVA (its header has no 'panollava' entry); "
            "expected a stage's model_final.safetensors"
        )
    return json.loads(metadata["panollava"])


def _load_checkpoint(path: Path, model: nn.Module, parts: tuple[str, ...], stage: Stage) -> None:
    """Load `parts` from a checkpoint of `stage`, which holds the parameters that it trains."""
    saved = _checkpoint_parameters(path)
    trained = {key.split(".")[0] for key in saved}
    if trained - {*stage.optional} != set(stage.trains):
        writers = [s.name for s in STAGES.values() if set(s.trains) == trained - {*s.optional}]
        raise UserError(
            f"{path}: holds {', '.join(sorted(trained)) or 'no parts of the model'}, as a "
            f"checkpoint of {f'stage {writers[0]!r}' if writers else 'no stage'} does"
        )
    # Not the state: a checkpoint has no buffers, because they are not trained.
    expected = _only(parts, dict(model.named_parameters()))
    copy_strictly(_only(parts, saved), expected, path)


def _checkpoint_parameters(path: Path) -> dict[str, Tensor]:
    """The model's parameters, but not the objective's, such as VICReg's expander."""
    return {
        key.removeprefix(_CHECKPOINT_PREFIX): tensor
        for key, tensor in read_checkpoint(path)["state_dict"].items()
        if key.startswith(_CHECKPOINT_PREFIX)
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint; no code is run. Raises UserError for a file that is
    missing, unreadable or not written by a stage."""
    try:
        if not zipfile.is_zipfile(path) and path.is_file():  # torch.load fails on such in many ways
            raise EOFError("truncated, or not written by torch.save")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(saved, dict) or not {"state_dict", "epoch_step", "best"} <= saved.keys():
        raise UserError(f"{path}: not a checkpoint of PanoLLaVA")
    return saved


def copy_strictly(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors `saved` in `path` into those `expected` of the same names.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; then nothing is copied.
    """
    problems = [f"'{key}' is missing from the file" for key in expected.keys() - saved.keys()]
    problems += [f"'{key}' is not in the model" for key in saved.keys() - expected.keys()]
    problems += [
        f"'{key}' has shape {tuple(saved[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected.keys() & saved.keys()
        if saved[key].shape != expected[key].shape
    ]
    if problems:
        raise UserError(
            f"{path}: does not match the model: {min(problems)} ({len(problems)} tensors differ); "
            "restore the settings it was trained with, or train it again"
        )
    for key, tensor in expected.items():
        tensor.detach().copy_(saved[key])


def _only(parts: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that are in these parts of the model."""
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in parts}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """The number of parameters of each part (child) of `model`. An adapter does not count as part
    of the language model."""
    counts = dict.fromkeys((name for name, _ in model.named_children()), 0)
    for name, parameter in model.named_parameters():
        if (part := name.split(".")[0]) in counts:
            counts[part] += parameter.numel()
    return counts
