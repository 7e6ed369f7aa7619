"""Measures of two SAEs of a chain: how far each feature turned, how many features are in use.

The formulas are those of OhhMoo/SAE-RL (scripts/topk/06*.py at d919128);
what deviates says so. Features are compared by index: a warm start keeps the index of a feature,
a resampled feature has lost it and is masked.

Dims: M features, D width of the model, N tokens, k active features per token, S stages of a chain,
R chains. Codes are sparse: idx_Nk names the features of a token, value_Nk their activations; a
value of 0 fills an unused place. Statistics are float64.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import binom
from torch import Tensor

from operando.stats.tests import benjamini_hochberg

ALIVE_DENSITY = 1e-4
QUADRANTS = ("stable", "rotated", "reweighted", "redirected")

Kind = Literal["frequency", "energy"]


class Summary(NamedTuple):
    """The columns of sae_rl's heatmap. Example: summarise(cosine_M).q25"""

    mean: float
    median: float
    q25: float
    q75: float
    min: float


class Usage(NamedTuple):
    """What the codes of one stage add up to, for each feature. Add the parts of two chunks.

    `count_M` are tokens with a value above 0, `energy_M` is the sum of squared values.

    Example: usage(idx_Nk, value_Nk, num_features=7168).count_M
    """

    count_M: Int[Tensor, "M"]
    energy_M: Float[Tensor, "M"]
    num_tokens: int


class PublishedLifecycle(NamedTuple):
    """Births and deaths by one threshold. Example: published_lifecycle(before_M, after_M).born"""

    alive_a: Bool[Tensor, "M"]
    alive_b: Bool[Tensor, "M"]
    born: Bool[Tensor, "M"]
    died: Bool[Tensor, "M"]


class Lifecycle(NamedTuple):
    """Births and deaths along a chain by two thresholds and a counting test.

    Row s of `born`, `died` and `q` belongs to the step from stage s to stage s + 1; `q` is nan
    where a feature was resampled or fired too rarely to be tested.

    Example: lifecycle(count_SM, num_tokens=44_574, resampled_SM=resampled_SM).born.sum(1)
    """

    alive: Bool[Tensor, "S M"]
    born: Bool[Tensor, "S-1 M"]
    died: Bool[Tensor, "S-1 M"]
    q: Float[Tensor, "S-1 M"]


class BestMatch(NamedTuple):
    """For each feature of a, its partner in b. `gap` = cosine of the partner - cosine by index.

    Example: best_match(W_dec_a_MD, W_dec_b_MD).gap_M.mean(), sae_rl's renaming gap
    """

    index_M: Int[Tensor, "M"]
    cosine_M: Float[Tensor, "M"]
    gap_M: Float[Tensor, "M"]


def cosine_by_index(
    W_a_MD: Float[Tensor, "M D"],
    W_b_MD: Float[Tensor, "M D"],
    resampled_M: Bool[Tensor, "M"] | None,
) -> Float[Tensor, "M"]:
    """Return the cosine of row i of a with row i of b, for decoder or encoder; nan if resampled.

    cos_i = <a_i, b_i> / (||a_i|| ||b_i||). With None no feature is masked, as in sae_rl, where
    a resampled index counts as a feature that turned. A row of zeros gives 0.
    """
    a_MD, b_MD = W_a_MD.double(), W_b_MD.double()
    norms_M = (a_MD.norm(dim=1) * b_MD.norm(dim=1)).clamp(min=1e-30)
    cosine_M = ((a_MD * b_MD).sum(1) / norms_M).clamp(-1.0, 1.0)
    return cosine_M if resampled_M is None else cosine_M.masked_fill(resampled_M, torch.nan)


def summarise(values_M: Float[Tensor, "M"]) -> Summary:
    """Return mean, median, quartiles and minimum of the values that are not nan."""
    kept = _kept(values_M)
    q25, median, q75 = np.quantile(kept, [0.25, 0.5, 0.75])
    return Summary(float(kept.mean()), float(median), float(q25), float(q75), float(kept.min()))


def drift(cosine_M: Float[Tensor, "M"]) -> float:
    """Return 1 - mean_i cos_i over the features that are not masked."""
    return 1.0 - float(_kept(cosine_M).mean())


def decoupling(dec_cos_M: Float[Tensor, "M"], enc_cos_M: Float[Tensor, "M"]) -> float:
    """Return r, Pearson's correlation over features of decoder and encoder cosine.

    nan where one of them does not vary over the features, as for an SAE beside itself.
    """
    both_M = ~(dec_cos_M.isnan() | enc_cos_M.isnan())
    x, y = dec_cos_M[both_M].double(), enc_cos_M[both_M].double()
    x, y = x - x.mean(), y - y.mean()
    norms = float(x.norm() * y.norm())
    # cosines that differ by rounding alone have no correlation worth a number
    tiny = 1e-12 * max(len(x), 1)
    return float((x * y).sum()) / norms if norms > tiny else float("nan")


