"""The locked set is whole, hashed, free of torch's own files, and within the bounds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^([a-z0-9-]+)==([^ ;\\]+)(.*(?:\n    --hash=sha256:[0-9a-f]{64}.*)*)", re.MULTILINE
)


def locked() -> dict[str, list[tuple[str, str]]]:
    """Every pinned version of a package, with what follows it; some differ by Python."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, version, rest in BLOCK.findall((ROOT / "requirements.lock").read_text()):
        found.setdefault(name, []).append((version, rest))
    return found


def test_every_line_is_a_pin_with_a_hash() -> None:
    text = (ROOT / "requirements.lock").read_text()
    pins = [pin for versions in locked().values() for pin in versions]
    assert len(pins) == len(re.findall(r"^[a-z]", text, re.MULTILINE)) > 60
    assert all("--hash=sha256:" in rest for _, rest in pins)
    assert not [
        name for name in locked() if name in ("torch", "triton") or name.startswith("nvidia")
    ]


def test_all_that_the_project_asks_for_is_locked_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["dev"], *extras["gguf"], *extras["math"]]
    for text in asked:
        one = Requirement(text)
        name = canonicalize_name(one.name)
        if name in ("torch", "operando"):
            continue
        assert name in locked(), f"{name}: make lock"
        for version, _ in locked()[name]:
            assert one.specifier.contains(version), f"{name} {version} is not {one.specifier}"


def test_every_dependency_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    open_ended = [t for t in every if "<" not in t and not t.startswith("operando[")]
    assert not open_ended, open_ended


def test_the_pinned_torch_is_within_the_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [Requirement(t) for t in project["dependencies"] if t.startswith("torch")]
    (pin,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch.specifier.contains(pin)
