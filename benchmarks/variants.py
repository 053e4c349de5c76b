"""What the laboratory compares: variants of the committed profile, "<regime>.<choice>"."""

from fnmatch import fnmatch
from typing import Any, NamedTuple

Changes = dict[str, Any]  # values by dotted keys of params.yaml

# How much is learned from. `vision` sees all panoramas in each.
REGIMES: dict[str, Changes] = {
    "quarter": {  # the rows of 200 panoramas, ten times
        "stage.resampler.labeled": 0.25,
        "stage.resampler.epochs": 10,
        "stage.finetune.labeled": 0.25,
    },
    "two-epochs": {"stage.resampler.epochs": 2, "stage.finetune.epochs": 0},
    "profile": {},
}


class Choice(NamedTuple):
    base: str | None  # the choice it is compared with
    changes: Changes


VIEWS: Changes = {"model.tokens": "views"}
SPHERE: Changes = {"model.tokens": "sphere", "model.sphere_rows": 4, "model.sphere_columns": 16}
CHOICES: dict[str, Choice] = {
    "sphere-64": Choice(None, SPHERE),
    "views": Choice("sphere-64", VIEWS),  # 128 tokens
    "sphere-32": Choice("sphere-64", {**SPHERE, "model.sphere_rows": 2}),
    "connector-linear": Choice("sphere-64", {**SPHERE, "model.resampler.type": "linear"}),
    "connector-perceiver": Choice("sphere-64", {**SPHERE, "model.resampler.type": "perceiver"}),
    "lora": Choice(
        "sphere-64", {**SPHERE, "stage.resampler.lora": True, "stage.finetune.lora": True}
    ),
    "direction-none": Choice("sphere-64", {**SPHERE, "model.resampler.position": "none"}),
    "direction-view": Choice("views", {**VIEWS, "model.resampler.position": "view"}),
    "views-global": Choice("sphere-64", {**SPHERE, "views.global_view": True}),
    # Wider than 90 degrees, because faces of 90 degrees share no token.
    "views-cubemap": Choice("views", {**VIEWS, "views.strategy": "cubemap", "views.fov": 100}),
    "views-sliding-window": Choice("views", {**VIEWS, "views.strategy": "sliding_window"}),
    "views-resize": Choice(
        "views", {**VIEWS, "views.strategy": "resize", "stage.vision.epochs": 0}
    ),
    "stage1-none": Choice("sphere-64", {**SPHERE, "stage.vision.epochs": 0}),
    "stage1-high": Choice("sphere-64", {**SPHERE, "stage.vision.lr": 1e-4}),
    "stage1-infonce": Choice("sphere-64", {**SPHERE, "stage.vision.objective": "infonce"}),
    "stage1-expander": Choice("sphere-64", {**SPHERE, "stage.vision.expander": 512}),
    "stage1-naive": Choice("sphere-64", {**SPHERE, "stage.vision.overlap": "naive"}),
}
TOKENS = ("sphere-64", "views", "sphere-32")
CORE = {f"{regime}.{tokens}" for regime in REGIMES for tokens in TOKENS}


def select(patterns: list[str]) -> list[str]:
    """The variants whose name, regime or choice matches a pattern, such as `stage1-*`, with those
    they are compared with. No patterns: the core ones."""
    names = [f"{regime}.{choice}" for regime in REGIMES for choice in CHOICES]
    chosen = {name for name in names if any(_matches(name, pattern) for pattern in patterns)}
    if not patterns:
        chosen = {*CORE}
    chosen |= {base for name in chosen if (base := base_of(name))}
    return [name for name in names if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch(each, pattern) for each in (name, *name.split(".")))


def base_of(name: str) -> str | None:
    regime, choice = name.split(".")
    base = CHOICES[choice].base
    return base and f"{regime}.{base}"


def changes_of(name: str) -> Changes:
    regime, choice = name.split(".")
    return {**CHOICES[choice].changes, **REGIMES[regime]}
