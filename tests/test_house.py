"""The house stands as designed: floors, arrows, names and sizes, read from the syntax trees of src/luthier.

Each rule is a function from a house (module name -> its tree) to the lines that break it, so that the same rule is
held against our own files and against a small house that breaks it. Imports inside functions and under TYPE_CHECKING
count like any other. The front door, luthier/__init__.py, stands above all floors and offers names lazily.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from luthier.adapters.inject import ADAPTERS
from luthier.recipe.adapters import ADAPTER_SETTINGS

ROOT = Path(__file__).parents[1]

FLOORS = (
    *("cli", "serve", "pipeline", "training", "evaluate", "rollout", "models"),
    *("adapters", "data", "quant", "objectives", "kernels", "recipe", "errors", "files", "shortage"),
)

# The loop takes its objective as a callable, yet what the callable returns must have a type that both sides know.
LOSS_TYPE = "luthier.objectives.loss"

# Imports inside a function, outside cli/: what an optional extra brings, in the one module that serves it.
EXTRAS_IMPORTED_LATE = {
    ("luthier.rollout.numbers", "math_verify"),
    ("luthier.rollout.rules", "jsonschema"),
    ("luthier.rollout.rules", "referencing"),
    *(("luthier.training.trackers", name) for name in ("alembic", "mlflow", "sqlalchemy", "trackio", "wandb")),
    ("luthier.training.trackers", "torch.utils.tensorboard"),
}

DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "huggingface_hub": "huggingface-hub",
    "mlflow": "mlflow-skinny",
}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


@dataclass(frozen=True)
class Import:
    """One imported name: `name` is empty for `import target`; `late` means inside a function."""

    target: str
    name: str
    line: int
    late: bool

    @property
    def ours(self) -> bool:
        return self.target.split(".")[0] == "luthier"


@dataclass(frozen=True)
class Module:
    name: str
    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def floor(self) -> str:
        """The folder below luthier/, or the file's own name; cli for __main__, empty for the front door."""
        parts = self.name.split(".")
        return "" if len(parts) == 1 else parts[1].replace("__main__", "cli")

    def at(self, line: int, message: str) -> str:
        quoted = self.text.splitlines()[line - 1].strip() if self.text else ""
        return f"{self.path}:{line}: {message}: {quoted}"

    @cached_property
    def exported(self) -> list[str] | None:
        """What `__all__` lists, or None where there is no such list."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return list(ast.literal_eval(node.value))
        return None

    @cached_property
    def defined(self) -> set[str]:
        return {name for node in self.tree.body for name in names_defined(node)}

    @cached_property
    def imported(self) -> set[str]:
        imports = (node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        return {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}


House = dict[str, Module]
Rule = Callable[[House], list[str]]


def names_defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement at a module's top binds, those of imports apart."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        leaves = (leaf for leaf in ast.walk(node) if isinstance(leaf, ast.Name))
        yield from (leaf.id for leaf in leaves if isinstance(leaf.ctx, ast.Store))
    elif isinstance(node, ast.If | ast.Try):
        inner = (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
        yield from (name for child in inner for name in names_defined(child))


def house_of(files: dict[str, str]) -> House:
    """A house from texts by path, the path as below src/."""
    modules = {}
    for path, text in files.items():
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        modules[name] = Module(name, path, text)
    return modules


def our_files(*folders: str) -> dict[str, str]:
    """Our Python files below these folders of the repository, by path."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def walk(node: ast.AST, *, late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether it lies inside a function."""
    for child in ast.iter_child_nodes(node):
        yield child, late
        yield from walk(child, late=late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def imports_of(module: Module, house: House) -> Iterator[Import]:
    for node, late in walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                name, target = ("", inner) if inner in house else (alias.name, source)
                yield Import(target, name, node.lineno, late)


def absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    folder = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*folder, *([node.module] if node.module else [])])


def our_imports(house: House) -> Iterator[tuple[Module, Import]]:
    """Imports of our own modules; the version at the front door is no floor's and free to all."""
    for module in house.values():
        for found in imports_of(module, house):
            if found.ours and (found.target, found.name) != ("luthier", "__version__"):
                yield module, found


def imports_from_above(house: House) -> list[str]:
    """A file imports only from its own folder or from floors below."""
    lines = [f"{m.path}:1: stands on no floor of the design" for m in house.values() if m.floor not in ("", *FLOORS)]
    for module, found in our_imports(house):
        below = found.target.split(".")[1:2]
        allowed = FLOORS[FLOORS.index(module.floor) :] if module.floor in FLOORS else FLOORS
        if not below or below[0] not in allowed:
            lines.append(module.at(found.line, f"{module.floor or 'the front door'} imports from above"))
    return lines


