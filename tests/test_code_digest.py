"""A stage's code digest changes with the modules that the stage imports, and with nothing else."""

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import panollava
from helpers import CODE_EDITS, PIPELINE
from panollava.errors import UserError
from panollava.provenance.code_digest import digests, write_digests

FILES = {
    "__init__.py": "",
    "shapes.py": '''
        """Shapes."""
        class Box:
            """A box."""
            def volume(self, unit=1.0):
                # of one unit
                return unit
    ''',
    "losses.py": """
        from . import shapes
        def near(a, b):
            return abs(a - b) * shapes.Box().volume()
    """,
    "encoder.py": """
        from typing import TYPE_CHECKING
        from panorama.losses import near
        if TYPE_CHECKING:
            from panorama.resampler import resample
        def encode(x):
            return near(x, 0)
    """,
    "resampler.py": """
        import panorama.parts.deep
        def resample(x):
            return panorama.parts.deep.middle(x)
    """,
    "lazy.py": """
        import json
        def run(x):
            from panorama.parts import deep
            return json.dumps(deep.middle(x))
    """,
    "parts/__init__.py": "LAYERS = 2",
    "parts/deep.py": """
        def middle(x):
            from ..shapes import Box
            return Box()
    """,
}
ENTRIES = {
    "encoder": ("panorama.encoder",),
    "resampler": ("panorama.resampler",),
    "lazy": ("panorama.lazy",),
    "both": ("panorama.encoder", "panorama.lazy"),
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "panorama" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return tmp_path / "panorama"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} in {path}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def changed(package: Path, change: Callable[[], object], entries: dict = ENTRIES) -> set[str]:
    """Stages whose digest `change` changes."""
    before = digests(package, entries)
    change()
    after = digests(package, entries)
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("encoder.py", "near(x, 0)", "near(x, 1)", "encoder both"),
        ("losses.py", "abs(a - b)", "abs(b - a)", "encoder both"),
        ("shapes.py", "return unit", "return -unit", "encoder resampler lazy both"),
        ("resampler.py", "middle(x)", "middle(-x)", "resampler"),
        # An import in a function, of a submodule, with its package's __init__.
        ("parts/deep.py", "return Box()", "return Box", "resampler lazy both"),
        ("parts/__init__.py", "2", "3", "resampler lazy both"),
        ("__init__.py", "", "print()", "encoder resampler lazy both"),
        # What a program does not see.
        ("shapes.py", "# of one unit", "# 1", ""),
        ("shapes.py", '"""Shapes."""', '"""All shapes."""', ""),
        ("shapes.py", '    """A box."""\n', "", ""),
        ("shapes.py", "return unit", "return (\n            unit\n        )", ""),
        ("encoder.py", "import resample", "import resample as other", ""),
        # A constant that is an expression's value is code.
        ("shapes.py", "unit=1.0", "unit=1", "encoder resampler lazy both"),
        ("lazy.py", "import json", "import json as other", "lazy both"),
    ],
)
def test_an_edit_changes_the_stages_that_import_the_module(
    package: Path, file: str, old: str, new: str, stages: str
) -> None:
    assert changed(package, lambda: edit(package / file, old, new)) == set(stages.split())


def test_an_import_for_the_type_checker_does_not_count_but_its_else_does(package: Path) -> None:
    def use() -> None:
        edit(package / "encoder.py", "def encode", "else:\n    from . import lazy\ndef encode")

    assert changed(package, use) == {"encoder", "both"}
    change = lambda: edit(package / "parts/__init__.py", "2", "3")  # noqa: E731
    assert changed(package, change) == set(ENTRIES)


def test_a_new_module_changes_nothing_until_it_is_imported(package: Path) -> None:
    new = package / "new.py"
    assert changed(package, lambda: new.write_text("print(1)")) == set()

    def use() -> None:
        edit(package / "encoder.py", "return near", "from . import new\n    return near")

    assert changed(package, use) == {"encoder", "both"}
    assert changed(package, lambda: new.write_text("print(2)")) == {"encoder", "both"}


def test_circular_imports_end(package: Path) -> None:
    edit(package / "losses.py", "from . import shapes", "from . import encoder, shapes")
    assert len(digests(package, ENTRIES)) == len(ENTRIES)


def test_the_file_starts_with_the_digest_and_shows_which_module_changed(
    package: Path, tmp_path: Path
) -> None:
    write_digests(tmp_path / "out", package, ENTRIES)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.stem for file in files] == sorted(ENTRIES)
    before = {file.stem: file.read_text(encoding="utf-8") for file in files}
    assert before == digests(package, ENTRIES)
    for stage, text in before.items():
        assert re.match(rf"[0-9a-f]{{64}} {stage}\n", text)

    edit(package / "shapes.py", "# of one unit", "")
    write_digests(tmp_path / "out", package, ENTRIES)
    assert {file.stem: file.read_text(encoding="utf-8") for file in files} == before

    edit(package / "losses.py", "a - b", "a + b")
    write_digests(tmp_path / "out", package, ENTRIES)
    after = (tmp_path / "out" / "encoder.txt").read_text(encoding="utf-8")
    different = set(after.splitlines()[1:]) - set(before["encoder"].splitlines()[1:])
    assert [line.split()[1] for line in different] == ["panorama.losses"]


