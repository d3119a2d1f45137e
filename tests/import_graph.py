"""What the repository's files import, as a parser sees it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported module: the file that names it, its absolute name, and whether only a function, a branch or a `try` does."""

    file: Path
    line: int
    module: str
    on_demand: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def unconditional_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run whenever the module is imported: not in functions, `try`, or `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try, ast.If)):
            yield child
            yield from unconditional_nodes(child)


def imports(root: Path, *folders: str) -> Iterator[Import]:
    for path in python_files(root, *folders):
        file = path.relative_to(root)
        package = [part for part in file.parts[:-1] if part != "kernels"]
        certain = set(map(id, unconditional_nodes(parse(path))))
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                # `from uso_engine import model` imports a part; `from uso_engine.model import blocks` is named well enough.
                modules = [f"{source}.{alias.name}" for alias in node.names] if source == "uso_engine" else [source]
            else:
                continue
            yield from (Import(file, node.lineno, module, id(node) not in certain) for module in modules)


def module_files(root: Path) -> dict[str, Path]:
    """Every file of uso_engine and the kernels by its name as a module; a package's is its ``__init__.py``."""
    found = {}
    for path in python_files(root, "uso_engine", "kernels"):
        parts = [part for part in path.relative_to(root).with_suffix("").parts if part not in {"kernels", "__init__"}]
        found[".".join(parts if path.is_relative_to(root / "uso_engine") else ["uso_kernels", *parts[1:]])] = path
    return found


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What can run, functions too: not what stands under `if TYPE_CHECKING`, which is for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from running_nodes(child)


def imported_files(root: Path) -> dict[str, set[str]]:
    """The files that each file imports when it runs, by their names as modules."""
    files = module_files(root)
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found: set[str] = set()
        for node in running_nodes(parse(path)):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                found.update(text if (text := f"{source}.{alias.name}") in files else source for alias in node.names)
        graph[name] = (found & files.keys()) - {name}
    return graph
