"""The verdicts on the claims that were written before the first run, and the sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from operando.recipe.study import (
    Bound,
    Claim,
    DifferenceClaim,
    EmergenceClaim,
    EmergenceDifferenceClaim,
    EquivalenceClaim,
    RateClaim,
    StudyRecipe,
)
from operando.stats.bootstrap import hierarchical_bootstrap, rate_interval
from operando.stats.intervals import Interval, exact_share
from operando.stats.tests import fisher, tost
from operando.study.analysis import Values, bootstrap_seed, compare, values_of
from operando.text import shown

TWO_SEEDS = "two seeds find a difference where there is none in about 11 % of studies, not in 5 %"

Verdict = Literal["supported", "falsified", "undecided"]


@dataclass(frozen=True)
class Judgement:
    """A claim with its verdict, and the number that decided it in words.

    Example: Judgement("H2", "The real direction beats random ones.", "falsified",
                       "hack of real minus random: +1 points (-4 to +6)", Interval(...))
    """

    name: str
    text: str
    verdict: Verdict
    finding: str
    interval: Interval

    @property
    def sentence(self) -> str:
        return (
            f"{self.name} {self.verdict}: {self.text} {self.finding[0].upper()}{self.finding[1:]}."
        )


def judge_claims(study: StudyRecipe, values: Values) -> list[Judgement]:
    """Return every claim's verdict, in the order in which they were written."""
    return [_judge(study, name, claim, values) for name, claim in study.claims.items()]


def _judge(study: StudyRecipe, name: str, claim: Claim, values: Values) -> Judgement:
    match claim:
        case DifferenceClaim():
            a_SP, b_SP = _pair(claim, values)
            interval = compare(a_SP, b_SP, bootstrap_seed(study)).hierarchical.interval
            verdict = _verdict(interval, claim.supported_if, claim.falsified_if)
            finding = f"{claim.metric} of {claim.arm} minus {claim.versus}: {points(interval)}"
        case RateClaim():
            own_SP = values_of(values, claim.arm, claim.metric, study.control)
            interval = rate_interval(own_SP, bootstrap_seed(study))
            verdict = _verdict(interval, claim.supported_if, claim.falsified_if)
            finding = f"{claim.metric} of {claim.arm}: {percent(interval)}"
        case EquivalenceClaim():
            verdict, finding, interval = _equivalence(study, claim, values)
        case EmergenceClaim():
            count, n = _reached(values[claim.arm][claim.metric], claim.threshold)
            interval = exact_share(count, n)
            verdict = _verdict(interval, claim.supported_if, claim.falsified_if)
            finding = (
                f"{count} of {n} runs of {claim.arm} have {claim.metric} of "
                f"{claim.threshold:.0%} or more, share {percent(interval)}"
            )
        case EmergenceDifferenceClaim():
            verdict, finding, interval = _emergence_difference(claim, values)
    return Judgement(name, shown(claim.text), verdict, finding, interval)


def _equivalence(
    study: StudyRecipe, claim: EquivalenceClaim, values: Values
) -> tuple[Verdict, str, Interval]:
    a_SP, b_SP = _pair(claim, values)
    test = tost((a_SP - b_SP).mean(1).tolist(), claim.margin)
    around = hierarchical_bootstrap(a_SP - b_SP, bootstrap_seed(study), level=0.90).interval
    is_within = max(-around.low, around.high) < claim.margin
    verdict: Verdict = "undecided"
    if test.p_value is not None and test.p_value < 0.05 and is_within:
        verdict = "supported"
    elif test.difference.low > claim.margin or test.difference.high < -claim.margin:
        verdict = "falsified"
    said = f"TOST p = {test.p_value:.2g}" if test.p_value is not None else "all alike, so no test,"
    finding = (
        f"{claim.metric} of {claim.arm} minus {claim.versus}: {points(test.difference)}, margin "
        f"{100 * claim.margin:.3g}, {said} over {test.n} seed pairs"
    )
    return verdict, finding, test.difference


def _emergence_difference(
    claim: EmergenceDifferenceClaim, values: Values
) -> tuple[Verdict, str, Interval]:
    count_a, n_a = _reached(values[claim.arm][claim.metric], claim.threshold)
    count_b, n_b = _reached(values[claim.versus][claim.metric], claim.threshold)
    p_value = fisher(count_a, n_a, count_b, n_b)
    is_more = count_a / n_a > count_b / n_b
    verdict: Verdict = "undecided"
    if p_value < 0.05:
        verdict = "supported" if is_more == (claim.expect == "more") else "falsified"
    finding = (
        f"{claim.metric} of {claim.threshold:.0%} or more in {count_a} of {n_a} runs of "
        f"{claim.arm} and {count_b} of {n_b} of {claim.versus}, Fisher p = {p_value:.2g}"
    )
    return verdict, finding, exact_share(count_a, n_a)


def _pair(
    claim: DifferenceClaim | EquivalenceClaim, values: Values
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of both sides; "base" is the model that the other side starts from."""
    return (
        values_of(values, claim.arm, claim.metric, claim.versus),
        values_of(values, claim.versus, claim.metric, claim.arm),
    )


def _reached(values_SP: np.ndarray, threshold: float) -> tuple[int, int]:
    return int((values_SP.mean(1) >= threshold).sum()), len(values_SP)


def _verdict(interval: Interval, supported_if: Bound, falsified_if: Bound) -> Verdict:
    if lies_within(interval, supported_if):
        return "supported"
    return "falsified" if lies_within(interval, falsified_if) else "undecided"


def lies_within(interval: Interval, bound: Bound) -> bool:
    """Return whether the whole interval is beyond the bound."""
    if bound.above is not None:
        return interval.low > bound.above
    return interval.high < bound.limit


def headline(study: StudyRecipe, judgements: Sequence[Judgement]) -> str:
    """Return one sentence about all claims, the falsified ones first and by name."""
    seeds = f"{len(study.arms)} arms, {len(study.seeds)} seeds each"
    if len(study.seeds) == 2:
        seeds += f" ({TWO_SEEDS})"
    if not judgements:
        return f"{study.name}: {seeds}; no claim was written before the first run."
    parts = []
    for verdict in ("falsified", "supported", "undecided"):
        found = [j for j in judgements if j.verdict == verdict]
        if found:
            named = "; ".join(f"{j.name}, {j.finding}" for j in found)
            parts.append(f"{len(found)} {verdict} ({named})")
    claims = "claim" if len(judgements) == 1 else "claims"
    return f"{study.name}: of {len(judgements)} {claims}, {', '.join(parts)}; {seeds}."


def points(interval: Interval) -> str:
    """Return a difference in percentage points with its 95 % interval."""
    value, low, high = (100 * x for x in interval)
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def percent(interval: Interval) -> str:
    """Return a share with its 95 % interval."""
    value, low, high = interval
    return f"{value:.1%} ({low:.1%} to {high:.1%})"
