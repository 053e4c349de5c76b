"""Hashes of everything that a result depends on: settings, files and tensors."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is slow to import, and `prepare` does not need it
    from torch import Tensor


def fingerprint(described: Any, files: Iterable[Path], tensors: Mapping[str, "Tensor"]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of anything that JSON can hold, of files'
    contents and of tensors."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for path in files:
        digest.update(_sha256(path).digest())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_raw_bytes(tensor))
    return digest.hexdigest()[:16]


def file_sha256(path: Path) -> str:
    return _sha256(path).hexdigest()


def _sha256(path: Path) -> "hashlib._Hash":
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _raw_bytes(tensor: "Tensor") -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
