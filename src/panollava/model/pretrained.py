"""Pretrained models from a hub id or a folder, through transformers' `from_pretrained`."""

import json
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig
from transformers.utils import hub

from panollava.config import Pretrained
from panollava.errors import UserError


def from_pretrained_arguments(pretrained: Pretrained) -> dict[str, object]:
    """The arguments that every `from_pretrained` call of the project passes."""
    return {
        "pretrained_model_name_or_path": pretrained.path,
        "revision": pretrained.revision or "main",
        "trust_remote_code": pretrained.trust_remote_code,
    }


def load_model(loader, pretrained: Pretrained, weights: bool, **options):  # type: ignore[no-untyped-def]
    """Load a model with an Auto class. Without `weights`, build it from its configuration on the
    meta device, where tensors have shapes but no data."""
    source = from_pretrained_arguments(pretrained)
    if weights:
        return load_from(loader, source, **options)
    config = load_from(AutoConfig, source)
    with torch.device("meta"):
        code = {"trust_remote_code": pretrained.trust_remote_code}
        return loader.from_config(config, **code, **options)


def load_from(loader, source, **options):  # type: ignore[no-untyped-def]
    """Call an Auto class's `from_pretrained`, or a function. A failure raises UserError."""
    load = getattr(loader, "from_pretrained", loader)
    try:
        return load(**source, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(
            f"cannot load '{source['pretrained_model_name_or_path']}' (revision "
            f"{source['revision']}); use a reachable hub id, or a folder written by "
            f"save_pretrained (for the demo's, run: dvc repro data/demo/dvc.yaml). {error}"
        ) from error


def hub_commit(pretrained: Pretrained) -> str | None:
    """The commit of a hub model that has been loaded; None for a local folder."""
    source = {"revision": pretrained.revision or "main", "local_files_only": True}
    file = hub.cached_file(pretrained.path, "config.json", **source)
    return hub.extract_commit_hash(file, None)


def describe_config(model: nn.Module) -> dict[str, Any]:
    """A pretrained model's configuration, without the place it was loaded from."""
    described = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[operator, union-attr]
    return {name: value for name, value in described.items() if name != "_name_or_path"}
