from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from helpers import ROOT
from panollava import config
from panollava.config import load_settings
from panollava.demo.settings import load_demo_settings
from panollava.errors import UserError
from panollava.evaluation.facts import READERS
from panollava.geometry.views import STRATEGIES, resampled
from panollava.model.network import RESAMPLERS
from panollava.training.lightning_module import SCHEDULES

PARAMS = (ROOT / "params.yaml").read_text()


def edited(tmp_path: Path, old: str, new: str) -> Path:
    assert old in PARAMS
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    "profile", ["params.yaml", "presets/quic360.yaml", "presets/quic360-recommended.yaml"]
)
def test_the_committed_profiles_are_valid(profile: str) -> None:
    assert load_settings(ROOT / profile).seed == 0


def test_the_real_profile_has_the_documented_values() -> None:
    stage = load_settings(ROOT / "presets/quic360.yaml").stage
    table = [
        (s.epochs, s.batch_size, s.lr, s.max_text_length)
        for s in (stage.vision, stage.resampler, stage.finetune)
    ]
    assert table == [(3, 32, 5e-6, 32), (5, 16, 2e-5, 64), (10, 8, 1e-5, 128)]


def test_the_recommended_profile_differs_where_its_comments_say() -> None:
    def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
        nested = [
            leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
            for k, v in tree.items()
        ]
        return {key: value for each in nested for key, value in each.items()}

    first, ours = (
        leaves(asdict(load_settings(ROOT / f"presets/{name}.yaml")))
        for name in ("quic360", "quic360-recommended")
    )
    assert {key: value for key, value in ours.items() if first[key] != value} == {
        "model.language_model.path": "Qwen/Qwen2.5-0.5B-Instruct",
        "model.tokens": "sphere",
        "model.prompt": "Describe this 360-degree panorama in one sentence. Topic: {query}",
        "stage.vision.accumulate": 8,
        "stage.vision.lr": 1e-5,
        "stage.resampler.accumulate": 8,
        "stage.resampler.batch_size": 48,
        "stage.resampler.lr": 1e-3,
        "stage.resampler.max_text_length": 128,
        "stage.finetune.accumulate": 8,
        "stage.finetune.batch_size": 48,
        "stage.finetune.lr": 2e-4,
    }


def test_the_profiles_roll_panoramas_so_that_views_show_new_pixels() -> None:
    demo, real = (load_settings(ROOT / name) for name in ("params.yaml", "presets/quic360.yaml"))
    assert resampled(real.views, real.evaluate.rolls) == real.evaluate.rolls != []
    assert resampled(demo.views, demo.evaluate.rolls)
    # The demo's seam compares the same objects in all four places.
    assert {90, 180, 270} <= {*demo.evaluate.rolls}


def test_a_mistyped_parameter_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = edited(tmp_path, "  size: 64", "  sise: 64")
    with pytest.raises(UserError, match=r"unknown parameter 'views.sise'.*'views.size'"):
        load_settings(path)


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing parameter 'seed'"):
        load_settings(edited(tmp_path, "seed: 0", ""))


