"""The settings: `params.yaml`, read once into frozen dataclasses and validated by pydantic.

A command sees only the sections that it declares, so that no stage can read a parameter which
`dvc.yaml` does not list for it. `machine` changes no result, and every command may read it.
Constraints on a single value stand here; those on a combination are checked where it is used."""

import difflib
import functools
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    TypeAdapter,
    ValidationError,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from panollava.errors import UserError


def _one_query(value: Any) -> str:
    # Without quotes, YAML reads {query} as a mapping.
    if not isinstance(value, str) or value.count("{query}") != 1:
        raise ValueError('expected a text in quotes with one {query}, such as "{query}"')
    return value


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"expected a regular expression ({error})") from None
    return value


Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
ShareAbove0 = Annotated[float, Field(strict=True, gt=0, le=1)]
ShareBelow1 = Annotated[float, Field(strict=True, ge=0, lt=1)]
Degrees = Annotated[float, Field(strict=True, ge=-360, le=360)]
Negative = Annotated[int, Field(strict=True, lt=0)]
Pitch = Annotated[float, Field(strict=True, ge=-90, le=90)]  # degrees, up positive
Fov = Annotated[float, Field(strict=True, gt=0, le=360)]  # degrees
Prompt = Annotated[str, BeforeValidator(_one_query)]
Pattern = Annotated[str, AfterValidator(_regular_expression)]


