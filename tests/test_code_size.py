"""The code's size: lines of code, names, and chains of imports."""

import ast
from pathlib import Path

from code_size import count_lines, identifiers, longest_chain

SOURCE = '''"""Module docstring."""

import os  # counts


def double(own: int) -> int:
    """Docstring.

    More of it."""
    # A comment.
    text = """a string,

    not a docstring"""
    return (
        own.whole
    )
'''


def test_only_lines_with_code_are_counted() -> None:
    assert count_lines(SOURCE) == 7


def test_names_parameters_and_attributes_are_identifiers() -> None:
    names = identifiers(ast.parse(SOURCE))
    assert (names.count("own"), names.count("whole"), names.count("double")) == (2, 1, 1)


def test_the_longest_chain_follows_imports_outside_of_functions(tmp_path: Path) -> None:
    package = tmp_path / "panollava"
    (package / "inner").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "top": "from panollava import middle\nfrom panollava.inner import bottom\n",
        "middle": "import panollava.inner.bottom\n",
        "lazy": "def f():\n    from panollava import top\n",
        "inner/__init__": "",
        "inner/bottom": "import os\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    assert longest_chain(tmp_path) == [
        "panollava.top",
        "panollava.middle",
        "panollava.inner.bottom",
    ]
