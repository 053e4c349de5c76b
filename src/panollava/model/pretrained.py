"""Pretrained models from a hub id or a folder, through transformers' `from_pretrained`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import hub

from panollava.config import Pretrained
from panollava.errors import UserError
from panollava.provenance.fingerprint import file_sha256

# Files of a tower's folder that loading reads: weights, configurations, tokenizer and code.
_READ = (
    *("*.safetensors*", "*.bin*", "*config.json", "*token*", "vocab*", "merges.txt", "*.model"),
    *("*.jinja", "*.py"),
)


def load_model(loader, pretrained: Pretrained, weights: bool, **options):  # type: ignore[no-untyped-def]
    """Load a model with an Auto class. Without `weights`, build it from its configuration on the
    meta device, where tensors have shapes but no data."""
    if weights:
        return load_from(loader.from_pretrained, pretrained, **options)
    config = load_from(AutoConfig.from_pretrained, pretrained)
    with torch.device("meta"):
        return loader.from_config(config, trust_remote_code=pretrained.trust_remote_code, **options)


def load_from(load, pretrained: Pretrained, **options):  # type: ignore[no-untyped-def]
    """Call `load`, such as an Auto class's `from_pretrained`. A failure raises UserError."""
    revision = pretrained.revision or "main"
    source = {"revision": revision, "trust_remote_code": pretrained.trust_remote_code}
    try:
        return load(pretrained.path, **source, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(
            f"cannot load '{pretrained.path}' (revision {revision}); use a reachable hub id, or a "
            "folder written by save_pretrained (for the demo's, run: dvc repro "
            f"data/demo/dvc.yaml). {error}"
        ) from error


def hub_commit(pretrained: Pretrained) -> str | None:
    """The commit of a hub model that has been loaded; None for a local folder."""
    source = {"revision": pretrained.revision or "main", "local_files_only": True}
    file = hub.cached_file(pretrained.path, "config.json", **source)
    return hub.extract_commit_hash(file, None)


def describe_tower(pretrained: Pretrained) -> dict[str, Any]:
    """Which tower has been loaded: the `commit` on the hub, or the SHA-256 of each of the `files`
    of a local folder."""
    folder = Path(pretrained.path)
    if not folder.is_dir():
        return {"commit": hub_commit(pretrained)}
    return {"files": _hashes(folder)}


def _hashes(folder: Path) -> dict[str, str]:
    files = {file for pattern in _READ for file in folder.glob(pattern) if file.is_file()}
    return {file.name: file_sha256(file) for file in sorted(files)}


def check_files(folder: Path, expected: dict[str, str], name: str) -> None:
    """Raises UserError unless the files of the tower `name` have these SHA-256, by their names."""
    found = _hashes(folder)
    for file in sorted(expected.keys() | found.keys()):
        if expected.get(file) != found.get(file):
            before, now = (hashes.get(file, "no such file")[:16] for hashes in (expected, found))
            raise UserError(
                f"{folder / file}: SHA-256 {now}, expected {before}: not the {name} of the "
                f"training; restore it, or pass {name}= with its place"
            )


def layer_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of transformer layers in `model`, one for most towers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [
        stack
        for stack in lists
        if len(stack) and all(isinstance(layer, GradientCheckpointingLayer) for layer in stack)
    ]


def describe_config(model: nn.Module) -> dict[str, Any]:
    """A pretrained model's configuration, without the place it was loaded from."""
    described = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[operator, union-attr]
    return {name: value for name, value in described.items() if name != "_name_or_path"}
