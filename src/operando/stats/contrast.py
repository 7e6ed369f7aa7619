"""Which features go with right answers: effect sizes, their permutation null, and hold-out AUCs.

Shape legend: R rollouts, M features, K permutations, P prompts. A rollout's value of a feature is
its mean over the completion's tokens.

Right and wrong answers are compared within a prompt, so that a feature of easy prompts is not taken
for a feature of right answers. The labels are exchangeable within a prompt under the null, and the
null shuffles them there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.random import Generator
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from operando.errors import UserError

CHUNK = 4096  # features compared at once
STRATUM_SIZE = 20  # answers


class Contrast(NamedTuple):
    """Effect size of every feature and the share of false finds beyond it.

    `q_M` is NaN where the feature fired in too few rollouts to be compared.

    Example: contrast(x_RM, correct_R, prompt_R, min_support=10, permutations=500, generator=g).d_M
    """

    d_M: Float[Tensor, "M"]
    q_M: Float[Tensor, "M"]
    support_M: Int[Tensor, "M"]
    null_max: float  # 95 % quantile over permutations of the largest |d|
    mixed_prompts: int


class Auc(NamedTuple):
    """P(score of a right answer > score of a wrong one), ties half, and the number of pairs.

    Example: Auc(0.71, pairs=480)
    """

    value: float
    pairs: float


def contrast(
    x_RM: Float[Tensor, "R M"],
    correct_R: Bool[Tensor, "R"],
    prompt_R: Int[Tensor, "R"],
    *,
    min_support: int,
    permutations: int,
    generator: Generator,
    confounds_RC: Float[Tensor, "R C"] | None = None,
) -> Contrast:
    """Return d of every feature, right against wrong answers of the same prompt.

    d = sum_p w_p (mean_right,p - mean_wrong,p) / sum_p w_p / (s + s_0), w_p = n_r n_w / (n_r + n_w)
    s is the feature's standard deviation within prompts, s_0 the median s: shrinkage that keeps
    rare features from winning by a small denominator (SAM, Tusher et al. 2001). q is the expected
    number of |d| as large under labels shuffled within prompts over the number found. What is
    linear in `confounds_RC` (such as length) is taken out of a feature first, within prompts.
    """
    weight_R = contrast_weights(correct_R, prompt_R)
    mixed = len(prompt_R[weight_R != 0].unique())
    if mixed == 0:
        raise UserError(
            f"no prompt has both right and wrong answers ({int(correct_R.sum())} of "
            f"{len(correct_R)} answers are right): nothing to compare. Choose easier or harder "
            "problems, or more answers per prompt (discover.num_generations)"
        )
    shuffled = [
        contrast_weights(shuffle_within(correct_R, prompt_R, generator), prompt_R)
        for _ in range(permutations)
    ]
    weight_KR = torch.stack([weight_R, *shuffled])
    support_M = (x_RM != 0).sum(dim=0)
    centred = [_within(x_RM[:, at : at + CHUNK], prompt_R) for at in range(0, x_RM.shape[1], CHUNK)]
    if confounds_RC is not None:
        basis_RC = torch.linalg.qr(_within(confounds_RC, prompt_R))[0]
        centred = [x_Rm - basis_RC @ (basis_RC.T @ x_Rm) for x_Rm in centred]
    s_M = torch.cat([x_Rm.square().mean(dim=0).sqrt() for x_Rm in centred])
    enough_M = (support_M >= min_support) & (s_M > 0)
    if not bool(enough_M.any()):
        raise UserError(
            f"no feature fires in {min_support} of {len(correct_R)} answers: lower "
            "discover.min_support, or sample more"
        )
    scale_M = s_M + s_M[enough_M].median()
    d_KM = torch.cat([weight_KR @ x_Rm for x_Rm in centred], dim=1) / scale_M
    d_KM[:, ~enough_M] = 0
    null_KM = d_KM[1:].abs()
    q_M = torch.full_like(scale_M, torch.nan)
    q_M[enough_M] = _q_values(d_KM[0, enough_M].abs(), null_KM[:, enough_M])
    null_max = float(null_KM.amax(dim=1).quantile(0.95)) if permutations else float("nan")
    return Contrast(d_KM[0], q_M, support_M, null_max, mixed)


def contrast_weights(
    correct_R: Bool[Tensor, "R"], prompt_R: Int[Tensor, "R"]
) -> Float[Tensor, "R"]:
    """Return c such that c @ x is the weighted mean over prompts of mean_right - mean_wrong."""
    _, index_R = prompt_R.unique(return_inverse=True)
    num = int(index_R.max()) + 1
    right_P = torch.zeros(num).index_add_(0, index_R, correct_R.float())
    wrong_P = torch.zeros(num).index_add_(0, index_R, (~correct_R).float())
    w_P = right_P * wrong_P / (right_P + wrong_P)
    sign_R = torch.where(
        correct_R, 1 / right_P.clamp(min=1)[index_R], -1 / wrong_P.clamp(min=1)[index_R]
    )
    return w_P[index_R] * sign_R / w_P.sum().clamp(min=1e-12)


def shuffle_within(
    correct_R: Bool[Tensor, "R"], prompt_R: Int[Tensor, "R"], generator: Generator
) -> Bool[Tensor, "R"]:
    """Return the labels shuffled among the answers of each prompt."""
    draw_R = torch.from_numpy(generator.random(len(correct_R)))
    by_prompt = torch.from_numpy(np.lexsort((np.arange(len(prompt_R)), prompt_R.numpy())))
    by_draw = torch.from_numpy(np.lexsort((draw_R.numpy(), prompt_R.numpy())))
    shuffled_R = torch.empty_like(correct_R)
    shuffled_R[by_prompt] = correct_R[by_draw]
    return shuffled_R


def _within(x_RM: Float[Tensor, "R M"], prompt_R: Int[Tensor, "R"]) -> Float[Tensor, "R M"]:
    """Return x minus its prompt's mean."""
    _, index_R = prompt_R.unique(return_inverse=True)
    num = int(index_R.max()) + 1
    count_P = torch.zeros(num).index_add_(0, index_R, torch.ones(len(index_R)))
    mean_PM = torch.zeros(num, x_RM.shape[1]).index_add_(0, index_R, x_RM) / count_P[:, None]
    return x_RM - mean_PM[index_R]


