"""Drift beside its null arm: share, excess, intervals, p-values, and what three chains may say.

A null chain trains its SAEs as the real chain does, at the same positions, on activations of the
frozen base (the null step of OhhMoo/SAE-RL, README d919128). Its drift is what refitting alone
gives.

Dims: R chains (seeds) of the real arm, N chains of the null arm, S = R + N, A assignments of S
chains to two arms; cells are whatever is measured for each chain: layers, transitions, features.
Statistics are float64.
"""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import t as student
from torch import Tensor

from operando.errors import UserError
from operando.stats.tests import benjamini_hochberg

MOST_ASSIGNMENTS = 200_000
ROUNDING = 1e-12

Verdict = Literal["structural", "reward-driven", "KL-driven", "reward- and KL-driven", "undecided"]


class Intervals(NamedTuple):
    """An `Interval` for each cell. Example: drift_against_null(...).excess.low"""

    value: Float[Tensor, "*cells"]
    low: Float[Tensor, "*cells"]
    high: Float[Tensor, "*cells"]


class DriftAgainstNull(NamedTuple):
    """Drift of the real arm beside that of the null arm, for each cell.

    `p_t` is one-sided, for excess > 0; `q_t` is `p_t` after Benjamini-Hochberg over the cells.
    `p_permutation` can not fall below `p_floor`, whatever the data: 1/20 for 3 + 3 chains.

    Example: drift_against_null(real_RLT, null_NLT, paired=False).share.value
    """

    real: Float[Tensor, "*cells"]
    null: Float[Tensor, "*cells"]
    excess: Intervals
    share: Intervals
    p_t: Float[Tensor, "*cells"]
    q_t: Float[Tensor, "*cells"]
    p_permutation: Float[Tensor, "*cells"]
    p_floor: float


class Separation(NamedTuple):
    """Whether the arms stand apart in the similarity of their chains.

    `statistic` is the mean similarity within arms minus that between arms. `complete` says that
    every pair within an arm is more similar than every pair across.

    Example: Separation(0.12, p_value=0.1, p_floor=0.1, complete=True), the most that 3 + 3 can say
    """

    statistic: float
    p_value: float
    p_floor: float
    complete: bool


class Classification(NamedTuple):
    """What three chains say of each cell; see `classify`. Example: classify(...).verdict[0]

    Lists and tensors run over the cells, flattened in row-major order. Effects are in units of
    drift, with Welch limits at 95 %.
    """

    verdict: list[Verdict]
    q_structural: Float[Tensor, "C"]
    q_reward: Float[Tensor, "C"]
    q_kl: Float[Tensor, "C"]
    excess: tuple[Intervals, Intervals, Intervals]  # e_A, e_B, e_C
    reward_effect: Intervals  # e_B - e_A
    kl_effect: Intervals  # e_C - e_A


def assignments(num_real: int, num_null: int, paired: bool) -> Bool[Tensor, "A S"]:
    """Return every assignment of S chains to the real arm (True), the observed one first.

    Not paired: all choices of R among S. Paired: chain r of both arms may swap, 2^R ways.
    """
    real = np.arange(num_real + num_null) < num_real
    if paired:
        assert num_real == num_null, f"{num_real} real chains paired with {num_null} null chains"
        count = 2**num_real
    else:
        count = math.comb(num_real + num_null, num_real)
    if count > MOST_ASSIGNMENTS:
        raise UserError(
            f"{num_real} + {num_null} chains can be assigned in {count:,} ways; "
            f"the exact test takes at most {MOST_ASSIGNMENTS:,}. Give fewer chains."
        )
    if paired:
        flips = np.array(list(product([False, True], repeat=num_real)))
        masks = np.concatenate([~flips, flips], axis=1)
    else:
        masks = np.zeros((count, len(real)), dtype=bool)
        for row, chosen in enumerate(combinations(range(len(real)), num_real)):
            masks[row, list(chosen)] = True
    assert (masks[0] == real).all(), "the observed assignment comes first"
    return torch.from_numpy(masks)


class _Estimate(NamedTuple):
    value: np.ndarray
    se: np.ndarray
    df: np.ndarray


class _Arms(NamedTuple):
    real_RC: np.ndarray
    null_NC: np.ndarray


