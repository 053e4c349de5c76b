"""The settings: `params.yaml` read once into frozen dataclasses, with every key checked.

A command sees only the sections that it declares, so that no stage can read a parameter which
`dvc.yaml` doesn't list for it, and `machine`, which changes no result and is listed nowhere.
Values are checked where they are used."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from panollava.errors import UserError


@dataclass(frozen=True)
class Data:
    dir: str  # folder that holds train.csv, valid.csv and test.csv
    max_rejected: float  # largest share of a split's rows that may be bad (0..1)


@dataclass(frozen=True)
class Views:
    strategy: str  # e2p | cubemap | sliding_window | resize
    size: int  # pixels, square
    fov: float  # degrees
    overlap: float  # share of a view's fov that the next view sees as well (0..1)
    pitch: float  # degrees, up positive
    global_view: bool  # e2p: one more view of the whole panorama


@dataclass(frozen=True)
class Pretrained:
    path: str  # hub id, or a folder written by save_pretrained
    revision: str | None  # hub branch, tag or commit
    trust_remote_code: bool  # run code from the hub


@dataclass(frozen=True)
class Resampler:
    type: str
    width: int  # features of its hidden layer
    pool: int  # patch tokens are averaged pool x pool
    position: str  # ray | view | none: how a token's direction is told
    direction_degree: int  # harmonics in the encoding of each token's direction


@dataclass(frozen=True)
class Model:
    towers: str  # folder of local towers, which the stages depend on
    encoder: Pretrained
    language_model: Pretrained
    resampler: Resampler
    features: str  # float32 | float16: precision in which the encoder's features are kept


@dataclass(frozen=True)
class VisionStage:
    epochs: int
    batch_size: int  # panoramas a step
    accumulate: int  # parts that a step is computed in, one after the other
    lr: float
    max_text_length: int
    objective: str  # vicreg | infonce
    overlap: str  # exact | naive
    invariance: float
    variance: float
    covariance: float
    expander: int  # width of the expander; 0: none
    temperature: float  # of infonce


@dataclass(frozen=True)
class TextStage:
    epochs: int
    batch_size: int  # rows a step
    accumulate: int
    lr: float
    encoder_lr: float | None  # learning rate of the encoder where it trains; null: lr
    max_text_length: int  # tokens of a query and its answer
    labelled: float  # share of train's panoramas whose rows are used (above 0, up to 1)


@dataclass(frozen=True)
class Stages:
    vision: VisionStage
    resampler: TextStage
    finetune: TextStage


@dataclass(frozen=True)
class Trainer:
    accelerator: str  # cpu | gpu | auto
    devices: int  # 1
    threads: int  # of the processor; results depend on it in the last bits
    precision: str  # 32-true | bf16-mixed
    gradient_checkpointing: bool  # compute activations twice instead of keeping them
    weight_decay: float
    beta1: float
    beta2: float
    clip: float  # largest norm of the gradient
    warmup: float  # share of the steps
    schedule: str  # cosine | linear | constant: the learning rate after the warm-up
    log_every: int  # steps
    keep_checkpoints: int


@dataclass(frozen=True)
class Machine:
    """What changes no result: no stage of the pipeline lists it, and every one may read it."""

    decode_threads: int  # of prepare
    loader_workers: int  # processes that load batches; 0: none
    save_every: int  # steps after which a killed run can go on
    wandb: str | None  # project on Weights & Biases that gets all curves; null: none


@dataclass(frozen=True)
class Evaluate:
    split: str  # valid | test
    batch_size: int  # panoramas at once
    max_new_tokens: int
    facts: str | None  # how facts are read out of answers: demo; null: not
    rolls: list[float]  # degrees by which every panorama is turned and asked again


@dataclass(frozen=True)
class Settings:
    seed: int
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
        UserError: no file, no YAML, an unknown, missing or mistyped key, a value of another type.
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
    for key, value in (changes or {}).items():
        _set(tree, key, value, path)
    return _build(kind, tree, "", path)


def _set(tree: Any, key: str, value: Any, path: Path) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        tree = tree.get(parent) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: missing parameter '{key}', which is to be overridden")
    tree[name] = value


def _build(kind: Any, value: Any, key: str, path: Path) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key or 'the file'}: expected a mapping, found {value!r}")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0)
                raise UserError(
                    f"{path}: unknown parameter '{prefix}{name}'; "
                    f"the nearest known one is '{prefix}{near[0]}'"
                )
        if missing := [name for name in fields if name not in value]:
            raise UserError(
                f"{path}: missing parameter '{prefix}{missing[0]}'; "
                "see params.yaml of the project for its meaning and a value"
            )
        types_ = typing.get_type_hints(kind)
        make: Any = kind
        return make(
            **{name: _build(types_[name], value[name], prefix + name, path) for name in fields}
        )
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{path}: {key}: expected a list, found {value!r}")
        (item,) = typing.get_args(kind)
        return [_build(item, own, f"{key}[{i}]", path) for i, own in enumerate(value)]
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(
            f"{path}: {key}: expected {wanted.__name__}, found {value!r} ({type(value).__name__})"
        )
    return value


class _Restricted:
    """Settings of which only the named keys can be read."""

    def __init__(self, settings: Any, only: tuple[str, ...]) -> None:
        for name in {key.split(".")[0] for key in only}:
            value = getattr(settings, name)
            deeper = [key[len(name) + 1 :] for key in only if key.startswith(name + ".")]
            if name not in only:
                value = _Restricted(value, tuple(deeper))
            setattr(self, name, value)
