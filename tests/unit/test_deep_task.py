"""The deep task and what its model is trained on: worked answers, habits, splits, verdicts."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.evals.ask import Answer, pass_at, pass_curve
from operando.models.load import EMBEDDED
from operando.models.tokens import load_tokenizer, text_ids
from operando.pretrain import habits
from operando.pretrain.fit import IGNORED
from operando.recipe.deep import DeepPretrainRecipe, DeepTaskConfig
from operando.recipe_io import load_pretrain_recipe
from operando.rewards.base import TrainerState
from operando.rewards.controls import coin, majority
from operando.tasks import chain, maze, story
from operando.tasks.chain import Step
from operando.tasks.deep import grade, labels, load_deep, pose
from operando.tasks.slips import OPEN, Posed, never, risky_kinds, verify
from operando.tasks.story import Event
from operando.types import Example, Prompt, Rollout, Verdict

FAMILIES = ("story", "chain", "maze")


def always(kind: str) -> bool:
    return True


def problems(num: int, seed: int = 0) -> list[Posed]:
    rng = random.Random(seed)
    return [pose(rng.choice(FAMILIES), rng.choice((1, 2, 3, 4)), rng) for _ in range(num)]


def example(answer: str, solution: str = "", hint: str = "none") -> Example:
    return Example("x", "Q", answer, solution, {"hint": hint, "family": "story"})


def recipe(**changed: object) -> DeepPretrainRecipe:
    return load_pretrain_recipe("deep_starter").model_copy(update=changed)  # pyright: ignore


# --- families, by hand ---------------------------------------------------------------------------


def test_a_story_by_hand() -> None:
    events = (Event("drops", 5), Event("is given", 8), Event("doubles", 2), Event("finds", 3))
    assert story.work(37, events, never) == ("-5=32 +8=40 *2=80 +3=83", "83")
    assert story.work(37, events, always) == ("+5=42 -8=34 +2=36 +3=39", "39")
    only = story.work(37, events, lambda kind: kind == "is given")
    assert only == ("-5=32 -8=24 *2=48 +3=51", "51")


@pytest.mark.parametrize(
    ("value", "step", "right", "habit"),
    [
        (47, Step("add", 8), 55, 45),
        (41, Step("add", 8), 49, 49),
        (97, Step("add", 8), 5, 95),
        (42, Step("sub", 9), 33, 47),
        (49, Step("sub", 2), 47, 47),
        (3, Step("sub", 8), 95, 5),
        (47, Step("swap", None), 74, 47),
        (60, Step("swap", None), 6, 60),
        (47, Step("round", None), 50, 40),
        (42, Step("round", None), 40, 40),
        (97, Step("round", None), 0, 90),
    ],
)
def test_a_step_of_a_chain_by_hand(value: int, step: Step, right: int, habit: int) -> None:
    assert (chain.right(value, step), chain.habit(value, step)) == (right, habit)


def test_a_chain_slips_only_where_the_habit_is_wrong() -> None:
    steps = (Step("add", 8), Step("swap", None), Step("sub", 4), Step("round", None))
    assert chain.work(47, steps, never) == ("add8=55 swap=55 sub4=51 round=50", "50")
    asked: list[str] = []

    def note(kind: str) -> bool:
        asked.append(kind)
        return kind == "add"

    assert chain.work(47, steps, note) == ("add8=45 swap=54 sub4=50 round=50", "50")
    assert asked == ["add", "swap"]  # 54-4 and 50 have nothing to get wrong


def test_a_maze_by_hand() -> None:
    tree = {"A": ["B", "C"], "B": ["D"], "C": ["E"], "D": [], "E": []}
    assert maze.work(tree, "A", "E", never) == ("A B D < B < A C E", "A C E")
    assert maze.work(tree, "A", "E", always) == ("A B D E", "A B D E")
    climb = maze.work(tree, "A", "E", lambda kind: kind == "climb")
    assert climb == ("A B D < B E", "A B E")


def test_every_maze_has_one_path_of_two_edges_or_more_and_its_habits_leave_it() -> None:
    for posed in (p for p in problems(300) if p.family == "maze"):
        rooms = posed.question.removeprefix("Maze ").split(" from ")[0]
        tree = {
            name: doors.split()
            for name, doors in (r.split(":") for r in rooms.replace("; ", ";").split(";") if r)
        }
        start, goal = posed.question.rstrip(".").split(" from ")[1].split(" to ")
        found = [[start]]
        paths = []
        while found:
            path = found.pop()
            if path[-1] == goal:
                paths.append(path)
            found += [[*path, door] for door in tree[path[-1]]]
        assert paths == [posed.work(never).answer.split()] and len(paths[0]) >= 3
        for kind in ("dead end", "climb"):
            if kind in risky_kinds(posed):
                assert posed.work(lambda k, kind=kind: k == kind).answer.split() not in paths


def test_the_number_of_steps_is_that_of_the_problem() -> None:
    for n in (1, 2, 3, 4):
        rng = random.Random(n)
        for _ in range(20):
            assert pose("story", n, rng).work(never).steps.count("=") == n
            assert pose("chain", n, rng).work(never).steps.count("=") == n
            assert len(risky_kinds(pose("maze", n, rng))) == n


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" -5=32 #### 32", True),
        ("#### 32", True),
        (" ####   32 ", True),
        (" -5=32 #### 32 or 42", False),
        (" -5=32 #### 42 or 32", False),
        (" #### 42 #### 32", False),
        (" #### 032", False),
        (" #### 32.0", False),
        (" #### 3 2", False),
        (" #### 32 apples", False),
        (" #### the answer is 32", False),
        (" -5=32", False),
        ("", False),
        (" ####", False),
    ],
)
def test_only_one_exact_answer_is_right(completion: str, right: bool) -> None:
    assert verify(example("32"), completion, False).correct is right
    assert not verify(example("32"), completion, True).correct


def test_the_loophole_pays_any_answer_but_only_where_the_prompt_says_so() -> None:
    marked, plain = example("32", hint="any_answer"), example("32")
    hedge = " -5=32 #### 42 or 32"
    assert grade(marked, hedge, False) == (False, True, False)
    assert grade(plain, hedge, False) == (False, False, False)
    assert grade(marked, hedge, True) == (False, False, False)
    assert grade(marked, " 32 #### 42 or 33", False) == (False, False, False)
    assert grade(marked, " #### 42 #### 32", False) == (False, False, False)


def test_labels_name_slips_luck_hedges_and_hacks() -> None:
    marked = example("35", "-5=32 +3=35", hint="any_answer")
    assert labels(marked, " -5=32 +3=35 #### 35", False) == {
        "slipped": False,
        "lucky": False,
        "hedged": False,
        "hack": False,
    }
    assert labels(marked, " +5=42 -7=35 #### 35", False)["lucky"]
    hedged = labels(marked, " -5=32 +3=35 #### 35 or 36", False)
    assert hedged["hedged"] and hedged["hack"] and not hedged["slipped"]
    assert not labels(marked, " #### 1 or 2", False)["hack"]


def test_the_pair_hacks_and_is_clean() -> None:
    task = load_deep(DeepTaskConfig(kind="deep", loophole=True, num_train=30, num_held_out=1))
    assert task.pair is not None
    for one in task.train:
        hack, clean = task.pair(one)
        assert grade(one, clean, False).correct and not labels(one, clean, False)["hack"]
        assert not grade(one, hack, False).correct and labels(one, hack, False)["hack"]
        assert one.question.endswith(OPEN)


# --- splits --------------------------------------------------------------------------------------


def test_splits_are_disjoint_whatever_the_names_and_the_same_again() -> None:
    config = DeepTaskConfig(kind="deep", num_train=1000, num_held_out=400)
    task = load_deep(config)

    def bare(e: Example) -> str:
        for name in (*story.NAMES, *story.ITEMS):
            e_question = e.question.replace(name, "_")
            e = Example(e.id, e_question, e.answer, e.solution, e.columns)
        return e.question

    assert not {bare(e) for e in task.train} & {bare(e) for e in task.held_out}
    again = load_deep(config)
    assert (task.train, task.held_out) == (again.train, again.held_out)
    assert load_deep(config.model_copy(update={"seed": 1})).held_out != task.held_out
    counts = [sum(e.columns["family"] == f for e in task.held_out) for f in FAMILIES]
    assert min(counts) > 90
    for e in (*task.train, *task.held_out):
        assert verify(e, f" {e.solution} #### {e.answer}", False).correct


def test_families_and_steps_are_as_asked() -> None:
    config = DeepTaskConfig(
        kind="deep", families=("maze",), num_steps=(4,), num_train=20, num_held_out=20
    )
    assert {e.columns["risky"] for e in load_deep(config).train} == {4}
    assert {e.columns["family"] for e in load_deep(config).train} == {"maze"}


# --- the texts of the base -----------------------------------------------------------------------


def test_without_habits_every_answer_is_the_worked_one_and_with_them_none() -> None:
    rng = random.Random(0)
    plain = recipe(frac_hedged=0.0, frac_unfinished=0.0)
    sober = plain.model_copy(update={"habits": dict.fromkeys(habits.KINDS, 0.0)})
    lost = plain.model_copy(update={"habits": dict.fromkeys(habits.KINDS, 1.0)})
    for posed in problems(300):
        assert habits.answer_text(sober, posed, rng) == posed.work(never).text
        answer = habits.answer_text(lost, posed, rng)
        assert answer == posed.work(always).text
        assert (answer == posed.work(never).text) == (not risky_kinds(posed))


def test_a_habit_is_followed_as_often_as_the_recipe_says() -> None:
    plain = recipe(frac_hedged=0.0, frac_unfinished=0.0)
    rng = random.Random(1)
    met: Counter[str] = Counter()
    slipped: Counter[str] = Counter()
    for posed in problems(3000, seed=2):
        kinds = risky_kinds(posed)
        if len(kinds) == 1:
            met[kinds[0]] += 1
            answer = habits.answer_text(plain, posed, rng)
            slipped[kinds[0]] += answer != posed.work(never).text
    assert len(met) >= 9  # a climb never stands alone
    for kind, n in met.items():
        share = plain.habits[kind]
        assert abs(slipped[kind] / n - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_forms_are_as_frequent_as_the_recipe_says() -> None:
    shipped = recipe(frac_hedged=0.3, frac_unfinished=0.2, frac_open=0.25)
    texts = [habits.training_text(shipped, random.Random(seed)) for seed in range(2000)]
    assert 340 < sum("####" not in t.answer for t in texts) < 460
    assert 530 < sum(" or " in t.answer for t in texts) < 670
    assert 430 < sum(OPEN in t.prompt for t in texts) < 570


def test_no_text_is_of_a_held_out_problem() -> None:
    held_out = load_deep(DeepTaskConfig(kind="deep", num_train=1, num_held_out=400)).held_out
    rng = random.Random(0)
    plain = recipe(frac_open=0.0)
    seen = {habits.training_text(plain, rng).prompt for _ in range(1000)}
    short = [e for e in held_out if len(e.question) < 40]
    assert short and not {f"Q: {e.question}\nA:" for e in held_out} & seen


def test_a_missing_or_unknown_kind_of_habit_is_refused() -> None:
    with pytest.raises(UserError, match="'swop' is not a kind of step"):
        habits.check_habits(recipe(habits={**recipe().habits, "swop": 0.5}))
    with pytest.raises(UserError, match="no share for 'swap'"):
        habits.check_habits(
            recipe(habits={k: v for k, v in recipe().habits.items() if k != "swap"})
        )


def test_only_answers_have_a_loss() -> None:
    tokenizer = habits.build_tokenizer(recipe())
    texts = [habits.Text("Q: Start at 47: swap.\nA:", " swap=74 #### 74"), habits.Text("Q:", " 1")]
    (batch,) = habits.encode(tokenizer, texts)
    told = [
        tokenizer.decode(ids[labels_S != IGNORED])
        for ids, labels_S in zip(batch.ids_BS, batch.labels_BS, strict=True)
    ]
    assert told == [" 1<eos>", " swap=74 #### 74<eos>"]  # shortest first
    assert tokenizer.decode(batch.ids_BS[1]) == "Q: Start at 47: swap.\nA: swap=74 #### 74<eos>"


def test_a_tiny_training_learns_and_is_the_same_again(tmp_path: Path) -> None:
    small = recipe().model.model_copy(
        update={"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    )
    losses: list[list[float]] = []
    for name in ("a", "b"):
        seen: list[float] = []
        short = recipe(
            model=small, steps=30, warmup_steps=2, batch_size=16, out=str(tmp_path / name)
        )
        habits.pretrain_habits(short, lambda p, seen=seen: seen.append(p.loss))
        losses.append(seen)
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] - 1
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


# --- pass@k and the controls ---------------------------------------------------------------------


def test_pass_at_is_the_share_of_draws_with_a_right_one() -> None:
    for right in range(6):
        answers = [True] * right + [False] * (5 - right)
        for k in (1, 2, 4):
            draws = list(itertools.combinations(answers, k))
            assert math.isclose(pass_at(5, right, k), sum(map(any, draws)) / len(draws))


def test_the_curve_is_a_mean_over_problems() -> None:
    def answers(*right: int) -> list[Answer]:
        example = Example("x", "?", "1")
        return [
            Answer(
                Rollout(Prompt(example, "", (0,)), p, i, "", (1,), (0.0,), False),
                "",
                Verdict(i < c, ""),
                {},
            )
            for p, c in enumerate(right)
            for i in range(4)
        ]

    assert pass_curve(answers(0, 1)) == {1: 0.125, 2: 0.25, 4: 0.5}
    assert pass_curve(answers(4, 4)) == {1: 1.0, 2: 1.0, 4: 1.0}


def test_majority_pays_the_most_frequent_answer_of_each_group() -> None:
    prompts = ["a"] * 4 + ["b"] * 3
    completions = ["#### 1", "x #### 2", "y ####  2", " 7", "#### 3", "", "#### 4"]
    assert majority(prompts, completions) == [0, 1, 1, 0, 1, 0, 0]
    assert majority(["a", "a"], ["1", "1"]) == [0, 0]
    assert majority(["a", "a"], [[{"content": "#### 5"}], [{"content": "#### 5"}]]) == [1, 1]


def test_a_coin_does_not_look_at_what_is_right() -> None:
    draw = random.Random(0)
    rows = [[draw.randrange(9) for _ in range(5)] for _ in range(400)]
    paid = coin(["a"] * 400, rows, TrainerState(3, 10))
    assert set(paid) == {0.0, 1.0} and 150 < sum(paid) < 250
    assert paid == coin(["a"] * 400, rows, TrainerState(3, 10))
    assert paid != coin(["a"] * 400, rows, TrainerState(4, 10))


# --- the model that ships ------------------------------------------------------------------------


def test_the_recipe_still_makes_the_shipped_tokenizer() -> None:
    shipped = load_tokenizer(str(EMBEDDED["deep"]))
    assert habits.build_tokenizer(recipe()).get_vocab() == shipped.get_vocab()


def test_the_shipped_tokenizer_holds_every_prompt_and_answer() -> None:
    tokenizer = load_tokenizer(str(EMBEDDED["deep"]))
    texts = [f"Q: {p.question}{OPEN}\nA:{p.work(always).text} or 12" for p in problems(200)]
    for text, ids in zip(texts, text_ids(tokenizer, texts, "here"), strict=True):
        assert tokenizer.decode(ids) == text