def drift_against_null(
    real: Float[Tensor, "R *cells"],
    null: Float[Tensor, "N *cells"],
    paired: bool,
    level: float = 0.95,
) -> DriftAgainstNull:
    """Return excess = mean(real) - mean(null) and share = mean(null) / mean(real), for each cell.

    The interval of the excess and p_t are Student's over chains: Welch's (1947, Biometrika 34:28)
    for two arms, that of the differences if `paired` (chain r of both arms shares seed and first
    SAE). The interval of the share is Fieller's (1954, JRSS B 16:175), with the same degrees of
    freedom; it is (-inf, inf) where the real drift can not be told from 0.
    p_permutation is exact and one-sided: the part of all assignments whose excess is at least the
    observed one. A cell without spread over the chains has no test: p_t = 1.
    """
    _check_arms(real, null, paired)
    cells = real.shape[1:]
    arms = _Arms(_flat(real), _flat(null))
    excess = _excess(arms, paired)
    p_t = _p_greater(excess)
    half = _quantile(excess.df, level) * excess.se
    mask_AS = assignments(len(real), len(null), paired)

    def shaped(values: np.ndarray) -> Float[Tensor, "*cells"]:
        return torch.from_numpy(np.ascontiguousarray(values)).reshape(cells)

    return DriftAgainstNull(
        real=shaped(arms.real_RC.mean(0)),
        null=shaped(arms.null_NC.mean(0)),
        excess=Intervals(
            shaped(excess.value), shaped(excess.value - half), shaped(excess.value + half)
        ),
        share=Intervals(*(shaped(part) for part in _fieller(arms, paired, level))),
        p_t=shaped(p_t),
        q_t=shaped(benjamini_hochberg(p_t)),
        p_permutation=shaped(_permutation_p(arms, mask_AS)),
        p_floor=1 / len(mask_AS),
    )


def separation(similarity_SS: Float[Tensor, "S S"], num_real: int, paired: bool) -> Separation:
    """Return how far the arms stand apart in a matrix of similarities of chains, real ones first.

    statistic = mean similarity of pairs within an arm - mean of pairs across arms; p is the part
    of all assignments with at least that. Renaming the arms leaves the statistic as it is, so the
    smallest p is 2/A where both arms are equally large.
    """
    S = len(similarity_SS)
    assert 2 <= num_real <= S - 2, f"{num_real} real chains of {S}: each arm needs 2 or more"
    sim = similarity_SS.double().cpu()
    sim = (sim + sim.T) / 2
    sim.fill_diagonal_(0.0)
    mask_AS = assignments(num_real, S - num_real, paired).double()
    other_AS = 1 - mask_AS
    in_real = ((mask_AS @ sim) * mask_AS).sum(1)
    in_null = ((other_AS @ sim) * other_AS).sum(1)
    across_A = ((mask_AS @ sim) * other_AS).sum(1)
    pairs_in = num_real * (num_real - 1) + (S - num_real) * (S - num_real - 1)
    stat_A = (in_real + in_null) / pairs_in - across_A / (num_real * (S - num_real))
    same_arm = mask_AS[0][:, None] == mask_AS[0][None, :]
    off_diagonal = ~torch.eye(S, dtype=torch.bool)
    complete = sim[same_arm & off_diagonal].min() > sim[~same_arm].max()
    floor = (2 if num_real == S - num_real else 1) / len(mask_AS)
    return Separation(
        float(stat_A[0]),
        float(_part_at_least(stat_A[:, None].numpy(), np.array([float(sim.abs().max())]))[0]),
        floor,
        bool(complete),
    )


