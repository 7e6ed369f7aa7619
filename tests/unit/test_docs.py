"""What README and docs say is tried: snippets run, commands parse, names and links exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer

import operando
from operando.cli import app
from operando.recipe_io import load_pretrain_recipe, load_recipe, load_sft_recipe, shipped_recipes
from operando.recursive.pipeline import load_pipeline
from operando.study.arms import load_study

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "operando"
EXAMPLE = ROOT / "examples" / "trl_reward.py"
PAGES = [
    ROOT / "README.md",
    ROOT / "AGENTS.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (\S.*)$", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FUNCTION = re.compile(r"`([\w/]+\.py):(\w+(?:\.\w+)?)`")
TORCHRUN = re.compile(r"^torchrun --nproc-per-node \d+ -m ")


def snippets(page: Path) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language == "python"]


def commands(page: Path) -> list[list[str]]:
    """Return the operando command lines of a page that have at least a subcommand."""
    text = FENCE.sub("", page.read_text())
    found = []
    for line in [*INDENTED.findall(text), *INLINE.findall(text)]:
        line = TORCHRUN.sub("", line).removeprefix(".venv/bin/")
        if re.match(r"operando [a-z]", line):
            found.append(shlex.split(line)[1:])
    return found


def run_python(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the library example has run once."""
    folder = tmp_path_factory.mktemp("example")
    assert run_python([str(EXAMPLE)], folder).splitlines()[-1] == "runs/trl-reward"
    return folder


