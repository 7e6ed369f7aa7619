"""The public face: `operando` gives its names, lightly, and whatever was imported before."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import operando

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    """Return what a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_operando_brings_neither_torch_nor_pydantic() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)"
    assert run(f"import sys, operando; dir(operando); print({heavy})") == "set()\n"


def test_a_recipe_is_read_and_an_error_is_caught_without_torch() -> None:
    code = (
        "import sys\nfrom operando import Interval, Recipe, UserError, load_recipe\n"
        "try: load_recipe('demoo')\nexcept UserError: print('torch' in sys.modules)"
    )
    assert run(code) == "False\n"


def test_every_name_is_there_and_is_what_its_module_has() -> None:
    homes = operando._homes()
    assert list(operando.__all__) == sorted(homes, key=lambda name: (name[0].islower(), name))
    assert set(homes) <= set(dir(operando))
    for name, (module, inside) in homes.items():
        found = getattr(operando, name)
        assert found is getattr(sys.modules[module], inside), name
        assert callable(found) and found.__module__ == module, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'operando' has no attribute 'lunch'"):
        operando.lunch  # noqa: B018


@pytest.mark.parametrize("name", ["train", "launch", "report"])
@pytest.mark.parametrize("first", ["module", "function"])
def test_a_function_stays_one_when_the_module_of_its_name_is_imported(
    name: str, first: str
) -> None:
    lines = [f"import operando.{name}", f"from operando import {name}"]
    code = "\n".join(lines if first == "module" else lines[::-1])
    code += f"\nimport operando\nprint(type({name}).__name__, operando.{name} is {name})"
    assert run(code) == "function True\n"


def test_the_table_and_all_are_what_a_type_checker_can_read() -> None:
    tree = ast.parse((ROOT / "src/operando/__init__.py").read_text())
    (names,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and _is_all(n))
    assert ast.literal_eval(names) == operando.__all__
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    (hidden,) = block.orelse  # where it could be seen, no misspelt name would be an error
    assert isinstance(hidden, ast.FunctionDef) and hidden.name == "__getattr__"


def _is_all(node: ast.Assign) -> bool:
    return ast.unparse(node.targets[0]) == "__all__"


def test_the_wheel_says_that_it_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling, of the extra dev")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "operando/py.typed" in zipfile.ZipFile(wheel).namelist()