def forbidden_arrows(house: House) -> list[str]:
    """training -> objectives (but for the type of a loss), adapters -> quant, objectives -> ours, recipe -> torch."""
    lines = []
    for module in house.values():
        for found in imports_of(module, house):
            to_floor = found.target.split(".")[1] if found.ours and "." in found.target else ""
            arrow = (module.floor, to_floor or found.target.split(".")[0])
            forbidden = arrow in {("adapters", "quant"), ("recipe", "torch"), ("recipe", "transformers")}
            forbidden |= arrow == ("training", "objectives") and found.target != LOSS_TYPE
            forbidden |= module.floor == "objectives" and found.ours and to_floor != "objectives"
            if forbidden:
                lines.append(module.at(found.line, " -> ".join(arrow) + " is forbidden"))
    return lines


def import_cycles(house: House) -> list[str]:
    """No module imports itself by way of others."""
    graph: dict[str, set[str]] = {name: set() for name in house}
    for module, found in our_imports(house):
        graph[module.name].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["a cycle: " + " <- ".join(error.args[1])]
    return []


def late_imports(house: House) -> list[str]:
    """Only cli/ imports inside functions, by statement or by name."""
    lines = []
    for module in house.values():
        if module.floor == "cli":
            continue
        late = [i for i in imports_of(module, house) if i.late and (module.name, i.target) not in EXTRAS_IMPORTED_LATE]
        lines += [module.at(found.line, "an import inside a function") for found in late]
        if module.floor:
            named = (node for node in ast.walk(module.tree) if isinstance(node, ast.Call))
            called = [node for node in named if re.search(r"(^|\.)(import_module|__import__)$", ast.unparse(node.func))]
            lines += [module.at(node.lineno, "an import by name") for node in called]
    return lines


def undocumented_modules(house: House) -> list[str]:
    """Every module says what happens in it."""
    return [f"{m.path}:1: has no docstring" for m in house.values() if not ast.get_docstring(m.tree)]


def incomplete_exports(house: House) -> list[str]:
    """A module with public names has `__all__`; it lists what other modules import, and nothing that is not there."""
    lines = []
    for module in house.values():
        public = module.defined | (module.imported if module.is_package else set())
        if module.exported is None and any(not name.startswith("_") for name in public):
            lines.append(f"{module.path}:1: has no __all__")
        missing = set(module.exported or ()) - module.defined - module.imported
        if missing and module.floor:
            lines.append(f"{module.path}:1: __all__ lists what is not there: {', '.join(sorted(missing))}")
    for module, found in our_imports(house):
        source = house.get(found.target)
        if source is None:
            lines.append(module.at(found.line, f"{found.target} does not exist"))
        elif found.name and found.name not in (source.exported or ()):
            lines.append(module.at(found.line, f"{found.name} is not in {source.path}'s __all__"))
    return lines


def ruff_order(name: str) -> tuple[int, list[str | int]]:
    """RUF022: constants, then classes, then the rest; numbers within names by value."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[:1].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def unsorted_exports(house: House) -> list[str]:
    listed = [(module, module.exported) for module in house.values() if module.exported]
    return [f"{m.path}:1: __all__ is not sorted" for m, names in listed if names != sorted(names, key=ruff_order)]


def undeclared_dependencies(house: House) -> list[str]:
    """What src imports is in pyproject.toml, as a dependency or in an extra for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + [r for e in extras if e not in ("test", "dev", "bench") for r in extras[e]]
    names = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in declared}
    lines = []
    for module in house.values():
        for found in imports_of(module, house):
            package = found.target.split(".")[0]
            known = found.ours or package in sys.stdlib_module_names
            if not known and DISTRIBUTIONS.get(package, package).replace("_", "-") not in names:
                lines.append(module.at(found.line, f"{package} is not declared in pyproject.toml"))
    return lines


def unsafe_loading(house: House) -> list[str]:
    """Nothing is unpickled, and no model's own code is run."""
    lines = []
    for module in house.values():
        for found in imports_of(module, house):
            if found.target.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "shelve"):
                lines.append(module.at(found.line, "pickle runs what a file says"))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                lines.append(module.at(node.lineno, "torch.load unpickles"))
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                lines.append(module.at(node.value.lineno, "a model's own code is not trusted"))
    return lines


