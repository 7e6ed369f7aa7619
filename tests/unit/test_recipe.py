"""Recipes: what they resolve to, what is refused and how it is said, and the way back to TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from operando.errors import UserError
from operando.recipe.base import Config
from operando.recipe.data import LoraConfig, WordsTaskConfig
from operando.recipe.run import Recipe
from operando.recipe.update import ClipLoss, GspoTokenLoss, RlooAdvantage
from operando.recipe_io import (
    Listed,
    apply_override,
    check,
    listed,
    load_pipeline_recipe,
    load_pretrain_recipe,
    load_recipe,
    load_sft_recipe,
    load_study_recipe,
    merge,
    read_toml,
    shipped_recipes,
    to_toml,
)

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("**/*.toml"))
TINY = ROOT / "recipes" / "tiny.toml"


def tiny(*overrides: str) -> Recipe:
    """The tiny recipe with overrides."""
    return load_recipe(str(TINY), overrides)


def refused(*overrides: str) -> str:
    """What is said against the tiny recipe with these overrides."""
    with pytest.raises(UserError) as error:
        tiny(*overrides)
    return str(error.value)


# --- how a recipe is put together ----------------------------------------------------------------


def test_a_base_is_merged_table_by_table(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(TINY.read_text())
    (tmp_path / "top.toml").write_text(
        'base = "base.toml"\nname = "top"\n[optim]\nwarmup_steps = 1\n[model]\nlayers = "first:2"\n'
    )
    below, top = tiny(), load_recipe(str(tmp_path / "top.toml"))
    assert top.name == "top"
    assert top.optim.warmup_steps == 1 and top.optim.lr == 1e-3, "the table's other key stays"
    assert top.model.layers == "first:2" and top.model.lora == below.model.lora
    assert top.rewards == below.rewards and top.task == below.task


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('base = "gone.toml"', "gone.toml"),
        ('base = "middle.toml"', "one level is the limit"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "middle.toml").write_text('base = "low.toml"\n')
    (tmp_path / "low.toml").write_text(TINY.read_text())
    file = tmp_path / "top.toml"
    file.write_text(text + "\n")
    with pytest.raises(UserError) as error:
        load_recipe(str(file))
    assert said in str(error.value) and "top.toml" in str(error.value)


def test_a_table_of_another_kind_replaces_and_does_not_mix() -> None:
    old: dict[str, object] = {"loss": {"kind": "clip", "clip_low": 0.1, "dual_clip": 3.0}}
    assert merge(old, {"loss": {"kind": "cispo"}}) == {"loss": {"kind": "cispo"}}
    assert merge(old, {"loss": {"clip_low": 0.3}}) == {
        "loss": {"kind": "clip", "clip_low": 0.3, "dual_clip": 3.0}
    }
    assert old == {"loss": {"kind": "clip", "clip_low": 0.1, "dual_clip": 3.0}}, "not in place"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=3", {"a": {"b": 3, "c": 1}}),
        ("a.b=3e-4", {"a": {"b": 3e-4, "c": 1}}),
        ("a.b=last:4", {"a": {"b": "last:4", "c": 1}}),
        ('a.b="3"', {"a": {"b": "3", "c": 1}}),
        ("a.b=[1,2]", {"a": {"b": [1, 2], "c": 1}}),
        ("a.b=x=y", {"a": {"b": "x=y", "c": 1}}),
        ("a={b={d=true}}", {"a": {"b": {"d": True}, "c": 1}}),
        ("new.deep.key=1", {"a": {"b": 0, "c": 1}, "new": {"deep": {"key": 1}}}),
    ],
)
def test_an_override_changes_one_key(override: str, expected: dict[str, object]) -> None:
    assert apply_override({"a": {"b": 0, "c": 1}}, override) == expected


@pytest.mark.parametrize("override", ["steps", "=3", " =3"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    assert "expected a.b=value" in refused(override)


def test_overrides_reach_the_recipe_and_the_last_one_counts() -> None:
    recipe = tiny(
        "steps=7",
        "steps=9",
        "optim.lr=1",
        "loss={kind='gspo_token'}",
        "advantage.kind=rloo",
        "task={kind='words',num_steps=[1,3]}",
    )
    assert recipe.steps == 9
    assert recipe.optim.lr == 1.0 and isinstance(recipe.optim.lr, float)
    assert recipe.loss == GspoTokenLoss(kind="gspo_token")
    assert recipe.advantage == RlooAdvantage(kind="rloo")
    assert isinstance(recipe.task, WordsTaskConfig) and recipe.task.num_steps == (1, 3)


def test_weights_follow_the_stages() -> None:
    plain = tiny()
    assert plain.weights_at(1) == plain.weights_at(4) == {"correct": 1.0, "format": 0.1}
    staged = tiny(
        "stages=[{until=2,weights={correct=0.5,format=2}},{weights={correct=3,format=0}}]"
    )
    weights = [staged.weights_at(step) for step in (1, 2, 3, 4)]
    first, last = {"correct": 0.5, "format": 2.0}, {"correct": 3.0, "format": 0.0}
    assert weights == [first, first, last, last]


def test_the_last_stage_may_end_where_the_run_does() -> None:
    recipe = tiny("steps=3", "stages=[{until=3,weights={correct=1,format=0}}]")
    assert recipe.weights_at(3) == {"correct": 1.0, "format": 0.0}


# --- unknown keys and values ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "meant"),
    [
        ("stepz=3", "stepz", "steps"),
        ("modle.id=x", "modle", "model"),
        ("model.layer=all", "model.layer", "layers"),
        ("model.lora.rnak=2", "model.lora.rnak", "rank"),
        ("task.num_trian=5", "task.num_trian", "num_train"),
        ("prompt.fewshot=2", "prompt.fewshot", "few_shot"),
        ("rollout.num_generation=2", "rollout.num_generation", "num_generations"),
        ("rewards.format.patern=x", "rewards.format.patern", "pattern"),
        ("advantage={kind='group',scael='none'}", "advantage.scael", "scale"),
        ("advantage={kind='gae',lamda=1}", "advantage.lamda", "lam"),
        ("loss={kind='clip',clip_hgih=1}", "loss.clip_hgih", "clip_high"),
        ("kl.coeff=1", "kl.coeff", "coef"),
        ("update.agregation=x", "update.agregation", "aggregation"),
        ("optim.learning=1", "optim.learning", None),
        ("eval.evry=1", "eval.evry", "every"),
        ("checkpoint.kep=1", "checkpoint.kep", "keep"),
        ("tracking.projct=x", "tracking.projct", "project"),
        ("parallel.knd=ddp", "parallel.knd", "kind"),
        pytest.param(
            "stages=[{weigths={},weights={correct=1,format=1}}]", "stages.0.weigths", "weights"
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_one(override: str, path: str, meant: str | None) -> None:
    message = refused(override)
    assert f"{path}: unknown key." in message
    if meant is None:
        assert "Did you mean" not in message and "Known: " in message
    else:
        assert f"Did you mean {meant!r}?" in message


@pytest.mark.parametrize(
    ("override", "path", "kinds"),
    [
        ("loss={clip_low=0.1}", "loss", ("clip", "gspo_token", "cispo")),
        ("rewards.extra={weight=1}", "rewards.extra", ("correct", "format", "function")),
    ],
)
def test_a_table_without_kind_is_told_the_kinds(
    override: str, path: str, kinds: tuple[str, ...]
) -> None:
    message = refused(override)
    assert f"{path}: needs kind" in message
    assert all(repr(kind) in message for kind in kinds), message


@pytest.mark.parametrize(
    ("override", "path", "meant"),
    [
        ("task.kind=word", "task.kind", "words"),
        ("rewards.correct.kind=corect", "rewards.correct.kind", "correct"),
        ("advantage.kind=grupo", "advantage.kind", "group"),
        ("loss.kind=gspo_tok", "loss.kind", "gspo_token"),
    ],
)
def test_an_unknown_kind_names_the_nearest_one(override: str, path: str, meant: str) -> None:
    message = refused(override)
    assert f"{path}: " in message and f"Did you mean {meant!r}?" in message


def test_every_mistake_is_said_at_once_with_its_file() -> None:
    message = refused("stepz=3", "optim.lr=-1", "model.dtype=int8", "rewards.extra={weight=1}")
    assert message.startswith("4 mistakes in the recipe\n")
    lines = message.splitlines()[1:]
    assert len(lines) == 4 and all(line.startswith(f"{TINY}: ") for line in lines)
    for path in ("stepz", "optim.lr", "model.dtype", "rewards.extra: needs kind"):
        assert sum(path in line for line in lines) == 1, path


def test_a_missing_key_is_named() -> None:
    tables = read_toml(TINY)
    del tables["steps"]
    with pytest.raises(UserError, match="steps: missing, and it has no default"):
        check(Recipe, tables, "here")


def test_a_misspelt_recipe_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'tiny.toml'"):
        load_recipe("tinny")


# --- values and combinations that are refused ----------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("name=a/b", "name"),
        ("name=''", "name"),
        ("steps=0", "steps"),
        ("steps='4'", "steps"),
        ("steps=2.5", "steps"),
        ("seed=-1", "seed"),
        ("rewards={kind='correct'}", "rewards"),
        ("model.lora.rank=0", "model.lora.rank"),
        ("model.lora.alpha=0", "model.lora.alpha"),
        ("task.max_number=1", "task.max_number"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("rollout.num_prompts=0", "rollout.num_prompts"),
        ("rollout.discard=['short']", "rollout.discard"),
        ("loss={kind='clip',clip_low=1}", "loss.clip_low"),
        ("loss={kind='clip',dual_clip=1}", "loss.dual_clip"),
        ("advantage={kind='gae',lam=1.5}", "advantage.lam"),
        ("advantage={kind='reward_to_go',gamma=0}", "advantage.gamma"),
        ("kl.coef=-1", "kl.coef"),
        ("update.epochs=0", "update.epochs"),
        ("optim.lr=0", "optim.lr"),
        ("optim.lr=high", "optim.lr"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("eval.every=0", "eval.every"),
        ("checkpoint.keep=0", "checkpoint.keep"),
    ],
)
def test_a_value_out_of_its_range_is_named(override: str, path: str) -> None:
    assert f"{TINY}: {path}" in refused(override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("prompt.template=Q:",), "must contain {question}"),
        (("prompt.system=Be brief.",), 'system is for format = "chat"'),
        (("rollout.top_p=0.9",), "full distribution only"),
        (("rewards.f={kind='function',path='mod.name'}",), "module:function"),
        (("kl.coef=0",), "would have no effect"),
        (("kl={place='reward',unbiased=false}",), "in the reward it has no effect"),
        (("kl={estimator='k1',unbiased=false}",), "zero expected gradient"),
        (("rollout.num_generations=1",), "advantage.kind = 'group' compares siblings"),
        (("rollout.num_prompts=1", "advantage={kind='leave_one_group_out'}"), "num_prompts >= 2"),
        (("rollout.num_generations=1", "advantage={kind='rloo'}"), "'rloo' compares siblings"),
        (
            ("rollout={num_generations=1,discard=['zero_variance']}", "advantage={kind='gae'}"),
            "a group of one never varies",
        ),
        (("update.num_minibatches=3",), "does not divide num_prompts * num_generations = 16"),
        (("optim.warmup_steps=4",), "leaves no step of 4"),
        (
            ("stages=[{weights={correct=1,format=1}},{weights={correct=1,format=1}}]",),
            "only the last stage may leave out `until`",
        ),
        (
            (
                "stages=[{until=3,weights={correct=1,format=1}},"
                "{until=3,weights={correct=1,format=1}},{weights={correct=1,format=1}}]",
            ),
            "`until` must rise, got [3, 3]",
        ),
        (
            ("stages=[{until=3,weights={correct=1,format=1}}]",),
            "stages end at step 3, the run has 4",
        ),
        (
            ("stages=[{weights={corect=1,correct=1,format=1}}]",),
            "stages.0.weights.corect: no such reward. Did you mean 'correct'?",
        ),
        (("stages=[{weights={correct=1}}]",), "stages.0.weights does not name ['format']"),
    ],
)
def test_an_impossible_combination_is_refused(overrides: tuple[str, ...], said: str) -> None:
    assert said in refused(*overrides)


def test_four_bit_weights_without_lora_are_refused() -> None:
    tables = read_toml(TINY)
    tables["model"] = {"id": "starter", "quantization": "nf4"}
    with pytest.raises(UserError, match="quantization needs model.lora"):
        check(Recipe, tables, "here")


def test_no_reward_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="rewards"):
        check(Recipe, {**read_toml(TINY), "rewards": {}}, "here")


@pytest.mark.parametrize(
    "overrides",
    [
        ("rollout.num_generations=1", "advantage={kind='gae'}"),
        ("rollout.num_generations=1", "advantage={kind='leave_one_group_out'}"),
        ("kl={place='reward',estimator='k1'}",),
        ("kl={estimator='k1'}",),
        ("kl={estimator='k2',unbiased=false}",),
        ("prompt={format='chat',system='Be brief.'}",),
        ("optim.warmup_steps=3",),
        ("update.num_minibatches=16",),
    ],
)
def test_its_possible_neighbour_is_accepted(overrides: tuple[str, ...]) -> None:
    assert tiny(*overrides) != tiny()


# --- the recipes that ship, and the way back -----------------------------------------------------


def load_any(file: Path) -> Config:
    tables = read_toml(file)
    if "arms" in tables:
        return load_study_recipe(str(file))
    if "rl" in tables:
        return load_pipeline_recipe(str(file))
    if "num_pairs" in tables:
        return load_sft_recipe(str(file))
    return (load_pretrain_recipe if "out" in tables else load_recipe)(str(file))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_checks_and_comes_back_from_toml(file: Path) -> None:
    recipe = load_any(file)
    assert check(type(recipe), tomllib.loads(to_toml(recipe)), "written") == recipe
    opening = file.read_text().splitlines()[:3]
    assert all(line.startswith("# ") for line in opening), "question, time, what to expect"


def test_the_shipped_recipes_are_the_checkout_s() -> None:
    assert len(RECIPES) >= 5 and shipped_recipes() == RECIPES


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "rollout.stop=['\\n\\n','\"','\\\\',\"\\u00e9\\t\"]",
            "prompt.template='a {question} \"b\"'",
        ),
        ("stages=[{until=2,weights={correct=0.5,format=2}},{weights={correct=3,format=0}}]",),
        ("advantage={kind='gae',lam=0.95}", "loss={kind='cispo'}", "optim.lr=1e-12"),
    ],
)
def test_a_resolved_recipe_comes_back_from_toml(overrides: tuple[str, ...]) -> None:
    comes_back(tiny(*overrides))


def test_reward_names_that_toml_must_quote_come_back() -> None:
    odd = {"a b": {"kind": "correct"}, "dotted.name": {"kind": "format", "pattern": '"\\d"'}}
    comes_back(check(Recipe, {**read_toml(TINY), "rewards": odd}, "here"))


def comes_back(recipe: Recipe) -> None:
    text = to_toml(recipe)
    again = check(Recipe, tomllib.loads(text), "written")
    assert again == recipe and to_toml(again) == text


def test_a_resolved_recipe_writes_every_default() -> None:
    written = tomllib.loads(to_toml(tiny()))
    assert written["loss"] == ClipLoss().model_dump(exclude_none=True)
    assert written["update"]["aggregation"] == "token_mean"


def test_a_shipped_recipe_with_a_point_in_its_name_is_found() -> None:
    assert load_recipe("layer_frozen_qwen1.5b").model.layers == "24-27"


def test_an_update_of_nothing_is_an_error() -> None:
    with pytest.raises(ValidationError, match="at least 1 item"):
        LoraConfig(targets=())


def test_every_shipped_recipe_says_what_it_asks_and_how_long_it_takes() -> None:
    rows = {file.stem: listed(file) for file in shipped_recipes()}
    for row in rows.values():
        assert row.question[-1] in "?." and row.hardware, row
        assert not {"Question:", "Expected:", "#"} & set(f"{row.question} {row.hardware}".split())
    assert rows["tiny"] == Listed(
        "tiny", "does everything still work together?", "1 CPU core, about 10 seconds."
    )


def test_a_question_of_two_lines_is_one(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("# Question: what does it know: a lot, or\n# nothing?\n# Expected: no\nb = 1\n")
    assert listed(file) == Listed("a", "what does it know: a lot, or nothing?", "")
