"""A digest of the code that each stage of the pipeline runs, so that a stage is run again when
that code changes, and only then.

The imports are followed inside the package, from a stage's entry points and from definition to
definition: a module's function counts only where reached code names it. Comments, docstrings and
formatting don't count. Not seen is what no name in the code leads to: modules imported by a
string (give them as entry points), attributes of a module looked up in another way than by
`module.name`, `getattr` or `vars`, what only its docstring says, and files that aren't Python."""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from panollava.errors import UserError

_TRAIN = "panollava.training.train:train"
# Entry points, as `module` or `module:definition`. The training stages share one, and import
# their objectives by a string.
STAGES: Mapping[str, tuple[str, ...]] = {
    "prepare": ("panollava.data.prepare:prepare_project",),
    "vision": (_TRAIN, "panollava.training.vicreg_objective:Objective"),
    "resampler": (
        "panollava.training.train:train",
        "panollava.training.answer_objective:Objective",
    ),
    "features": ("panollava.training.features:write_features",),
    "finetune": (_TRAIN, "panollava.training.answer_objective:Objective"),
    "evaluate": ("panollava.evaluation.evaluate:evaluate", "panollava.demo.facts:READER"),
    "demo-scenes": ("panollava.demo.dataset:make_scenes",),
    "demo-encoder": ("panollava.demo.encoder:make_encoder",),
    "demo-language-model": ("panollava.demo.language_model:make_language_model",),
}
_ALL = "*"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (*_DEFINITIONS, *_COMPREHENSIONS, ast.Lambda)

Use = tuple[str, ...]  # ("views", "layout") for `views.layout`
Import = tuple[str, str | None]  # module, and the name taken from it; None: the module itself


def digests(package: Path, stages: Mapping[str, tuple[str, ...]] = STAGES) -> dict[str, str]:
    """SHA-256 of each stage's code. `package`: the folder of the package, such as src/panollava.

    Raises:
        UserError: a module that isn't Python, or an entry point that isn't there.
    """
    modules = _read(package)
    return {stage: _hash(_text(modules, entries)) for stage, entries in stages.items()}


