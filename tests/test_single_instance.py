"""Only one process per command and folder."""

import os
from pathlib import Path

import pytest

from panollava.cli.single_instance import single_instance
from panollava.errors import UserError


def test_a_second_instance_is_refused_with_the_process_id_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with single_instance("prepare"):
        pass
    with single_instance("prepare"):
        with (
            pytest.raises(UserError, match=rf"\(pid {os.getpid()}\) is already running"),
            single_instance("prepare"),
        ):
            pass
        with single_instance("features"):  # another command
            pass
    # The first one has ended. Its process id, perhaps another one, is no longer named.
    (tmp_path / ".resume/prepare.lock").write_text("123456")
    with (
        single_instance("prepare"),
        pytest.raises(UserError, match=rf"\(pid {os.getpid()}\) is already running"),
        single_instance("prepare"),
    ):
        pass
