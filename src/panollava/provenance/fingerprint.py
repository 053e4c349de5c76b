"""A hash of everything that a result depends on: settings, files and tensors."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is slow to import, and `prepare` does not need it
    from torch import Tensor


def fingerprint(description: Any, files: Iterable[Path], tensors: Mapping[str, "Tensor"]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over a JSON value, the contents of files, and
    named tensors."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for path in files:
        digest.update(bytes.fromhex(file_sha256(path)))
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_raw_bytes(tensor))
    return digest.hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raw_bytes(tensor: "Tensor") -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data  # NumPy has no bfloat16
