"""A digest of each pipeline stage's code, so that DVC reruns a stage when its code changes.

The digest covers every module of the package that the stage's entry modules import, directly or
indirectly. Comments, docstrings and formatting do not count. Imports by a string cannot be
followed: list such modules in `ENTRY_MODULES`."""

import ast
import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from panollava.errors import UserError
from panollava.files import write_text
from panollava.stages import STAGES

Entries = Mapping[str, tuple[str, ...]]  # modules by pipeline stage

PACKAGE = Path(__file__).parents[1]
ENTRY_MODULES: Entries = {
    "prepare": ("panollava.data.prepare", "panollava.data.sampled_views"),
    **{name: ("panollava.training.train", stage.objective) for name, stage in STAGES.items()},
    "features": ("panollava.training.features",),
    "evaluate": ("panollava.evaluation.evaluate", "panollava.demo.facts"),
    "report": ("panollava.serving.report",),
    "demo-scenes": ("panollava.demo.dataset",),
    "demo-encoder": ("panollava.demo.encoder",),
    "demo-language-model": ("panollava.demo.language_model",),
}


def write_digests(out: Path, package: Path = PACKAGE, entries: Entries = ENTRY_MODULES) -> None:
    """Write the text of each stage to `out`/<stage>.txt."""
    for stage, text in digests(package, entries).items():
        write_text(out / f"{stage}.txt", text)


def digest(stage: str) -> str:
    """The text of one stage, see `digests`."""
    return digests(PACKAGE, {stage: ENTRY_MODULES[stage]})[stage]


def digests(package: Path = PACKAGE, entries: Entries = ENTRY_MODULES) -> dict[str, str]:
    """For each stage, a text: the SHA-256 of its code, then one line per module with the module's
    hash, so that a diff names the modules that changed. `package`: the folder of the package.

    Raises:
        UserError: a module is not valid Python, or an entry module does not exist.
    """
    modules = _Modules(package)
    texts = {}
    for stage, names in entries.items():
        reached = sorted(_imported_by(names, modules))
        lines = "".join(f"{modules.read(name).hash[:16]} {name}\n" for name in reached)
        texts[stage] = f"{_sha256(lines)} {stage}\n{lines}"
    return texts


class _Module(NamedTuple):
    hash: str
    imports: set[str]  # dotted names, also of functions and of other packages


class _Modules:
    """The modules of a package by their dotted names, each read when it is first asked for."""

    def __init__(self, package: Path) -> None:
        self.places: dict[str, tuple[Path, str]] = {}  # file and package
        for file in package.rglob("*.py"):
            *parents, name = file.relative_to(package.parent).with_suffix("").parts
            dotted = ".".join(parents if name == "__init__" else [*parents, name])
            self.places[dotted] = file, ".".join(parents)
        self.read = cache(lambda name: _read_module(*self.places[name]))


def _read_module(file: Path, package: str) -> _Module:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file}: not valid Python ({error}); correct it") from None
    tree = _RemoveUnexecuted().visit(tree)
    imports = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # An imported name may be a submodule.
            imports |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        for name, value in list(ast.iter_fields(node)):
            if value == []:  # newer versions of Python have more empty fields, or print them
                delattr(node, name)
    return _Module(_sha256(ast.dump(tree)), imports)


def _imported_by(entries: tuple[str, ...], modules: _Modules) -> set[str]:
    """The entry modules and all that they import, directly or indirectly, inside the package."""
    for name in entries:
        if name not in modules.places:
            raise UserError(f"no module {name}; correct ENTRY_MODULES in {Path(__file__).name}")
    reached: set[str] = set()
    pending = set(entries)
    while pending:
        name = pending.pop()
        if name in modules.places and name not in reached:
            reached.add(name)
            # Importing a module runs the __init__ of its packages first.
            pending |= {*modules.read(name).imports, name.rpartition(".")[0]}
    return reached


class _RemoveUnexecuted(ast.NodeTransformer):
    """Removes docstrings, and what only a type checker reads."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        type_checking = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        return node.orelse if type_checking else node


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
