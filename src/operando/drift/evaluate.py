"""How good the SAEs of a run's chains are, on texts that they were not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from operando.drift.chain import (
    ARMS,
    Arm,
    load_chain,
    sae_folder,
    split_tokens,
    trained_sites,
    training_of,
)
from operando.drift.collect import Texts, chosen_texts, load_acts, padded_batches, stages_of
from operando.errors import UserError
from operando.models.load import load_model
from operando.models.policy import Policy
from operando.run import SeedTree, write_parquet
from operando.run_folder import read_recipe
from operando.sae.quality import LossRecovered, Quality, TextBatch, loss_recovered, measure_quality
from operando.sae.sae import SAE
from operando.tables import TextTable, table
from operando.update.checkpoint import load_weights


@dataclass(frozen=True)
class QualityRow:
    """One SAE of a chain. See sae/quality.py for what the numbers are."""

    site: str
    step: int
    arm: Arm
    quality: Quality
    loss: LossRecovered


def evaluate_saes(run: Path, seed: int = 0) -> tuple[list[QualityRow], Path]:
    """Return and write the quality of every SAE of one seed's chains, both arms.

    An SAE of the real arm is asked about its own stage's model, one of the null arm about the base.
    Tokens are those that were held out of training. The cross-entropy runs over the completions
    that hold any of them: with split = "tokens" these are texts that were trained on.
    """
    texts, sites, stages = chosen_texts(run), trained_sites(run), stages_of(run)
    if not sites:
        raise UserError(f"{run} has no SAE chains; run: operando sae train {run}")
    held_out = {}
    for site in sites:
        settings = training_of(sae_folder(run, "real", seed, 0, site)).settings
        held_out[site] = ~split_tokens(texts, settings)
    batches = {site: list(held_out_batches(texts, held_out[site])) for site in sites}
    first_N = first_tokens(texts)
    recipe = read_recipe(run)
    policy = Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed))
    chains: dict[tuple[str, Arm], dict[int, SAE]] = {
        (site, arm): load_chain(run, site, arm, seed) for site in sites for arm in ARMS
    }
    rows = []
    for step in stages:
        if step:
            load_weights(run, step, policy)
        for (site, arm), chain in chains.items():
            asked = stages if arm == "null" and step == 0 else [step] if arm == "real" else []
            acts_ND = load_acts(run, texts, step, site)[held_out[site]]
            for position in asked:
                sae = chain[position]
                quality = measure_quality(sae, acts_ND, first_N[held_out[site]])
                loss = loss_recovered(policy.base, sae, batches[site], site)
                rows.append(QualityRow(site, position, arm, quality, loss))
    rows.sort(key=lambda row: (row.site, row.arm, row.step))
    file = run / "drift" / "quality.parquet"
    columns: dict[str, list[object]] = {"site": [], "step": [], "arm": []}
    for row in rows:
        values = {"site": row.site, "step": row.step, "arm": row.arm}
        for key, value in (values | row.quality._asdict() | row.loss._asdict()).items():
            columns.setdefault(key, []).append(value)
    write_parquet(file, columns)
    return rows, file


def first_tokens(texts: Texts) -> Bool[Tensor, " N"]:
    """Return which tokens begin a completion whose prompt is empty, and may be attention sinks.

    The first position of a sequence is the prompt's, which is not read; so this is mostly False.
    """
    at_start = torch.tensor([not len(prompt) for prompt in texts.prompts])
    text_N = texts.text_of_token()
    begins_N = torch.ones(len(text_N), dtype=torch.bool)
    begins_N[1:] = text_N[1:] != text_N[:-1]
    return begins_N & at_start[text_N]


def held_out_batches(texts: Texts, held_out_N: Bool[Tensor, " N"]) -> Iterator[TextBatch]:
    """Give the held-out texts, right-padded; their completions' tokens are read."""
    kept = set(texts.text_of_token()[held_out_N].tolist())
    chosen = Texts(
        texts.writer,
        [p for i, p in enumerate(texts.prompts) if i in kept],
        [c for i, c in enumerate(texts.completions) if i in kept],
        texts.digest,
    )
    for ids_BS, read_BS in padded_batches(chosen):
        last_B1 = read_BS.shape[1] - read_BS.flip(1).int().argmax(1, keepdim=True)
        yield TextBatch(ids_BS, torch.arange(read_BS.shape[1]) < last_B1, read_BS)


def quality_table(run: Path, rows: list[QualityRow]) -> TextTable:
    """Return one row an SAE."""
    cells = [
        (
            row.site.removesuffix(".hook_resid_post"),
            str(row.step),
            row.arm,
            f"{row.quality.nmse:.4f}",
            f"{row.quality.fvu:.4f}",
            f"{row.quality.fvu_no_sinks:.4f}",
            f"{row.quality.l0:.1f}",
            f"{row.quality.dead:.0%}",
            f"{row.loss.delta:+.4f}",
            f"{row.loss.recovered_mean:.1%}",
            f"{row.loss.recovered_zero:.1%}",
        )
        for row in rows
    ]
    heads = ("site", "step", "arm", "NMSE", "FVU", "FVU, no sinks", "L0", "dead", "CE +nats")
    heads = (*heads, "recovered vs mean", "recovered vs zero")
    return table(f"{run.name}: SAEs on held-out tokens (seed 0)", heads, cells, ("site", "arm"))
