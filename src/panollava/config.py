"""The settings: `params.yaml` read once into frozen dataclasses, with every key checked.

A command sees only the sections that it declares, so that no stage can read a parameter which
`dvc.yaml` doesn't list for it, and `machine`, which changes no result and is listed nowhere.
What a value may be stands beside it; what several must be together is checked where they are
used."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from panollava.errors import UserError


@dataclass(frozen=True)
class Allowed:
    """What a value may be beside its type: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Allowed("at least 1", lambda value: value >= 1)]
CountOrZero = Annotated[int, Allowed("at least 0", lambda value: value >= 0)]
NotNegative = Annotated[float, Allowed("at least 0", lambda value: value >= 0)]
Positive = Annotated[float, Allowed("above 0", lambda value: value > 0)]
Share = Annotated[float, Allowed("from 0 to 1", lambda value: 0 <= value <= 1)]
ShareAbove0 = Annotated[float, Allowed("above 0 and up to 1", lambda value: 0 < value <= 1)]
ShareBelow1 = Annotated[float, Allowed("from 0 to below 1", lambda value: 0 <= value < 1)]
Degrees = Annotated[float, Allowed("from -360 to 360 degrees", lambda value: -360 <= value <= 360)]
Pitch = Annotated[float, Allowed("from -90 to 90 degrees", lambda value: -90 <= value <= 90)]
Fov = Annotated[float, Allowed("above 0 and up to 360 degrees", lambda value: 0 < value <= 360)]
One = Annotated[
    int,
    Allowed(
        "1, because a step's mean isn't computed across several devices (raise the stage's "
        "accumulate where a step doesn't fit one)",
        lambda value: value == 1,
    ),
]
Seed = Annotated[int, Allowed("from 0 to 4294967295", lambda value: 0 <= value < 2**32)]


@dataclass(frozen=True)
class Data:
    dir: str  # folder that holds train.csv, valid.csv and test.csv
    max_rejected: Share  # largest share of a split's rows that may be bad


@dataclass(frozen=True)
class Views:
    strategy: Literal["e2p", "cubemap", "sliding_window", "resize"]
    size: Count  # pixels, square
    fov: Fov  # degrees
    overlap: ShareBelow1  # of a view's fov, that the next view sees as well
    pitch: Pitch  # degrees, up positive
    global_view: bool  # e2p: one more view of the whole panorama


@dataclass(frozen=True)
class Pretrained:
    path: str  # hub id, or a folder written by save_pretrained
    revision: str | None  # hub branch, tag or commit
    trust_remote_code: bool  # run code from the hub


@dataclass(frozen=True)
class Resampler:
    type: Literal["mlp"]
    width: Count  # features of its hidden layer
    pool: Count  # patch tokens are averaged pool x pool
    position: Literal["ray", "view", "none"]  # how a token's direction is told
    direction_degree: Count  # harmonics in the encoding of each token's direction


@dataclass(frozen=True)
class Model:
    towers: str  # folder of local towers, which the stages depend on
    encoder: Pretrained
    language_model: Pretrained
    resampler: Resampler
    features: Literal["float32", "float16"]  # precision in which the encoder's features are kept


@dataclass(frozen=True)
class VisionStage:
    epochs: CountOrZero
    batch_size: Count  # panoramas a step
    accumulate: Count  # parts that a step is computed in, one after the other
    lr: NotNegative
    max_text_length: Count
    objective: Literal["vicreg", "infonce"]
    overlap: Literal["exact", "naive"]
    invariance: NotNegative
    variance: NotNegative
    covariance: NotNegative
    expander: CountOrZero  # width of the expander; 0: none
    temperature: Positive  # of infonce


@dataclass(frozen=True)
class TextStage:
    epochs: CountOrZero
    batch_size: Count  # rows a step
    accumulate: Count
    lr: NotNegative
    encoder_lr: NotNegative | None  # learning rate of the encoder where it trains; null: lr
    max_text_length: Count  # tokens of a query and its answer
    labeled: ShareAbove0  # of train's panoramas, whose rows are used


@dataclass(frozen=True)
class Stages:
    vision: VisionStage
    resampler: TextStage
    finetune: TextStage


@dataclass(frozen=True)
class Trainer:
    accelerator: Literal["cpu", "gpu", "auto"]
    devices: One
    threads: Count  # of the processor; results depend on it in the last bits
    precision: Literal["32-true", "bf16-mixed"]
    gradient_checkpointing: bool  # compute activations twice instead of keeping them
    compile: bool  # the towers' layers
    deterministic: bool  # kernels that give the same bits each time
    weight_decay: NotNegative
    beta1: ShareBelow1
    beta2: ShareBelow1
    clip: Positive  # largest norm of the gradient
    warmup: Share  # of the steps
    schedule: Literal["cosine", "linear", "constant"]  # the learning rate after the warm-up
    log_every: Count  # steps
    keep_checkpoints: Count