def length_confounds(
    length_R: Int[Tensor, "R"], truncated_R: Bool[Tensor, "R"]
) -> Float[Tensor, "R C"]:
    """Return length, its square, and truncation, standardised; what does not vary is left out."""
    length_R1 = length_R.float()[:, None]
    raw_RC = torch.cat([length_R1, length_R1.square(), truncated_R.float()[:, None]], dim=1)
    spread_C = raw_RC.std(dim=0)
    return ((raw_RC - raw_RC.mean(dim=0)) / spread_C.clamp(min=1e-12))[:, spread_C > 0]


def _q_values(real_M: Float[Tensor, "M"], null_KM: Float[Tensor, "K M"]) -> Float[Tensor, "M"]:
    """Return (mean number of null values >= d) / (number of real values >= d), made monotone."""
    if null_KM.shape[0] == 0:
        return torch.full_like(real_M, torch.nan)
    order = real_M.argsort(descending=True)
    null = np.sort(null_KM.numpy(), axis=None)
    beyond = len(null) - np.searchsorted(null, real_M[order].numpy(), side="left")
    found = np.arange(1, len(order) + 1)
    # One more draw, the real one, keeps a q of exactly 0 out of reach.
    expected = (beyond + found) / (null_KM.shape[0] + 1)
    q = np.minimum.accumulate((expected / found)[::-1])[::-1].clip(max=1.0)
    q_M = torch.empty_like(real_M)
    q_M[order] = torch.from_numpy(q.copy()).to(q_M.dtype)
    return q_M


def auc(
    score_R: Float[Tensor, "R"],
    correct_R: Bool[Tensor, "R"],
    stratum_R: Int[Tensor, "R"] | None = None,
) -> Auc:
    """Return the AUC over all right-wrong pairs, or over those within a stratum (a prompt, ...)."""
    score, correct = score_R.double().numpy(), correct_R.numpy().astype(float)
    if np.isnan(score).any():
        return Auc(float("nan"), 0.0)
    strata = np.zeros(len(score), dtype=int) if stratum_R is None else stratum_R.numpy()
    # ranks within strata from one sort: the stratum is the leading digit, its start is taken off
    place = np.unique(strata, return_inverse=True)[1]
    values, value = np.unique(score, return_inverse=True)
    size = np.bincount(place)
    rank = rankdata(place * len(values) + value) - (size.cumsum() - size)[place]
    right = np.bincount(place, weights=correct)
    wins = np.bincount(place, weights=rank * correct) - right * (right + 1) / 2
    pairs = right * (size - right)
    wins = wins[pairs > 0].sum()
    return Auc(wins / pairs.sum() if pairs.any() else float("nan"), float(pairs.sum()))


def bootstrap_auc(
    score_R: Float[Tensor, "R"],
    correct_R: Bool[Tensor, "R"],
    prompt_R: Int[Tensor, "R"],
    generator: Generator,
    resamples: int = 1000,
    stratum_R: Int[Tensor, "R"] | None = None,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the AUC, prompts resampled whole; NaN twice where no
    resample has a pair to compare (within a stratum, if given)."""
    rows = [torch.nonzero(prompt_R == prompt)[:, 0] for prompt in prompt_R.unique()]
    values = []
    for _ in range(resamples):
        index = torch.cat([rows[i] for i in generator.integers(len(rows), size=len(rows))])
        stratum_r = None if stratum_R is None else stratum_R[index]
        values.append(auc(score_R[index], correct_R[index], stratum_r).value)
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def confound_strata(length_R: Int[Tensor, "R"], truncated_R: Bool[Tensor, "R"]) -> Int[Tensor, "R"]:
    """Return strata of equal truncation and similar length: quantile bins of about 20 answers.

    Fewer, wider bins would leave so much of the length inside a bin that a score of nothing but
    length still tells right from wrong there.
    """
    bins = max(2, len(length_R) // STRATUM_SIZE)
    edges = torch.quantile(length_R.float(), torch.linspace(0, 1, bins + 1)[1:-1])
    return torch.bucketize(length_R.float(), edges.unique()) * 2 + truncated_R.long()


class Rho(NamedTuple):
    """Spearman's rho of a score with a binary label, and the largest it could be.

    With a share p of right answers, |rho| <= sqrt(3 p (1 - p)).

    Example: Rho(0.54, bound=0.542)
    """

    value: float
    bound: float


def spearman(score_R: Float[Tensor, "R"], correct_R: Bool[Tensor, "R"]) -> Rho:
    """Return rho, mechreward's measure, with its bound for binary labels."""
    p = float(correct_R.float().mean())
    bound = (3 * p * (1 - p)) ** 0.5
    if bound == 0 or bool((score_R == score_R[0]).all()):
        return Rho(0.0, bound)
    found = spearmanr(score_R.numpy(), correct_R.numpy())
    return Rho(float(found.statistic), bound)  # pyright: ignore[reportAttributeAccessIssue]
