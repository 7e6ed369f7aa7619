"""The base and the last model, on the base's texts and on the last model's, without any refit.

The 2 x 2 of model and text tells "the text changed" from "the model changed". Siblings, the texts
of one prompt, are one text for every interval and test.

Dims: N tokens, G texts, D width of the model, M features, R resamples; C sums a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.stats import mannwhitneyu
from torch import Tensor

from operando.drift.collect import Texts, read_acts, read_texts, stages_of, text_logps
from operando.drift.frozen_sae import frozen_diff, num_changed, whole_texts
from operando.models.load import load_model
from operando.models.policy import Policy
from operando.run import SeedTree, write_json
from operando.run_folder import read_recipe
from operando.sae.quality import sink_tokens
from operando.sae.sae import SAE
from operando.stats.tests import benjamini_hochberg
from operando.tables import TextTable, interval, table
from operando.update.checkpoint import load_weights

GRID_TOKENS = 10_000  # of each writer's texts
PCA_RANK = 16
RESAMPLES = 999


@dataclass(frozen=True)
class Effect:
    """A change with a 95 % bootstrap interval over texts, and a permutation p over texts."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class GridRow:
    """One measure at one site: the 2 x 2 of model and text, and what changed.

    `base_on_last` is the base model on the last model's texts. `text` compares the base model on
    both texts; `model_on_base` and `model_on_last` compare the models on the same text.
    """

    site: str
    measure: str
    base_on_base: float
    last_on_base: float
    base_on_last: float
    last_on_last: float
    text: Effect
    model_on_base: Effect
    model_on_last: Effect


@dataclass(frozen=True)
class GridFeatures:
    """Features of the SAE with q <= 0.05: models by paired sign-flips, texts by rank sums."""

    site: str
    text: int
    model_on_base: int
    model_on_last: int


@dataclass(frozen=True)
class GridReport:
    """All numbers of `drift --grid`."""

    run: str
    step: int
    tokens: tuple[int, int]  # of the base's and of the last model's texts
    prompts: tuple[int, int]
    rows: tuple[GridRow, ...]
    features: tuple[GridFeatures, ...]
    file: Path


# One SAE, all stages


class _Seen(NamedTuple):
    """What one model makes of one writer's texts."""

    logp_N: Float[Tensor, "N"]
    acts: dict[str, Float[Tensor, "N D"]]


class _Cells(NamedTuple):
    """Sums over the tokens of each text, for each model on each writer's texts."""

    base_on_base: Float[Tensor, "G C"]
    last_on_base: Float[Tensor, "G C"]
    base_on_last: Float[Tensor, "H C"]
    last_on_last: Float[Tensor, "H C"]


Compare = Callable[[Tensor, Tensor], Tensor]  # sums [R C] of two cells -> a number each [R]


def grid_report(run: Path, sites: Sequence[str], sae: SAE | None) -> GridReport:
    """Return and write the 2 x 2 of model and text; with an SAE, its FVU and features are used.

    The last model is that of the last saved step. Texts are the base's (the first step's rollouts)
    and about as many tokens of the last steps' rollouts.
    """
    recipe, step = read_recipe(run), stages_of(run)[-1]
    base_texts = read_texts(run, "base", GRID_TOKENS)
    last_texts = read_texts(run, "last", base_texts.num_tokens)
    texts = (base_texts, last_texts)
    policy = Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed))
    seen = [_see(policy, sites, t) for t in texts]
    load_weights(run, step, policy)
    seen += [_see(policy, sites, t) for t in texts]
    of_token = [t.prompt_of_token() for t in texts]
    logp = [_by_text(s.logp_N[:, None], of_token[i % 2]) for i, s in enumerate(seen)]
    rows = [_grid_row("text", "log-prob", _Cells(logp[0], logp[2], logp[1], logp[3]), _mean_change)]
    features = []
    for site in sites:
        kept = [~sink_tokens(seen[i].acts[site]) for i in (0, 1)]  # the base decides for both
        acts = [s.acts[site][kept[i % 2]] for i, s in enumerate(seen)]
        text = [of_token[i][kept[i]] for i in (0, 1)]
        error = (
            _pca_errors(acts, text)
            if sae is None
            else [_square(x - sae.reconstruct(x)) for x in acts]
        )
        sums = [
            _by_text(torch.cat([_square(x)[:, None], e[:, None], x], dim=1), text[i % 2])
            for i, (x, e) in enumerate(zip(acts, error, strict=True))
        ]
        cells = _Cells(sums[0], sums[2], sums[1], sums[3])
        rows.append(_grid_row(site, "mean activation", cells, _distance))
        rows.append(_grid_row(site, "FVU", cells, _fvu_change))
        if sae is not None:
            features.append(_grid_features(site, sae, acts, text))
    report = GridReport(
        run.name, step, (base_texts.num_tokens, last_texts.num_tokens),
        (len(logp[0]), len(logp[1])), tuple(rows), tuple(features), run / "drift" / "grid.json",
    )  # fmt: skip
    write_json(report.file, asdict(report) | {"file": str(report.file)})
    return report


