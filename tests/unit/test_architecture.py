"""One way down: a module imports only from rooms above it; the loop stays readable."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "operando"
ROOMS = (
    "text", "errors", "files", "owned", "stopping", "tables", "stats", "recipe",
    "recipe_io", "run_folder", "types", "run", "parallel", "models", "sae", "tasks",
    "rollout", "rewards", "update", "integrations", "records", "setup", "train", "pretrain",
    "evals", "drift", "study", "discovery", "doctor", "report", "display", "launch", "recursive",
    "demo", "cli", "__main__",
)  # fmt: skip


def room(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


def upward_imports(module: str, source: str) -> list[str]:
    """Return the imports of a module that point to a room below its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "operando":
                names = [f"operando.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [n for n in names if n.startswith("operando.") and room(n) > room(module)]
    return found


def modules() -> list[tuple[str, Path]]:
    files = [f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py"]
    named = [".".join(("operando", *f.relative_to(PACKAGE).with_suffix("").parts)) for f in files]
    return list(zip(named, files, strict=True))


def test_no_module_imports_from_below() -> None:
    for module, file in modules():
        assert upward_imports(module, file.read_text()) == [], module


def test_a_planted_upward_import_is_found() -> None:
    source = "from operando.report.html import write_report"
    assert upward_imports("operando.train", source) == ["operando.report.html"]
    assert upward_imports("operando.cli", source) == []


def test_no_module_comes_back_to_itself() -> None:
    """Imports within a function count: a circle is a circle wherever it is closed."""
    names = {module for module, _ in modules()}
    edges = {module: imported(file.read_text()) & names - {module} for module, file in modules()}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for inner in sorted(edges[module]):
                walk(inner, (*path, module))
            done.add(module)

    for module in sorted(names):
        walk(module, ())


def imported(source: str) -> set[str]:
    """Return the modules that a source imports, by either form."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_loop_fits_in_400_lines_and_every_file_in_500() -> None:
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 400
    for module, file in modules():
        assert len(file.read_text().splitlines()) <= 500, module


def test_the_command_line_starts_without_torch() -> None:
    named: set[str] = set()
    for file in (PACKAGE / "cli").glob("*.py"):
        tree = ast.parse(file.read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        named |= {getattr(n, "module", None) or n.names[0].name for n in top}
    light = {"errors", "files", "owned", "stopping", "cli", "cli.app"}
    library = {"__future__", "contextlib", "signal", "sys", "pathlib", "typing", "typer"}
    assert named == library | {f"operando.{name}" for name in light}
