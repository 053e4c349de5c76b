"""PanoLLaVA: a vision-language model for 360° panoramas, trained in three reproducible stages."""

import importlib
import os
from typing import Any

# Torch's threads wait for each other many times a step. Where another program takes a core they
# would wait in a busy loop, by libgomp's default of milliseconds: a step then takes up to ten times
# as long. Read when libgomp is loaded, so before torch is.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name: str) -> Any:
    # Imported at first use, because torch and transformers take seconds; by its name, because a
    # stage's code digest follows import statements.
    if name == "PanoLLaVA":
        return importlib.import_module("panollava.model.panollava").PanoLLaVA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
