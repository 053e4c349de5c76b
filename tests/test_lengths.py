"""Panoramas with texts that the language model cannot attend to are an error of the first command,
not of the stage that reads them."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from transformers import AutoTokenizer

from helpers import save_language_model
from panollava import paths
from panollava.cli import main as cli
from panollava.data.dialogue import Dialogue

COMMANDS = ("plan", "plan vision", "train vision", "train resampler", "train all", "features")
BEFORE_ROWS = 38  # tokens: 32 of the views, and the chat template before them
RESAMPLER, LONGEST = 43, 99  # max_text_length; the longest row that fits the first has 43
LONG = "the red box is left . " * 20  # more than LONGEST tokens

Configure = Callable[..., None]


@pytest.fixture
def configure(project: Path, small_data: Path) -> Configure:
    """Sets the language model's window and dotted parameters, and adds a row to a split. Its other
    rows are shorter than RESAMPLER."""
    shutil.copytree(small_data, "data")

    def write(window: int, split: str = "train", query: str = "", text: str = LONG, **changes):
        save_language_model(Path("towers"), window=window)
        if query:
            with Path(f"data/{split}.csv").open("a", newline="", encoding="utf-8") as lines:
                csv.writer(lines).writerow((f"images/{split}_0.jpg", query, text))
        yaml = YAML()
        tree = yaml.load(paths.PARAMS)
        changes = {
            "data__dir": "data",
            "model__language_model__path": "towers",
            "model__tokens": "views",
            "stage__resampler__max_text_length": RESAMPLER,
            "stage__finetune__max_text_length": LONGEST,
            "evaluate__max_new_tokens": 8,
            **changes,
        }
        for name, value in changes.items():
            *sections, key = name.split("__")
            section = tree
            for each in sections:
                section = section[each]
            section[key] = value
        yaml.dump(tree, paths.PARAMS)

    return write


def query_tokens(text: str) -> int:
    save_language_model(Path("towers"))
    return len(Dialogue(AutoTokenizer.from_pretrained("towers")).query(text))


def error(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_a_window_that_is_too_small_for_a_later_stage_stops_the_first_command(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(BEFORE_ROWS + LONGEST - 1, query="what")
    for command in (*COMMANDS, "evaluate"):
        message = error(command, capsys)
        assert (
            "'qwen2' model attends to 136 tokens, but a panorama with its text has 137" in message
        )
        assert "; lower stage.finetune.max_text_length (99), use fewer views, raise" in message
        assert "resampler.max_text" not in message and "evaluate" not in message.split("; ")[-1]
        assert not Path("runs").exists() and not Path("metrics").exists(), command
    cli.main("train all --max-text-length 98".split())
    assert paths.weights_file("finetune").is_file()


def test_only_the_rows_that_exist_have_to_fit(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(BEFORE_ROWS + RESAMPLER)
    cli.main(["plan", "vision"])
    configure(BEFORE_ROWS + RESAMPLER, data__dir="nowhere")  # without rows, the limit decides
    assert "lower stage.finetune.max_text_length (99), use" in error("plan", capsys)
    configure(BEFORE_ROWS + RESAMPLER - 1, query="what")
    lengths = (
        "lower stage.resampler.max_text_length (43) and lower stage.finetune.max_text_length (99)"
    )
    assert lengths in error("plan", capsys)
    few = {f"stage__{name}__labeled": 0.01 for name in ("resampler", "finetune")}
    configure(BEFORE_ROWS + RESAMPLER - 1, **few)  # not the panorama with the long row
    cli.main(["plan", "vision"])


def test_validation_rows_are_not_cut(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(BEFORE_ROWS + LONGEST, split="valid", query="what")
    message = error("train vision", capsys)
    assert "shorten data/valid.csv, row 3 (images/valid_0.jpg), use fewer views" in message
    assert "lower" not in message


def test_the_longest_query_of_the_evaluation_has_to_leave_room_for_its_answer(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    window = BEFORE_ROWS + query_tokens(LONG) + 8
    configure(window, split="test", query=LONG)
    cli.main(["plan", "vision"])
    configure(window, evaluate__max_new_tokens=9)
    message = error("train vision", capsys)
    assert f"attends to {window} tokens, but a panorama with its text has {window + 1}" in message
    assert "; lower evaluate.max_new_tokens (9), use fewer views" in message
    configure(window, model__prompt="the {query}")
    assert "lower evaluate.max_new_tokens (8)" in error("evaluate", capsys)
    configure(window, evaluate__split="valid")
    cli.main(["plan", "vision"])


def test_every_query_has_to_leave_room_in_every_stage(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "what is it, and where is it on the left"
    length = query_tokens(query)
    assert length > RESAMPLER
    configure(
        *(32768, "train", query),
        stage__resampler__max_text_length=length + 1,
        stage__finetune__max_text_length=length + 1,
    )
    cli.main(["plan", "vision"])
    configure(
        32768,
        stage__resampler__max_text_length=length + 1,
        stage__finetune__max_text_length=length,
    )
    for command in ("plan vision", "train vision"):
        message = error(command, capsys)
        assert "stage.finetune: data/train.csv, row 13 (images/train_0.jpg): " in message
        assert f"the {length} tokens of the query with its prompt leave no room" in message
        assert not Path("runs").exists()


def test_a_language_model_without_a_limit_fits(configure: Configure) -> None:
    configure(0, query="what")
    cli.main(["plan", "vision"])


def test_a_missing_language_model_stops_the_first_command_too(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(32768)
    Path("towers/config.json").unlink()
    assert "cannot load 'towers'" in error("train vision", capsys)
    assert not Path("runs").exists()


def test_merged_tokens_fit_where_those_of_the_views_do_not(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = {"model__tokens": "sphere", "model__sphere_columns": 8}
    configure(BEFORE_ROWS + LONGEST, query="what", model__sphere_rows=5, **merged)
    message = error("plan", capsys)
    assert f"has {BEFORE_ROWS + LONGEST + 8}; lower stage.finetune" in message
    assert "(99), lower model.sphere_rows, or use another language model" in message
    configure(BEFORE_ROWS + LONGEST - 1, model__sphere_rows=2, **merged)
    cli.main(["plan"])
