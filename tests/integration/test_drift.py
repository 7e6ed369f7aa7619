"""SAE chains of a tiny run: null arms, resume, planted truths, errors."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from operando.drift.chain import (
    chain_config,
    kept_tokens,
    load_chain,
    sae_folder,
    split_tokens,
    training_of,
)
from operando.drift.collect import acts_file, chosen_texts, load_acts, read_texts
from operando.drift.commands import show_drift, train_run_saes
from operando.drift.compare import check_conditions, compare_drift
from operando.drift.evaluate import evaluate_saes
from operando.drift.report import drift_report, drift_table
from operando.errors import UserError
from operando.recipe.rewards import ScorerReward
from operando.recipe.update import KlConfig, OptimConfig
from operando.recipe_io import to_toml
from operando.run_folder import read_recipe
from operando.sae.formats import load_sae, save_sae
from tests.integration.runs import tiny, trained

QUIET = Console(quiet=True)
OTHER_REWARD = {"correct": ScorerReward(kind="scorer", scorer="strict")}
OTHER_OPTIM = OptimConfig(lr=1e-3)
CONFIG = {"expansion": 1, "k": 4, "epochs": 1, "batch_size": 64}
SITE = "blocks.4.hook_resid_post"


def train(run: Path, **settings: object) -> None:
    options = {"layers": "1,4", "writer": "both", "tokens": 1000, "num_seeds": 2, **CONFIG}
    train_run_saes(QUIET, run, **(options | settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trained(tiny(tmp_path_factory.mktemp("runs"), "optim.lr=1e-2", "checkpoint.every=2"))
    train(folder)
    return folder


def test_every_number_has_its_null_beside_it(run: Path) -> None:
    report = drift_report(run, chosen_texts(run))
    cells = [("1", 0, 2), ("1", 2, 4), ("4", 0, 2), ("4", 2, 4)]
    measures = ("decoder", "encoder", "decoupling")
    assert [(r.site[7], r.from_step, r.to_step, r.measure) for r in report.transitions] == [
        (*cell, measure) for cell in cells for measure in measures
    ]
    assert all(r.real > 0 and r.null > 0 for r in report.transitions)
    # Layers 3 to 5 are trained: after layer 1 nothing changed, so both arms are equal to the bit.
    frozen = [r for r in report.transitions if r.site.startswith("blocks.1.")]
    assert all(r.real == r.null and r.excess[0] == 0 and r.q == 1 for r in frozen)
    assert {n.name for n in report.names if n.site.startswith("blocks.1.")} == {"no drift shown"}
    moved = [r for r in report.transitions if r.site == SITE]
    assert all(r.real != r.null for r in moved)
    written = json.loads(report.file.read_text())
    assert len(written["transitions"]) == 12 and report.file.with_suffix(".parquet").is_file()


def test_the_table_is_whole_at_80_columns(run: Path) -> None:
    shown = Console(width=80, file=io.StringIO())
    report = drift_report(run, chosen_texts(run))
    shown.print(drift_table(report))
    lines = shown.file.getvalue().splitlines()
    assert not [line for line in lines if "…" in line]
    rows = [line.split() for line in lines if line[:3] in ("0-2", "2-4")]
    assert len(rows) == len(report.transitions) + len(report.by_match)
    first = report.transitions[0]
    assert rows[0][1:4] == [first.measure, f"{first.real:.4f}", f"{first.null:.4f}"]


def test_the_null_arm_is_the_base_at_every_stage(run: Path) -> None:
    texts = chosen_texts(run)
    first, last = (load_acts(run, texts, step, SITE) for step in (0, 4))
    assert len(first) == texts.num_tokens and not torch.equal(first, last)
    chains = {arm: load_chain(run, SITE, arm, seed=1) for arm in ("real", "null")}
    assert list(chains["real"]) == [0, 2, 4]
    assert torch.equal(chains["real"][0].W_dec_MD, chains["null"][0].W_dec_MD)
    assert chains["null"][4].origin.checkpoint == "step_00000"
    assert chains["real"][4].origin.checkpoint == "step_00004"
    other = load_chain(run, SITE, "real", seed=0)
    assert not torch.equal(other[0].W_dec_MD, chains["real"][0].W_dec_MD)


def test_activations_are_those_of_a_plain_forward(run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from operando.models.load import STARTER

    texts = chosen_texts(run)
    base = AutoModelForCausalLM.from_pretrained(STARTER).eval()
    model = PeftModel.from_pretrained(base, str(run / "checkpoints/step_00004"))
    prompt, completion = list(texts.prompts[5]), list(texts.completions[5])
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[5][0, len(prompt) :]
    got = load_acts(run, texts, 4, SITE)[texts.text_of_token() == 5]
    torch.testing.assert_close(got, hidden, atol=2e-2, rtol=2e-3)


def test_a_killed_training_goes_on_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for arm in ("real", "null"):
        shutil.rmtree(sae_folder(copy, arm, 1, 4, SITE))
    acts_file(copy, chosen_texts(copy), 4, SITE).unlink()
    train(copy)
    for arm in ("real", "null"):
        again, whole = (load_chain(r, SITE, arm, 1)[4] for r in (copy, run))
        assert again.sha256() == whole.sha256()


def jittered(run: Path, number: int) -> None:
    """Move every SAE of a copy by a little noise, as chains of another run would."""
    generator = torch.Generator().manual_seed(number)
    for folder in sorted((run / "saes").glob("*_seed*/step_*/*")):
        sae = load_sae(folder)
        dec, enc = 1e-3 * torch.randn(2, *sae.W_dec_MD.shape, generator=generator)
        save_sae(replace(sae, W_dec_MD=sae.W_dec_MD + dec, W_enc_MD=sae.W_enc_MD + enc), folder)


def with_recipe(run: Path, copy: Path, **tables: object) -> Path:
    """The run under another recipe: what drift compare asks is the recipe, not the name."""
    shutil.copytree(run, copy)
    recipe = read_recipe(run)
    copied = recipe.model_copy(update={"name": copy.name, **tables})
    (copy / "recipe.toml").write_text(to_toml(copied))
    return copy


def test_three_runs_are_compared_only_as_far_as_the_nulls_allow(run: Path, tmp_path: Path) -> None:
    strict = with_recipe(run, tmp_path / "strict", rewards=OTHER_REWARD)
    elsewhere = read_recipe(run).model.model_copy(update={"device": "cpu"})  # not another model
    more_kl = with_recipe(run, tmp_path / "more_kl", kl=KlConfig(coef=0.5), model=elsewhere)
    with pytest.raises(UserError, match="one is a copy of the other"):
        compare_drift(QUIET, [run, strict, more_kl])
    for number, folder in enumerate((strict, more_kl)):
        jittered(folder, number)
    rows = json.loads(compare_drift(QUIET, [run, strict, more_kl]).read_text())["cells"]
    assert [(r["site"][7], r["from_step"], r["measure"]) for r in rows[:4]] == [
        ("1", 0, "decoder"),
        ("1", 0, "encoder"),
        ("1", 0, "decoupling"),
        ("1", 2, "decoder"),
    ]
    assert {row["verdict"] for row in rows if row["site"].startswith("blocks.1.")} == {"undecided"}
    for row in rows:
        A, B, C = row["excess"]
        assert row["reward_effect"][0] == pytest.approx(B[0] - A[0])
        assert row["kl_effect"][0] == pytest.approx(C[0] - A[0])


def test_runs_that_are_no_three_conditions_are_refused(run: Path, tmp_path: Path) -> None:
    strict = with_recipe(run, tmp_path / "strict", rewards=OTHER_REWARD)
    more_kl = with_recipe(run, tmp_path / "more_kl", kl=KlConfig(coef=0.5))
    both = with_recipe(run, tmp_path / "both", kl=KlConfig(coef=0.5), rewards=OTHER_REWARD)
    with pytest.raises(UserError, match="expected three runs"):
        compare_drift(QUIET, [run, run])
    with pytest.raises(UserError, match="given twice"):
        compare_drift(QUIET, [run, run, run])
    for runs, message in (
        ([run, more_kl, strict], r"more_kl \(B\) is rewarded as .* \(A\): rewards must differ"),
        ([run, strict, both], r"both \(C\) is rewarded otherwise than .* only kl may differ"),
        ([run, both, more_kl], r"both \(B\) differs from .* in kl too"),
    ):
        with pytest.raises(UserError, match=message):
            check_conditions(runs)
    longer = with_recipe(run, tmp_path / "longer", kl=KlConfig(coef=0.5), optim=OTHER_OPTIM)
    assert check_conditions([run, strict, more_kl]) == []
    (line,) = check_conditions([run, strict, longer])
    assert "differs from" in line and "in optim" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "9"}, "layer 9 is out of range"),
        ({"writer": "bose"}, "Did you mean 'base'"),
        ({"tokens": 2000}, "SAEs of other texts"),
        (
            {"k": 8, "epochs": 2, "lr": 0.01},
            "other settings: k 4 there, 8 asked; epochs 1 there, 2 asked; lr 0.001 there, 0.01",
        ),
        ({"mode": "sae_rl"}, "mode default there, sae_rl asked"),
        ({"sinks": "keep"}, "sinks drop there, keep asked"),
        ({"sinks": "kept"}, "Did you mean 'keep'"),
        ({"expansion": 2}, "d_sae 128 there, 256 asked"),
        ({"k": 129}, "k = 129 active features of 128"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    run: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(run, **settings)


def test_a_missing_stage_and_a_run_without_saes(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "saes" / "null_seed0" / "step_00002")
    with pytest.raises(UserError, match="seed 0: missing steps 2"):
        show_drift(QUIET, copy)
    shutil.rmtree(copy / "saes")
    shutil.rmtree(copy / "drift")
    with pytest.raises(UserError, match="has no SAE chains"):
        show_drift(QUIET, copy)
    with pytest.raises(UserError, match="not a run folder"):
        show_drift(QUIET, tmp_path / "nothing")


def test_a_picture_of_the_same_numbers_is_the_same_file(run: Path) -> None:
    picture = show_drift(QUIET, run).with_suffix(".svg")
    once = picture.read_bytes()
    show_drift(QUIET, run)
    assert picture.read_bytes() == once


def test_one_seed_gives_no_drift_number(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for arm in ("first", "real", "null"):
        shutil.rmtree(copy / "saes" / f"{arm}_seed1")
    with pytest.raises(UserError, match="chains of one seed"):
        show_drift(QUIET, copy)


def test_not_finite_activations_are_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "drift")
    shutil.rmtree(copy / "saes")
    file = copy / "checkpoints/step_00002/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.full_like(t, torch.nan) for name, t in tensors.items()}, file)
    with pytest.raises(UserError, match="not finite"):
        train(copy)


def test_texts_are_the_writers(run: Path) -> None:
    base, last = read_texts(run, "base", 100), read_texts(run, "last", 100)
    assert base.digest != last.digest and 100 <= base.num_tokens < 140
    assert base.num_tokens == len(base.text_of_token())


def test_quality_of_every_sae_on_texts_that_were_held_out(run: Path) -> None:
    rows, file = evaluate_saes(run)
    assert len(rows) == 2 * 2 * 3  # sites, arms, stages
    table = pq.read_table(file).to_pylist()
    assert {(r["site"], r["arm"], r["step"]) for r in table} == {
        (row.site, row.arm, row.step) for row in rows
    }
    for row in rows:
        assert 0 < row.quality.fvu < 1.5 and 0 < row.quality.l0 <= 4
        assert row.loss.zero_ablated > row.loss.base
        # Its own completions, given their prompts, surprise the policy little.
        assert row.loss.base < 1.5
    # The first SAE is one and the same in both arms, and so is what it is asked about.
    firsts = {row.arm: row for row in rows if row.site == SITE and row.step == 0}
    assert firsts["real"].quality == firsts["null"].quality


def test_how_an_sae_was_trained_is_kept(run: Path) -> None:
    for step, arm in ((0, "real"), (4, "null")):
        kept = training_of(sae_folder(run, arm, 1, step, SITE))
        assert kept.settings == chain_config("default", 128, k=4, epochs=1, batch_size=64)
        assert len(kept.history) == 1 and kept.best_epoch == 1
        # the error over the variance is that of the SAE on the tokens it was not trained on
        texts, sae = chosen_texts(run), load_sae(sae_folder(run, arm, 1, step, SITE))
        held_N = ~split_tokens(texts, kept.settings) & kept_tokens(run, texts, SITE, kept.settings)
        x_ND = load_acts(run, texts, 0, SITE)[held_N]
        error = (x_ND - sae.reconstruct(x_ND)).square().mean()
        assert kept.val_error == pytest.approx(
            float(error / x_ND.var(0, correction=0).mean()), 1e-3
        )
        assert kept.tokens < texts.num_tokens - int(held_N.sum()) + 1
    shown = Console(record=True, width=100)
    train_run_saes(shown, run, "1,4", "both", 1000, 2, **CONFIG)
    text = shown.export_text()
    assert "error / variance" in text and "1.0 of 1" in text and "dead" in text


def test_mode_sae_rl_is_the_published_protocol_and_a_given_setting_counts() -> None:
    middle, last = (chain_config("sae_rl", 7168, is_last_layer=last) for last in (False, True))
    assert (middle.k, last.k) == (64, 256)
    assert (middle.epochs, middle.lr, middle.batch_size) == (20, 1e-4, 512)
    assert (middle.split, middle.val_share, middle.sinks) == ("tokens", 0.2, "keep")
    own = chain_config("sae_rl", 7168, is_last_layer=True, k=32, lr=3e-4, epochs=None)
    assert (own.k, own.lr, own.epochs, own.mode) == (32, 3e-4, 20, "sae_rl")


def test_rows_or_texts_are_held_out_and_sinks_are_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = chosen_texts(run)
    published, own = chain_config("sae_rl", 768), chain_config("default", 768)
    rows_N = split_tokens(texts, published)
    assert int((~rows_N).sum()) == round(0.2 * texts.num_tokens)
    assert len(texts.text_of_token()[~rows_N].unique()) > 0.5 * len(texts.completions)
    by_text_N = split_tokens(texts, own)
    held_texts = texts.text_of_token()[~by_text_N].unique()
    assert not torch.isin(texts.text_of_token()[by_text_N], held_texts).any()
    acts_ND = load_acts(run, texts, 0, SITE)
    acts_ND[17] *= 100
    monkeypatch.setattr("operando.drift.chain.load_acts", lambda *_: acts_ND)
    assert (~kept_tokens(run, texts, SITE, own)).nonzero().flatten().tolist() == [17]
    assert kept_tokens(run, texts, SITE, published).all()
