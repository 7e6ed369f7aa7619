"""A user's file is loaded as Python loads modules, and what it raises names its own line."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.rewards.base import RewardLog, TrainerState, call_reward
from operando.tasks.user_code import load_function
from operando.types import Example, Prompt, Rollout

FILE = """
from __future__ import annotations
from dataclasses import dataclass
import beside_it_42

@dataclass
class Paid:
    value: float = beside_it_42.VALUE

def pay(completions, **_):
    return [Paid(float(len(c))).value for c in completions]

def breaks(completions, **_):
    return [inner(c) for c in completions]

def inner(text):
    return 1 / (text != "bad\\x1b")

if __name__ == "__main__":
    raise SystemExit("run as a program")
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it_42.py").write_text("VALUE = 2.5\n")
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def test_dataclasses_pickles_and_helpers_beside_the_file_work(file: Path) -> None:
    function = load_function(f"{file}:pay")
    assert function(completions=["ab"]) == [2.0]
    paid = vars(sys.modules[function.__module__])["Paid"]()
    assert pickle.loads(pickle.dumps(paid)) == paid and paid.value == 2.5


def test_two_files_of_one_name_are_two_modules(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text("def pay(completions, **_):\n    return [9.0]\n")
    first, second = load_function(f"{file}:pay"), load_function(f"{other}:pay")
    assert first.__module__ != second.__module__ and second(completions=["a"]) == [9.0]


@pytest.mark.parametrize("path", ["x", ":x", ".py:x", "a.b:", ""])
def test_a_path_without_a_module_or_a_name_says_what_is_expected(path: str) -> None:
    with pytest.raises(UserError, match="expected file.py:function"):
        load_function(path)


@pytest.mark.parametrize("code", ["def f(:", "1 / 0", "import nowhere_42", "raise ValueError"])
def test_a_file_that_does_not_load_is_one_message_and_leaves_no_module(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UserError, match=r"reward path .*broken.py:f'"):
        load_function(f"{tmp_path}/broken.py:f")
    assert not [name for name in sys.modules if name.endswith("_broken")]


def test_what_a_reward_raises_names_the_users_line_and_the_completion(file: Path) -> None:
    one = Rollout(Prompt(Example("a", "q", "1"), "q", (1,)), 0, 0, "good", (1,), (0.0,), False)
    rollouts = [one, replace(one, completion="bad\x1b")]
    function = load_function(f"{file}:breaks")
    with pytest.raises(UserError) as caught:
        call_reward("mine", function, rollouts, None, TrainerState(1, 2), RewardLog())
    said = str(caught.value)
    line = FILE[: FILE.index("return 1 /")].count("\n") + 1
    assert f"{file}:{line} in inner" in said and "ZeroDivisionError" in said
    assert "rewards/base.py" not in said and "The completion: 'bad\\x1b'" in said
