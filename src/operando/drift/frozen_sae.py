"""What changed inside a run, through one SAE that is not refitted: all stages, the same tokens.

Siblings, the texts of one prompt, are one text for every interval and test.

Dims: N tokens, G texts, D width of the model, M features, T stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.stats import norm
from torch import Tensor

from operando.drift.collect import (
    Splice,
    Texts,
    chosen_texts,
    collect,
    load_acts,
    read_texts,
    text_logps,
)
from operando.drift.frozen_sums import FrozenDiff, add, empty_sums, finish
from operando.models.load import load_model
from operando.models.policy import Policy
from operando.run import SeedTree, write_json, write_parquet
from operando.run_folder import read_recipe
from operando.sae.quality import sink_tokens
from operando.sae.sae import SAE
from operando.stats.tests import benjamini_hochberg
from operando.tables import TextTable, table
from operando.update.checkpoint import load_weights

FDR = 0.05
CHUNK_TOKENS = 4096  # codes of all stages are held for so many tokens
TEXT_TOKENS = 20_000  # read for --frozen where the run has not chosen its texts
SPLICE_TOKENS = 4_000  # of the texts whose cross-entropy is measured


@dataclass(frozen=True)
class FrozenRow:
    """One stage through the SAE of the base, beside the base.

    `changed` features have q <= 0.05; `abs_delta` is the mean over features of |difference of the
    mean activation|; `beta` the quartiles of the latent scaling over the features that the base
    uses, None if it uses none; `delta_ce` what the reconstruction costs, in nats per token.
    """

    step: int
    fvu: float
    cosine: float
    changed: int
    abs_delta: float
    beta: tuple[float, float, float] | None
    delta_ce: float


@dataclass(frozen=True)
class HalvesRow:
    """The base on one random half of the texts against the base on the other: nothing changed.

    `changed` is what the usual unpaired test, with tokens taken as independent, calls changed.
    """

    changed: int
    abs_delta: float


@dataclass(frozen=True)
class FrozenReport:
    """All numbers of `drift --frozen`. `control` is the number of changed features of the base
    against itself, computed as for a stage: it has to be 0."""

    run: str
    sae: str
    site: str
    texts: str
    tokens: int
    sinks: int
    features: int
    control: int
    stages: tuple[FrozenRow, ...]
    halves: HalvesRow
    file: Path
    diff: FrozenDiff


def frozen_report(
    run: Path,
    sae: SAE,
    path: Path,
    site: str,
    on_stage: Callable[[int, int], None] = lambda _done, _all: None,
) -> FrozenReport:
    """Return and write what every stage does with one SAE, on the same tokens."""
    chosen = (run / "drift" / "texts.json").is_file()
    texts = chosen_texts(run) if chosen else read_texts(run, "both", TEXT_TOKENS)
    stages = collect(run, [site], texts, on_stage)
    acts = [load_acts(run, texts, step, site) for step in stages]
    kept_N = ~sink_tokens(acts[0])  # the same tokens at every stage
    acts, text_N = [acts_ND[kept_N] for acts_ND in acts], texts.prompt_of_token()[kept_N]
    diff = frozen_diff(sae, acts, text_N)
    control = frozen_diff(sae, [acts[0], acts[0].clone()], text_N)
    costs = _splice_costs(run, sae, site, texts, kept_N, stages)
    rows = [_frozen_row(diff, t, step, costs[t]) for t, step in enumerate(stages)]
    report = FrozenReport(
        run.name, str(path), site, texts.writer, len(text_N), int((~kept_N).sum()), sae.d_sae,
        num_changed(control.q_TM[1]), tuple(rows), _halves(sae, acts[0], text_N),
        run / "drift" / "frozen.json", diff,
    )  # fmt: skip
    kept = {key: value for key, value in vars(report).items() if key not in ("diff", "file")}
    write_json(
        report.file,
        kept | {"stages": [asdict(row) for row in rows], "halves": asdict(report.halves)},
    )
    write_parquet(report.file.with_suffix(".parquet"), _feature_columns(diff, stages))
    return report


def frozen_diff(
    sae: SAE, acts: Sequence[Float[Tensor, "N D"]], text_N: Int[Tensor, "N"]
) -> FrozenDiff:
    """Return the diff of every set of activations beside the first one."""
    sums = empty_sums(len(acts), sae.d_sae, sae.d_in, reference=0)
    for rows in whole_texts(text_N):
        codes = [sae.encode(acts_ND[rows]) for acts_ND in acts]
        width = max(code.idx_Nk.shape[1] for code in codes)
        idx_TNk = torch.stack(
            [F.pad(code.idx_Nk, (0, width - code.idx_Nk.shape[1])) for code in codes]
        )
        value_TNk = torch.stack(
            [F.pad(code.value_Nk, (0, width - code.value_Nk.shape[1])) for code in codes]
        )
        resid_TND = torch.stack([acts_ND[rows] for acts_ND in acts])
        sums = add(sums, sae.W_dec_MD, sae.b_dec_D, resid_TND, idx_TNk, value_TNk, text_N[rows])
    return finish(sums, sae.W_dec_MD)


def whole_texts(text_N: Int[Tensor, "N"]) -> Iterator[slice]:
    """Give runs of about CHUNK_TOKENS tokens that end where a text ends."""
    ends = torch.unique_consecutive(text_N, return_counts=True)[1].cumsum(0).tolist()
    start = 0
    for end in ends:
        if end - start >= CHUNK_TOKENS or end == ends[-1]:
            yield slice(start, end)
            start = end


def num_changed(q_M: Tensor | np.ndarray) -> int:
    """Return the number of features with q <= 0.05."""
    return int((q_M <= FDR).sum())


def _frozen_row(diff: FrozenDiff, t: int, step: int, delta_ce: float) -> FrozenRow:
    beta = diff.beta_TM[t][diff.beta_TM[t].isfinite()]
    quartiles = None
    if len(beta):
        low, middle, high = np.quantile(beta.numpy(), [0.25, 0.5, 0.75]).tolist()
        quartiles = (low, middle, high)
    return FrozenRow(
        step, float(diff.fvu_T[t]), float(diff.cosine_T[t]), num_changed(diff.q_TM[t]),
        float(diff.delta_act_TM[t].abs().mean()), quartiles, delta_ce,
    )  # fmt: skip


def _feature_columns(diff: FrozenDiff, stages: Sequence[int]) -> Mapping[str, Sequence[object]]:
    T, M = diff.p_TM.shape
    numbers = {
        "rate": diff.rate_TM.value, "rate_low": diff.rate_TM.low, "rate_high": diff.rate_TM.high,
        "mean_act": diff.mean_act_TM, "delta": diff.delta_act_TM, "beta": diff.beta_TM,
        "p": diff.p_TM, "q": diff.q_TM,
    }  # fmt: skip
    names = {"step": [step for step in stages for _ in range(M)], "feature": list(range(M)) * T}
    return {**names, **{key: value.flatten().tolist() for key, value in numbers.items()}}


def _halves(sae: SAE, acts_ND: Float[Tensor, "N D"], text_N: Int[Tensor, "N"]) -> HalvesRow:
    """Compare two random halves of the texts as if their tokens were independent (Welch's z)."""
    texts = text_N.unique()
    order = torch.randperm(len(texts), generator=SeedTree(0).generator("drift", "halves"))
    first_N = torch.isin(text_N, texts[order[: len(texts) // 2]])
    means, errors = [], []
    for half_N in (first_N, ~first_N):
        codes = sae.encode(acts_ND[half_N])
        num, value = int(half_N.sum()), codes.value_Nk.double().flatten()
        zeros_M = torch.zeros(sae.d_sae, dtype=torch.float64)
        mean_M = zeros_M.index_add(0, codes.idx_Nk.flatten(), value) / max(num, 1)
        square_M = zeros_M.index_add(0, codes.idx_Nk.flatten(), value.square()) / max(num, 1)
        means.append(mean_M)
        errors.append((square_M - mean_M.square()).clamp(min=0.0) / max(num, 1))
    delta_M = means[0] - means[1]
    z_M = delta_M.abs() / (errors[0] + errors[1]).sqrt().clamp(min=1e-300)
    p_M = torch.from_numpy(np.asarray(2 * norm.sf(z_M.numpy()), dtype=np.float64))
    return HalvesRow(num_changed(benjamini_hochberg(p_M.numpy())), float(delta_M.abs().mean()))


def _splice_costs(
    run: Path, sae: SAE, site: str, texts: Texts, kept_N: Tensor, stages: Sequence[int]
) -> list[float]:
    """Return for each stage cross-entropy with the reconstruction minus without, nats per token.

    Over about SPLICE_TOKENS tokens of texts taken evenly; sinks stay as they are; the first token
    of a completion is left out, as nothing before it was replaced.
    """
    every = max(1, -(-texts.num_tokens // SPLICE_TOKENS))
    part = Texts(texts.writer, texts.prompts[::every], texts.completions[::every], texts.digest)
    text_N = part.text_of_token()
    counts_N = torch.cat([torch.zeros(1, dtype=torch.bool), text_N[1:] == text_N[:-1]])
    recipe = read_recipe(run)
    policy = Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed))
    moved = sae.to(policy.device)
    splice = Splice(site, kept_N[texts.text_of_token() % every == 0], moved.reconstruct)
    costs = []
    for step in stages:
        if step:
            load_weights(run, step, policy)
        lost_N = text_logps(policy, part) - text_logps(policy, part, splice)
        costs.append(float(lost_N[counts_N].double().mean()))
    return costs


# Model x text


# --- the terminal --------------------------------------------------------------------------------


def frozen_table(report: FrozenReport) -> TextTable:
    """Return one row per stage, then the warning row of unpaired halves of the base's texts."""
    rows = []
    for row in report.stages:
        first = row is report.stages[0]
        changed = report.control if first else row.changed
        rows.append(
            (
                f"{row.step} (base against itself)" if first else str(row.step),
                f"{row.fvu:.4f}",
                f"{row.cosine:.6f}",
                f"{changed} of {report.features}",
                f"{row.abs_delta:.2e}",
                _quartiles(row.beta),
                f"{row.delta_ce:+.4f}",
            )
        )
    changed = f"{report.halves.changed} of {report.features}"
    name = "0 (warning: unpaired halves of its texts)"
    rows.append((name, "", "", changed, f"{report.halves.abs_delta:.2e}"))
    title = (
        f"{report.run}: one SAE at {report.site}, not refitted; the same {report.tokens:,} tokens "
        f"at all stages, {report.sinks} sinks left out"
    )
    heads = ("step", "FVU", "cosine", "changed (q <= 0.05)", "|delta|", "beta", "delta CE")
    return table(title, heads, rows, words=("step",))


def _quartiles(beta: tuple[float, float, float] | None) -> str:
    if beta is None:
        return "none in use"
    low, median, high = beta
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def feature_table(report: FrozenReport, num: int = 10) -> TextTable:
    """Return the features whose mean activation changed most from the base to the last stage."""
    diff = report.diff
    order = diff.delta_act_TM[-1].abs().argsort(descending=True)[:num]
    moved = [j for j in order.tolist() if diff.delta_act_TM[-1, j] != 0]
    rows = []
    for j in moved:
        rate, act, beta = diff.rate_TM.value[:, j], diff.mean_act_TM[:, j], diff.beta_TM[:, j]
        low, high = float(diff.rate_TM.low[-1, j]), float(diff.rate_TM.high[-1, j])
        rows.append(
            (
                str(j),
                f"{rate[0]:.2%} to {rate[-1]:.2%} ({low:.2%} to {high:.2%})",
                f"{act[0]:.4f} to {act[-1]:.4f}",
                f"{diff.delta_act_TM[-1, j]:+.4f}",
                f"{beta[0]:.3f} to {beta[-1]:.3f}",
                f"{diff.q_TM[-1, j]:.3f}",
            )
        )
    title = f"features with the largest |delta|, base to step {report.stages[-1].step}"
    if not moved:
        title += ": none, every mean activation is the base's"
    return table(title, ("feature", "rate", "mean activation", "delta", "beta", "q"), rows)
