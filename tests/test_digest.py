"""A stage's digest changes with the code that the stage runs, and with nothing else."""

import ast
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import panollava
from panollava.errors import UserError
from panollava.provenance.code_digest import STAGES, digests, write_digests

FILES = {
    "__init__.py": "from panorama.shapes import Box as Crate\n",
    "shapes.py": '''
        """Shapes."""
        import math as maths
        UNIT, SCALE = 1.0, 2.0
        class Box:
            """A box."""
            def volume(self):
                return UNIT
        class Ball(Box):
            def volume(self):
                return maths.pi
        def unused():
            return 1
    ''',
    "losses.py": """
        from . import shapes
        def near(a, b):
            return abs(a - b) * shapes.SCALE
        def far(a, b):
            return -near(a, b)
    """,
    "registry.py": """
        KNOWN = {}
        def register(function):
            KNOWN[function.__name__] = function
            return function
        def find(name):
            return KNOWN[name]
    """,
    "encoder.py": """
        import json
        from panorama.losses import near
        from panorama.parts import deep
        def encode(x):
            # the stage's work
            return near(x, deep.middle(x))
    """,
    "resampler.py": """
        import panorama.losses as losses
        from panorama import registry
        @registry.register
        def mlp(x):
            return x
        def resample(x, losses=losses):
            import panorama.parts.deep
            def inner(shapes):
                return shapes.resample(panorama.parts.deep.lower(x))
            return inner(losses)
    """,
    "lazy.py": """
        def run(x):
            from panorama.losses import far as loss
            other = loss(x, 0)
            return other
        def other():
            from panorama import Crate
            return Crate()
    """,
    "picked.py": """
        from panorama import registry, resampler
        def pick(name, resampler):
            return registry.find(name)(resampler)
    """,
    "whole.py": """
        from panorama import losses
        def run(name):
            return getattr(losses, name)
    """,
    "front.py": """
        import panorama
        def run(name):
            return getattr(panorama, name)
    """,
    "parts/__init__.py": "",
    "parts/deep.py": """
        from ..shapes import Ball
        def middle(x):
            return x
        def lower(x):
            return Ball()
    """,
}
ENTRIES = {
    "encoder": ("panorama.encoder:encode",),
    "resampler": ("panorama.resampler:resample",),
    "lazy": ("panorama.lazy:run",),
    "crate": ("panorama.lazy:other",),
    "picked": ("panorama.picked:pick",),
    "whole": ("panorama.whole",),
    "front": ("panorama.front",),
    "both": ("panorama.encoder:encode", "panorama.lazy:run"),
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
    assert text.count(old) == 1, f"{old!r} in {path}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def changed(package: Path, change: Callable[[], object], stages: dict | None = None) -> set[str]:
    """Stages whose digest `change` changes."""
    before = digests(package, stages or ENTRIES)
    change()
    after = digests(package, stages or ENTRIES)
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        # A definition reaches the stages that name it, by whatever kind of import.
        ("encoder.py", "near(x, deep", "near(deep", "encoder both"),
        ("losses.py", "abs(a - b)", "abs(b - a)", "encoder resampler lazy whole both"),
        ("losses.py", "-near", "+near", "resampler lazy whole both"),
        ("parts/deep.py", "return x", "return -x", "encoder both"),
        ("parts/deep.py", "return Ball()", "return [Ball()]", "resampler"),
        ("shapes.py", "maths.pi", "maths.tau", "resampler"),
        ("shapes.py", "import math as maths", "import cmath as maths", "resampler"),
        ("shapes.py", "return UNIT", "return 0", "resampler crate front"),
        (
            "shapes.py",
            "UNIT, SCALE = 1.0",
            "UNIT, SCALE = 1",
            "encoder resampler lazy crate whole front both",
        ),
        ("shapes.py", "return 1", "return 2", ""),
        ("lazy.py", "return Crate()", "return Crate", "crate"),
        ("lazy.py", "far as loss", "near as loss", "lazy both"),
        ("__init__.py", "Box as Crate", "Ball as Crate", "crate front"),
        # What registers itself when it is imported belongs to whoever imports its module.
        ("resampler.py", "return x", "return -x", "resampler picked"),
        ("resampler.py", "return inner(losses)", "return inner(0)", "resampler"),
        ("registry.py", "return KNOWN[name]", "return KNOWN.get(name)", "picked"),
        ("registry.py", "return function", "return None", "resampler picked"),
        # Comments, docstrings and formatting say nothing to a computer.
        ("encoder.py", "# the stage's work", "# its work", ""),
        ("shapes.py", '"""Shapes."""', '"""All shapes."""', ""),
        ("shapes.py", '    """A box."""\n', "", ""),
        ("losses.py", "return -near(a, b)", "return (\n        -near(a,   b,)\n    )", ""),
        ("encoder.py", "import json\n", "", ""),
    ],
)
def test_an_edit_changes_the_stages_that_run_it(
    package: Path, file: str, old: str, new: str, stages: str
) -> None:
    assert changed(package, lambda: edit(package / file, old, new)) == set(stages.split())


