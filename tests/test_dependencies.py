"""The one-way order of dependencies, and the rules of layout that a parser can see.

Every rule is a function from a source tree to the list of what breaks it: empty for this repository, and not empty for a small
tree with that one fault seeded in it.
"""

import ast
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from import_graph import imported_files, imports, module_files, parse, python_files

# From the bottom up. A module may import what lies below it and, where that makes no circle, its neighbours.
DIFFUSERS = ("diffusers_callback", "diffusers_results")
LAYERS = (
    {"errors", "interrupt_lock", "process_bound", "process_state", "local_names", "version"},
    {"model", "precision"},
    {"imaging", "conditioning", "sampling", "weights", "safety"},
    {"parallel"},
    {"section", "queue_limits", "sampling_settings", "api", "config", "config_files"},
    {"request_type", "offload", "loading", "pipeline", "inputs", "generated", "generation", "preparation", "scheduling"}
    | {"engine", "async_engine", "diffusers_face", "progress", "call_arguments", "provenance", "stopwatch"},
    {"verification", "evaluation", "comparison", "embedded", "profiling", "serving"},
    {"cli", "__init__", "__main__"},
)
LAYER_OF = {unit: height for height, units in enumerate(LAYERS) for unit in units}

# The reason why a file may be longer than 300 lines, or a function's body (without its docstring) longer than 50.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

FORBIDDEN_NAMES = re.compile(r"(?:.*_)?(utils?|helpers?|common|managers?|misc|v\d+)")
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "pydantic_core": "pydantic",
    "google": "protobuf",
    "optimum": "optimum-quanto",
    "opentelemetry": "opentelemetry-api",
}
XFORMERS = "kernels/uso_kernels/attention/xformers.py:"
FILE_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "subprocess", "socket", "tomllib", "configparser", "mmap"}


def unit_of(file: Path) -> str:
    return file.parts[1].removesuffix(".py")


def upward_imports(root: Path) -> list[str]:
    """Imports against the order of the layers, and parts of uso_engine that have no layer."""
    wrong = []
    for found in imports(root, "uso_engine"):
        unit = unit_of(found.file)
        if unit not in LAYER_OF:
            wrong.append(f"{found.file}: {unit} has no place in LAYERS")
        elif found.top in {"benchmarks", "training", "tests"}:
            wrong.append(str(found))
        elif found.top == "uso_engine":
            target = found.module.split(".")[1] if "." in found.module else "__init__"
            if LAYER_OF.get(target, len(LAYERS)) > LAYER_OF[unit]:
                wrong.append(str(found))
    return sorted(set(wrong))


def circles(root: Path) -> list[str]:
    """Parts of uso_engine that import each other, however far round."""
    graph: dict[str, set[str]] = {}
    for found in imports(root, "uso_engine"):
        if found.module.startswith("uso_engine."):
            graph.setdefault(unit_of(found.file), set()).add(found.module.split(".")[1])

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        following = graph.get(start, set()) - {start} - seen
        return goal in following or any(reaches(unit, goal, seen | following) for unit in following)

    return [unit for unit in sorted(graph) if reaches(unit, unit, set())]


def file_circles(root: Path) -> list[str]:
    """Files that import each other when they run, however far round; an import within a function counts.

    Two files may name each other's types for the type checker: what runs does not depend on it.
    """
    files, graph = module_files(root), imported_files(root)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        following = set(graph[start])
        while following - seen:
            seen |= following
            following = {further for name in following for further in graph[name]}
        return seen

    return [f"{files[name].relative_to(root)} reaches itself" for name in sorted(files) if name in reachable(name)]


def impure_kernels(root: Path) -> list[str]:
    """uso_kernels imports torch, triton, the standard library and itself (test_packaging shows that triton may be absent)."""
    allowed = {"torch", "triton", "uso_kernels", *sys.stdlib_module_names}
    # One attention backend is xFormers itself; nothing else may know that package.
    backends = {"xformers.py": {"xformers"}}
    return [
        str(found)
        for found in imports(root, "kernels/uso_kernels")
        if found.top not in allowed | backends.get(found.file.name, set())
    ]


