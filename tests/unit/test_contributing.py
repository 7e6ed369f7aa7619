"""CONTRIBUTING.md leaves out no file that names the thing to follow."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from operando.recipe.run import TaskConfig

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "operando"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
PLACE = re.compile(r"`([\w/]+\.py):(\w+)`")
STEP = re.compile(r"^(\d)\. `([\w/]+\.py):(\w+)`", re.MULTILINE)
NUMBERS = ("no", "One", "Two", "Three", "Four", "Five", "Six")
SECTIONS = {
    title: body
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    if "Follow `" in body
}
KINDS = {
    str(get_args(config.model_fields["kind"].annotation)[0])
    for config in get_args(get_args(TaskConfig)[0])
}
by_section = pytest.mark.parametrize("title", SECTIONS)


def test_the_checklists_are_found() -> None:
    assert list(SECTIONS) == [
        "A task",
        "A reward",
        "An advantage",
        "An intervention",
        "An SAE format",
    ]


def test_every_named_test_exists() -> None:
    named = re.findall(r"`(tests/\S+?\.py)`", PAGE)
    assert named and [name for name in named if not (ROOT / name).is_file()] == []


def followed(body: str) -> list[str]:
    """Return the names of the variant that a checklist follows."""
    return re.findall(r"`(\w+)`", body[body.index("Follow `") :].partition(".")[0])


def files_naming(words: list[str]) -> set[str]:
    pattern = re.compile(rf"\b({'|'.join(words)})\b")
    files = SOURCE.rglob("*.py")
    return {f.relative_to(SOURCE).as_posix() for f in files if pattern.search(f.read_text())}


@by_section
def test_a_checklist_has_every_file_that_names_its_example(title: str) -> None:
    body = SECTIONS[title]
    steps = STEP.findall(body)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert f"{NUMBERS[len(steps)]} places" in body
    assert {file for _, file, _ in steps} == files_naming(followed(body))


def lists_of_tasks(file: Path) -> bool:
    """Return whether a tuple, list or table of a module has three or more kinds of tasks."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Dict(keys=items):
                texts = {item.value for item in items if isinstance(item, ast.Constant)}
                if len(texts & KINDS) >= 3:
                    return True
    return False


def test_the_further_places_of_a_task_are_all_the_lists_of_tasks() -> None:
    body = SECTIONS["A task"].partition("Further places")[2]
    further = {file for file, _ in PLACE.findall(body)}
    found = {f.relative_to(SOURCE).as_posix() for f in SOURCE.rglob("*.py") if lists_of_tasks(f)}
    assert found == further - {"recipe/mixture.py", "tasks/mixture.py"}
