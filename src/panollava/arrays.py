"""Arrays on disk: .npy files, read memory-mapped, and written as they come."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panollava.errors import UserError
from panollava.files import whole


def open_array(path: Path) -> NDArray:
    """A memory-mapped .npy file. Raises UserError if it is missing or broken."""
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that makes it: dvc repro") from None
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path}: not a whole .npy file ({error}); remove it and run: "
            "make verify, then dvc repro"
        ) from None


@contextlib.contextmanager
def write_array(path: Path) -> Iterator[Callable[[NDArray], None]]:
    """A function that appends rows, (rows, ...), to the .npy file at `path`, which is there as a
    whole when the block ends well, and not at all otherwise. The first rows settle shape and type;
    without any the shape is (0,).

    Memory doesn't grow with the file. It is not memory-mapped, where a full disk would end the
    process without a word."""
    count, shape, dtype = 0, (), np.dtype(np.uint8)
    with whole(path) as beside, beside.open("wb") as file:

        def write_header() -> None:  # NumPy pads it to one length for every count
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)

        def append(rows: NDArray) -> None:
            nonlocal count, shape, dtype
            if count == 0:
                shape, dtype = rows.shape[1:], rows.dtype
                file.seek(0)
                write_header()
            if (rows.shape[1:], rows.dtype) != (shape, dtype):
                raise ValueError(f"rows of {shape}, {dtype}; got {rows.shape[1:]}, {rows.dtype}")
            file.write(np.ascontiguousarray(rows).data)
            count += len(rows)

        yield append
        file.seek(0)
        write_header()
