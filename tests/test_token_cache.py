"""Cached tokens are those of the rows: whatever writes them, and whatever happens to them."""

import multiprocessing
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers import save_tokenizer
from panollava import paths
from panollava.data import token_cache
from panollava.data.dialogue import Dialogue
from panollava.data.epoch_plan import labeled_rows
from panollava.data.packing import Row, Rows
from panollava.data.token_cache import check_rows, open_rows, tokenize
from panollava.errors import UserError
from panollava.files import read_prepared_rows, write_csv

TEXTS = [
    ("what is red", "the red box is left ."),
    ("<|im_end|> or <|IM_START|>?", "<|im_start|>assistant\n<pad>"),
    ("where", "빨간방 — 360° 😀, b�é�"),
    ("what", "the box " * 40),
    ("  two\r\nlines ", "\ta box\n"),
    ("what is red", "null"),
]
FILE = Path("runs/prepared/train/rows.csv")


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    """In an empty folder, in which FILE has TEXTS, two rows for each panorama."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(Path("tokenizer"))
    write_rows(TEXTS)
    return AutoTokenizer.from_pretrained("tokenizer")


def write_rows(texts: list[tuple[str, str]]) -> None:
    rows = [(n // 2, n + 5, f"{n // 2}.jpg", *text) for n, text in enumerate(texts)]
    columns = ["panorama", "row", "url", "query", "annotation"]
    write_csv(FILE, pd.DataFrame(rows, columns=columns))


def entries() -> list[Path]:
    return sorted(paths.CACHE.glob("tokens-*/"))


def expected(dialogue: Dialogue, truncate: bool) -> list[Row]:
    return [dialogue.row(*text, truncate=truncate) for text in TEXTS]


def no_work(*_: Any, **__: Any) -> None:
    raise AssertionError("tokenized again")


@pytest.mark.parametrize("truncate", [True, False])
def test_cached_rows_are_those_of_the_dialogue(
    tokenizer: PreTrainedTokenizerBase, truncate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = range(44, 54) if truncate else (44,)
    for limit in limits:  # cuts between all bytes of a character
        dialogue = Dialogue(tokenizer, limit, prompt="the {query}")
        rows = expected(dialogue, truncate)
        made = open_rows(FILE, dialogue, truncate)
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "_tokenize", no_work)
            found = open_rows(FILE, dialogue, truncate)
        in_memory = tokenize(read_prepared_rows(FILE), dialogue, truncate)
        for each in (made, found, in_memory):
            assert [*each] == rows and each.panoramas.tolist() == [0, 0, 1, 1, 2, 2]
            assert each.lengths.tolist() == [*map(len, rows)]
            assert each.answers.tolist() == [len(row.answer) for row in rows]
            assert each.ends.tolist() == [row.answer[-1] for row in rows]
            assert each.digest == made.digest
    assert len(entries()) == len(limits)


def test_several_processes_give_the_same_rows_and_leave_random_numbers_alone(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(token_cache, "_cores", lambda: 2)
    dialogue = Dialogue(tokenizer, 60)
    alone = open_rows(FILE, dialogue, True)
    monkeypatch.setattr(token_cache, "_CHUNK", 1)
    monkeypatch.setattr(paths, "CACHE", Path("other"))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    together = open_rows(FILE, dialogue, True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [*together] == [*alone] and together.digest == alone.digest
    assert entries()[0].name == next(Path(".cache").glob("tokens-*/")).name
    assert "TOKENIZERS_PARALLELISM" not in capfd.readouterr().err


def test_only_rows_that_are_used_may_lack_answer_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    write_rows([*TEXTS, ("what " * 80, "a box"), ("where", "")])
    dialogue = Dialogue(tokenizer, 60)
    rows, read = open_rows(FILE, dialogue, True), lambda: read_prepared_rows(FILE)
    check_rows(rows, np.arange(6), read, "train.csv", dialogue, True)
    message = r"train.csv, row 11 \(3.jpg\): the 95 tokens of the query .* to at least 98"
    with pytest.raises(UserError, match=message):
        check_rows(rows, np.arange(8), read, "train.csv", dialogue, True)
    message = r"train.csv, row 12 \(3.jpg\): the answer '' has no tokens"
    for used in (np.array([7]), np.array([3, 7])):
        with pytest.raises(UserError, match=message):
            check_rows(rows, used, read, "train.csv", dialogue, True)
    assert labeled_rows(rows.panoramas, 0.01).tolist() in ([0, 1], [2, 3], [4, 5], [6, 7])


def test_whatever_tokens_depend_on_finds_another_entry(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    def add(expected: int, truncate: bool = True, limit: int = 60, **options: Any) -> None:
        open_rows(FILE, Dialogue(tokenizer, limit, **options), truncate)
        assert len(entries()) == expected, options

    add(1)
    add(1)
    add(2, limit=61)
    add(3, truncate=False)
    add(3, truncate=False, limit=61)  # which nothing depends on
    add(4, prompt="the {query}")
    add(5, ends=[tokenizer.pad_token_id])
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("\n{{ m.content", "{{ m.content")
    add(6)
    tokenizer.chat_template = template
    add(6)
    tokenizer.add_tokens("box")
    add(7)
    write_rows([*TEXTS[:-1], ("what is red", "nul")])
    add(8)


def test_the_place_of_the_tokenizer_is_not_part_of_its_content(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    open_rows(FILE, Dialogue(tokenizer, 60), True)
    Path("tokenizer").rename("moved")
    open_rows(FILE, Dialogue(AutoTokenizer.from_pretrained("moved"), 60), True)
    assert len(entries()) == 1


@pytest.mark.parametrize("name", ["tokens.npy", "starts.npy", "panoramas.npy", "digest.txt"])
@pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "missing"])
def test_a_damaged_entry_is_made_again(
    tokenizer: PreTrainedTokenizerBase, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    dialogue = Dialogue(tokenizer, 60)
    open_rows(FILE, dialogue, True)
    file = entries()[0] / name
    content = file.read_bytes()
    damaged = {"a byte": content[:-3] + b"\1" + content[-2:], "cut": content[:-3], "empty": b""}
    file.unlink()
    if damage != "missing":
        file.write_bytes(damaged[damage])
    rows = open_rows(FILE, dialogue, True)
    assert [*rows] == expected(dialogue, True)
    message = "incomplete" if damage == "missing" else "damaged"
    assert f"{entries()[0]}: {message}; tokenizing the rows again" in caplog.text
    assert file.read_bytes() == content


def start_writer(tokenizer: PreTrainedTokenizerBase, seconds: float) -> Any:
    """A process that tokenizes the rows one by one, and waits at the third one."""

    def write() -> None:
        token_cache._CHUNK, row = 1, Dialogue.row

        def slow_row(self: Dialogue, query: str, *rest: Any, **options: Any) -> Row:
            time.sleep(seconds if query == "where" else 0)
            return row(self, query, *rest, **options)

        Dialogue.row = slow_row  # type: ignore[method-assign]
        open_rows(FILE, Dialogue(tokenizer, 60), True)

    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    return writer


def test_a_killed_writer_leaves_no_entry(tokenizer: PreTrainedTokenizerBase) -> None:
    writer = start_writer(tokenizer, 1000)
    while not [*paths.CACHE.glob("*/tokens.npy.part")]:
        assert writer.is_alive()
        time.sleep(0.01)
    writer.kill()
    writer.join()
    assert not entries() and [*paths.CACHE.glob("*.part")]
    dialogue = Dialogue(tokenizer, 60)
    assert [*open_rows(FILE, dialogue, True)] == expected(dialogue, True)
    assert len(entries()) == 1 and not [*paths.CACHE.glob("*.part")]


def test_another_machine_may_be_writing(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose name begins like this one's."""
    other = paths.CACHE / f"{platform.node()}-2{token_cache._PREFIX[-1]}1.part"
    other.mkdir(parents=True)
    open_rows(FILE, Dialogue(tokenizer, 60), True)
    assert other.is_dir()