def test_a_mistyped_parameter_in_a_list_is_named(tmp_path: Path) -> None:
    text = (ROOT / "data/demo/params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("places: 8", "place: 8"))
    with pytest.raises(UserError) as raised:
        load_demo_settings(path)
    unknown, known = (f"'language_model.lessons[1].{name}'" for name in ("place", "places"))
    assert str(raised.value) == (
        f"{path}: unknown parameter {unknown}; the nearest known one is {known}"
    )


def test_an_integer_in_place_of_a_number_is_converted(tmp_path: Path) -> None:
    fov = load_settings(edited(tmp_path, "fov: 90", "fov: 80")).views.fov
    assert (fov, type(fov)) == (80.0, float)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 0", "seed: -1", "seed: expected at least 0, found -1"),
        ("seed: 0", f"seed: {2**32}", f"seed: expected less than {2**32}, found {2**32}"),
        (
            "max_rejected: 0.0",
            "max_rejected: 1.1",
            "data.max_rejected: expected at most 1, found 1.1",
        ),
        ("fov: 90", "fov: 361", "views.fov: expected at most 360, found 361"),
        ("fov: 90", "fov: 0", "views.fov: expected greater than 0, found 0"),
        ("pitch: 0", "pitch: 91", "views.pitch: expected at most 90, found 91"),
        ("pitch: 0", "pitch: -91", "views.pitch: expected at least -90, found -91"),
        ("size: 64", "size: big", "views.size: expected an integer, found 'big'"),
        ("size: 64", "size: 0", "views.size: expected at least 1, found 0"),
        ("overlap: 0.5", "overlap: 1", "views.overlap: expected less than 1, found 1"),
        ("layer: null", "layer: 0", "model.encoder.layer: expected less than 0, found 0"),
        ("pool: 2", "pool: 0", "model.resampler.pool: expected at least 1, found 0"),
        ("epochs: 1", "epochs: -1", "stage.vision.epochs: expected at least 0, found -1"),
        ("batch_size: 8", "batch_size: 0", "stage.vision.batch_size: expected at least 1, found 0"),
        ("accumulate: 1", "accumulate: 0", "stage.vision.accumulate: expected at least 1, found 0"),
        ("lr: 2.0e-5", "lr: .nan", "stage.vision.lr: expected a finite number, found nan"),
        ("rank: 16", "rank: 0", "model.lora.rank: expected at least 1, found 0"),
        (
            r"targets: .*\.(q|k|v|o|gate|up|down)_proj",
            "targets: (q_proj",
            "model.lora.targets: expected a regular expression (missing ), unterminated subpattern "
            "at position 0), found '(q_proj'",
        ),
        (
            "encoder_lr: 2.0e-4",
            "encoder_lr: -1",
            "stage.resampler.encoder_lr: expected at least 0, found -1",
        ),
        (
            "encoder_lr: 2.0e-4",
            "encoder_lr: null",
            "stage.resampler.encoder_lr: expected a number, found null",
        ),
        (
            "labeled: 1.0",
            "labeled: 0",
            "stage.resampler.labeled: expected greater than 0, found 0",
        ),
        (
            "accelerator: cpu",
            "accelerator: GPU",
            "trainer.accelerator: expected 'cpu', 'gpu' or 'auto', found 'GPU'",
        ),
        ("devices: 1", "devices: 0", "machine.devices: expected at least 1, found 0"),
        (
            "threads: 2 # CPU",
            "devices: 1\n  threads: 2 # CPU",
            "'trainer.devices' is now 'machine.devices', which changes no result; move it there",
        ),
        ("fov: 90", "fov: true", "views.fov: expected a number, found True"),
        ("fov: 90", "fov: '90'", "views.fov: expected a number, found '90'"),
        ("size: 64", "size: 64.0", "views.size: expected an integer, found 64.0"),
        ("compile: false", "compile: 0", "trainer.compile: expected a boolean, found 0"),
        ("dir: data/demo", "dir: 1", "data.dir: expected a string, found 1"),
        ("wandb: null", "wandb: 1", "machine.wandb: expected a string, found 1"),
        ("[20, 45, 90, 180, 270]", "20", "evaluate.rolls: expected a list, found 20"),
        *(
            (
                'prompt: "{query}"',
                f"prompt: {text}",
                f'model.prompt: expected a text in quotes with one {{query}}, such as "{{query}}", '
                f"found {found}",
            )
            for text, found in (
                ("Describe it.", "'Describe it.'"),
                ('"{query} or {query}"', "'{query} or {query}'"),
                ('"{ query }"', "'{ query }'"),
                ("{query}", "{'query': None}"),  # without quotes, a mapping of YAML
                ("null", "null"),
            )
        ),
        ("devices: 1", "devices: true", "machine.devices: expected an integer, found True"),
        ("threads: 2", "threads: 0", "trainer.threads: expected at least 1, found 0"),
        (
            "precision: 32-true",
            "precision: 16-mixed",
            "trainer.precision: expected '32-true' or 'bf16-mixed', found '16-mixed'",
        ),
        ("beta2: 0.98", "beta2: 1.0", "trainer.beta2: expected less than 1, found 1.0"),
        ("clip: 0.5", "clip: 0", "trainer.clip: expected greater than 0, found 0"),
        ("log_every: 10", "log_every: 0", "trainer.log_every: expected at least 1, found 0"),
        (
            "loader_workers: 0",
            "loader_workers: -1",
            "machine.loader_workers: expected at least 0, found -1",
        ),
        ("save_every: 50", "save_every: 0", "machine.save_every: expected at least 1, found 0"),
        ("facts: demo", "facts: all", "evaluate.facts: expected 'demo' or null, found 'all'"),
        (
            "[20, 45, 90, 180, 270]",
            "[20, 361]",
            "evaluate.rolls[1]: expected at most 360, found 361",
        ),
    ],
)
def test_an_invalid_value_is_named_with_the_valid_ones(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = edited(tmp_path, old, new)
    with pytest.raises(UserError) as raised:
        load_settings(path)
    assert str(raised.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epochs: 1", "epochs: 0"),  # the stage copies its input weights
        ("overlap: 0.5", "overlap: 0"),
        ("warmup: 0.1", "warmup: 1"),
        ("facts: demo", "facts: null"),
        ("[20, 45, 90, 180, 270]", "[]"),
        ('prompt: "{query}"', 'prompt: "In {braces} {} {0}: {query}\\n"'),
    ],
)
def test_the_limits_are_valid(tmp_path: Path, old: str, new: str) -> None:
    load_settings(edited(tmp_path, old, new))


def test_a_value_from_the_command_line_is_checked_too() -> None:
    changes = {"stage.vision.epochs": -1}
    with pytest.raises(UserError) as raised:
        load_settings(ROOT / "params.yaml", ("machine",), changes)
    message = "command line: stage.vision.epochs: expected at least 0, found -1"
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [
        (config.Views, "strategy", STRATEGIES),
        (config.Resampler, "type", RESAMPLERS),
        (config.Trainer, "schedule", SCHEDULES),
        (config.Evaluate, "facts", [*READERS, None]),
    ],
)
def test_every_implementation_has_a_name_in_the_schema(
    section: type, key: str, known: Iterable[Any]
) -> None:
    assert set(get_args(get_type_hints(section)[key])) == set(known)


def test_numbers_as_dvc_writes_them_are_numbers(tmp_path: Path) -> None:
    path = edited(tmp_path, "lr: 2.0e-3", "lr: 3e-05")
    assert load_settings(path).stage.resampler.lr == 3e-5


def test_a_missing_file_and_invalid_yaml_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_settings(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_settings(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(UserError, match="the file: expected a mapping, found null"):
        load_settings(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="missing parameter 'stage.vision.lr', which an option"):
        load_settings(tmp_path / "params.yaml", changes={"stage.vision.lr": 1.0})


def test_undeclared_parameters_cannot_be_read() -> None:
    settings = load_settings(ROOT / "params.yaml", ("seed", "stage.vision", "model.encoder.path"))
    assert settings.stage.vision.epochs >= 0
    assert settings.model.encoder.path
    assert settings.machine.save_every  # changes no result
    for unread in (lambda: settings.data, lambda: settings.stage.finetune):
        with pytest.raises(AttributeError):
            unread()
    assert vars(load_settings(ROOT / "params.yaml", ())).keys() == {"machine"}