def write_digests(
    out: Path,
    package: Path = Path(__file__).parents[1],
    stages: Mapping[str, tuple[str, ...]] = STAGES,
) -> None:
    """Write `out`/<stage>.txt: the stage's digest, and a line with the hash of each definition
    below it, so that comparing two such files shows what has changed."""
    modules = _read(package)
    out.mkdir(parents=True, exist_ok=True)
    for stage, entries in stages.items():
        text = _text(modules, entries)
        (out / f"{stage}.txt").write_text(f"{_hash(text)} {stage}\n{text}", encoding="utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _text(modules: "dict[str, _Module]", entries: tuple[str, ...]) -> str:
    reached = _Reached(modules)
    for entry in entries:
        module, _, name = entry.partition(":")
        if module not in modules or (name and name not in modules[module].definitions):
            raise UserError(f"the table of stages in digest.py names {entry}, which doesn't exist")
        reached.definition(module, name or _ALL)
    lines = {label: "\n".join(texts) for label, texts in reached.code.items()}
    return "".join(f"{_hash(lines[label])[:16]} {label}\n" for label in sorted(lines))


@dataclass
class _Module:
    """The top level of a module: what it defines, and what runs when it is imported."""

    name: str
    is_package: bool
    imports: dict[str, Import] = field(default_factory=dict)
    loads: set[str] = field(default_factory=set)
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    on_import: list[ast.stmt] = field(default_factory=list)


def _read(package: Path) -> dict[str, _Module]:
    trees = {path: _parse(path) for path in sorted(package.rglob("*.py"))}
    nodes = (node for tree in trees.values() for node in ast.walk(tree))
    bases_act = any(getattr(node, "name", None) == "__init_subclass__" for node in nodes)
    modules = {}
    for path, tree in trees.items():
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        module = _Module(".".join(parts[:-1] if is_package else parts), is_package)
        if "*" in _imports(tree, module)[0]:
            raise UserError(f"{path}: `import *` can't be followed; name what is imported")
        for statement in tree.body:
            if not isinstance(statement, _DEFINITIONS):
                imports, loads = _imports(statement, module)
                module.imports |= imports
                module.loads |= loads
        own = {name for name, (source, _) in module.imports.items() if _in(package.name, source)}
        own |= {name for statement in tree.body for name in _defined(statement)}
        for statement in tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            for name in _defined(statement):
                module.definitions.setdefault(name, []).append(statement)
            if _acts_on_import(statement, own, bases_act):
                module.on_import.append(statement)
        modules[module.name] = module
    return modules


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not valid Python: {error}") from None


def _in(package: str, module: str) -> bool:
    return module == package or module.startswith(package + ".")


def _imports(node: ast.AST, module: _Module) -> tuple[dict[str, Import], set[str]]:
    """Names that the imports in `node` bind, and the modules that they load."""
    bound: dict[str, Import] = {}
    loads = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                loads.add(alias.name)
                if alias.asname:
                    bound[alias.asname] = (alias.name, None)
                else:
                    bound[alias.name.split(".")[0]] = (alias.name.split(".")[0], None)
        elif isinstance(child, ast.ImportFrom):
            source = child.module or ""
            if child.level:
                up = child.level - module.is_package
                base = module.name.rsplit(".", up)[0] if up else module.name
                source = f"{base}.{source}" if source else base
            for alias in child.names:
                loads |= {source, f"{source}.{alias.name}"}
                bound[alias.asname or alias.name] = (source, alias.name)
    return bound, loads


def _defined(statement: ast.stmt) -> set[str]:
    """Names that a statement of the top level binds, other than by an import."""
    return {statement.name} if isinstance(statement, _DEFINITIONS) else _stored([statement])


def _acts_on_import(statement: ast.stmt, own: set[str], bases_act: bool) -> bool:
    """Whether importing the module may have an effect through this statement, on something else
    than the names it defines: it is no plain definition, or calls something of the package
    (`own` names) when it is defined, as a decorator or a base class that registers does.
    `bases_act`: whether there are such base classes."""
    run: list[ast.AST]
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            defaults = [*statement.args.defaults, *filter(None, statement.args.kw_defaults)]
            run = [*statement.decorator_list, *_calls(defaults)]
        case ast.ClassDef():
            head = [*statement.keywords, *statement.decorator_list]
            head += statement.bases if bases_act else []
            body = [node for node in _own_scope(statement.body) if isinstance(node, ast.Call)]
            run = [*head, *body]
        case ast.Assign() if all(map(_is_name, statement.targets)):
            run = _calls([statement.value])
        case ast.AnnAssign(target=ast.Name()):
            run = _calls([statement.value] if statement.value else [])
        case ast.Expr(value=ast.Constant()):
            return False
        case _:
            return True
    if any(name.startswith("__") for name in _defined(statement)):
        return True
    names = (child for part in run for child in ast.walk(part) if isinstance(child, ast.Name))
    return any(name.id in own for name in names)


def _is_name(target: ast.expr) -> bool:
    """A name, or several in brackets."""
    several = isinstance(target, ast.Tuple | ast.List) and all(map(_is_name, target.elts))
    return several or isinstance(target, ast.Name)


def _calls(nodes: list[ast.expr]) -> list[ast.AST]:
    return [child for node in nodes for child in ast.walk(node) if isinstance(child, ast.Call)]


def _own_scope(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Nodes that run in the scope of `body` itself; of the scopes inside it, the node alone."""
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, _SCOPES):
            todo.extend(ast.iter_child_nodes(node))


def _stored(body: list[ast.stmt]) -> set[str]:
    """Names that `body` binds in its own scope, other than by an import."""
    names = set()
    for node in _own_scope(body):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, _DEFINITIONS) or (isinstance(node, ast.ExceptHandler) and node.name):
            names.add(str(node.name))
    return names


class _Uses(ast.NodeVisitor):
    """Collects the names that a statement takes from outside, with the attributes asked of them.
    Where it can't tell (comprehensions, class bodies), it collects too many."""

    def __init__(self) -> None:
        self.found: set[Use] = set()
        self._hidden: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        self._add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        attributes: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            attributes.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            self._add(inner.id, *attributes)
        else:
            self.visit(inner)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        body: list[ast.stmt] = [ast.Expr(node.body)] if isinstance(node, ast.Lambda) else node.body
        head = [] if isinstance(node, ast.Lambda) else [*node.decorator_list, node.returns]
        for part in filter(None, [node.args, *head]):
            self.visit(part)
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters += filter(None, [node.args.vararg, node.args.kwarg])
        outer = self._hidden
        self._hidden = outer | {parameter.arg for parameter in parameters} | _stored(body)
        for inner in _own_scope(body):
            if isinstance(inner, ast.Global):
                self._hidden -= set(inner.names)
            elif isinstance(inner, ast.Import | ast.ImportFrom):
                names = (alias.asname or alias.name.split(".")[0] for alias in inner.names)
                self._hidden -= set(names)
        for statement in body:
            self.visit(statement)
        self._hidden = outer

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def _add(self, *use: str) -> None:
        if use[0] not in self._hidden:
            self.found.add(use)


class _Reached:
    """Follows definitions and imports; `code` holds what was reached, by `module:name`."""

    def __init__(self, modules: dict[str, _Module]) -> None:
        self.modules = modules
        self.code: dict[str, list[str]] = {}
        self._seen: set[tuple[str, str]] = set()

    def load(self, name: str) -> None:
        """What runs when `name` is imported: its packages, itself, and what these import."""
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = self.modules.get(".".join(parts[:end]))
            if module is None or self._is_seen(module.name, "when imported"):
                continue
            for statement in module.on_import:
                self._statement(module, "when imported", statement)
            for loaded in sorted(module.loads):
                self.load(loaded)

    def definition(self, name: str, wanted: str) -> None:
        """Definition `wanted` of module `name`, or all of them."""
        self.load(name)
        if self._is_seen(name, wanted):
            return
        module = self.modules[name]
        if wanted == _ALL:
            exported = module.imports if module.is_package else {}
            for each in sorted(module.definitions.keys() | exported.keys()):
                self.definition(name, each)
            return
        for statement in module.definitions.get(wanted, []):
            self._statement(module, wanted, statement)
        if wanted in module.imports:
            self._import(module.imports[wanted], [])
        elif wanted not in module.definitions and not wanted.startswith("__"):
            self.definition(name, _ALL)  # it comes about in a way that isn't understood here

    def _statement(self, module: _Module, label: str, statement: ast.stmt) -> None:
        self.code.setdefault(f"{module.name}:{label}", []).append(_canonical(statement))
        local, loads = _imports(statement, module)
        for loaded in sorted(loads):
            self.load(loaded)
        uses = _Uses()
        uses.visit(statement)
        for name, *attributes in sorted(uses.found):
            for imported in filter(None, [local.get(name), module.imports.get(name)]):
                self.code[f"{module.name}:{name} (import)"] = [str(imported)]
                self._import(imported, attributes)
            if name in module.definitions:
                self.definition(module.name, name)

    def _import(self, imported: Import, attributes: list[str]) -> None:
        source, name = imported
        path = [*source.split("."), *([name] if name else []), *attributes]
        module = path.pop(0)
        if module not in self.modules:
            return
        while path and path[0] not in self.modules[module].definitions:
            if f"{module}.{path[0]}" not in self.modules:
                break
            module = f"{module}.{path.pop(0)}"
        self.definition(module, path[0] if path else _ALL)

    def _is_seen(self, module: str, name: str) -> bool:
        seen = (module, name) in self._seen
        self._seen.add((module, name))
        return seen


def _canonical(node: object) -> str:
    """A statement as text, the same for every way to write it: without comments, positions,
    docstrings and other statements that do nothing."""
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, list):
        return f"[{', '.join(_canonical(item) for item in node if not _does_nothing(item))}]"
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={_canonical(value)}"
            for name, value in ast.iter_fields(node)
            # What is empty is left out: some versions of Python have more optional fields.
            if value is not None and value != [] and not isinstance(value, ast.expr_context)
        )
        return f"{type(node).__name__}({', '.join(fields)})"
    return repr(node)


def _does_nothing(item: object) -> bool:
    constant = isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
    return constant or isinstance(item, ast.Pass)
