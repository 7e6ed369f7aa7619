"""Drift without a refit: one SAE over all stages, and the 2 x 2 of model and text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from operando.drift.collect import acts_file, load_acts, read_texts, text_logps
from operando.drift.commands import show_frozen, show_grid
from operando.drift.frozen_sae import frozen_diff, frozen_report
from operando.drift.model_diff import grid_report
from operando.errors import UserError
from operando.models.load import load_model, width_of
from operando.models.policy import Policy
from operando.run import SeedTree
from operando.run_folder import read_recipe
from operando.sae.formats import load_sae, save_sae
from operando.sae.sae import SAE, Origin
from tests.integration.runs import tiny, trained

QUIET = Console(quiet=True)
BELOW, TRAINED = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"


def random_sae(width: int, site: str, features: int = 48) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_MD = torch.nn.functional.normalize(torch.randn(features, width, generator=generator), dim=1)
    zeros_D = torch.zeros(width)
    origin = Origin(model="starter", site=site)
    return SAE(W_MD, torch.zeros(features), W_MD, zeros_D, zeros_D, "topk_relu", k=4, origin=origin)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tiny(
            tmp_path_factory.mktemp("runs"),
            "optim.lr=1e-2",
            "checkpoint.every=2",
            "rollout.num_prompts=16",
        )
    )


@pytest.fixture(scope="module")
def saes(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, width = tmp_path_factory.mktemp("saes"), width_of(read_recipe(run).model)
    for site in (BELOW, TRAINED):
        save_sae(random_sae(width, site), folder / site)
    return {site: folder / site for site in (BELOW, TRAINED)}


@pytest.fixture(autouse=True)
def few_spliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operando.drift.frozen_sae.SPLICE_TOKENS", 100)


def test_below_the_trained_layers_nothing_changes(run: Path, saes: dict[str, Path]) -> None:
    report = frozen_report(run, load_sae(saes[BELOW]), saes[BELOW], BELOW)
    assert [row.step for row in report.stages] == [0, 2, 4]
    assert not report.diff.delta_act_TM.any() and report.control == 0
    for row in report.stages:
        assert (row.changed, row.abs_delta) == (0, 0.0)
        assert (row.fvu, row.beta) == (report.stages[0].fvu, report.stages[0].beta)
        assert row.cosine == pytest.approx(1.0, abs=1e-12)


def test_above_them_features_change_and_the_control_stays_at_zero(
    run: Path, saes: dict[str, Path]
) -> None:
    file = show_frozen(QUIET, run, saes[TRAINED], None)
    written = json.loads(file.read_text())
    assert written["control"] == 0 and written["site"] == TRAINED
    first, *_, last = written["stages"]
    assert (first["changed"], first["abs_delta"]) == (0, 0.0) and last["changed"] > 0
    assert last["cosine"] < first["cosine"] == pytest.approx(1.0)
    # Half of the texts against the other half: differences where nothing changed.
    assert written["halves"]["abs_delta"] > 0
    table = pq.read_table(file.with_suffix(".parquet")).to_pydict()
    changed = sum(q <= 0.05 for q, step in zip(table["q"], table["step"], strict=True) if step == 4)
    assert changed == last["changed"] and len(table["q"]) == 3 * 48
    texts = read_texts(run, "both", 20_000)
    codes = load_sae(saes[TRAINED]).encode_dense(load_acts(run, texts, 4, TRAINED))
    got = np.array(table["mean_act"]).reshape(3, 48)[2]
    np.testing.assert_allclose(got, codes.double().mean(0), rtol=1e-5, atol=1e-6)


def test_a_planted_change_of_one_feature_is_found(
    run: Path, saes: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    sae = load_sae(saes[BELOW])
    frozen_report(copy, sae, saes[BELOW], BELOW)
    texts = read_texts(copy, "both", 20_000)
    acts_ND = load_acts(copy, texts, 0, BELOW)
    codes_NM = sae.encode_dense(acts_ND)
    planted = int((codes_NM > 0).sum(0).argmax())
    along_N1 = codes_NM[:, planted, None]
    moved_ND = (acts_ND + 0.5 * along_N1 * sae.W_dec_MD[planted]).half()
    np.save(acts_file(copy, texts, 4, BELOW), moved_ND.numpy())
    report = frozen_report(copy, sae, saes[BELOW], BELOW)
    assert [row.changed > 0 for row in report.stages] == [False, False, True]
    diff = report.diff
    assert int(diff.delta_act_TM[2].abs().argmax()) == planted and diff.q_TM[2, planted] < 1e-3
    # f d_j was put on top of the activations once more by half: beta rises by 1/2.
    assert float(diff.beta_TM[2, planted] - diff.beta_TM[0, planted]) == pytest.approx(
        0.5, abs=0.01
    )


def test_sinks_are_left_out_of_every_stage(
    run: Path, saes: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    sae = load_sae(saes[BELOW])
    plain = frozen_report(copy, sae, saes[BELOW], BELOW)
    texts = read_texts(copy, "both", 20_000)
    acts_ND = load_acts(copy, texts, 0, BELOW)
    acts_ND[7] *= 100
    np.save(acts_file(copy, texts, 0, BELOW), acts_ND.half().numpy())
    report = frozen_report(copy, sae, saes[BELOW], BELOW)
    assert (report.sinks, report.tokens) == (plain.sinks + 1, plain.tokens - 1)
    assert not report.diff.delta_act_TM.any()


def test_splicing_the_activations_themselves_costs_nothing(run: Path, tmp_path: Path) -> None:
    width = width_of(read_recipe(run).model)
    eye = torch.eye(width)
    both_MD = torch.cat([eye, -eye])  # relu of x and of -x: exact
    zeros_D = torch.zeros(width)
    sae = SAE(both_MD, torch.zeros(2 * width), both_MD, zeros_D, zeros_D, "relu")
    save_sae(sae, tmp_path / "exact")
    report = frozen_report(run, sae, tmp_path / "exact", TRAINED)
    assert [row.delta_ce for row in report.stages] == pytest.approx([0.0] * 3, abs=1e-5)
    assert max(row.fvu for row in report.stages) < 1e-9
    nothing = replace(sae, W_dec_MD=torch.zeros(2 * width, width))
    worse = frozen_report(run, nothing, tmp_path / "exact", TRAINED)
    assert min(row.delta_ce for row in worse.stages) > 0.1


def test_log_probs_of_texts_are_those_of_the_sampler(run: Path) -> None:
    recipe, texts = read_recipe(run), read_texts(run, "base", 100)
    policy = Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed))
    rows = pq.read_table(run / "rollouts" / "step_00001.parquet").to_pylist()
    sampled = [x for row in rows[: len(texts.prompts)] for x in row["sampling_logp"]]
    np.testing.assert_allclose(text_logps(policy, texts), sampled, atol=1e-4)


def test_the_grid_tells_the_text_from_the_model(run: Path) -> None:
    report = grid_report(run, [BELOW, TRAINED], None)
    by = {(row.site, row.measure): row for row in report.rows}
    for measure in ("mean activation", "FVU"):
        below, trained_row = by[BELOW, measure], by[TRAINED, measure]
        for effect in (below.model_on_base, below.model_on_last):
            assert (effect.value, effect.low, effect.high, effect.p) == (0.0, 0.0, 0.0, 1.0)
        assert below.text.value != 0 and below.text.low < below.text.high
        assert trained_row.model_on_base.value != 0
    moved = by[TRAINED, "mean activation"].model_on_base
    assert moved.p < 0.05 and 0 < moved.low < moved.value
    logp = by["text", "log-prob"]
    assert logp.text.value == pytest.approx(logp.base_on_last - logp.base_on_base)
    assert logp.model_on_base.value == pytest.approx(logp.last_on_base - logp.base_on_base)


def test_the_grid_through_an_sae(run: Path, saes: dict[str, Path]) -> None:
    below = json.loads(show_grid(QUIET, run, None, saes[BELOW], None).read_text())
    assert below["features"][0]["model_on_base"] == below["features"][0]["model_on_last"] == 0
    assert below["rows"][2]["measure"] == "FVU" and below["rows"][2]["text"]["value"] != 0
    above = json.loads(show_grid(QUIET, run, None, saes[TRAINED], None).read_text())
    assert above["features"][0]["model_on_base"] > 0


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    acts = [torch.randn(60, 8, generator=generator) for _ in range(2)]
    text_N, sae = torch.arange(60) // 7, random_sae(8, "")
    whole = frozen_diff(sae, acts, text_N)
    monkeypatch.setattr("operando.drift.frozen_sae.CHUNK_TOKENS", 10)
    torch.testing.assert_close(frozen_diff(sae, acts, text_N).p_TM, whole.p_TM)


def test_what_does_not_fit_is_one_clear_error(
    run: Path, saes: dict[str, Path], tmp_path: Path
) -> None:
    width = width_of(read_recipe(run).model)
    save_sae(random_sae(width, ""), tmp_path / "no_site")
    with pytest.raises(UserError, match="does not say its site"):
        show_frozen(QUIET, run, tmp_path / "no_site", None)
    save_sae(random_sae(width + 1, TRAINED), tmp_path / "wide")
    with pytest.raises(UserError, match=f"reads d_in={width + 1}"):
        show_frozen(QUIET, run, tmp_path / "wide", None)
    save_sae(random_sae(width, "blocks.60.hook_resid_post"), tmp_path / "deep")
    with pytest.raises(UserError, match="the model has blocks 0-"):
        show_grid(QUIET, run, None, tmp_path / "deep", None)
    with pytest.raises(UserError, match="not both"):
        show_grid(QUIET, run, "1", saes[BELOW], None)
    with pytest.raises(UserError, match="was trained at"):
        show_frozen(QUIET, run, saes[BELOW], TRAINED)
    (tmp_path / "broken").mkdir()
    with pytest.raises(UserError, match="holds no SAE in a known format"):
        show_frozen(QUIET, run, tmp_path / "broken", None)


def test_a_run_with_only_the_base(run: Path, saes: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints")
    for show in (
        lambda: show_frozen(QUIET, copy, saes[BELOW], None),
        lambda: show_grid(QUIET, copy, "1", None, None),
    ):
        with pytest.raises(UserError, match="no stage but the base"):
            show()
