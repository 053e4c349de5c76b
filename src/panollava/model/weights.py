"""`model_final.safetensors`: the parts of a model that have learned something, and a header that
says what they are."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from panollava.errors import UserError
from panollava.files import whole


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
    with whole(path) as beside:
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
    path: Path,
    model: nn.Module,
    parts: tuple[str, ...],
    stage: str,
    among: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Load `parts` from a file of `stage` into `model`, and return its header.

    `among`: all the parts that the file must hold, where they are more than those loaded.

    Raises:
        UserError: the file is of another stage, its tensors aren't exactly those of its parts,
            or have other shapes.
    """
    header = read_header(path)
    if header.get("stage") != stage:
        raise UserError(
            f"{path}: holds the result of stage '{header.get('stage')}', expected '{stage}'"
        )
    with safe_open(path, framework="pt") as file:
        keys = file.keys()
        others = tuple(f"{part}." for part in among or () if part not in parts)
        found: dict[str, Tensor] = {
            key: file.get_tensor(key) for key in keys if not key.startswith(others)
        }
    wanted = {
        f"{part}.{name}": tensor
        for part in parts
        for name, tensor in getattr(model, part).state_dict().items()
    }
    problems = [f"{key} is missing" for key in wanted.keys() - found.keys()]
    problems += [f"{key} is not part of the model" for key in found.keys() - wanted.keys()]
    problems += [
        f"{key} has shape {tuple(found[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted.keys() & found.keys()
        if found[key].shape != wanted[key].shape
    ]
    if problems:
        raise UserError(
            f"{path}: doesn't fit the model of params.yaml ({len(problems)} of its tensors: "
            f"{sorted(problems)[0]}); it was trained with {json.dumps(header.get('settings'))}"
        )
    for part in parts:
        own = {k.removeprefix(part + "."): v for k, v in found.items() if k.startswith(part + ".")}
        getattr(model, part).load_state_dict(own)
    return header
