"""The size of the code and of the READMEs, for one checkout or several side by side.

    python benchmarks/code_size.py                 this checkout
    python benchmarks/code_size.py OLD NEW         two others

A line of code is one with code on it: no blank line, comment or docstring."""

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
PACKAGE = "panollava"
VAGUE_NAMES = ("own", "told", "whole", "beside", "alone")
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT])
    parser.add_argument("--chain", action="store_true", help="print the longest chain of imports")
    options = parser.parse_args()
    columns = [measure_checkout(checkout) for checkout in options.checkouts]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    headers = ["", *(str(checkout.resolve()) for checkout in options.checkouts)]
    sys.stdout.write(tabulate(rows, headers, tablefmt="plain", intfmt=",") + "\n")
    if options.chain:
        for checkout in options.checkouts:
            sys.stdout.write(" -> ".join(longest_chain(checkout / "src")) + "\n")


def measure_checkout(checkout: Path) -> dict[str, int | None]:
    src = checkout / "src"
    files = sorted(src.rglob("*.py"))
    modules = [file for file in files if file.name != "__init__.py"]
    names = Counter(name for file in files for name in identifiers(ast.parse(file.read_text())))
    return {
        "lines of code in src": sum(count_lines(file.read_text()) for file in files),
        "most lines of code in a module": max(count_lines(file.read_text()) for file in modules),
        "modules": len(modules),
        "packages": len(files) - len(modules),
        "longest chain of imports": len(longest_chain(src)),
        "words in README.md": count_words(checkout / "README.md"),
        "words in README.ko.md": count_words(checkout / "README.ko.md"),
        **{f"uses of '{name}'": names[name] for name in VAGUE_NAMES},
    }


def count_lines(source: str) -> int:
    """Lines with code, without docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node, clean=False) is not None and first is not None:
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    text = source.splitlines()
    return sum(1 for line in lines if text[line - 1].strip())


def count_words(file: Path) -> int | None:
    return len(file.read_text(encoding="utf-8").split()) if file.is_file() else None


def identifiers(tree: ast.AST) -> list[str]:
    """Names, attributes, parameters, functions and classes, each time that they occur."""
    names = []
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                names.append(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
    return names


def longest_chain(src: Path) -> list[str]:
    """Modules of which each imports the next one when it is imported itself."""
    files = {_module_name(src, file): file for file in src.rglob("*.py")}

    @cache
    def chain(module: str) -> list[str]:
        imported = _imports(ast.parse(files[module].read_text())) & files.keys() - {module}
        return [module, *max(map(chain, sorted(imported)), key=len, default=[])]

    return max(map(chain, sorted(files)), key=len)


def _module_name(src: Path, file: Path) -> str:
    parts = file.relative_to(src).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module) -> set[str]:
    """What may be modules in the imports outside of functions and `if TYPE_CHECKING`."""
    names: set[str] = set()
    pending: list[ast.AST] = [*tree.body]
    while pending:
        match pending.pop():
            case ast.Import(names=aliases):
                names.update(alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module), names=aliases) if module != PACKAGE:
                names |= {module, *(f"{module}.{alias.name}" for alias in aliases)}
            case ast.ImportFrom(names=aliases):  # the package itself is imported by everything
                names |= {f"{PACKAGE}.{alias.name}" for alias in aliases}
            case ast.FunctionDef() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case node:
                pending += ast.iter_child_nodes(node)
    return names


if __name__ == "__main__":
    main()