def test_the_folder_and_the_order_of_hashing_do_not_matter(package: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(package, tmp_path / "elsewhere" / "panorama")
    source = Path(panollava.__file__).parents[1]
    program = f"""
import sys; sys.path.insert(0, {str(source)!r})
from pathlib import Path
from panollava.provenance.code_digest import digests
print(digests(Path({str(copy)!r}), {ENTRIES!r}))
"""
    for seed in ("0", "1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed},
            check=True,
        )
        assert ast.literal_eval(result.stdout) == digests(package, ENTRIES)


def test_fields_of_the_syntax_tree_that_only_newer_pythons_have_do_not_matter(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `type_params` of functions and classes, which is empty in most of them."""

    def parse_with_more_fields(*arguments: Any, **options: Any) -> ast.Module:
        tree = parse(*arguments, **options)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                node.newer = []  # type: ignore[union-attr]
        return tree

    def add_fields() -> None:
        monkeypatch.setattr(ast, "parse", parse_with_more_fields)
        for node in (ast.FunctionDef, ast.ClassDef):
            monkeypatch.setattr(node, "_fields", (*node._fields, "newer", "newest"))
            monkeypatch.setattr(node, "newest", None, raising=False)

    parse = ast.parse

    assert changed(package, add_fields) == set()


def test_a_module_that_is_not_python_is_named(package: Path) -> None:
    (package / "encoder.py").write_text("def broken(:")
    with pytest.raises(UserError, match=r"encoder\.py: not valid Python"):
        digests(package, ENTRIES)


def test_an_entry_module_that_does_not_exist_is_named(package: Path) -> None:
    with pytest.raises(UserError, match=r"no module panorama\.nowhere"):
        digests(package, {"stage": ("panorama.nowhere",)})


PROJECT = Path(panollava.__file__).parent


@pytest.fixture(scope="module")
def listings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each stage of this project, the words of its file: digest, stage, hash, module, ..."""
    folder = tmp_path_factory.mktemp("digest")
    write_digests(folder, PROJECT)
    return {file.stem: file.read_text(encoding="utf-8").split() for file in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of this project's package."""
    ignore = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(PROJECT, tmp_path / "panollava", ignore=ignore)


def differing(source: Path, listings: dict[str, list[str]]) -> set[str]:
    """Stages whose digest in the copy is not the project's."""
    after = digests(source)
    return {stage for stage, words in listings.items() if words[0] != after[stage].split()[0]}


def test_rewriting_the_project_in_another_format_and_without_comments_changes_nothing(
    source: Path, listings: dict[str, list[str]]
) -> None:
    for path in source.rglob("*.py"):
        path.write_text(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))))
    assert differing(source, listings) == set()


@pytest.mark.parametrize("name", CODE_EDITS)
def test_an_edit_of_the_project_changes_these_digests(
    source: Path, listings: dict[str, list[str]], name: str
) -> None:
    """The edits that test_pipeline.py makes under DVC."""
    code = CODE_EDITS[name]
    edit(source / code.file, code.old, code.new)
    assert differing(source, listings) & set(PIPELINE) == code.digests
    assert code.digests <= code.reruns


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("data.images", "prepare evaluate report demo-scenes"),
        ("data.rows", "prepare report"),
        ("data.dialogue", "resampler finetune evaluate report demo-language-model"),
        ("geometry.overlap", "vision"),
        ("training.vicreg_objective", "vision"),
        ("training.losses", "vision"),
        ("training.answer_objective", "resampler finetune"),
        ("model.encoder", "vision resampler features finetune evaluate report demo-language-model"),
        *(
            (module, "resampler features finetune evaluate report demo-encoder demo-language-model")
            for module in ("model.resampler", "geometry.token_sphere")
        ),
        *(
            (module, "resampler finetune evaluate report demo-language-model")
            for module in ("model.network", "model.perceiver")
        ),
        ("model.generate", "evaluate report demo-language-model"),
        ("evaluation.captions", "evaluate"),
        ("serving.gallery", "report"),
        ("demo.facts", "evaluate"),
        ("provenance.resume", "vision resampler finetune"),
        ("logs", ""),
        ("cli.main", ""),
        ("planning.plan", ""),
    ],
)
def test_a_module_counts_for_these_stages(
    listings: dict[str, list[str]], module: str, stages: str
) -> None:
    assert (PROJECT / f"{module.replace('.', '/')}.py").is_file()
    reached = {stage for stage in listings if f"panollava.{module}" in listings[stage]}
    assert reached == set(stages.split())