def _see(policy: Policy, sites: Sequence[str], texts: Texts) -> _Seen:
    acts = {site: x.float() for site, x in read_acts(policy, sites, texts).items()}
    return _Seen(text_logps(policy, texts), acts)


def _by_text(value_Nc: Float[Tensor, "N c"], text_N: Int[Tensor, "N"]) -> Float[Tensor, "G C"]:
    """Return for each text the number of its tokens, then the sums of the values."""
    value_NC = F.pad(value_Nc.double(), (1, 0), value=1.0)
    texts, place_N = text_N.unique(return_inverse=True)
    return value_NC.new_zeros(len(texts), value_NC.shape[1]).index_add_(0, place_N, value_NC)


def _pca_errors(acts: Sequence[Tensor], text: Sequence[Tensor]) -> list[Float[Tensor, "N"]]:
    """Return |x - projection|^2 on the base's top principal directions.

    Fitted on the base model and its texts, on each half of the texts; a text of the fit is measured
    by the other half's directions, every other text by the mean of both.
    """
    half_N = text[0] % 2 == 0
    fits = [_pca_error(acts[0][part_N]) for part_N in (half_N, ~half_N)]
    errors = []
    for i, acts_ND in enumerate(acts):
        even_N, odd_N = (fit(acts_ND) for fit in fits)
        own = i % 2 == 0  # on the base's texts
        errors.append(torch.where(half_N, odd_N, even_N) if own else (even_N + odd_N) / 2)
    return errors


def _pca_error(fit_ND: Float[Tensor, "N D"]) -> Callable[[Tensor], Tensor]:
    mean_D = fit_ND.double().mean(0)
    centred_ND = fit_ND.double() - mean_D
    basis_DK = torch.linalg.eigh(centred_ND.T @ centred_ND).eigenvectors[:, -PCA_RANK:]

    def error(acts_ND: Tensor) -> Tensor:
        rest_ND = acts_ND.double() - mean_D
        return _square(rest_ND - rest_ND @ basis_DK @ basis_DK.T)

    return error


