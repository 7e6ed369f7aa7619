"""Step penalties, think formats and the tag fence: values worked by hand, and their properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from operando.recipe.data import WordsTaskConfig
from operando.recipe.rewards import (
    LF_GRPO_WORDS,
    NOWAIT_WORDS,
    REASONSCORE_WORDS,
    STEP_WORDS,
    CorrectReward,
    StepGrpoReward,
    StepPenaltyReward,
    TagFenceReward,
    ThinkFormatReward,
)
from operando.recipe.run import Recipe
from operando.rewards.compose import as_tokens, make_parts
from operando.rewards.formats import find_tags, is_one_block, pair_tags, tag_fence, think_format
from operando.rewards.outcome import OutcomeReward
from operando.rewards.steps import count_words, step_grpo, step_penalty
from operando.tasks.words import load_words
from operando.types import Example, Prompt, Rollout

TASK = load_words(WordsTaskConfig(kind="words", num_train=1, num_held_out=1))
PENALTY = StepPenaltyReward(kind="step_penalty")
LF_GRPO_PENALTY = StepPenaltyReward(
    kind="step_penalty", count="last_block", match="substring", words=LF_GRPO_WORDS
)
STRICT = think_format(ThinkFormatReward(kind="think_format"))
LF_GRPO_FORMAT = think_format(ThinkFormatReward(kind="think_format", scheme="lf_grpo"))
FENCE = tag_fence(TagFenceReward(kind="tag_fence"))
LF_GRPO_FENCE = tag_fence(TagFenceReward(kind="tag_fence", scheme="lf_grpo"))
INNOCENT = "The waiter buttered the attributes; factually he awaits butterflies."


def rollout(text: str, prefill: str = "\nA:", group: int = 0, truncated: bool = False) -> Rollout:
    example = Example("e", "How many?", "5")
    prompt = Prompt(example, f"Q: How many?{prefill}", (4, 5), prefill=prefill)
    return Rollout(prompt, group, 0, text, (7, 8), (-0.5, -0.5), truncated)


def value(
    reward: OutcomeReward, text: str, prefill: str = "\nA:", truncated: bool = False
) -> float:
    (paid,) = reward([rollout(text, prefill, truncated=truncated)])
    return paid


def penalty(text: str, config: StepPenaltyReward = PENALTY, prefill: str = "\nA:") -> float:
    return value(step_penalty(config, TASK), text, prefill)


# --- the absolute step penalty -------------------------------------------------------------------


def test_the_lists_are_as_long_as_published() -> None:
    assert [len(set(w)) for w in (LF_GRPO_WORDS, REASONSCORE_WORDS, NOWAIT_WORDS)] == [6, 10, 17]
    assert set(STEP_WORDS) == {*LF_GRPO_WORDS, *REASONSCORE_WORDS, *NOWAIT_WORDS}


def test_penalty_is_gamma_to_the_number_of_words_and_only_for_right_answers() -> None:
    assert penalty("2+3=5 #### 5") == 1.0
    assert penalty("Wait, hmm. But 2+3=5 #### 5") == pytest.approx(0.99**3)
    assert penalty("Wait, hmm. But 2+3=5 #### 4") == 0.0
    half = StepPenaltyReward(kind="step_penalty", gamma=0.5)
    assert penalty("Let me check: 5. #### 5", half) == 0.5, "the longest of the phrases, once"


def test_every_block_and_the_prefill_count() -> None:
    text = "<think>wait wait</think><think>hmm</think> but #### 5"
    assert penalty(text) == pytest.approx(0.99**4)
    assert penalty(text, prefill="\nA: Wait,") == pytest.approx(0.99**5)


def test_the_published_counter_sees_the_last_block_and_substrings() -> None:
    assert penalty("<think>wait wait</think> but #### 5", LF_GRPO_PENALTY) == pytest.approx(0.99**2)
    hidden = "<think>wait wait</think><think>hmm</think> but #### 5"
    assert penalty(hidden, LF_GRPO_PENALTY) == pytest.approx(0.99), "earlier blocks are free"
    counted = f"<think>{INNOCENT}</think> #### 5"
    # waiter, awaits; buttered, attributes, butterflies; factually
    assert penalty(counted, LF_GRPO_PENALTY) == pytest.approx(0.99**6)
    assert penalty(counted) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "WAIT",
        "wait.",
        "_wait_",
        "wait1",
        "w\u200bait",
        "wa\u00adit",
        "ｗａｉｔ",
        "wa\ufe0fit",
        "(wait)",
    ],
)
def test_a_word_counts_however_it_is_spelled(text: str) -> None:
    assert count_words(f"so {text} 5", STEP_WORDS) == 1


@pytest.mark.parametrize("text", ["waiter", "await", "attribute", "checksum", "Ohio", "x"])
def test_a_word_inside_another_does_not_count(text: str) -> None:
    assert count_words(f"so {text} 5", STEP_WORDS) == 0


def test_white_space_and_tags_inside_a_phrase_do_not_hide_it() -> None:
    assert count_words("let\n  me\u00a0check", STEP_WORDS) == 1
    assert count_words("let </think><think> me check", STEP_WORDS) == 1


# --- Step-GRPO -----------------------------------------------------------------------------------


def test_step_grpo_by_hand() -> None:
    reward = step_grpo(StepGrpoReward(kind="step_grpo"), TASK)
    plain = "<think>2+3=5</think> #### 5"  # k = 1
    twice = "<think>Wait. Wait, 2+3=5</think> #### 5"  # k = 3
    wrong = "Wait Wait Wait Wait #### 4"  # k = 5, not in mu
    alone = rollout("Wait #### 5", group=1)  # mu = k = 2, no block
    nobody = rollout("<think>Wait</think> #### 4", group=2)
    paid = reward([rollout(plain), rollout(twice), rollout(wrong), alone, nobody])
    mu = 2
    assert paid == pytest.approx(
        [
            0.9 * (1 - 0.5 * math.tanh((1 - mu) / mu)) + 0.1,
            0.9 * (1 - 0.5 * math.tanh((3 - mu) / mu)) + 0.1,
            0.0,
            0.9,
            0.1,
        ]
    )


def test_step_grpo_triggers_have_case_and_letter_boundaries() -> None:
    reward = step_grpo(StepGrpoReward(kind="step_grpo", pattern=".*#### .*"), TASK)
    same = [rollout(t) for t in ("wait #### 5", "Waiter #### 5", "AWait #### 5", "#### 5")]
    assert reward(same) == pytest.approx([1.0] * 4)
    assert reward([*same, rollout("Wait1 #### 5")])[-1] < 1.0


# --- think format --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "paid"),
    [
        ("<think>a</think> b", 1.0),
        ("</think>a<think> b", 0.5),
        ("<think>a</think>  ", 0.5),
        ("<think>a</think><think>b</think> c", 0.3),
        ("<think>a</think></think> c", 0.3),
        ("<think><think>", 0.3),
        ("<think>a", 0.2),
        ("a</think> b", 0.2),
        ("a", 0.0),
        ("<Think>a</Think> b", 0.0),
    ],
)
def test_lf_grpo_format(text: str, paid: float) -> None:
    assert value(LF_GRPO_FORMAT, text) == paid


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "<think>a",
        "a</think> b",
        "</think>a<think> b",
        "<think>a</think>",
        "<think> </think> b",
        "<think>a</think><think>b</think> c",
        "<think>a</think></think> c",
        "<think><think>a</think></think> c",
        "<think>a<Think>b</think> c",
        "<think>a</think> <THINK> c",
        "<think x=1>a</think> c",
        "<think >a</think> c",
        "<think>a</ think> c",
        "<think>a</think> c < think >",
        "<think>a</think> c <thi\u200bnk>",
        "<think>a</think> c ＜think＞",
        "<outer><think>a</think></outer> c",
        "<a><think></a>b</think> c",
        "<think>a<b></think> c",
    ],
)
def test_strict_format_pays_nothing_for(text: str) -> None:
    assert value(STRICT, text) == 0.0


def test_strict_format_pays_for_one_block_over_prefill_and_completion() -> None:
    assert value(STRICT, "<think>a<b>c, 2 < 3</think> c") == 1.0
    assert value(STRICT, "<think>x <i>y</i><br/></think> c") == 1.0
    assert value(STRICT, "a</think> b", prefill="\nA: <think>") == 1.0
    assert value(STRICT, "<think>a</think> b", prefill="\nA: <think>") == 0.0
    assert value(STRICT, "<think>a</think> b", truncated=True) == 0.0


# --- tags ----------------------------------------------------------------------------------------


def test_tags_and_comparisons_are_told_apart() -> None:
    text = (
        "a<b>c x < y > z (n)<m>(k) i<n and j>0 5<7 <b>bold</b> <Step1> </no-x> <p class='q'> <br/>"
    )
    found = [tag.text for tag in find_tags(text)]
    assert found == ["<b>", "</b>", "<Step1>", "</no-x>", "<p class='q'>", "<br/>"]
    assert find_tags("answer<number>42</number>")[0].name == "number"
    assert find_tags("<<12+1=13>>13 and 3<4") == []


def test_tags_are_paired_by_a_stack() -> None:
    paired = pair_tags(find_tags("<a><b></a></b><a></a>"))
    assert [p.partner for p in paired] == [2, None, 0, None, 5, 4]
    assert [p.inside for p in paired] == [None, "a", None, None, None, None]


@pytest.mark.parametrize(("n", "paid"), [(0, 0.0), (1, -0.3), (5, -1.5), (6, -1.5), (50, -1.5)])
def test_lf_grpo_fence(n: int, paid: float) -> None:
    assert value(LF_GRPO_FENCE, "<think>a</think>" + "<x>" * n) == pytest.approx(paid)


def test_fence_by_hand_and_what_it_counts() -> None:
    assert [value(FENCE, "<xy>" * n) for n in (0, 1, 2, 6)] == pytest.approx(
        [0, -1 / 3, -0.5, -0.75]
    )
    assert value(FENCE, "a<b>c and 2 < 3 <think>x</think>") == 0.0
    assert value(FENCE, "<Think>a</think >") == -0.5


@given(st.integers(0, 2000))
def test_every_further_tag_costs_in_float32_too(n: int) -> None:
    texts = [" <x1>" * n, " <x1>" * (n + 1)]
    paid = as_tokens("f", FENCE([rollout(t) for t in texts]), [rollout(t) for t in texts], 2)
    assert paid[1].sum() < paid[0].sum()


# --- properties of the defaults ------------------------------------------------------------------

WORDS = st.sampled_from(
    [*STEP_WORDS, "Wait,", "so", "2+3=5", "a<b>c", "<x1>", "waiter", "and", "HMM", "\u200bbut"]
)
THOUGHTS = st.lists(WORDS, min_size=1, max_size=8)
DEFAULTS = {"penalty": step_penalty(PENALTY, TASK), "format": STRICT, "fence": FENCE}


def paid_all(text: str) -> list[float]:
    return [value(reward, text) for reward in DEFAULTS.values()]


def never_raises(before: str, after: str) -> None:
    assert all(b >= a for b, a in zip(paid_all(before), paid_all(after), strict=True)), after


def block(words: list[str]) -> str:
    return f"<think> {' '.join(words)} </think> #### 5"


@given(THOUGHTS, st.integers(0, 8))
def test_p1_splitting_a_block_never_raises(words: list[str], at: int) -> None:
    split = [*words[:at], "</think> <think>", *words[at:]]
    never_raises(block(words), block(split))
    assert value(STRICT, block(split)) == 0.0
    assert penalty(block(split)) == penalty(block(words)), "and merging is the way back"


@given(THOUGHTS)
def test_p2_moving_text_outside_never_raises(words: list[str]) -> None:
    inside, text = block(words), " ".join(words)
    for outside in (f"{text} <think></think> #### 5", f"<think></think> {text} #### 5"):
        assert penalty(outside) == penalty(inside)
        never_raises(inside, outside)


@given(THOUGHTS)
def test_p3_case_does_not_matter_and_innocent_words_are_free(words: list[str]) -> None:
    assert penalty(block([w.upper() for w in words])) == penalty(block(words))
    assert penalty(block([*words, "so", INNOCENT])) == penalty(block([*words, "so"]))


@given(THOUGHTS, st.integers(0, 8))
def test_p4_a_tag_counts_alike_in_prefill_and_completion(words: list[str], at: int) -> None:
    text = block(words)
    cut = min(at, len(text))
    for reward in (DEFAULTS["penalty"], STRICT):
        assert value(reward, text[cut:], "\nA: " + text[:cut]) == value(reward, text, "\nA: ")


@given(THOUGHTS, st.sampled_from(STEP_WORDS))
def test_p5_one_more_word_costs(words: list[str], more: str) -> None:
    assert penalty(block([*words, ";", more])) < penalty(block(words))


@given(THOUGHTS, st.sampled_from(["<Think>", "<think x=1>", "< think >", "</think>", "<think>"]))
def test_p6_malformed_think_tags_never_raise(words: list[str], tag: str) -> None:
    for after in (f"{tag} {block(words)}", f"{block(words)} {tag}", block([tag, *words])):
        never_raises(block(words), after)
        assert value(STRICT, after) == 0.0


@given(THOUGHTS, st.integers(1, 60))
def test_p7_there_is_no_free_region(words: list[str], n: int) -> None:
    text = block(words)
    assert value(FENCE, f"{text}{' <zz>' * (n + 1)}") < value(FENCE, f"{text}{' <zz>' * n}")


@given(THOUGHTS, st.integers(1, 5))
def test_p8_padding_after_the_answer_changes_nothing(words: list[str], n: int) -> None:
    assert paid_all(block(words) + " That is all." * n) == paid_all(block(words))


@given(THOUGHTS)
def test_p9_a_wrong_answer_is_paid_no_steps(words: list[str]) -> None:
    assert penalty(block(words).replace("#### 5", "#### 6")) == 0.0


@given(st.text(max_size=60))
def test_any_text_at_all_can_be_judged(text: str) -> None:
    assume("####" not in text)
    for paid, low, high in zip(paid_all(text + " #### 5"), (0, 0, -1), (1, 1, 0), strict=True):
        assert low <= paid <= high
    assert is_one_block(text) in (True, False)


# --- the recipe ----------------------------------------------------------------------------------


def test_a_recipe_names_them() -> None:
    recipe = Recipe(
        name="r",
        steps=1,
        task=WordsTaskConfig(kind="words", num_train=1, num_held_out=1),
        rewards={
            "correct": CorrectReward(kind="correct"),
            "steps": PENALTY,
            "group": StepGrpoReward(kind="step_grpo"),
            "form": ThinkFormatReward(kind="think_format"),
            "fence": TagFenceReward(kind="tag_fence"),
        },
    )
    one = [rollout("<think>Wait</think> <q> #### 5")]
    paid = {p.name: p.outcome(one) for p in make_parts(recipe, TASK, {}) if p.outcome is not None}
    assert paid == {
        "correct": [1.0],
        "steps": [0.99],
        "group": [1.0],
        "form": [1.0],
        "fence": [-1 / 3],
    }


def test_an_empty_word_is_refused() -> None:
    with pytest.raises(ValueError, match="a word is empty"):
        StepPenaltyReward(kind="step_penalty", words=("wait", " "))