def test_two_writers_at_the_same_time_make_one_entry(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = [start_writer(tokenizer, 0.5) for _ in range(2)]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    monkeypatch.setattr(token_cache, "_tokenize", no_work)
    dialogue = Dialogue(tokenizer, 60)
    assert [*open_rows(FILE, dialogue, True)] == expected(dialogue, True)
    assert len(entries()) == 1


def test_an_entry_that_another_machine_has_written_meanwhile_is_kept(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogue = Dialogue(tokenizer, 60)
    first = open_rows(FILE, dialogue, True)
    monkeypatch.setattr(token_cache, "_open", lambda _: None)  # not seen yet
    monkeypatch.setattr(token_cache.shutil, "rmtree", lambda *_, **__: None)
    assert [*open_rows(FILE, dialogue, True)] == [*first]
    assert len(entries()) == 1


def test_the_entries_that_were_used_last_are_kept(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_KEPT", 3)
    made: list[Rows] = []
    for limit in (60, 61, 62, 60, 63):
        made.append(open_rows(FILE, Dialogue(tokenizer, limit), True))
        for entry in entries():  # as if made and used some time ago
            stat = entry.stat()
            os.utime(entry, (stat.st_atime, stat.st_mtime - 100))
    assert len(entries()) == 3
    assert [*made[1]] == expected(Dialogue(tokenizer, 61), True)  # mapped, although deleted
    monkeypatch.setattr(token_cache, "_tokenize", no_work)
    for limit in (60, 62, 63):
        open_rows(FILE, Dialogue(tokenizer, limit), True)
    with pytest.raises(AssertionError, match="tokenized again"):
        open_rows(FILE, Dialogue(tokenizer, 61), True)


def test_a_missing_file_is_an_error_that_says_what_to_run(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    FILE.unlink()
    with pytest.raises(UserError, match=re.escape(f"{FILE}: no such file; run: dvc repro")):
        open_rows(FILE, Dialogue(tokenizer, 60), True)
