"""The fuzzer finds the planted bugs, with a small example, and nothing on the defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from operando.cli import app
from operando.errors import UserError
from operando.evals.answers import Answer, is_opened, split_at_answer
from operando.evals.fuzz import FuzzResult, Row, breach_at, fuzz_target
from operando.evals.mutations import MUTATIONS
from operando.evals.mutations_answer import another, far_from, swap_final
from operando.evals.mutations_words import INNOCENT, NEUTRAL
from operando.recipe.data import WordsTaskConfig
from operando.recipe.rewards import STEP_WORDS
from operando.recipe_io import load_recipe
from operando.rewards.steps import count_words
from operando.run import Run
from operando.tasks.words import ANSWER, load_words
from tests.unit.fuzz_rewards import LOOPHOLES, SOUND, WHY

HEAD = """
name = "r"
steps = 1
[task]
kind = "words"
num_train = 40
num_held_out = 1
"""
SEED = 'words = ["wait", "hmm", "but", "thinking", "actually", "let me check"]'
OURS = (
    HEAD
    + """
[rewards.correct]
kind = "correct"
[rewards.steps]
kind = "step_penalty"
[rewards.form]
kind = "think_format"
[rewards.fence]
kind = "tag_fence"
"""
)
PREFILLED = OURS + '\n[prompt]\nprefill = " <think>"\n'


def write(folder: Path, text: str) -> str:
    (folder / "r.toml").write_text(text)
    return str(folder / "r.toml")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fuzzed(tmp_path: Path, rewards: str) -> FuzzResult:
    return fuzz_target(write(tmp_path, HEAD + rewards), num=3)


def found(result: FuzzResult) -> dict[str, Row]:
    return {row.edit: row for row in result.findings}


# --- nothing on the defaults ---------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [OURS, PREFILLED], ids=["plain", "prefilled"])
def test_nothing_is_found_on_the_defaults(tmp_path: Path, recipe: str) -> None:
    result = fuzz_target(write(tmp_path, recipe), num=4)
    assert result.findings == []
    tried = {row.reward: 0 for row in result.rows}
    for row in result.rows:
        tried[row.reward] += row.tried
    assert set(tried) == {"correct", "steps", "form", "fence", "weighted total"}
    assert min(tried.values()) > 500
    assert {row.edit for row in result.rows} == {edit.name for edit in MUTATIONS}


def test_nothing_is_found_on_the_verifier_of_words() -> None:
    result = fuzz_target("words", num=8)
    assert result.findings == [] and {row.reward for row in result.rows} == {"verifier"}
    assert (result.num_right, result.num_wrong) == (16, 24)


def test_an_opener_that_is_in_no_list_is_an_evasion_and_no_finding(tmp_path: Path) -> None:
    result = fuzzed(tmp_path, '[rewards.steps]\nkind = "step_penalty"\n')
    rows = {row.edit: row for row in result.rows if row.is_evasion}
    assert rows["unlisted opener"].breaches > 0 and result.findings == []
    example = rows["unlisted opener"].smallest
    assert example is not None and "hold on" in example.after.lower()


# --- the planted bugs ----------------------------------------------------------------------------


def test_the_multi_block_loophole_is_found_with_a_small_example(tmp_path: Path) -> None:
    result = fuzzed(tmp_path, '[rewards.s]\nkind = "step_penalty"\ncount = "last_block"\n')
    rows = found(result)
    assert {"split blocks", "move outside tags", "leave unclosed", "empty block"} == set(rows)
    row = rows["split blocks"]
    assert row.smallest is not None and row.smallest.times == 1
    assert row.smallest.paid_before == pytest.approx(0.99)
    assert row.smallest.paid_after == pytest.approx(1.0)
    assert len(row.smallest.before.split()) <= 5, row.smallest.before
    # six words: "Wait, let me check. Hmm, but maybe not. Actually, yes."
    assert row.largest_gain == pytest.approx(1 - 0.99**6, abs=1e-5)


def test_the_substring_bug_is_found(tmp_path: Path) -> None:
    rows = found(
        fuzzed(tmp_path, f'[rewards.s]\nkind = "step_penalty"\nmatch = "substring"\n{SEED}')
    )
    example = rows["innocent words"].smallest
    assert example is not None and "waiter" in example.after and example.paid_before == 1.0
    assert example.paid_after == pytest.approx(0.99**6)
    assert "listed synonym" in rows and "invisible characters" in rows


def test_the_free_region_of_the_fence_of_lf_grpo_is_found(tmp_path: Path) -> None:
    rows = found(fuzzed(tmp_path, '[rewards.f]\nkind = "tag_fence"\nscheme = "lf_grpo"\n'))
    assert set(rows) == {"flood of tags"}
    example = rows["flood of tags"].smallest
    assert example is not None and example.times == 6
    assert example.paid_before == example.paid_after == -1.5


def test_a_list_of_numbers_catches_contains_answer(tmp_path: Path) -> None:
    rows = found(fuzzed(tmp_path, '[rewards.c]\nkind = "contains_answer"\n'))
    assert {"list of numbers", "every small sum", "another number", "gold without its form"} <= set(
        rows
    )
    assert rows["list of numbers"].largest_gain == 1.0


def test_the_published_step_grpo_has_the_gaps_of_its_one_word(tmp_path: Path) -> None:
    rows = found(fuzzed(tmp_path, '[rewards.g]\nkind = "step_grpo"\n'))
    assert set(rows) == {"re-case openers", "listed synonym", "invisible characters"}


def test_what_the_policy_is_really_paid_is_fuzzed_at_every_stage(tmp_path: Path) -> None:
    stages = "\n".join(
        f"[[stages]]\n{until}weights = {{ correct = 1.0, s = {weight} }}\n"
        for until, weight in (("until = 1\n", 0.0), ("", 1.0))
    )
    text = HEAD.replace("steps = 1", "steps = 2") + (
        '[rewards.correct]\nkind = "correct"\n'
        '[rewards.s]\nkind = "step_penalty"\ncount = "last_block"\n' + stages
    )
    result = fuzz_target(write(tmp_path, text), num=2)
    at = {row.reward for row in result.findings}
    assert at == {"s", "weighted total, stage 2"}, "of stage 1 the weight is 0"


# --- functions -----------------------------------------------------------------------------------

FUNCTIONS = """
def fine(completions, answer, **kwargs):
    return [float(c.rstrip().endswith("#### " + a)) for c, a in zip(completions, answer)]