def test_library_example_trains_with_its_function(example_folder: Path):
    metrics = (example_folder / "runs/trl-reward/metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 5  # step 0 and four steps
    assert '"rewards/mine/mean"' in metrics[-1]


def test_readme_shows_the_example_as_it_is():
    assert EXAMPLE.read_text() in snippets(ROOT / "README.md")


def test_the_first_page_of_the_docs_shows_the_loop_as_it_is():
    assert snippets(ROOT / "docs" / "index.md") == [(ROOT / "examples/loop.py").read_text()]


def test_every_page_has_its_place_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert sorted(re.findall(r"- (\S+\.md)$", nav, re.MULTILINE)) == sorted(pages)


def test_api_page_is_current():
    """In a process of its own: the types here are checked, and the functions wrapped."""
    code = (
        "import make_api; assert make_api.PAGE.read_text() == make_api.api_page(), make_api.__doc__"
    )
    run_python(["-c", code], ROOT / "docs")


def test_run_folder_snippet_reads_the_examples_run(example_folder: Path):
    for code in snippets(ROOT / "docs" / "run-folder.md"):
        assert "####" in run_python(["-c", code], example_folder)


def test_run_folder_page_names_every_column_metric_and_manifest_key(example_folder: Path):
    run = example_folder / "runs" / "trl-reward"
    page = (ROOT / "docs" / "run-folder.md").read_text()
    named = set(INLINE.findall(page))
    used = set(json.loads((run / "manifest.json").read_text()))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        used |= set(json.loads(line))
    for file in run.glob("*/*.parquet"):
        used |= set(pq.read_schema(file).names)
    used = {re.sub(r"^data/.*", "data/NAME", name.replace("/mine", "/NAME")) for name in used}
    assert used <= named
    files = {file.name for file in run.iterdir()}
    assert all(name in page for name in files), files


@by_page
def test_python_snippets_compile_and_import_what_exists(page: Path):
    for code in snippets(page):
        for node in ast.walk(compile(code, page.name, "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert {alias.name for alias in node.names} <= set(dir(module)), ast.unparse(node)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def inner_imports(code: str) -> list[str]:
    """Return the imports that take a public name from a room where `operando` itself has it."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("operando.")
        for alias in node.names
        if alias.name in operando.__all__
    ]


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("examples/*"))],
    ids=lambda page: page.name,
)
def test_public_names_are_imported_from_operando_alone(page: Path):
    for code in snippets(page) if page.suffix == ".md" else [page.read_text()]:
        assert inner_imports(code) == []


def test_an_import_from_a_room_would_be_noticed():
    assert inner_imports("from operando.models.load import STARTER, load_model")
    assert not inner_imports("from operando.models.load import STARTER")
    assert not inner_imports("from operando import load_model")


def test_reward_of_the_quickstart_pays_and_logs():
    (code,) = snippets(ROOT / "docs" / "quickstart.md")
    scope: dict[str, object] = {}
    exec(code, scope)
    logged: dict[str, float] = {}
    is_brief = scope["is_brief"]
    assert callable(is_brief)
    paid = is_brief(["a", "b"], [[1] * 24, [1] * 26], logged.__setitem__, prompts=["p", "p"])
    assert paid == [1.0, 0.0]
    assert logged == {"brief/length": 25.0}


@by_page
def test_commands_and_their_options_exist(page: Path):
    group = typer.main.get_command(app)
    for name, *arguments in commands(page):
        assert name in group.commands, f"operando {name}"
        if arguments:
            # Raises for an unknown option, a missing argument, a value of the wrong type.
            params = group.commands[name].make_context(name, list(arguments)).params
            check_recipe(name, params)


def check_recipe(name: str, params: dict[str, object]) -> None:
    """Load the recipe that a command names, with its overrides, if it is a shipped one."""
    recipe, overrides = params.get("recipe"), params.get("overrides") or ()
    shipped = {file.stem for file in shipped_recipes()}
    if not isinstance(recipe, str) or Path(recipe).stem not in shipped:
        return
    if recipe.endswith(".toml"):
        assert (ROOT / recipe).is_file(), recipe
    if name == "study":
        load_study(recipe)
        return
    if name == "pipeline":
        load_pipeline(recipe, tuple(overrides))
        return
    load = {"pretrain": load_pretrain_recipe, "sft": load_sft_recipe}.get(name, load_recipe)
    load(recipe, tuple(overrides))


def test_commands_are_found_in_the_pages():
    found = {command[0] for page in PAGES for command in commands(page)}
    assert found == {
        "demo",
        "depth",
        "train",
        "eval",
        "report",
        "recipes",
        "config",
        "import",
        "pretrain",
        "fuzz",
        "tags",
        "task",
        "certify",
        "contribution",
        "sae",
        "drift",
        "features",
        "canary",
        "study",
        "doctor",
        "direction",
        "sft",
        "pipeline",
        "audit",
        "calibrate",
    }


def test_a_command_that_does_not_exist_would_be_noticed():
    group = typer.main.get_command(app)
    with pytest.raises(Exception, match="--nope"):
        group.commands["train"].make_context("train", ["demo", "--nope"])


def test_every_key_of_a_recipe_has_a_meaning():
    rows = [line.split(" | ") for line in (ROOT / "docs/recipes.md").read_text().splitlines()]
    keys = [cells for cells in rows if len(cells) == 4 and cells[0].startswith("| `")]
    assert len(keys) > 350
    assert [cells for cells in keys if len(cells[3].strip(" |")) < 8] == []


@by_page
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    for line in [*INDENTED.findall(text), *INLINE.findall(text)]:
        if found := re.fullmatch(r"make ([\w-]+)", line):
            assert found[1] in targets, line


@by_page
def test_named_functions_exist(page: Path):
    for file, name in FUNCTION.findall(page.read_text()):
        if file.startswith("tests/") or file == "my_reward.py":
            continue
        assert name in names_in(SOURCE / file), f"{file}:{name}"


def names_in(file: Path) -> set[str]:
    """Return functions, classes, Class.method, constants and imports of a source file."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {ast.unparse(target) for target in node.targets}
        if isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {f"{node.name}.{name}" for name in inner}
    return found


@by_page
def test_relative_links_resolve(page: Path):
    for link in LINK.findall(page.read_text()):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_layout_in_the_readme_names_every_room_and_module():
    text = (ROOT / "README.md").read_text()
    rooms = [p.name + "/" for p in SOURCE.iterdir() if (p / "__init__.py").is_file()]
    modules = [p.name for p in SOURCE.glob("*.py") if not p.name.startswith("__")]
    missing = [name for name in [*rooms, *modules] if name not in text]
    assert missing in ([], ["errors.py"])


def test_recipes_page_is_current():
    file = ROOT / "docs" / "make_recipes.py"
    spec = importlib.util.spec_from_file_location("make_recipes", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.recipes_page(), "run python docs/make_recipes.py"