def impure_model(root: Path) -> list[str]:
    """The model reads no files, no config and no environment, and knows no library but torch and the kernels."""
    allowed = {"torch", "uso_kernels", "uso_engine"} | (sys.stdlib_module_names - FILE_MODULES)
    wrong = [str(found) for found in imports(root, "uso_engine/model") if found.top not in allowed]
    for path in python_files(root, "uso_engine/model"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"open", "read_text", "read_bytes"}:
                wrong.append(f"{path.relative_to(root)}:{node.lineno} reads a file")
    return wrong


def environment_reads(root: Path) -> list[str]:
    """Environment variables are read where a process starts, in the command line and the server, and nowhere else."""
    return [
        f"{path.relative_to(root)}:{node.lineno} reads the environment"
        for path in python_files(root, "uso_engine", "kernels")
        if unit_of(path.relative_to(root)) not in {"cli", "serving"}
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}
    ]


def undeclared_imports(root: Path) -> list[str]:
    """Every package imported is declared, and one that only an extra brings is imported on demand (or by the server)."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", requirement, maxsplit=1)[0].replace("_", "-").lower() for requirement in requirements}

    core, optional = names(project["dependencies"]), names([line for extra in extras.values() for line in extra])
    ours = {"uso_engine", "uso_kernels", "benchmarks", "training", *sys.stdlib_module_names}
    ours |= {path.stem for path in python_files(root, "tests")}
    wrong = []
    for found in imports(root, "uso_engine", "benchmarks", "training", "tests"):
        distribution = DISTRIBUTIONS.get(found.top, found.top).replace("_", "-").lower()
        if found.top in ours or distribution in core:
            continue
        installed = distribution in optional
        on_demand = found.on_demand or found.file.parts[0] != "uso_engine" or unit_of(found.file) == "serving"
        if not (installed and on_demand):
            wrong.append(str(found))
    return wrong


def quanto_beyond_one_module(root: Path) -> list[str]:
    """optimum-quanto is in maintenance and has known defects: one module knows it."""
    files = sorted({str(found.file) for found in imports(root, "uso_engine") if found.top == "optimum"})
    return files if len(files) > 1 else []


def bad_names(root: Path) -> list[str]:
    """No module is called after nothing; neither `tests` nor `kernels` is a package."""
    paths = [path.relative_to(root) for path in python_files(root, "uso_engine", "kernels", "benchmarks", "training", "tests")]
    wrong = [str(path) for path in paths if any(FORBIDDEN_NAMES.fullmatch(part.removesuffix(".py")) for part in path.parts)]
    wrong += [name for name in ("tests/__init__.py", "kernels/__init__.py") if (root / name).exists()]
    return wrong + [str(path) for path in paths if path.parts[0] == "tests" and len(path.parts) > 2]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(parse(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def untyped_kernel_functions(root: Path) -> list[str]:
    """Functions in uso_kernels without types; only Triton's own kernels may lack them, so mypy cannot be asked."""
    wrong = []
    for path in python_files(root, "kernels"):
        for node in functions(path):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            typed = node.returns is not None and all(x.annotation or x.arg in {"self", "cls"} for x in arguments)
            if not typed and not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                wrong.append(f"{path.relative_to(root)}:{node.lineno} {node.name}")
    return wrong


def long_code(root: Path) -> list[str]:
    """Files over 300 lines, and functions with a body over 50 (without the docstring), that nobody has given a reason for."""
    wrong = []
    for path in python_files(root, "uso_engine", "kernels", "benchmarks", "training", "tests"):
        name = str(path.relative_to(root))
        length = len(path.read_text().splitlines())
        if length > 300 and name not in LONG_FILES:
            wrong.append(f"{name}: {length} lines")
        for node in functions(path):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            length = (node.end_lineno or 0) - ((first.end_lineno or 0) if documented else first.lineno - 1)
            if length > 50 and f"{name}::{node.name}" not in LONG_FUNCTIONS:
                wrong.append(f"{name}::{node.name}: {length} lines")
    return wrong


def checks_that_can_be_switched_off(root: Path) -> list[str]:
    """Assertions in a function that do more than tell a type checker what a name is: python -O leaves them out."""
    wrong = []
    for path in python_files(root, "uso_engine", "kernels"):
        found = [node for function in functions(path) for node in ast.walk(function) if isinstance(node, ast.Assert)]
        wrong += [f"{path.relative_to(root)}:{node.lineno}" for node in found if not narrows(node.test)]
    return wrong


