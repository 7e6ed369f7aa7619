"""What stands beside the code agrees with it: workflows, hooks, citation, list of benchmarks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import operando

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def workflow(name: str) -> dict[str, dict[str, object]]:
    """Return the jobs of a workflow."""
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text())["jobs"]


def commands(name: str) -> list[str]:
    text = (ROOT / ".github/workflows" / name).read_text()
    return re.findall(r"- run: (.*)", text)


def test_the_workflows_run_the_readmes_commands() -> None:
    assert commands("test.yml") == ["make test PYTHON=python", "make docs PYTHON=python"]
    assert commands("newest.yml") == ["make test-newest PYTHON=python"]
    assert {"test", "docs", "test-newest"} <= TARGETS


def test_every_python_that_is_claimed_is_tried() -> None:
    pythons = workflow("test.yml")["test"]["strategy"]["matrix"]["python"]  # pyright: ignore
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    minors = [int(one.removeprefix("3.")) for one in pythons]
    assert minors == list(range(minors[0], minors[-1] + 1))
    tried = re.findall(r"python3\.(\d+)", (ROOT / "Makefile").read_text().partition("VENV")[0])
    assert minors == [int(one) for one in tried]
    claimed = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python" in text]
    assert claimed == pythons


def test_the_newest_versions_may_fail_but_are_tried_each_week() -> None:
    assert workflow("newest.yml")["newest"]["continue-on-error"] is True
    assert "schedule:\n    - cron:" in (ROOT / ".github/workflows/newest.yml").read_text()


def test_the_hooks_use_the_locked_ruff() -> None:
    (locked,) = re.findall(r"^ruff==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "format"], ["ruff", "check"]]
    assert all(hook["additional_dependencies"] == [f"ruff=={locked}"] for hook in hooks)


def test_what_is_cited_is_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["version"] == operando.__version__
    assert cited["license"] == PROJECT["license"]


def test_every_benchmark_has_its_line() -> None:
    page = (ROOT / "benchmarks/README.md").read_text()
    named = re.findall(r"^\| `(\w+\.py)` \|", page, re.MULTILINE)
    assert sorted(named) == sorted(file.name for file in ROOT.glob("benchmarks/*.py"))