def oversized(house: House) -> list[str]:
    """No file over 400 lines, no function over 60."""
    lines = []
    for module in house.values():
        length = len(module.text.splitlines())
        if length > MAX_FILE_LINES:
            lines.append(f"{module.path}:1: has {length} lines, over {MAX_FILE_LINES}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                height = (node.end_lineno or node.lineno) - node.lineno + 1
                if height > MAX_FUNCTION_LINES:
                    lines.append(module.at(node.lineno, f"{height} lines, over {MAX_FUNCTION_LINES}"))
    return lines


def unfinished(house: House) -> list[str]:
    """No note to self is left behind."""
    marks = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")
    numbered = [(m, line, text) for m in house.values() for line, text in enumerate(m.text.splitlines(), 1)]
    return [m.at(line, "unfinished") for m, line, text in numbered if marks.search(text)]


HOUSE = house_of({path.removeprefix("src/"): text for path, text in our_files("src").items()})

RULES_AND_BREACHES: list[tuple[Rule, dict[str, str]]] = [
    (imports_from_above, {"luthier/data/a.py": "def f():\n    from luthier.models import load"}),
    (imports_from_above, {"luthier/data/a.py": "import luthier"}),
    (imports_from_above, {"luthier/data/a.py": "from ..models import load"}),
    (imports_from_above, {"luthier/helpers.py": ""}),
    (forbidden_arrows, {"luthier/training/a.py": "from luthier.objectives.language import language_modelling"}),
    (forbidden_arrows, {"luthier/adapters/a.py": "import luthier.quant.nf4"}),
    (forbidden_arrows, {"luthier/objectives/a.py": "from luthier.errors import LuthierError"}),
    (forbidden_arrows, {"luthier/recipe/a.py": "from torch import Tensor"}),
    (import_cycles, {"luthier/data/a.py": "import luthier.data.b", "luthier/data/b.py": "from luthier.data import a"}),
    (late_imports, {"luthier/data/a.py": "class A:\n    def f(self):\n        import json"}),
    (late_imports, {"luthier/data/a.py": "import importlib\nimportlib.import_module('luthier.cli')"}),
    (undocumented_modules, {"luthier/data/a.py": "x = 1"}),
    (incomplete_exports, {"luthier/data/a.py": "def f(): ..."}),
    (incomplete_exports, {"luthier/data/a.py": "__all__ = ['g']"}),
    (incomplete_exports, {"luthier/data/a.py": "from luthier.data.b import c", "luthier/data/b.py": "__all__ = []"}),
    (unsorted_exports, {"luthier/data/a.py": "__all__ = ['b', 'a']"}),
    (unsorted_exports, {"luthier/data/a.py": "__all__ = ['Loss', 'SFT']"}),
    (undeclared_dependencies, {"luthier/data/a.py": "import peft"}),
    (unsafe_loading, {"luthier/data/a.py": "from pickle import loads"}),
    (unsafe_loading, {"luthier/data/a.py": "import torch\ntorch.load('x')"}),
    (unsafe_loading, {"luthier/data/a.py": "f(trust_remote_code=True)"}),
    (oversized, {"luthier/data/a.py": "\n" * 401}),
    (oversized, {"luthier/data/a.py": "def f():\n" + "    x = 1\n" * 60}),
    (unfinished, {"luthier/data/a.py": "x = 1  # TO" + "DO: two"}),
]

RULES = list(dict.fromkeys(rule for rule, _ in RULES_AND_BREACHES))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_our_house_has_no(rule: Rule) -> None:
    breaches = dict.fromkeys(rule(HOUSE))
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(("rule", "files"), RULES_AND_BREACHES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_breach_is_caught_by(rule: Rule, files: dict[str, str]) -> None:
    assert len(rule(house_of(files))) == 1


def test_a_house_in_order_passes_every_rule() -> None:
    imports = "from luthier import __version__\nfrom luthier.objectives.loss import Loss"
    user = f'"""Says."""\n\n{imports}\n\n__all__ = ["A1"]\n\nA1 = (__version__, Loss)'
    loss = '"""Says."""\n\n__all__ = ["Loss"]\n\n\nclass Loss: ...'
    house = house_of({"luthier/training/a.py": user, "luthier/objectives/loss.py": loss})
    assert [line for rule in RULES for line in rule(house)] == []


def test_the_house_is_read_whole() -> None:
    assert {"luthier", "luthier.errors", "luthier.training.loop", "luthier.recipe"} <= set(HOUSE)


def test_tests_and_benchmarks_are_sized_and_finished_like_the_package() -> None:
    files = {path: text for path, text in our_files("tests", "benchmarks").items() if path != "tests/test_house.py"}
    assert [*oversized(house_of(files)), *unfinished(house_of(files))] == []


@pytest.mark.parametrize("module", ["luthier", "luthier.recipe"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_every_adapter_has_settings_of_its_name() -> None:
    assert set(ADAPTERS) == set(ADAPTER_SETTINGS)