def narrows(test: ast.expr) -> bool:
    """Whether an expression only says of what type names are."""
    if isinstance(test, (ast.BoolOp, ast.UnaryOp)):  # and, or, not
        return all(narrows(part) for part in ast.iter_child_nodes(test) if isinstance(part, ast.expr))
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) in ("isinstance", "callable")


RULES: dict[Callable[[Path], list[str]], tuple[str, str]] = {
    # rule: (file, its text) of a fault that it must find
    upward_imports: ("uso_engine/model/blocks.py", "from ..config import EngineConfig"),
    circles: ("uso_engine/imaging/open.py", "import uso_engine.weights.lora.reading"),
    file_circles: ("uso_engine/model/grid.py", "def grid():\n    from .rope import cosines"),
    impure_kernels: ("kernels/uso_kernels/attention/__init__.py", "import numpy"),
    impure_model: ("uso_engine/model/rope.py", "def read(path):\n    return path.open()"),
    environment_reads: ("uso_engine/engine.py", "import os\nfast = os.environ['USO_FAST']"),
    undeclared_imports: ("uso_engine/weights/lora/reading.py", "import einops"),
    quanto_beyond_one_module: ("uso_engine/precision/second.py", "from optimum.quanto import qint8"),
    bad_names: ("uso_engine/imaging/image_utils.py", ""),
    untyped_kernel_functions: ("kernels/uso_kernels/attention/__init__.py", "def attention(q, k: int) -> int:\n    return k"),
    checks_that_can_be_switched_off: ("uso_engine/inputs.py", "def side(pixels):\n    assert pixels > 0\n    return pixels"),
    long_code: ("benchmarks/step.py", "def run():\n" + "    run()\n" * 51),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule: Callable[[Path], list[str]], repository: Path) -> None:
    broken = rule(repository)
    assert broken == [], f"{rule.__doc__}\n" + "\n".join(broken)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_finds_a_seeded_fault(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    sound = {
        "pyproject.toml": 'project.dependencies = ["torch>=2"]\nproject.optional-dependencies.quant = ["optimum-quanto"]\n',
        "uso_engine/engine.py": "import torch\nfrom .weights.lora import LoRA\nfrom uso_engine import errors\n",
        "uso_engine/errors.py": "",
        "uso_engine/imaging/open.py": "from ..errors import ImageError\n",
        "uso_engine/weights/lora.py": "from uso_engine.imaging.open import read\nfrom uso_engine.model.rope import Grid\n",
        "uso_engine/precision/quanto.py": "def quantize():\n    import optimum.quanto\n",
        "uso_engine/model/rope.py": "import math\nfrom uso_kernels.ragged import Ragged\nfrom . import grid\n",
        "uso_engine/model/grid.py": "if TYPE_CHECKING:\n    from .rope import Grid\n",
        "kernels/uso_kernels/ragged.py": "import torch\ntry:\n    import triton\nexcept ImportError:\n    triton = None\n",
    }
    seeded, fault = RULES[rule]
    for name, text in sound.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert rule(tmp_path) == []
    parse.cache_clear()
    (tmp_path / seeded).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / seeded).write_text(fault)
    assert len(rule(tmp_path)) > 0


def test_no_test_reaches_the_network() -> None:
    with pytest.raises(OSError, match="tests may not leave this machine"):
        socket.create_connection(("192.0.2.1", 443), timeout=0.1)  # an address reserved for documentation


@pytest.mark.parametrize("module", ["uso_engine", "uso_engine.api.request", "uso_engine.cli"])
def test_import_is_light(module: str, repository: Path) -> None:
    """`--help` and the request schema must not wait for torch (2 s) or transformers (4 s more)."""
    check = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'diffusers', 'triton'}} & set(sys.modules)))"
    paths = f"{repository}:{repository / 'kernels'}"
    answer = subprocess.run(
        [sys.executable, "-c", check], env={"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == []


FOLDERS = {".ci", "benchmarks", "configs", "deploy", "docs", "kernels", "tests", "training", "uso_engine"}
PICTURES = {"docs", "deploy", "tests", "uso_engine"}


def test_what_a_command_wrote_is_not_in_the_repository(repository: Path) -> None:
    """Folders that no document names, and pictures beside code, are left over from somebody's run."""
    if not (repository / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    assert {path.parts[0] for path in paths if len(path.parts) > 1} == FOLDERS
    assert {path.parts[0] for path in paths if path.suffix in {".png", ".jpg", ".webp", ".gif"}} <= PICTURES
