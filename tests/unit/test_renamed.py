"""A renamed value is an error that names the new one in a recipe, and is read in a stored file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from operando.drift.chain import RECORD, chain_config, training_of
from operando.errors import UserError
from operando.recipe.renamed import RENAMED, refuse_renamed, with_new_names
from operando.recipe.run import Recipe
from operando.recipe_io import check, load_recipe, to_toml
from operando.run_folder import FORMAT, read_recipe
from operando.tasks.canary import load_canary

OLD = [
    ({"kind": "features", "file": "p.json", "mode": "seed"}, "mode", "mechreward"),
    ({"kind": "think_format", "scheme": "seed"}, "scheme", "lf_grpo"),
    ({"kind": "tag_fence", "scheme": "seed"}, "scheme", "lf_grpo"),
    ({"kind": "process", "scheme": "seed"}, "scheme", "recursive_lm"),
]


@pytest.mark.parametrize(("table", "key", "new"), OLD)
def test_a_renamed_value_in_a_recipe_is_an_error_that_names_the_new_one(
    table: dict[str, str], key: str, new: str
) -> None:
    toml = ", ".join(f'{k} = "{v}"' for k, v in table.items())
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", (f"rewards.x={{{toml}}}", "stepz=3"))
    said = str(caught.value)
    assert f'rewards.x.{key}: "seed" was renamed to "{new}"' in said
    assert "2 mistakes" in said and "stepz: unknown key" in said and "should be" not in said


def test_a_renamed_key_in_a_recipe_is_an_error_that_names_the_new_one() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", ('rewards.x={kind="features",pack="a.json"}',))
    said = str(caught.value)
    assert 'rewards.x.pack: this key was renamed to "file"' in said
    assert "1 mistake in the recipe" in said and "missing" not in said


def test_a_renamed_key_of_a_stored_recipe_is_read() -> None:
    stored = {"rewards": {"pack": {"kind": "features", "pack": "a.json"}, "x": {"pack": 1}}}
    read, said = with_new_names(stored)
    assert read == {"rewards": {"pack": {"kind": "features", "file": "a.json"}, "x": {"pack": 1}}}
    assert len(said) == 1


def test_a_renamed_preset_is_an_error_that_names_the_new_one() -> None:
    with pytest.raises(
        UserError, match='projection.preset: "seed" was renamed to "projected_grpo"'
    ):
        load_recipe("tiny", ("projection.directions=d", "projection.preset=seed"))


def test_the_seed_of_a_generator_is_no_renamed_value() -> None:
    tables: dict[str, object] = {
        "seed": 1,
        "name": "seed",
        "rewards": {"seed": {"kind": "correct"}},
    }
    assert with_new_names(tables) == (tables, [])


def test_every_new_value_of_a_recipe_is_valid() -> None:
    for table, key, new in OLD:
        given = {"rewards": {"x": table | {key: new}}}
        tiny = load_recipe("tiny").model_dump(mode="json", exclude_none=True)
        assert "x" in check(Recipe, tiny | given, "here").rewards


@pytest.mark.parametrize(
    ("owner", "option"), [("sae train", "--mode"), ("sae", "format"), ("canary", "--classifier")]
)
def test_a_renamed_option_names_the_new_value(owner: str, option: str) -> None:
    new = RENAMED[owner, option, "seed"]
    with pytest.raises(UserError, match=f'{option} seed: "seed" was renamed to "{new}"'):
        refuse_renamed(owner, option, "seed")
    refuse_renamed(owner, option, new)


def test_the_canary_says_it() -> None:
    with pytest.raises(UserError, match="mechreward"):
        load_canary(classifier="seed")


def test_a_run_folder_with_an_old_value_is_read(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", ("rewards.x={kind='process', scheme='recursive_lm'}",))
    text = to_toml(recipe).replace('"recursive_lm"', '"seed"')
    assert '"seed"' in text
    (tmp_path / "recipe.toml").write_text(text)
    manifest = {"format": FORMAT, "name": "x", "started": "", "versions": {}, "warnings": []}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_recipe(tmp_path) == recipe


def test_a_chain_with_an_old_mode_is_read(tmp_path: Path) -> None:
    settings = {**vars(chain_config("sae_rl", 512)), "mode": "seed"}
    kept = {"tokens": 9, "best_epoch": 1, "val_error": 0.5, "dead": 0.0, "resampled": 0}
    record = {"settings": settings, "seconds": 1.0, "history": [], **kept}
    (tmp_path / RECORD).write_text(json.dumps(record))
    assert training_of(tmp_path).settings == chain_config("sae_rl", 512)
