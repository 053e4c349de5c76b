"""Pretrained models from a hub id or a folder, through transformers' `from_pretrained`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import hub

from panollava.config import Pretrained
from panollava.errors import UserError, out_of_memory_reason
from panollava.files import GIT_LFS_POINTER, is_git_lfs_pointer
from panollava.provenance.fingerprint import file_sha256

# Files of a tower's folder that loading reads: weights, configurations, tokenizer and code.
_READ = (
    *("*.safetensors*", "*.bin*", "*config.json", "*token*", "vocab*", "merges.txt", "*.model"),
    *("*.jinja", "*.py"),
)
# Tensors that older weights hold and newer models compute.
_COMPUTED = re.compile(r"(inv_freq|masked_bias|position_ids)$")

Report = Mapping[str, Any]  # what `from_pretrained` says of the weights; empty without weights


def load_model(  # type: ignore[no-untyped-def]
    loader, pretrained: Pretrained, weights: bool, **options
) -> tuple[Any, Report]:
    """Load a model with an Auto class, and what to give to `check_weights`. Without `weights`,
    build it from its configuration on the meta device, where tensors have shapes but no data."""
    if weights:
        reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        return load_from(loader.from_pretrained, pretrained, **reported, **options)
    config = load_from(AutoConfig.from_pretrained, pretrained)
    trust = pretrained.trust_remote_code
    with torch.device("meta"):
        return loader.from_config(config, trust_remote_code=trust, **options), {}


def check_weights(report: Report, part: nn.Module, prefix: str, place: str) -> None:
    """Raises UserError if the weights do not fit `part`, whose names in the model start with
    `prefix`: transformers makes up the missing ones at random and ignores unexpected ones.

    Weights outside `part` do not count, nor those of heads, which are outside its layers."""
    state = {prefix + name for name in part.state_dict()}
    stacks = layer_stacks(part)
    layers = tuple(f"{prefix}{n}." for n, module in part.named_modules() if module in stacks)
    problems = [f"'{n}' is missing" for n in report.get("missing_keys", ()) if n in state]
    problems += [
        f"'{name}' has shape {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in report.get("mismatched_keys", ())
        if name in state
    ]
    problems += [
        f"'{name}' is not in the model"
        for name in report.get("unexpected_keys", ())
        if name.startswith(layers) and not _COMPUTED.search(name)
    ]
    if problems:
        raise UserError(
            f"{place}: the weights do not fit config.json: {min(problems)} ({len(problems)} "
            "tensors differ); use a folder or hub id whose weights and config.json belong together"
        )


def load_from(load, pretrained: Pretrained, **options):  # type: ignore[no-untyped-def]
    """Call `load`, such as an Auto class's `from_pretrained`. A failure raises UserError."""
    revision = pretrained.revision or "main"
    source = {"revision": revision, "trust_remote_code": pretrained.trust_remote_code}
    if pointers := [file for file in _files(Path(pretrained.path)) if is_git_lfs_pointer(file)]:
        raise UserError(f"{pointers[0]}: {GIT_LFS_POINTER}")
    try:
        return load(pretrained.path, **source, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and out_of_memory_reason(error):
            raise
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
    return {file.name: file_sha256(file) for file in _files(folder)}


def _files(folder: Path) -> list[Path]:
    """The files that loading reads; none if it is not a folder."""
    return sorted({f for pattern in _READ for f in folder.glob(pattern) if f.is_file()})


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