def quadrants(dec_cos_M: Float[Tensor, "M"], enc_cos_M: Float[Tensor, "M"]) -> Int[Tensor, "M"]:
    """Return for each feature its place in QUADRANTS, or -1 if it is masked.

    High means at least the median (the middle of the two middle values if M is even):
    stable = high decoder, high encoder; rotated = low, low; reweighted = high decoder, low
    encoder; redirected = low decoder, high encoder. About half of the features are low whatever
    happened: a quadrant says "more than the others", never "much".
    """
    both_M = ~(dec_cos_M.isnan() | enc_cos_M.isnan())
    high_dec_M = dec_cos_M >= float(np.median(_kept(dec_cos_M[both_M])))
    high_enc_M = enc_cos_M >= float(np.median(_kept(enc_cos_M[both_M])))
    place_M = torch.full_like(dec_cos_M, -1, dtype=torch.long)
    place_M[both_M & high_dec_M & high_enc_M] = QUADRANTS.index("stable")
    place_M[both_M & ~high_dec_M & ~high_enc_M] = QUADRANTS.index("rotated")
    place_M[both_M & high_dec_M & ~high_enc_M] = QUADRANTS.index("reweighted")
    place_M[both_M & ~high_dec_M & high_enc_M] = QUADRANTS.index("redirected")
    return place_M


def usage(idx_Nk: Int[Tensor, "N k"], value_Nk: Float[Tensor, "N k"], num_features: int) -> Usage:
    """Return counts and energy of each feature over the tokens of one chunk."""
    flat = idx_Nk.reshape(-1).long()
    value = value_Nk.reshape(-1).double()
    count_M = torch.bincount(flat[value > 0], minlength=num_features)
    energy_M = value.new_zeros(num_features).index_add_(0, flat, value.square())
    return Usage(count_M, energy_M, len(idx_Nk))


def density(used: Usage) -> Float[Tensor, "M"]:
    """Return the share of tokens on which a feature is above 0."""
    assert used.num_tokens > 0, "no tokens"
    return used.count_M.double() / used.num_tokens


def alive(density_M: Float[Tensor, "M"]) -> Bool[Tensor, "M"]:
    """Return density > 1e-4, sae_rl's threshold."""
    return density_M > ALIVE_DENSITY


def entropy_bits(weight_M: Float[Tensor, "M"]) -> float:
    """Return H = -sum_i p_i log2 p_i with p = weight / sum(weight); nan without any weight."""
    p = weight_M.double() / weight_M.double().sum()
    return float(-torch.special.xlogy(p, p).sum()) / float(np.log(2.0))


def effective_count(used: Usage, kind: Kind) -> float:
    """Return 2^H, the number of equally used features with the same entropy.

    frequency: p ~ density, as sae_rl. energy: p ~ sum of squared activations (ours), which a
    feature that fires often but faintly does not fill.
    """
    return 2.0 ** entropy_bits(_weight(used, kind))


def published_lifecycle(
    density_a_M: Float[Tensor, "M"], density_b_M: Float[Tensor, "M"]
) -> PublishedLifecycle:
    """Return births and deaths as sae_rl counts them: alive is density > 1e-4, nothing tested.

    On 44,574 tokens the threshold is 4.5 firings, so that counting noise alone makes both.
    """
    alive_a, alive_b = alive(density_a_M), alive(density_b_M)
    return PublishedLifecycle(alive_a, alive_b, ~alive_a & alive_b, alive_a & ~alive_b)


