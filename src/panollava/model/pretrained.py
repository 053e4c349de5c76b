"""Loading pretrained models with `from_pretrained`, from a hub id or a folder."""

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
    """Load a model with an Auto class; without `weights`, from its configuration alone, on the
    meta device, where tensors have a shape and no content."""
    source = from_pretrained_arguments(pretrained)
    if weights:
        return load_from(loader, source, **options)
    config = load_from(AutoConfig, source)
    with torch.device("meta"):
        code = {"trust_remote_code": pretrained.trust_remote_code}
        return loader.from_config(config, **code, **options)


def load_from(loader, source, **options):  # type: ignore[no-untyped-def]
    """Call a `from_pretrained` loader, its failure told as what the user can mend."""
    load = getattr(loader, "from_pretrained", loader)
    try:
        return load(**source, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(
            f"can't load '{source['pretrained_model_name_or_path']}' (revision "
            f"{source['revision']}): give a folder written by save_pretrained (the demo's are "
            "made by: dvc repro data/demo/dvc.yaml), or a hub id that this machine can reach. "
            f"{error}"
        ) from error


def hub_commit(pretrained: Pretrained) -> str | None:
    """The commit of a hub model that has just been loaded; None for a folder of one's own."""
    source = {"revision": pretrained.revision or "main", "local_files_only": True}
    file = hub.cached_file(pretrained.path, "config.json", **source)
    return hub.extract_commit_hash(file, None)


def describe_config(model: nn.Module) -> dict[str, Any]:
    """A pretrained model's configuration, wherever it was loaded from."""
    described = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[operator, union-attr]
    return {name: value for name, value in described.items() if name != "_name_or_path"}
