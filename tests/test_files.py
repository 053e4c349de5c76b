from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from panollava.errors import UserError
from panollava.files import (
    atomic_write,
    is_git_lfs_pointer,
    open_array,
    write_array,
    write_csv,
    write_json,
)


def test_an_interrupted_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "new folder/report.json"
    write_json(path, {"name": "Zürich", "rows": [1, None]})
    before = path.read_text(encoding="utf-8")
    assert before == '{\n  "name": "Zürich",\n  "rows": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=r"runs: .*; a file exists where a folder is needed"):
        write_json(tmp_path / "runs/report.json", {})


def test_csv_texts_are_read_back_unchanged(tmp_path: Path) -> None:
    table = pd.DataFrame({"row": [0, 1], "text": ['a "b",\r c\n', "x\ry"]})
    write_csv(tmp_path / "rows.csv", table)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "rows.csv"), table)


def test_an_array_written_in_pieces_is_the_file_that_numpy_writes(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float16).reshape(5, 3, 4)
    with write_array(tmp_path / "pieces.npy") as append:
        append(array[:2])
        append(array[2:])
    np.save(tmp_path / "whole.npy", array)
    assert (tmp_path / "pieces.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    opened = open_array(tmp_path / "pieces.npy")
    assert isinstance(opened, np.memmap) and np.array_equal(opened, array)
    with write_array(tmp_path / "empty.npy"):
        pass
    assert open_array(tmp_path / "empty.npy").shape == (0,)


def test_an_array_of_any_memory_order_is_written_by_rows(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(12).reshape(4, 3))
    with write_array(tmp_path / "views.npy") as append:
        append(array)
    assert np.array_equal(open_array(tmp_path / "views.npy"), array)


def test_an_opened_array_cannot_change_its_file(tmp_path: Path) -> None:
    with write_array(tmp_path / "views.npy") as append:
        append(np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        open_array(tmp_path / "views.npy")[0] = 1


def test_files_of_one_stem_can_be_written_at_once(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.csv") as one, atomic_write(tmp_path / "a.json") as other:
        one.write_text("rows")
        other.write_text("report")
    assert (tmp_path / "a.csv").read_text() == "rows"
    assert (tmp_path / "a.json").read_text() == "report"


def test_rows_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    for other in (np.zeros((1, 4), np.uint8), np.zeros((1, 3), np.int8)):
        with pytest.raises(ValueError), write_array(tmp_path / "views.npy") as append:
            append(np.zeros((2, 3), np.uint8))
            append(other)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_damaged_array_is_named_with_what_to_run(tmp_path: Path) -> None:
    path = tmp_path / "views.npy"
    with pytest.raises(UserError, match=r"views.npy: no such file; .*dvc repro"):
        open_array(path)
    for content in (b"", b"junk", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"views.npy: not a complete .npy file .*make verify"):
            open_array(path)


@pytest.mark.parametrize("host", ["git-lfs", "hawser"])  # hawser: before version 1.0
def test_a_git_lfs_pointer_is_recognized(tmp_path: Path, host: str) -> None:
    pointer = f"version https://{host}.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    file = tmp_path / "a.jpg"
    file.write_text(pointer)
    assert is_git_lfs_pointer(file)
    assert is_git_lfs_pointer(pointer.encode())
    for content in (b"", b"version 1", b"\x89PNG" + pointer.encode(), b" " + pointer.encode()):
        file.write_bytes(content)
        assert not is_git_lfs_pointer(file)
    assert not is_git_lfs_pointer(tmp_path)
    assert not is_git_lfs_pointer(tmp_path / "missing")
