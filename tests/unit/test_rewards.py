"""The reward contract (a superset of TRL's), and that what is rewarded is weights times parts."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from operando.errors import UserError
from operando.recipe.data import WordsTaskConfig
from operando.recipe.rewards import FormatReward
from operando.recipe.run import Recipe
from operando.recipe_io import check
from operando.rewards.base import (
    RUN_METRIC_GROUPS,
    RUN_METRICS,
    RewardFunction,
    RewardLog,
    TrainerState,
    as_tokens,
    call_reward,
)
from operando.rewards.compose import RewardPart, compute_rewards, make_parts
from operando.tasks.user_code import load_function
from operando.tasks.words import load_words
from operando.types import Example, Prompt, Rewards, Rollout, Trace

ROOT = Path(__file__).parents[2]
STATE = TrainerState(3, 10)
NAN = float("nan")


def rollout(text: str, length: int, gold: str = "5", chat: bool = False) -> Rollout:
    """One completion of `length` tokens."""
    example = Example("e", "How many?", gold, columns={"answer": gold, "level": length})
    messages = ({"role": "user", "content": "How many?"},) if chat else ()
    prompt = Prompt(example, "Q: How many?\nA:", (4, 5), messages)
    ids = tuple(range(10, 10 + length))
    return Rollout(prompt, 0, 0, text, ids, tuple(-0.5 for _ in ids), is_truncated=False)


ROLLOUTS = [rollout(" 2+3=5 #### 5", 3), rollout(" #### 4", 1, gold="9")]
WIDTH = 4


def channel(function: Callable[..., object]) -> torch.Tensor:
    """The unweighted per-token channel of one function over ROLLOUTS."""
    return paid({"r": function}, {"r": 1.0}).parts["r"]


def paid(
    functions: Mapping[str, Callable[..., object]],
    weights: dict[str, float],
    trace: Trace | None = None,
) -> Rewards:
    """Rewards of user functions over ROLLOUTS; what they return is not to be believed."""
    parts = [RewardPart(name, function=cast(RewardFunction, f)) for name, f in functions.items()]
    return compute_rewards(parts, weights, ROLLOUTS, trace, STATE, WIDTH)


def refused(function: Callable[..., object]) -> str:
    with pytest.raises(UserError) as error:
        paid({"mine": function}, {"mine": 1.0})
    assert "reward 'mine'" in str(error.value), "the reward is named"
    return str(error.value)


# --- what a function is given --------------------------------------------------------------------


def test_a_trl_function_gets_every_keyword() -> None:
    seen: dict[str, object] = {}

    def spy(**keywords: object) -> list[float]:
        seen.update(keywords)
        return [0.0, 0.0]

    call_reward("r", spy, ROLLOUTS, None, STATE, RewardLog())
    assert seen["prompts"] == ["Q: How many?\nA:"] * 2
    assert seen["completions"] == [" 2+3=5 #### 5", " #### 4"]
    assert seen["completion_ids"] == [[10, 11, 12], [10]]
    assert seen["answer"] == ["5", "9"] and seen["level"] == [3, 1]
    assert seen["trainer_state"] == STATE and STATE.global_step == 3
    assert callable(seen["log_extra"]) and callable(seen["log_metric"])
    assert "trace" not in seen, "only for a function that names it"


def test_chat_prompts_and_completions_are_message_lists() -> None:
    def spy(prompts: list, completions: list) -> list[float]:
        assert prompts == [[{"role": "user", "content": "How many?"}]]
        assert completions == [[{"role": "assistant", "content": "five"}]]
        return [1.0]

    call_reward("r", spy, [rollout("five", 2, chat=True)], None, STATE, RewardLog())


def test_a_function_without_kwargs_gets_what_it_names() -> None:
    def picky(answer: list[str], completions: list[str], bonus: float = 0.5) -> list[float]:
        return [bonus + float(c.endswith(a)) for a, c in zip(answer, completions, strict=True)]

    values = call_reward("r", picky, ROLLOUTS, None, STATE, RewardLog())
    assert list(values) == [1.5, 0.5]


def test_the_trace_goes_to_the_function_that_names_it() -> None:
    logp_BT = torch.tensor([[-1.0, -2.0, -3.0, 0.0], [-4.0, 0.0, 0.0, 0.0]])
    trace = Trace(logp_BT, torch.zeros(2, WIDTH), None, None, {}, {})

    def confident(trace: Trace, **_: object) -> list[float]:
        return trace.logp_BT.sum(dim=1).tolist()

    def other(completions: list[str], **_: object) -> list[float]:
        return [1.0 for _ in completions]

    assert RewardPart("a", function=confident).needs_trace()
    assert not RewardPart("b", function=other).needs_trace()
    total_BT = paid({"a": confident, "b": other}, {"a": 1, "b": 0}, trace).total_BT
    assert total_BT.sum(dim=1).tolist() == [-6.0, -4.0]


def test_async_functions_pay_as_sync_ones() -> None:
    async def later(completions: list[str], **_: object) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    def now(completions: list[str], **_: object) -> list[float]:
        return [float(len(c)) for c in completions]

    assert torch.equal(channel(later), channel(now))
    assert channel(later).sum() == len(" 2+3=5 #### 5") + len(" #### 4")


def test_what_a_function_logs_is_kept() -> None:
    def logs(completions: list[str], log_metric, log_extra, **_: object) -> list[float]:
        log_metric("hits", 1)
        log_metric("hits", 0)
        log_extra("why", ["a", "b"])
        return [0.0, 0.0]

    rewards = paid({"r": logs}, {"r": 1.0})
    assert rewards.metrics == {"hits": 0.5} and rewards.columns == {"why": ["a", "b"]}


@pytest.mark.parametrize(
    "name", ["reward", "kl", "step", "eval/correct", "rewards/r/mean", "projection/grad_cos"]
)
def test_a_metric_of_the_runs_own_is_not_overwritten(name: str) -> None:
    def logs(completions: list[str], log_metric, **_: object) -> list[float]:
        log_metric("words", 1)
        log_metric(name, 7)
        return [0.0, 0.0]

    log = RewardLog()
    with pytest.raises(UserError) as error:
        call_reward("mine", logs, ROLLOUTS, None, STATE, log)
    said = str(error.value)
    assert "reward 'mine'" in said and f"log_metric: {name!r} is a metric" in said
    assert f"such as 'user/{name}'" in said and log.metrics == {"words": [1.0]}
    log.log_metric(f"user/{name}", 7)


def test_the_names_that_are_refused_are_those_of_the_docs() -> None:
    page = (ROOT / "docs" / "run-folder.md").read_text()
    table = page.split("## metrics.jsonl")[1].split("## results.json")[0]
    keys = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`([^`]+)`", " ".join(keys))) - {"projection/..."}
    named |= {"kl/q2", "kl/q3"}  # kl/q1 to kl/q4
    assert {name for name in named if not name.startswith(RUN_METRIC_GROUPS)} == RUN_METRICS


# --- where values stand --------------------------------------------------------------------------


def test_a_scalar_stands_on_the_last_real_token() -> None:
    expected = torch.tensor([[0.0, 0.0, 2.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    assert torch.equal(as_tokens("r", [2, -1.0], ROLLOUTS, WIDTH), expected)


def test_a_list_stands_token_by_token_beside_a_scalar() -> None:
    expected = torch.tensor([[0.5, 0.0, -1.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    assert torch.equal(as_tokens("r", [[0.5, 0, -1], 3.0], ROLLOUTS, WIDTH), expected)


def test_none_is_not_applicable_and_is_not_zero() -> None:
    expected = torch.tensor([[NAN, NAN, NAN, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = as_tokens("r", [None, 0.0], ROLLOUTS, WIDTH)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


# --- one clear message for each mistake ----------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, 1.0, 1.0], "returned 3 values for 2 completions"),
        ([], "returned 0 values for 2 completions"),
        (1.0, "returned float, expected a list of 2 values"),
        (None, "returned NoneType, expected a list of 2 values"),
        ({"a": 1.0, "b": 2.0}, "returned dict, expected a list of 2 values"),
        ("ab", "returned str, expected a list of 2 values"),
        ([1.0, NAN], "completion 1: not finite"),
        ([math.inf, 0.0], "completion 0: not finite"),
        ([[0.0, NAN, 0.0], 0.0], "completion 0: not finite"),
        ([[0.0, 1.0], 0.0], "completion 0: 2 per-token values for 3 completion tokens"),
        ([0.0, []], "completion 1: 0 per-token values for 1 completion tokens"),
    ],
)
def test_a_wrong_result_is_one_clear_message(returned: object, said: str) -> None:
    def mine(**_: object) -> object:
        return returned

    assert said in refused(mine)


# Values of a type that no annotation allows. The type checker of the tests would stop them before
# the product does, so they are rewarded in a process without it.
ODD = {
    "text": ["right", 1.0],
    "number as text": [0.0, "1.0"],
    "text per token": [["a", "b", "c"], 1.0],
    "dict": [{"score": 1.0}, 1.0],
    "None per token": [[1.0, None, 1.0], 1.0],
    "bool and numpy": [True, np.float32(0.25)],
    "tensors": [torch.tensor(1.0), torch.tensor(0.25)],
}


def pay_odd_values() -> dict[str, str]:
    """What is rewarded each of ODD, or the error."""
    said = {}
    for name, returned in ODD.items():
        try:
            rewards = paid({"mine": lambda returned=returned, **_: returned}, {"mine": 1.0})
            said[name] = str(rewards.total_BT.sum(dim=1).tolist())
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


@pytest.fixture(scope="module")
def odd_values() -> dict[str, str]:
    code = (
        "import json, sys; from tests.unit.test_rewards import pay_odd_values; "
        "sys.stdout.write(json.dumps(pay_odd_values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "completion 0: expected a number, got 'right'"),
        ("number as text", "completion 1: expected a number, got '1.0'"),
        ("text per token", "completion 0: expected a number, got 'a'"),
        ("dict", "completion 0: expected a number, got {'score': 1.0}"),
        ("None per token", "completion 0: expected a number, got None"),
    ],
)
def test_what_is_no_number_is_one_clear_message(
    odd_values: dict[str, str], name: str, said: str
) -> None:
    assert odd_values[name] == f"UserError: reward 'mine', {said}"


def test_numbers_of_any_make_are_paid(odd_values: dict[str, str]) -> None:
    assert odd_values["bool and numpy"] == odd_values["tensors"] == "[1.0, 0.25]"


def test_a_nan_names_the_way_out_and_the_completion() -> None:
    message = refused(lambda **_: [0.0, NAN])
    assert "Return None where the reward does not apply" in message and " #### 4" in message


def test_a_raising_function_is_not_a_reward_of_zero() -> None:
    def broken(completions: list[str], **_: object) -> list[float]:
        return [1 / len(c.split("@")[1:]) for c in completions]

    async def broken_later(**_: object) -> list[float]:
        raise KeyError("gold")

    assert "raised ZeroDivisionError: division by zero" in refused(broken)
    assert "raised KeyError: 'gold'" in refused(broken_later)


def test_an_unknown_parameter_names_the_nearest_column() -> None:
    def mine(completions: list[str], answers: list[str]) -> list[float]:
        return [0.0, 0.0]

    message = refused(mine)
    assert "asks for 'answers'" in message and "Did you mean 'answer'?" in message


def test_a_function_is_found_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def two(completions, **kw):\n    return [2.0 for _ in completions]\n")
    assert channel(load_function(f"{file}:two")).sum() == 4.0
    with pytest.raises(UserError, match="no function 'tow'. Did you mean 'two'"):
        load_function(f"{file}:tow")
    with pytest.raises(UserError, match="there is no file"):
        load_function(f"{tmp_path}/gone.py:two")
    with pytest.raises(UserError, match="no_such_module"):
        load_function("no_such_module:two")
    file.write_text("def two(:\n")
    with pytest.raises(UserError, match="invalid syntax"):
        load_function(f"{file}:two")


# --- weights, stages, the sum --------------------------------------------------------------------


def test_the_sum_is_weights_times_parts() -> None:
    functions: dict[str, Callable[..., object]] = {
        "tokens": lambda **_: [[0.5, 0.25, -1.0], 2.0],
        "scalar": lambda **_: [1.0, -3.0],
        "watched": lambda **_: [100.0, 100.0],
    }
    rewards = paid(functions, {"tokens": 2.0, "scalar": -0.5, "watched": 0.0})
    expected = torch.tensor([[1.0, 0.5, -2.5, 0.0], [5.5, 0.0, 0.0, 0.0]])
    assert torch.equal(rewards.total_BT, expected)
    assert rewards.parts["watched"].sum() == 200.0, "weight 0 is watched, unweighted"
    assert rewards.weights == {"tokens": 2.0, "scalar": -0.5, "watched": 0.0}


def test_the_sum_against_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(4, generator=generator).tolist() for name in "abc"}
    weights = {"a": 0.3, "b": -1.7, "c": 4.0}
    functions: dict[str, Callable[..., object]] = {
        name: (lambda name=name, **_: [values[name][:3], values[name][3]]) for name in "abc"
    }
    total_BT = paid(functions, weights).total_BT
    for b, length in enumerate((3, 1)):
        for t in range(WIDTH):
            at = t if b == 0 else 3
            wanted = sum(weights[n] * values[n][at] for n in "abc") if t < length else 0.0
            assert float(total_BT[b, t]) == pytest.approx(wanted, abs=1e-6), (b, t)


def test_a_part_that_does_not_apply_adds_nothing_and_all_of_them_are_nan() -> None:
    functions: dict[str, Callable[..., object]] = {
        "a": lambda **_: [None, None],
        "b": lambda **_: [3.0, None],
    }
    total_BT = paid(functions, {"a": 5.0, "b": 2.0}).total_BT
    assert total_BT[0].tolist() == [0.0, 0.0, 6.0, 0.0]
    assert total_BT[1, 0].isnan() and total_BT[1, 1:].tolist() == [0.0, 0.0, 0.0]


def make_recipe(**tables: object) -> Recipe:
    plain = {"name": "r", "steps": 4, "task": {"kind": "words", "num_train": 4, "num_held_out": 4}}
    return check(Recipe, plain | tables, "here")


TASK = load_words(WordsTaskConfig(kind="words", num_train=4, num_held_out=4))


def test_stages_change_what_the_same_rollouts_are_paid() -> None:
    recipe = make_recipe(
        rewards={"correct": {"kind": "correct"}, "format": {"kind": "format"}},
        stages=[
            {"until": 2, "weights": {"correct": 0, "format": 1}},
            {"weights": {"correct": 10, "format": -1}},
        ],
    )
    parts = make_parts(recipe, TASK, {})
    sums = [
        compute_rewards(parts, recipe.weights_at(step), ROLLOUTS, None, STATE, WIDTH)
        .total_BT.sum(1)
        .tolist()
        for step in (1, 2, 3, 4)
    ]
    # both have the format, only the first is right
    assert sums == [[1.0, 1.0], [1.0, 1.0], [9.0, -1.0], [9.0, -1.0]]


def test_the_outcome_rewards_worked_by_hand() -> None:
    rewards = {
        "correct": {"kind": "correct"},
        "lenient": {"kind": "contains_answer"},
        "shape": {"kind": "format", "pattern": r" \d.*"},
    }
    parts = make_parts(make_recipe(rewards=rewards), TASK, {})
    rollouts = [
        rollout(" 2+3=5 #### 5", 2),
        rollout(" 5, 6 or 7 #### 7", 2),  # names the gold number, answers another
        rollout(" #### 15", 2),  # 15 does not hold the number 5
        rollout(" 1 #### 5 #### 5", 2),  # two marks
    ]
    found = compute_rewards(parts, {name: 1.0 for name in rewards}, rollouts, None, STATE, 2).parts
    assert found["correct"][:, 1].tolist() == [1, 0, 0, 0]
    assert found["lenient"][:, 1].tolist() == [1, 1, 0, 1]
    assert found["shape"][:, 1].tolist() == [1, 1, 0, 1]
    assert all(part[:, 0].eq(0).all() for part in found.values())


def test_a_bad_pattern_and_misnamed_functions_are_refused() -> None:
    with pytest.raises(UserError, match="not a regular expression"):
        make_parts(make_recipe(rewards={"f": {"kind": "format", "pattern": "("}}), TASK, {})
    recipe = make_recipe(rewards={"mine": {"kind": "function"}})
    with pytest.raises(UserError, match="rewards.mine has no path"):
        make_parts(recipe, TASK, {})
    with pytest.raises(UserError, match="'mien' is no reward of the recipe. Did you mean 'mine'"):
        make_parts(recipe, TASK, {"mien": lambda **_: [1.0]})
    assert FormatReward(kind="format").weight == 1.0


@pytest.mark.parametrize(
    ("reward", "gold", "is_refused"),
    [
        ({"kind": "contains_answer"}, "Paris", True),
        ({"kind": "contains_answer"}, "1.5", True),
        ({"kind": "contains_answer"}, "-15", False),
        ({"kind": "scorer", "scorer": "strict"}, "Paris", True),
        ({"kind": "scorer", "scorer": "strict"}, "1,500", False),
    ],
)
def test_a_reward_of_numbers_refuses_other_answers(reward, gold, is_refused) -> None:
    recipe = make_recipe(rewards={"r": reward})
    task = replace(TASK, train=[replace(TASK.train[0], answer=gold)])
    if not is_refused:
        assert len(make_parts(recipe, task, {})) == 1
        return
    with pytest.raises(UserError, match=f"rewards.r compares numbers, and .* is '{gold}'"):
        make_parts(recipe, task, {})
