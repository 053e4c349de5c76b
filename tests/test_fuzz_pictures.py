"""No changed picture ends in an internal error, a crash or a hang, and fuzzing would see one."""

import os
import signal
import time
from collections import Counter

import pytest

import fuzz_pictures
from fuzz_pictures import FAULTS, changed_file, fuzz, good_files, read


def test_500_changed_files_are_read_or_refused() -> None:
    outcomes = fuzz(500, seed=0)
    assert [outcome.number for outcome in outcomes] == list(range(500))
    counts = Counter(outcome.kind for outcome in outcomes)
    assert not [outcome for outcome in outcomes if outcome.kind in FAULTS]
    assert counts["read"] > 50 and counts["refused: cut off"] > 50
    assert counts["refused: broken picture"] > 50


def test_all_unchanged_files_are_read() -> None:
    for name, content in good_files().items():
        assert read(content, 96) == ("read", ""), name


def test_a_file_is_a_function_of_seed_and_index() -> None:
    assert changed_file(3, 5) == changed_file(3, 5)
    assert len({changed_file(seed, index)[1] for seed in range(2) for index in range(20)}) > 38


def crash_or_hang(indices: range, seed: int, outcomes: fuzz_pictures.Connection) -> None:
    """A child that crashes at file 1, hangs at file 2 and fails at file 3."""
    for index in indices:
        if index == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if index == 2:
            time.sleep(1000)
        kind = "internal error" if index == 3 else "read"
        outcomes.send(fuzz_pictures.Outcome(index, "a.png", kind))


def test_crashes_and_hangs_are_counted_and_the_others_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz_pictures, "read_files", crash_or_hang)
    monkeypatch.setattr(fuzz_pictures, "LIMIT", 5)
    kinds = [outcome.kind for outcome in fuzz(5, seed=0)]
    assert kinds == ["read", "crash", "hang", "internal error", "read"]