def counting_p(
    count_a: Int[Tensor, "*shape"], count_b: Int[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return the two-sided p that a feature fires equally often, from counts on the same tokens.

    Given n = count_a + count_b, count_b ~ Binomial(n, 1/2): the conditional test of two Poisson
    rates (Przyborowski & Wilenski 1940, Biometrika 31:313), p = min(1, 2 P(X <= min)). Firing of
    one stage goes with that of the next on the same token, which makes it conservative; firings
    that come in bursts within a text make it liberal.
    """
    less = torch.minimum(count_a, count_b).cpu().numpy()
    total = (count_a + count_b).cpu().numpy()
    p = np.minimum(1.0, 2.0 * binom.cdf(less, total, 0.5))
    return torch.from_numpy(np.asarray(p, dtype=np.float64)).reshape(count_a.shape)


def lifecycle(
    count_SM: Int[Tensor, "S M"],
    num_tokens: int,
    resampled_SM: Bool[Tensor, "S M"],
    low: float = ALIVE_DENSITY / 2,
    high: float = ALIVE_DENSITY * 2,
    fdr: float = 0.05,
) -> Lifecycle:
    """Return births and deaths that are more than counting noise, from counts on the same tokens.

    A living feature dies when its density falls to `low` or below; a dead one is born when it
    rises to `high` or above; in between it stays what it was (sae_rl: one threshold). At the
    first stage and after resampling the geometric mean of both decides, and that is no event.
    A crossing counts if its q <= fdr: counting_p against the last stage that showed the old state
    plainly (above `high` or below `low`; failing that, the first stage), then Benjamini-Hochberg
    over all features with enough firings to be tested, at each transition: not over the crossings,
    which were chosen for their difference. A crossing that does not count leaves the state.
    """
    assert 0 < low <= high, f"low = {low}, high = {high}"
    count_SM, resampled_SM = count_SM.cpu().long(), resampled_SM.cpu()
    density_SM = count_SM.double() / num_tokens
    middle = (low * high) ** 0.5
    state_M, reference_M = density_SM[0] > middle, count_SM[0].clone()
    states, births, deaths, q_values = [state_M], [], [], []
    for density_M, count_M, resampled_M in zip(
        density_SM[1:], count_SM[1:], resampled_SM[1:], strict=True
    ):
        up_M = ~state_M & (density_M >= high)
        down_M = state_M & (density_M <= low)
        # the smallest p of n firings is 2^(1-n); n itself says nothing about which stage has more
        tested_M = ~resampled_M & (torch.exp2(1.0 - (reference_M + count_M)) <= fdr)
        q_M = torch.full_like(density_M, torch.nan)
        q_M[tested_M] = torch.from_numpy(
            benjamini_hochberg(counting_p(reference_M[tested_M], count_M[tested_M]).numpy())
        )
        counted_M = (up_M | down_M) & (q_M <= fdr)
        births.append(up_M & counted_M)
        deaths.append(down_M & counted_M)
        q_values.append(q_M)
        state_M = torch.where(resampled_M, density_M > middle, state_M ^ counted_M)
        plain_M = torch.where(state_M, density_M >= high, density_M <= low)
        reference_M = torch.where(plain_M | resampled_M | counted_M, count_M, reference_M)
        states.append(state_M)
    empty = count_SM.new_zeros(0, count_SM.shape[1])
    return Lifecycle(
        torch.stack(states),
        torch.stack(births) if births else empty.bool(),
        torch.stack(deaths) if deaths else empty.bool(),
        torch.stack(q_values) if q_values else empty.double(),
    )


def best_match(
    W_a_MD: Float[Tensor, "M D"], W_b_MD: Float[Tensor, "M D"], chunk: int = 1024
) -> BestMatch:
    """Return for each row of a the row of b with the largest cosine; several may share one.

    The maximum over M rows is large by chance too, so the gap is above 0 even for features that
    only turned; read it beside the gap of the null arm.
    """
    a_MD, b_MD = _unit(W_a_MD), _unit(W_b_MD)
    best = [(a_MD[i : i + chunk] @ b_MD.T).max(dim=1) for i in range(0, len(a_MD), chunk)]
    cosine_M = torch.cat([b.values for b in best]).double()
    index_M = torch.cat([b.indices for b in best])
    return BestMatch(index_M, cosine_M, cosine_M - (a_MD * b_MD).sum(1).double())


def pairwise_similarity(W_RMD: Float[Tensor, "R M D"]) -> Float[Tensor, "R R"]:
    """Return the mean cosine by index of each two chains at one stage, for nulls.separation.

    An index means the same in two chains only if both started from the same SAE; give decoders
    minus that first SAE where the start itself should not count as similarity.
    """
    unit_RMD = W_RMD.double() / W_RMD.double().norm(dim=2, keepdim=True).clamp(min=1e-30)
    return torch.einsum("rmd,smd->rs", unit_RMD, unit_RMD) / W_RMD.shape[1]


def _unit(W_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
    return W_MD.float() / W_MD.float().norm(dim=1, keepdim=True).clamp(min=1e-30)


def _weight(used: Usage, kind: Kind) -> Float[Tensor, "M"]:
    match kind:
        case "frequency":
            return used.count_M.double()
        case "energy":
            return used.energy_M.double()


def _kept(values_M: Float[Tensor, "M"]) -> np.ndarray:
    kept = values_M[~values_M.isnan()].double().cpu().numpy()
    assert len(kept) > 0, f"all {len(values_M)} features are masked"
    return kept