def classify(
    flexible: tuple[Float[Tensor, "..."], Float[Tensor, "..."]],
    strict: tuple[Float[Tensor, "..."], Float[Tensor, "..."]],
    kl: tuple[Float[Tensor, "..."], Float[Tensor, "..."]],
    fdr: float = 0.05,
    families: int = 1,
) -> Classification:
    """Return what changed each cell: the reward, the KL term, any training at all; or "undecided".

    Each chain is its (real, null) drift, [R, *cells] and [N, *cells]: A with the flexible reward,
    B with the strict reward, C as A but with KL. e_X is the excess of chain X over its own nulls.

    - reward-driven: e_A and e_B differ (two-sided), and at least one of them is above 0.
    - KL-driven: e_A and e_C differ (two-sided), and at least one of them is above 0.
    - reward- and KL-driven: both of these.
    - structural: e_A, e_B and e_C are all above 0, and neither difference was shown. It says that
      the change is there in every chain; it does not show that the chains change equally.
    - undecided: none of these. The null arms do not let it be said, and that is no evidence of
      absence: with 3 seeds per arm only differences of several standard deviations are seen.

    The tests are Welch's t over chains, so they lean on drift being roughly normal over seeds (the
    permutation test can not reach 0.05 two-sided with 3 + 3 chains). A joint claim has the largest
    p of its parts (Berger 1982, Technometrics 24:295), "at least one of two" has twice the smaller
    p. Benjamini-Hochberg runs over the cells of each kind of claim apart, at `fdr`: true structural
    findings must not lower the bar for reward and KL. q is multiplied by `families`, the number of
    tables that are read as one. The null arms count as independent: where chains share one null
    arm, the differences are judged too strictly.
    """
    chains = [flexible, strict, kl]
    for real, null in chains:
        _check_arms(real, null, paired=False)
        assert real.shape[1:] == flexible[0].shape[1:], f"{real.shape} beside {flexible[0].shape}"
    flat = [_Arms(_flat(real), _flat(null)) for real, null in chains]
    p_A, p_B, p_C = (_p_greater(_excess(arms, paired=False)) for arms in flat)
    p_reward = np.maximum(_p_differ(flat[0], flat[1]), np.minimum(1, 2 * np.minimum(p_A, p_B)))
    p_kl = np.maximum(_p_differ(flat[0], flat[2]), np.minimum(1, 2 * np.minimum(p_A, p_C)))
    p_structural = np.maximum(np.maximum(p_A, p_B), p_C)
    q_structural, q_reward, q_kl = (
        torch.from_numpy(families * benjamini_hochberg(p)).clamp(max=1.0)
        for p in (p_structural, p_reward, p_kl)
    )
    verdict: list[Verdict] = [
        _verdict(bool(s), bool(r), bool(k))
        for s, r, k in zip(q_structural <= fdr, q_reward <= fdr, q_kl <= fdr, strict=True)
    ]
    e_A, e_B, e_C = (_band(_excess(arms, paired=False)) for arms in flat)
    return Classification(
        verdict,
        q_structural,
        q_reward,
        q_kl,
        (e_A, e_B, e_C),
        _band(_difference(flat[1], flat[0])),
        _band(_difference(flat[2], flat[0])),
    )


def _verdict(structural: bool, reward: bool, kl: bool) -> Verdict:
    match structural, reward, kl:
        case _, True, True:
            return "reward- and KL-driven"
        case _, True, False:
            return "reward-driven"
        case _, False, True:
            return "KL-driven"
        case True, False, False:
            return "structural"
        case _:
            return "undecided"


def _check_arms(
    real: Float[Tensor, "R *cells"], null: Float[Tensor, "N *cells"], paired: bool
) -> None:
    assert real.shape[1:] == null.shape[1:], f"real {real.shape} beside null {null.shape}"
    for name, arm in (("real", real), ("null", null)):
        if len(arm) < 2:
            raise UserError(
                f"The {name} arm has {len(arm)} chain(s). An interval needs 2 seeds or more; "
                f"the default is 3."
            )
        if not bool(torch.isfinite(arm).all()):
            raise UserError(f"The drift of the {name} arm holds NaN or infinite values.")
        for i, j in combinations(range(len(arm)), 2):
            if torch.equal(arm[i], arm[j]) and bool((arm[i] != 0).any()):
                raise UserError(
                    f"Chains {i} and {j} of the {name} arm hold the same numbers. "
                    f"Copies of one chain say nothing about spread; give different seeds."
                )
    if paired and len(real) != len(null):
        raise UserError(f"{len(real)} real chains can not be paired with {len(null)} null chains.")


def _flat(values: Float[Tensor, "R *cells"]) -> np.ndarray:
    return values.detach().double().cpu().reshape(len(values), -1).numpy()


def _excess(arms: _Arms, paired: bool) -> _Estimate:
    x_RC, y_NC = arms
    if paired:
        delta = x_RC - y_NC
        se = delta.std(0, ddof=1) / np.sqrt(len(delta))
        return _Estimate(delta.mean(0), se, np.full(se.shape, len(delta) - 1.0))
    return _welch(x_RC.mean(0) - y_NC.mean(0), [x_RC, y_NC])