def longer(completions, **kwargs):
    return [float(len(c)) for c in completions]

def raises(completions, **kwargs):
    return [1 / 0 for c in completions]

def nan(completions, **kwargs):
    return [float("nan") for c in completions]

def short(completions, **kwargs):
    return [0.0]

def none(completions, **kwargs):
    return [None for c in completions]

def traced(completions, trace):
    return [0.0 for c in completions]
"""


def fuzz_function(tmp_path: Path, name: str) -> FuzzResult:
    (tmp_path / "my.py").write_text(FUNCTIONS)
    return fuzz_target("words", reward=f"{tmp_path / 'my.py'}:{name}", num=2)


def test_a_trl_function_is_fuzzed(tmp_path: Path) -> None:
    assert fuzz_function(tmp_path, "fine").findings == []
    assert {"repeat", "pad after the answer"} <= set(found(fuzz_function(tmp_path, "longer")))
    assert fuzz_function(tmp_path, "none").rows == (), "where it never applies nothing is tried"


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("raises", "raised ZeroDivisionError"),
        ("nan", "not finite"),
        ("short", "returned 1 values for"),
        ("traced", "needs `trace`"),
    ],
)
def test_a_broken_function_is_one_clear_message(tmp_path: Path, name: str, cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        fuzz_function(tmp_path, name)


# --- real answers --------------------------------------------------------------------------------


def make_run(folder: Path, completions: list[str]) -> Path:
    """A run folder of one step with these completions of the first problem."""
    rewards = '[rewards.c]\nkind = "contains_answer"\n'
    recipe = load_recipe(write(folder, f'runs_dir = "{folder}"\n{HEAD}{rewards}'))
    run = Run.create(recipe)
    run.close()
    task = load_words(WordsTaskConfig(kind="words", num_train=40, num_held_out=1))
    example = task.train[0]
    num = len(completions)
    table = {
        "group": [0] * num,
        "sample": list(range(num)),
        "prompt": [f"Q: {example.question}\nA:"] * num,
        "completion": [c.replace("GOLD", example.answer) for c in completions],
        "answer": [example.answer] * num,
        "is_truncated": [False] * num,
    }
    (run.folder / "rollouts").mkdir()
    pq.write_table(pa.table(table), run.folder / "rollouts" / "step_00001.parquet")
    return run.folder


def test_a_run_gives_its_own_answers(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [" so #### GOLD", " no idea #### -3", " no idea #### -3"])
    result = fuzz_target(str(folder), num=5)
    assert (result.num_right, result.num_wrong) == (2 + 8, 2 + 12), "each twice, and four made"
    assert result.file == folder / "fuzz.json"
    content = json.loads(result.file.read_text())
    rows = {row["edit"]: row for row in content["rows"] if row["breaches"]}
    assert content["num_findings"] == len(rows) and content["reads"] == {"c": "some"}
    assert rows["list of numbers"]["smallest"]["paid_after"] == 1.0
    assert rows["another number"]["smallest"]["paid_after"] == 1.0


def test_a_run_without_rollouts_and_an_unknown_target_are_clear(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [" #### GOLD"])
    (folder / "rollouts" / "step_00001.parquet").unlink()
    with pytest.raises(UserError, match="no rollouts to fuzz"):
        fuzz_target(str(folder))
    with pytest.raises(UserError, match="no recipe 'nonsense'"):
        fuzz_target("nonsense")


# --- the edits themselves ------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["Wait,", "2+3=5", "<think>", "</think>", "so", "<b>", "\n", "####", "#### 7", "let me check"]
)


@settings(max_examples=60)
@given(st.lists(PIECES, max_size=8), st.sampled_from(["\nA:", "\nA: <think>"]))
def test_every_edit_takes_any_text_and_keeps_the_final_answer(
    words: list[str], prefill: str
) -> None:
    text = " ".join(words)
    _, tail = split_at_answer(text)
    example, other = load_words(WordsTaskConfig(kind="words", num_train=2, num_held_out=1)).train
    for edit in MUTATIONS:
        for chain in edit.apply(Answer(prefill, text, example, other)):
            assert len(chain.texts) == len(chain.times) >= 2
            if ANSWER.search(tail) and edit.must != "pay less":
                last = [ANSWER.findall(one)[-1] for one in chain.texts]
                assert len(set(last)) == 1, (edit.name, chain)


def test_innocent_and_neutral_words_differ_in_nothing_else() -> None:
    assert len(INNOCENT) == len(NEUTRAL)
    assert len(INNOCENT.split()) == len(NEUTRAL.split())
    assert count_words(INNOCENT + NEUTRAL, STEP_WORDS) == 0
    assert is_opened("A: <think>") and not is_opened("<think></think>")


@pytest.mark.parametrize(
    ("must", "paid", "at"),
    [
        ("never raise", [1.0, 1.0], None),
        ("never raise", [1.0, 0.5], None),
        ("never raise", [1.0, 1.1], 1),
        ("not change", [1.0, 0.9], 1),
        ("not change", [1.0, 1.0], None),
        ("cost ever more", [0.0, -0.3, -1.5, -1.5, -1.5], 3),
        ("cost ever more", [0.0, -0.3, -0.7, -0.75, -0.9], None),
        ("cost ever more", [0.0, 0.0, 0.0, 0.0, 0.0], None),
        ("cost ever more", [1.0, 0.0, 0.0, 0.0, 0.0], None),
        ("cost ever more", [0.0, 0.1, 0.0, 0.0, 0.0], 1),
    ],
)
def test_what_a_breach_is(must: str, paid: list[float], at: int | None) -> None:
    assert breach_at(must, paid) == at


# --- the command ---------------------------------------------------------------------------------


def test_the_command_ends_with_3_on_a_finding_and_0_on_none(tmp_path: Path) -> None:
    good = CliRunner().invoke(app, ["fuzz", write(tmp_path, OURS), "--num", "2"])
    assert good.exit_code == 0 and good.stdout.splitlines()[-1] == "fuzz_r.json"
    assert "nothing found" in good.output
    bad = write(tmp_path, HEAD + '[rewards.f]\nkind = "tag_fence"\nscheme = "lf_grpo"\n')
    result = CliRunner().invoke(app, ["fuzz", bad, "--num", "2"])
    assert result.exit_code == 3 and result.stdout.splitlines()[-1] == "fuzz_r.json"
    assert "flood of tags" in result.output and "free" in result.output


def test_the_page_shows_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    page = (Path(__file__).parents[2] / "docs" / "fuzzing.md").read_text()
    recipes = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    shown = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    for name, recipe, text in zip(("lf_grpo", "ours"), recipes, shown, strict=True):
        (tmp_path / f"{name}.toml").write_text(recipe)
        result = CliRunner().invoke(app, ["fuzz", f"{name}.toml", "--num", "4"])
        assert [line.rstrip() for line in result.stderr.splitlines()] == text.splitlines()


# --- farms on process rewards --------------------------------------------------------------------

FARMS = {
    "trivial equation",
    "distinct trivia",
    "identities",
    "commuted copies",
    "needless chain",
    "every small sum",
}


def test_the_process_reward_of_recursive_lm_is_farmed_by_every_needless_equation(
    tmp_path: Path,
) -> None:
    rows = found(fuzzed(tmp_path, '[rewards.p]\nkind = "process"\nscheme = "recursive_lm"\n'))
    assert set(rows) >= FARMS | {"list of numbers"}
    assert rows["trivial equation"].largest_gain == pytest.approx(0.75), (
        "three times, up to the cap"
    )
    assert rows["list of numbers"].largest_gain == pytest.approx(1.0), "one #### of many is gold"
    example = rows["identities"].smallest
    assert example is not None and "*1=" in example.after


def test_the_process_reward_of_milestones_is_not_farmed(tmp_path: Path) -> None:
    result = fuzzed(tmp_path, '[rewards.p]\nkind = "process"\n')
    assert result.findings == []
    tried = {row.edit: row.tried for row in result.rows}
    assert all(tried[name] >= 6 for name in FARMS), tried


# --- planted loopholes, and rewards without one --------------------------------------------------


def fuzz_planted(tmp_path: Path, kind: str, name: str) -> FuzzResult:
    (tmp_path / "planted.py").write_text(
        f"from tests.unit.fuzz_rewards import {kind}\nreward = {kind}[{name!r}]\n"
    )
    return fuzz_target("words", reward=f"{tmp_path / 'planted.py'}:reward", num=2)


@pytest.mark.parametrize("name", LOOPHOLES)
def test_a_planted_loophole_is_found_for_its_own_reason(tmp_path: Path, name: str) -> None:
    rows = found(fuzz_planted(tmp_path, "LOOPHOLES", name))
    assert WHY[name] & set(rows), (name, sorted(rows))


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_reward_is_not_accused(tmp_path: Path, name: str) -> None:
    result = fuzz_planted(tmp_path, "SOUND", name)
    assert {row.edit: row.smallest for row in result.findings} == {}
    blind = name in ("constant", "length_penalty")
    assert result.reads == {"reward": "not asked" if blind else "right"}


FORM = '[rewards.form]\nkind = "format"\npattern = ".*####.*"\n'


def test_a_part_may_be_blind_and_the_only_reward_may_not(tmp_path: Path) -> None:
    alone = fuzzed(tmp_path, FORM)
    assert {"another number", "another problem's answer"} <= set(found(alone))
    assert alone.reads == {"form": "never"}
    both = fuzzed(tmp_path, FORM + '[rewards.correct]\nkind = "correct"\n')
    assert both.reads == {"form": "never", "correct": "right", "weighted total": "right"}
    assert both.findings == []
    blind = fuzzed(tmp_path, FORM + FORM.replace("form]", "again]"))
    assert {row.reward for row in blind.findings} == {"weighted total"}, "nothing there looks"


def test_what_could_not_be_asked_is_no_clean_bill(tmp_path: Path) -> None:
    recipe = write(tmp_path, HEAD + '[rewards.f]\nkind = "tag_fence"\n')
    result = CliRunner().invoke(app, ["fuzz", recipe, "--num", "2"])
    assert result.exit_code == 0 and "nothing found" not in result.output
    assert "it pays no right answer more than none" in " ".join(result.output.split())


@pytest.mark.parametrize("gold", ["3", "39", "-7", "100", "0", "1000"])
def test_made_wrong_answers_neither_hold_gold_nor_equal_it(gold: str) -> None:
    wrong = far_from(gold)
    assert gold not in wrong and wrong not in gold
    assert all(float(text) != float(gold) for text in another(gold)) and len(another(gold)) >= 7
    assert f"{gold}1" in another(gold) and str(int(gold) + 1) in another(gold)


def test_the_final_answer_is_swapped_and_not_its_like() -> None:
    assert swap_final("39+0=39; 139 #### 39", "39", "7") == "39+0=39; 139 #### 7"
    assert swap_final("139 #### 39.5", "39", "7") is None
    assert swap_final("so #### 39.", "39", "7") == "so #### 7."