@dataclass(frozen=True)
class Machine:
    """What changes no result: no stage of the pipeline lists it, and every one may read it."""

    decode_threads: Count  # of prepare
    loader_workers: CountOrZero  # processes that load batches; 0: none
    save_every: Count  # steps after which a killed run can go on
    wandb: str | None  # project on Weights & Biases that gets all curves; null: none


@dataclass(frozen=True)
class Evaluate:
    split: Literal["valid", "test"]
    batch_size: Count  # panoramas at once
    max_new_tokens: Count
    facts: Literal["demo", None]  # how facts are read out of answers; null: not
    rolls: list[Degrees]  # degrees by which every panorama is turned and asked again


@dataclass(frozen=True)
class Settings:
    seed: Seed
    data: Data
    views: Views
    model: Model
    stage: Stages
    trainer: Trainer
    machine: Machine
    evaluate: Evaluate


ALWAYS_READABLE = ("machine",)


def load_settings(
    path: Path, only: tuple[str, ...] | None = None, changes: Mapping[str, Any] | None = None
) -> Settings:
    """Read `path`. `only` names the sections or keys (`stage.vision`, `seed`) that stay readable
    beside ALWAYS_READABLE; any other attribute of the result raises AttributeError. `changes` are
    values that override the file's, by their dotted keys.

    Raises:
        UserError: no file, no YAML, an unknown, missing or mistyped key, a value of another type
            or outside what is allowed.
    """
    settings = read(Settings, path, changes)
    if only is None:
        return settings
    return _Restricted(settings, (*only, *ALWAYS_READABLE))  # type: ignore[return-value]


Kind = TypeVar("Kind")


def read(kind: type[Kind], path: Path, changes: Mapping[str, Any] | None = None) -> Kind:
    """Read a YAML file into a dataclass, every key checked. Raises UserError, see
    `load_settings`."""
    try:
        # YAML 1.2: `3e-05`, as DVC writes it, is a number there and a string in YAML 1.1.
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; run the command in the project's folder, "
            "or copy a profile there: cp presets/quic360.yaml params.yaml"
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    changes = changes or {}
    for key, value in changes.items():
        _set(tree, key, value, path)
    return _build(kind, tree, "", path, changes)


def _set(tree: Any, key: str, value: Any, path: Path) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        tree = tree.get(parent) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: missing parameter '{key}', which is to be overridden")
    tree[name] = value


def _build(kind: Any, value: Any, key: str, path: Path, changes: Mapping[str, Any]) -> Any:
    place = f"{'command line' if key in changes else path}: {key or 'the file'}"
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{place}: expected a mapping, found {value!r}")
        kinds = typing.get_type_hints(kind, include_extras=True)
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in kinds:
                near = difflib.get_close_matches(str(name), kinds, n=1, cutoff=0)
                raise UserError(
                    f"{path}: unknown parameter '{prefix}{name}'; "
                    f"the nearest known one is '{prefix}{near[0]}'"
                )
        if missing := [name for name in kinds if name not in value]:
            raise UserError(
                f"{path}: missing parameter '{prefix}{missing[0]}'; "
                "see params.yaml of the project for its meaning and a value"
            )
        make: Any = kind
        return make(
            **{
                name: _build(own, value[name], prefix + name, path, changes)
                for name, own in kinds.items()
            }
        )
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{place}: expected a list, found {value!r}")
        (item,) = typing.get_args(kind)
        return [_build(item, own, f"{key}[{i}]", path, changes) for i, own in enumerate(value)]
    return checked(kind, value, place)


def checked(kind: Any, value: Any, place: str) -> Any:
    """`value`, if it is one of `kind`: a plain type, one with what is `Allowed` beside it, any of
    these or None, or a Literal. Raises a UserError that begins with `place`."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in options):
            raise UserError(f"{place}: expected {_listed(options)}, found {value!r}")
        return value
    if origin is Annotated:
        plain, allowed = options
        value = checked(plain, value, place)
        if not allowed.holds(value):
            raise UserError(f"{place}: expected {allowed.words}, found {value!r}")
        return value
    if types.NoneType in options:
        (other,) = (option for option in options if option is not types.NoneType)
        return None if value is None else checked(other, value, place)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(
            f"{place}: expected {kind.__name__}, found {value!r} ({type(value).__name__})"
        )
    return value


def _listed(options: tuple[Any, ...]) -> str:
    *first, last = ("null" if option is None else str(option) for option in options)
    return f"{', '.join(first)} or {last}" if first else last


class _Restricted:
    """Settings of which only the named keys can be read."""

    def __init__(self, settings: Any, only: tuple[str, ...]) -> None:
        for name in {key.split(".")[0] for key in only}:
            value = getattr(settings, name)
            deeper = [key[len(name) + 1 :] for key in only if key.startswith(name + ".")]
            if name not in only:
                value = _Restricted(value, tuple(deeper))
            setattr(self, name, value)