def _welch(value: np.ndarray, arms: list[np.ndarray]) -> _Estimate:
    """Return the estimate, a sum of means of arms, with Welch-Satterthwaite degrees of freedom."""
    parts = [(arm.var(0, ddof=1) / len(arm), len(arm) - 1) for arm in arms]
    var = np.asarray(sum(v for v, _ in parts))
    below = np.asarray(sum(v**2 / n for v, n in parts))
    least = float(min(n for _, n in parts))
    df = np.divide(var**2, below, out=np.full(var.shape, least), where=below > 0)
    return _Estimate(value, np.sqrt(var), df)


def _p_greater(estimate: _Estimate) -> np.ndarray:
    value, se, df = estimate
    ratio = np.divide(value, se, out=np.full(value.shape, -np.inf), where=se > 0)
    return np.asarray(student.sf(ratio, df), dtype=np.float64)


def _difference(a: _Arms, b: _Arms) -> _Estimate:
    """Return (real_a - null_a) - (real_b - null_b), Welch over four arms."""
    value = (a[0].mean(0) - a[1].mean(0)) - (b[0].mean(0) - b[1].mean(0))
    return _welch(value, [*a, *b])


def _p_differ(a: _Arms, b: _Arms) -> np.ndarray:
    """Return the two-sided p of the difference of two excesses."""
    found = _difference(a, b)
    return np.minimum(1.0, 2 * _p_greater(found._replace(value=np.abs(found.value))))


def _band(estimate: _Estimate, level: float = 0.95) -> Intervals:
    half = _quantile(estimate.df, level) * estimate.se
    value, low, high = estimate.value, estimate.value - half, estimate.value + half
    return Intervals(
        *(torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (value, low, high))
    )


def _quantile(df: np.ndarray, level: float) -> np.ndarray:
    assert 0 < level < 1, f"level = {level}"
    return np.asarray(student.ppf((1 + level) / 2, df))


class _Share(NamedTuple):
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _fieller(arms: _Arms, paired: bool, level: float) -> _Share:
    """Return mean(y)/mean(x) and the rho with (y - rho x)^2 <= q^2 var(y - rho x)."""
    x_RC, y_NC = arms
    x, y = x_RC.mean(0), y_NC.mean(0)
    share = np.divide(y, x, out=np.full(x.shape, np.nan), where=x != 0)
    var_x, var_y = x_RC.var(0, ddof=1) / len(x_RC), y_NC.var(0, ddof=1) / len(y_NC)
    if paired:
        cov = ((x_RC - x) * (y_NC - y)).sum(0) / (len(x_RC) - 1) / len(x_RC)
        df = np.full(x.shape, len(x_RC) - 1.0)
    else:
        cov = np.zeros_like(x)
        df = _welch(share, [np.nan_to_num(share) * x_RC, y_NC]).df
    q2 = _quantile(df, level) ** 2
    a, b, c = x * x - q2 * var_x, x * y - q2 * cov, y * y - q2 * var_y
    bounded = a > 0
    safe_a = np.where(bounded, a, 1.0)
    root = np.sqrt(np.maximum(b * b - a * c, 0.0))
    low = np.where(bounded, (b - root) / safe_a, -np.inf)
    return _Share(share, low, np.where(bounded, (b + root) / safe_a, np.inf))


def _permutation_p(arms: _Arms, mask_AS: Bool[Tensor, "A S"]) -> np.ndarray:
    real_AS = mask_AS.double().numpy()
    pooled_SC = np.concatenate(arms)
    weight_AS = real_AS / len(arms.real_RC) - (1 - real_AS) / len(arms.null_NC)
    parts = max(1, len(weight_AS) * pooled_SC.shape[1] // 10**7)
    blocks = np.array_split(pooled_SC, parts, axis=1)
    return np.concatenate(
        [_part_at_least(weight_AS @ block, np.abs(block).max(0)) for block in blocks]
    )


def _part_at_least(stat_AC: np.ndarray, scale_C: np.ndarray) -> np.ndarray:
    """Return the part of the assignments with at least the first one's value; ties count, also
    those that differ by rounding of terms as large as `scale_C`."""
    slack = ROUNDING * np.maximum(scale_C, 1e-300)
    return (stat_AC >= stat_AC[0] - slack).mean(0)