def _square(x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
    return x_ND.double().square().sum(1)


def _mean_change(a_RC: Tensor, b_RC: Tensor) -> Tensor:
    return b_RC[:, 1] / b_RC[:, 0] - a_RC[:, 1] / a_RC[:, 0]


def _fvu_change(a_RC: Tensor, b_RC: Tensor) -> Tensor:
    return _fvu(b_RC) - _fvu(a_RC)


def _fvu(sums_RC: Tensor) -> Tensor:
    spread_R = sums_RC[:, 1] - sums_RC[:, 3:].square().sum(1) / sums_RC[:, 0]
    return sums_RC[:, 2] / spread_R


def _distance(a_RC: Tensor, b_RC: Tensor) -> Tensor:
    """Return 1 - cosine of the mean activations, as |a - b|^2 / 2 of unit vectors: 0 is exact."""
    gap_RD = F.normalize(a_RC[:, 3:], dim=1) - F.normalize(b_RC[:, 3:], dim=1)
    return gap_RD.square().sum(1) / 2


def _grid_row(site: str, measure: str, cells: _Cells, compare: Compare) -> GridRow:
    total = [cell.sum(0, keepdim=True) for cell in cells]
    match measure:
        case "mean activation":  # beside the base on its own texts
            shown = [float(compare(total[0], cell)) for cell in total]
        case "FVU":
            shown = [float(_fvu(cell)) for cell in total]
        case _:
            shown = [float(cell[0, 1] / cell[0, 0]) for cell in total]
    return GridRow(
        site, measure, *shown,
        text=_effect(cells.base_on_base, cells.base_on_last, compare, paired=False),
        model_on_base=_effect(cells.base_on_base, cells.last_on_base, compare, paired=True),
        model_on_last=_effect(cells.base_on_last, cells.last_on_last, compare, paired=True),
    )  # fmt: skip


def _effect(
    a_GC: Float[Tensor, "G C"], b_HC: Float[Tensor, "H C"], compare: Compare, paired: bool
) -> Effect:
    """Return the change from a to b, its bootstrap interval and its permutation p over texts.

    Paired texts are drawn together, and their p swaps the two models of a text; else the texts'
    writers are shuffled. p = (1 + number at least as large) / (1 + RESAMPLES), two-sided. The
    interval is the percentile one moved to have its mean at the value: a distance between draws
    of few texts is too large.
    """
    generator = SeedTree(0).generator("drift", "grid")
    value = compare(a_GC.sum(0, keepdim=True), b_HC.sum(0, keepdim=True))
    a_RG = _draws(len(a_GC), generator)
    b_RH = a_RG if paired else _draws(len(b_HC), generator)
    drawn_R = compare(a_RG @ a_GC, b_RH @ b_HC)
    low, high = np.quantile((drawn_R - drawn_R.mean() + value).numpy(), [0.025, 0.975])
    if paired:
        swap_RG = torch.randint(2, (RESAMPLES, len(a_GC)), generator=generator).double()
        moved_RC = swap_RG @ (b_HC - a_GC)
        null_R = compare(a_GC.sum(0) + moved_RC, b_HC.sum(0) - moved_RC)
    else:
        pool = torch.cat([a_GC, b_HC])
        rank_R = torch.rand(RESAMPLES, len(pool), generator=generator).argsort(1)
        first_R = (rank_R < len(a_GC)).double()
        null_R = compare(first_R @ pool, (1 - first_R) @ pool)
    slack = 1e-12 * float(value.abs())
    p = (1 + int((null_R.abs() >= value.abs() - slack).sum())) / (1 + RESAMPLES)
    return Effect(float(value), float(low), float(high), p)


def _draws(num: int, generator: torch.Generator) -> Float[Tensor, "R G"]:
    """Return how often each text is drawn, in each resample."""
    drawn = torch.randint(num, (RESAMPLES, num), generator=generator)
    ones = torch.ones_like(drawn, dtype=torch.float64)
    return torch.zeros(RESAMPLES, num, dtype=torch.float64).scatter_add_(1, drawn, ones)


def _grid_features(
    site: str, sae: SAE, acts: Sequence[Tensor], text: Sequence[Tensor]
) -> GridFeatures:
    on_base = frozen_diff(sae, [acts[0], acts[2]], text[0])
    on_last = frozen_diff(sae, [acts[1], acts[3]], text[1])
    means = [_mean_codes(sae, acts[i], text[i]) for i in (0, 1)]
    varies_M = torch.cat(means).amax(0) > torch.cat(means).amin(0)
    p_M = torch.ones(sae.d_sae, dtype=torch.float64)
    base, last = (mean_GM[:, varies_M].numpy() for mean_GM in means)
    p_M[varies_M] = torch.from_numpy(mannwhitneyu(base, last, method="asymptotic").pvalue)
    return GridFeatures(
        site,
        num_changed(benjamini_hochberg(p_M.numpy())),
        num_changed(on_base.q_TM[1]),
        num_changed(on_last.q_TM[1]),
    )


def _mean_codes(sae: SAE, acts_ND: Tensor, text_N: Tensor) -> Float[Tensor, "G M"]:
    """Return the mean activation of each feature in each text."""
    parts = []
    for rows in whole_texts(text_N):
        codes = sae.encode(acts_ND[rows])
        texts, place_N, num_G = text_N[rows].unique(return_inverse=True, return_counts=True)
        key = place_N[:, None] * sae.d_sae + codes.idx_Nk.long()
        flat = torch.zeros(len(texts) * sae.d_sae, dtype=torch.float64)
        flat.index_add_(0, key.flatten(), codes.value_Nk.double().flatten())
        parts.append(flat.view(len(texts), sae.d_sae) / num_G[:, None])
    return torch.cat(parts)


# --- the terminal --------------------------------------------------------------------------------


def grid_table(report: GridReport) -> TextTable:
    """Return for each site and measure the 2 x 2 of model and text with the effects beside it."""
    rows = []
    for row in report.rows:
        base, last = f"{row.base_on_base:.4f}", f"{row.last_on_base:.4f}"
        site = row.site.removesuffix(".hook_resid_post")
        rows.append((site, row.measure, "base", base, last, _effect_cell(row.model_on_base)))
        base, last = f"{row.base_on_last:.4f}", f"{row.last_on_last:.4f}"
        effects = (_effect_cell(row.model_on_last), _effect_cell(row.text))
        rows.append(("", "", "last", base, last, *effects))
    title = (
        f"{report.run}: the base and step {report.step} on the base's text ({report.prompts[0]} "
        f"prompts, {report.tokens[0]:,} tokens) and the last steps' ({report.prompts[1]} prompts, "
        f"{report.tokens[1]:,} tokens); 95 % intervals over prompts"
    )
    words = ("site", "measure", "text by")
    heads = (*words, "base", "last", "model changed", "text changed")
    return table(title, heads, rows, words)


def _effect_cell(effect: Effect) -> str:
    limits = interval((effect.value, effect.low, effect.high), "+.4f")
    return f"{limits}, p {effect.p:.3f}"


def grid_lines(report: GridReport) -> list[str]:
    """Return what the words of the table mean, and the features that changed."""
    lines = [
        "mean activation: 1 - cosine with the base on its own text. text changed: the base on both "
        "texts. model changed: both models on the same text. p: permutation over prompts."
    ]
    for row in report.features:
        name = row.site.removesuffix(".hook_resid_post")
        lines.append(
            f"{name}: features with q <= 0.05: {row.text} by the text, {row.model_on_base} by the "
            f"model on the base's text, {row.model_on_last} on the last model's"
        )
    return lines
