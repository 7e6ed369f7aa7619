"""How well a score tells right from wrong answers, beside what chance and length would give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.random import Generator
from torch import Tensor

from operando.discovery.answers import Answers
from operando.recipe.run import DiscoverConfig
from operando.rewards.internal import set_score
from operando.sae.feature_set import FeatureSet, Gate
from operando.sae.sae import SAE
from operando.sae.selected_features import SelectedFeatures
from operando.stats import contrast as ct


@dataclass(frozen=True)
class Measured:
    """How well one score tells right from wrong answers on the prompts held out.

    `within` compares answers of the same prompt only, `controlled` only answers of similar length
    and equal truncation, with its own interval; NaN where there is no such pair.

    Example: Measured("features", auc=0.71, low=0.66, high=0.76, within=0.68, controlled=0.70,
                      controlled_low=0.64, controlled_high=0.75, rho=0.33, rho_bound=0.85)
    """

    name: str
    auc: float
    low: float
    high: float
    within: float
    controlled: float
    controlled_low: float
    controlled_high: float
    rho: float
    rho_bound: float


@dataclass(frozen=True)
class Null:
    """A control drawn n times; `within`: the AUC over pairs of one prompt.

    Example: Null("random features", 0.50, 0.56, 0.50, 0.55, 0.01, 0.11, n=200)
    """

    name: str
    auc: float
    auc_q95: float
    within: float
    within_q95: float
    rho: float
    rho_q95: float
    n: int


def measure(
    name: str, score_R: Float[Tensor, "R"], judged: Answers, generator: Generator
) -> Measured:
    """Return the AUCs and the rho of one score."""
    correct_R = judged.correct_R
    low, high = ct.bootstrap_auc(score_R, correct_R, judged.prompt_R, generator)
    strata_R = ct.confound_strata(judged.length_R, judged.truncated_R)
    same_low, same_high = ct.bootstrap_auc(
        score_R, correct_R, judged.prompt_R, generator, stratum_R=strata_R
    )
    rho = ct.spearman(score_R, correct_R)
    return Measured(
        name,
        ct.auc(score_R, correct_R).value,
        low,
        high,
        ct.auc(score_R, correct_R, judged.prompt_R).value,
        ct.auc(score_R, correct_R, strata_R).value,
        same_low,
        same_high,
        rho.value,
        rho.bound,
    )


def null(name: str, scores: list[Tensor], judged: Answers) -> Null:
    """Return the mean and the 95 % quantile of a control's AUC, over all pairs and over those of
    one prompt, and of its rho."""
    aucs = [ct.auc(score_R, judged.correct_R).value for score_R in scores]
    within = [ct.auc(score_R, judged.correct_R, judged.prompt_R).value for score_R in scores]
    rhos = [ct.spearman(score_R, judged.correct_R).value for score_R in scores]
    return Null(
        name,
        float(np.mean(aucs)),
        float(np.quantile(aucs, 0.95)),
        float(np.mean(within)),
        float(np.quantile(within, 0.95)),
        float(np.mean(rhos)),
        float(np.quantile(rhos, 0.95)),
        len(scores),
    )


def answer_scores(feature_set: FeatureSet, sae: SAE | None, answers: Answers) -> Float[Tensor, "R"]:
    """Return each answer's mean score, as it would be rewarded."""
    if sae is None:
        read_NF = answers.acts_ND.float() @ torch.tensor(feature_set.direction)[:, None]
    else:
        read_NF = SelectedFeatures(sae, tuple(f.id for f in feature_set.features))(answers.acts_ND)
    score_1N = set_score(feature_set, read_NF[None], saturate=True)
    return answers.mean_of(score_1N[0][:, None])[:, 0]


def gate_of(config: DiscoverConfig, real: Measured | None, nulls: list[Null]) -> Gate:
    """Return whether a set may be rewarded: over the minimum, over both nulls' 95 %, and more than
    length: among answers of the same length the interval of its AUC must lie above 0.5."""
    if real is None:
        return Gate(False, (f"no feature has q <= {config.max_q}",))
    name = "AUC" if config.measure == "auc" else "rho"
    value = real.auc if config.measure == "auc" else real.rho
    reasons = []
    if not value >= config.minimum:
        reasons.append(f"{name} {value:.3f} on held-out prompts is under {config.minimum}")
    for control in nulls:
        limit = control.auc_q95 if config.measure == "auc" else control.rho_q95
        if not value > limit:
            reasons.append(
                f"{name} {value:.3f} is not over the 95 % of {control.name}, {limit:.3f}"
            )
    if config.measure == "auc" and not real.low > 0.5:
        reasons.append(f"the AUC's interval {_limits(real.low, real.high)}")
    if real.controlled != real.controlled:
        reasons.append("no right and wrong answers of the same length to compare")
    elif not real.controlled_low > 0.5:
        same = _limits(real.controlled_low, real.controlled_high)
        reasons.append(
            f"the AUC's interval among answers of the same length {same}: length may be all"
        )
    return Gate(not reasons, tuple(reasons))


def _limits(low: float, high: float) -> str:
    """Return where an interval that is not above 0.5 lies."""
    return f"[{low:.3f}, {high:.3f}] {'holds' if high >= 0.5 else 'is below'} 0.5"