def test_code_that_runs_on_import_counts_for_every_importer(package: Path) -> None:
    def change() -> None:
        path = package / "shapes.py"
        path.write_text(path.read_text(encoding="utf-8") + "\nprint(SCALE)\n", encoding="utf-8")

    # The package's own __init__ imports it, so everyone does.
    assert changed(package, change) == set(ENTRIES)


def test_a_new_module_changes_nothing_until_it_is_imported(package: Path) -> None:
    new = package / "new.py"
    assert changed(package, lambda: new.write_text("print(1)")) == set()

    def use() -> None:
        edit(package / "encoder.py", "return near", "from . import new\n    return near")

    assert changed(package, use) == {"encoder", "both"}
    assert changed(package, lambda: new.write_text("print(2)")) == {"encoder", "both"}


def test_a_base_class_that_registers_its_children_counts_for_every_importer(package: Path) -> None:
    assert changed(package, lambda: edit(package / "shapes.py", "maths.pi", "3")) == {"resampler"}
    edit(package / "shapes.py", "class Box:", "class Box:\n    def __init_subclass__(cls): ...")
    assert changed(package, lambda: edit(package / "shapes.py", "return 3", "return 4")) == set(
        ENTRIES
    )


def test_a_loop_of_imports_ends(package: Path) -> None:
    edit(package / "losses.py", "from . import shapes", "from . import encoder, shapes")
    edit(package / "losses.py", "return abs(", "return encoder.encode(a) or abs(")
    assert len(digests(package, ENTRIES)) == len(ENTRIES)


def test_the_file_changes_with_the_digest_and_shows_what_changed(
    package: Path, tmp_path: Path
) -> None:
    write_digests(tmp_path / "out", package, ENTRIES)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.stem for file in files] == sorted(ENTRIES)
    before = {file.stem: file.read_text(encoding="utf-8") for file in files}
    for stage, digest in digests(package, ENTRIES).items():
        assert before[stage].splitlines()[0] == f"{digest} {stage}"

    edit(package / "encoder.py", "# the stage's work", "")
    write_digests(tmp_path / "out", package, ENTRIES)
    assert {file.stem: file.read_text(encoding="utf-8") for file in files} == before

    edit(package / "losses.py", "-near", "+near")
    write_digests(tmp_path / "out", package, ENTRIES)
    after = (tmp_path / "out" / "lazy.txt").read_text(encoding="utf-8")
    different = set(after.splitlines()[1:]) - set(before["lazy"].splitlines()[1:])
    assert [line.split()[1] for line in different] == ["panorama.losses:far"]


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


@pytest.mark.parametrize(
    ("text", "message"),
    [("def broken(:", "encoder.py: not valid Python"), ("from panorama.losses import *", r"\*")],
)
def test_a_module_that_cannot_be_followed_is_named(package: Path, text: str, message: str) -> None:
    (package / "encoder.py").write_text(text)
    with pytest.raises(UserError, match=message):
        digests(package, ENTRIES)


@pytest.mark.parametrize("entry", ["panorama.nowhere", "panorama.losses:nothing"])
def test_an_entry_that_does_not_exist_is_named(package: Path, entry: str) -> None:
    with pytest.raises(UserError, match=entry):
        digests(package, {"stage": (entry,)})


PIPELINE = {stage: entries for stage, entries in STAGES.items() if not stage.startswith("demo-")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this project's package."""
    source = Path(panollava.__file__).parent
    return shutil.copytree(
        source, tmp_path / "panollava", ignore=shutil.ignore_patterns("__pycache__")
    )


def test_rewriting_the_project_without_comments_and_in_another_format_changes_nothing(
    project: Path,
) -> None:
    def rewrite() -> None:
        for path in project.rglob("*.py"):
            path.write_text(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))))

    assert changed(project, rewrite, dict(STAGES)) == set()


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("resampler", "resampler finetune evaluate"),
        ("overlap", "vision"),
        ("vicreg", "vision"),
        ("losses", "vision"),
        ("pictures", "prepare"),
        ("rows", "prepare"),
        ("generate", "evaluate"),
        ("captions", "evaluate"),
        ("autoregressive", "resampler finetune"),
        ("encoder", "vision resampler features finetune evaluate"),
        ("cli", ""),
    ],
)
def test_an_edit_of_the_project_reruns_exactly_these_stages(
    project: Path, module: str, stages: str
) -> None:
    """The edit is in every function and method of the module."""

    def change() -> None:
        path = project / f"{module}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body.append(ast.parse("assert 1 < 2").body[0])
        path.write_text(ast.unparse(tree))

    assert changed(project, change, PIPELINE) == set(stages.split())


def test_what_prepare_makes_of_the_settings_is_code_that_it_runs(project: Path) -> None:
    def change() -> None:
        edit(project / "prepare.py", "rolled_split=settings.evaluate.split", 'rolled_split="valid"')

    assert changed(project, change, PIPELINE) == {"prepare"}