class Section:
    """Base of all sections: unknown keys and numbers that are not finite are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Data(Section):
    dir: str  # folder that holds train.csv, valid.csv and test.csv
    max_rejected: Share  # largest share of a split's rows that may be bad
    store: Literal["views", "panoramas"]  # what prepare keeps; panoramas: as JPEG
    shard_size: Count  # pictures per file that prepare and features write
    store_dir: str | None  # folder for these files; null: in runs/, kept by DVC


@dataclass(frozen=True)
class Views(Section):
    strategy: Literal["e2p", "cubemap", "sliding_window", "resize"]
    size: Count  # pixels, square
    fov: Fov
    overlap: ShareBelow1  # share of a view's fov that the next view sees too
    pitch: Pitch
    global_view: StrictBool  # e2p: one more view of the whole panorama


@dataclass(frozen=True)
class Pretrained(Section):
    path: str  # hub id, or a folder written by save_pretrained
    revision: str | None  # hub branch, tag or commit
    trust_remote_code: StrictBool  # run code from the hub


@dataclass(frozen=True)
class PretrainedEncoder(Pretrained):
    layer: Negative | None  # whose output is read, -1: the last; null: the last pretrained one


@dataclass(frozen=True)
class Resampler(Section):
    type: Literal["mlp", "linear", "perceiver"]
    width: Count  # features of its hidden layers; not used with linear
    queries: Count  # of perceiver: the number of its tokens; not used with the others
    pool: Count  # patch tokens of views that are not merged are averaged pool x pool
    position: Literal["ray", "view", "none"]  # encoding of each token's direction
    direction_degree: Count  # harmonics in the encoding of a ray


@dataclass(frozen=True)
class Lora(Section):
    rank: Count
    alpha: Count  # the adapter's output is scaled by alpha / rank
    targets: Pattern  # matches complete names of the language model's linear layers


@dataclass(frozen=True)
class Model(Section):
    towers: str  # folder of local towers, which the stages depend on
    encoder: PretrainedEncoder
    language_model: Pretrained
    prompt: Prompt  # text around a query, inside the chat template
    tokens: Literal["views", "sphere"]  # pooled in each view, or merged in cells of the sphere
    sphere_rows: Count  # cells from top to bottom; not used with views
    sphere_columns: Count  # cells around the horizon, a multiple of the views; the same
    resampler: Resampler
    lora: Lora  # used by the stages that train it
    features: Literal["float32", "float16"]  # precision of the encoder's cached features


@dataclass(frozen=True)
class VisionStage(Section):
    epochs: CountOrZero
    patience: Count | None  # epochs without a lower validation loss that end the stage
    batch_size: Count  # panoramas per step, at most
    accumulate: Count  # parts of a step, computed one after the other
    lr: NotNegative
    max_text_length: Count  # kept for older scripts; this stage reads no text
    objective: Literal["vicreg", "infonce"]
    overlap: Literal["exact", "naive"]
    invariance: NotNegative
    variance: NotNegative
    covariance: NotNegative
    expander: CountOrZero  # width of the expander; 0: none
    temperature: Positive  # of infonce


@dataclass(frozen=True)
class TextStage(Section):
    epochs: CountOrZero
    patience: Count | None
    batch_size: Count  # rows per step, at most: a panorama's rows stay together
    accumulate: Count
    lr: NotNegative
    max_text_length: Count  # tokens of a query and its answer in train
    labeled: ShareAbove0  # share of train's panoramas whose rows are used
    turn: StrictBool  # roll train's panoramas by random numbers of view strides
    lora: StrictBool  # train an adapter (LoRA) of the language model
    lora_lr: NotNegative  # learning rate of the adapter


@dataclass(frozen=True)
class ResamplerStage(TextStage):
    encoder_lr: NotNegative  # learning rate of the encoder


@dataclass(frozen=True)
class Stages(Section):
    vision: VisionStage
    resampler: ResamplerStage
    finetune: TextStage


@dataclass(frozen=True)
class Trainer(Section):
    accelerator: Literal["cpu", "gpu", "auto"]
    threads: Count  # of the processor; results depend on it in the last bits
    precision: Literal["32-true", "bf16-mixed"]
    gradient_checkpointing: StrictBool  # recompute activations instead of storing them
    compile: StrictBool  # the towers' layers
    cuda_graphs: StrictBool  # record the steps of a GPU, and replay them
    deterministic: StrictBool  # bit-reproducible kernels
    weight_decay: NotNegative
    beta1: ShareBelow1
    beta2: ShareBelow1
    clip: Positive  # largest norm of the gradient
    warmup: Share  # of the steps
    schedule: Literal["cosine", "linear", "constant"]  # the learning rate after the warm-up
    log_every: Count  # steps
    keep_checkpoints: Count


@dataclass(frozen=True)
class Machine(Section):
    """Changes no result: no stage of the pipeline lists it, and every command may read it."""

    devices: Count  # processes that share training, features and evaluation, each on one device
    decode_threads: Count  # of prepare
    loader_workers: CountOrZero  # processes that load batches; 0: none
    save_every: Count  # steps between checkpoints that a killed run resumes from
    wandb: str | None  # project on Weights & Biases for the curves; null: none


@dataclass(frozen=True)
class Evaluate(Section):
    split: Literal["valid", "test"]
    batch_size: Count  # panoramas per batch
    max_new_tokens: Count
    facts: Literal["demo", None]  # reader that extracts facts from answers; null: none
    rolls: list[Degrees]  # every panorama is also evaluated rolled by each of these


@dataclass(frozen=True)
class Settings(Section):
    seed: Seed
    data: Data
    views: Views
    model: Model
    stage: Stages
    trainer: Trainer
    machine: Machine
    evaluate: Evaluate


ALWAYS_READABLE = ("machine",)
_MOVED = {"trainer.devices": "machine.devices"}


def load_settings(
    path: Path, only: tuple[str, ...] | None = None, changes: Mapping[str, Any] | None = None
) -> Settings:
    """Read `path`. `only` names the sections or keys (`stage.vision`, `seed`) that are readable in
    addition to ALWAYS_READABLE; any other attribute of the result raises AttributeError. `changes`
    override values of the file, by their dotted keys.

    Raises:
        UserError: no file, invalid YAML, an unknown or missing key, or an invalid value.
    """
    settings = read(Settings, path, changes)
    if only is None:
        return settings
    return _Restricted(settings, (*only, *ALWAYS_READABLE))  # type: ignore[return-value]


Kind = TypeVar("Kind")


def read(kind: type[Kind], path: Path, changes: Mapping[str, Any] | None = None) -> Kind:
    """Read a YAML file into a dataclass of sections. Raises UserError, see `load_settings`."""
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
    try:
        return _validator(kind).validate_python(tree)  # type: ignore[arg-type]
    except ValidationError as error:
        raise UserError(_explain(error, kind, path, changes)) from None


def checked(kind: Any, value: Any, place: str) -> Any:
    """`value`, if it is valid for the annotated type `kind`. Raises a UserError that begins with
    `place`."""
    try:
        return _validator(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{place}: {_expectation(error.errors()[0])}") from None


_validator = functools.cache(TypeAdapter)


def _set(tree: Any, key: str, value: Any, path: Path) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        tree = tree.get(parent) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: missing parameter '{key}', which an option overrides")
    tree[name] = value


def _explain(invalid: ValidationError, kind: Any, path: Path, changes: Mapping[str, Any]) -> str:
    """The first error as a message. A misspelled key comes before the one that is then missing."""
    error = min(invalid.errors(), key=lambda each: "unexpected" not in each["type"])
    key = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, error["loc"])))
    if key in _MOVED and error["type"] == "unexpected_keyword_argument":
        return f"{path}: '{key}' is now '{_MOVED[key]}', which changes no result; move it there"
    if error["type"] == "unexpected_keyword_argument":
        *parents, name = error["loc"]
        for parent in parents:
            in_list = isinstance(parent, int)
            kind = typing.get_args(kind)[0] if in_list else typing.get_type_hints(kind)[str(parent)]
        (near,) = difflib.get_close_matches(str(name), typing.get_type_hints(kind), 1, cutoff=0)
        near = key.removesuffix(str(name)) + near
        return f"{path}: unknown parameter '{key}'; the nearest known one is '{near}'"
    if error["type"] == "missing":
        return f"{path}: missing parameter '{key}'; the project's params.yaml explains it"
    place = "command line" if key in changes else path
    return f"{place}: {key or 'the file'}: {_expectation(error)}"


def _expectation(error: Any) -> str:
    """Pydantic's message in the words of YAML, with the value."""
    message = "expected a mapping" if error["type"] == "dataclass_type" else error["msg"]
    for old, new in (
        ("Value error, ", ""),
        ("Input should be", "expected"),
        ("a valid integer", "an integer"),
        ("a valid ", "a "),
        ("greater than or equal to", "at least"),
        ("less than or equal to", "at most"),
        (" or None", " or null"),
    ):
        message = message.replace(old, new)
    found = "null" if error["input"] is None else repr(error["input"])
    return f"{message}, found {found}"


class _Restricted:
    """Settings of which only the named keys are readable."""

    def __init__(self, settings: Any, only: tuple[str, ...]) -> None:
        for name in {key.split(".")[0] for key in only}:
            value = getattr(settings, name)
            if name not in only:
                inner = (key.removeprefix(f"{name}.") for key in only if key.startswith(f"{name}."))
                value = _Restricted(value, tuple(inner))
            setattr(self, name, value)
