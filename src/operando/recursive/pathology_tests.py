"""Verdicts on a recursive model's loops: each threshold, and whether a random model meets it too.

A test passes only where the model meets it and no untrained model of the same config does; of what
a random model meets as well, meeting it says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from operando.recursive.pathology_metrics import flow, starvation
from operando.recursive.pathology_read import CacheGap, Reading
from operando.stats.bootstrap import cluster_bootstrap
from operando.stats.intervals import Interval

Verdict = Literal["PASS", "FAIL", "WARN", "UNINFORMATIVE"]

MOST_JITTER, MOST_SPIKE, DRIFT = 0.10, 4.0, (0.5, 2.0)
FAR, FAR_DRIFT = 3, (0.25, 4.0)  # what is a failure: times the limits of jitter and spike
MOST_NLL, MOST_DROP = 0.02, 0.02  # nats per token; share of right answers
LEAST_GAIN = 0.01  # nats per token of R loops over one; CART's was about 0.01
LEAST_SENSE = 0.10  # nats per token of the texts below the same tokens in random order
MOST_CACHE_GAP = 1e-4
PUBLISHED_JITTER, PUBLISHED_COSINE = 0.10, 0.735  # what recursive_lm's report called healthy


@dataclass(frozen=True)
class Number:
    """One measure: the model's, those of untrained models, and the model's on shuffled tokens."""

    name: str
    value: float | None  # None: it does not exist, such as the norm of no gradient
    baselines: Sequence[float | None] = ()
    shuffled: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Test:
    """A verdict with its reason and its numbers."""

    name: str
    verdict: Verdict
    why: str
    numbers: Sequence[Number]


class Read(NamedTuple):
    """What was read of the model, of the model on shuffled tokens, and of the baselines on both."""

    own: Reading
    noise: Reading
    baselines: list[Reading]
    baselines_noise: list[Reading]
    right: Mapping[int, Sequence[bool]]  # the model's greedy answers, by depth
    baseline_right: Sequence[bool]  # one baseline's, at depth R
    alike: Sequence[int]  # problems with one number have one solution
    R: int
    seed: int

    def number(
        self, name: str, get: Callable[[Reading], float | None], interval: Interval | None = None
    ) -> Number:
        return Number(
            name, get(self.own), [get(t) for t in self.baselines], get(self.noise), interval
        )

    def right_of(self, loops: int) -> Number:
        baselines = [float(np.mean(self.baseline_right))] if loops == self.R else []
        return Number(f"right with {loops}", float(np.mean(self.right[loops])), baselines)

    def change(self, before: int, after: int) -> list[float]:
        """Return 1, 0 or -1 of each problem: how another depth changes whether it is right."""
        pairs = zip(self.right[before], self.right[after], strict=True)
        return [float(b) - float(a) for a, b in pairs]

    def mean(self, values: Sequence[float]) -> Interval:
        return cluster_bootstrap(
            [[v] for v in values], lambda x_bK: x_bK[:, 0], self.alike, self.seed
        )

    def tells(self, reading: Reading, noise: Reading, loops: int) -> bool:
        """Return whether texts are told from their own tokens in random order."""
        gap = [b - a for a, b in zip(reading.nll[loops], noise.nll[loops], strict=True)]
        return self.mean(gap).low > LEAST_SENSE


def verdict(meets: bool | None, baselines: Sequence[bool]) -> Verdict:
    """Return what a test says: nothing, where an untrained model meets it too."""
    if meets is None:
        return "WARN"
    if not meets:
        return "FAIL"
    return "UNINFORMATIVE" if any(baselines) else "PASS"


def beside(baselines: Sequence[bool]) -> str:
    return f"{sum(baselines)} of {len(baselines)} random models pass too"


def test_of_shock(r: Read) -> Test:
    """Jitter, spike and drift of the steps between loops.

    Beyond a limit is a warning, for loops that do much work move much; far beyond is a failure.
    """

    def meets(reading: Reading) -> bool | None:
        s = reading.shock
        within = [
            s.jitter <= k * MOST_JITTER and s.spike <= k * MOST_SPIKE and low <= s.drift <= high
            for k, (low, high) in ((1, DRIFT), (FAR, FAR_DRIFT))
        ]
        return True if within[0] else None if within[1] else False

    def jitter(mean_bT: np.ndarray) -> np.ndarray:
        return mean_bT.std(1)

    def spike(mean_bT: np.ndarray) -> np.ndarray:
        return mean_bT.max(1) / np.median(mean_bT, 1)

    numbers = [
        r.number(
            f"jitter J, at most {MOST_JITTER}",
            lambda x: x.shock.jitter,
            cluster_bootstrap(r.own.steps, jitter, r.alike, r.seed),
        ),
        r.number(
            f"spike S, at most {MOST_SPIKE:g}",
            lambda x: x.shock.spike,
            cluster_bootstrap(r.own.steps, spike, r.alike, r.seed),
        ),
        r.number(f"drift D, {DRIFT[0]:g} to {DRIFT[1]:g}", lambda x: x.shock.drift),
        r.number("bend a", lambda x: x.shock.bend),
        r.number("p99 of a step", lambda x: x.shock.p99),
    ]
    baselines, own = [meets(t) is True for t in r.baselines], meets(r.own)
    words = {True: beside(baselines), None: "beyond a limit", False: "far beyond a limit"}[own]
    return Test("update shock", verdict(own, baselines), words, numbers)


def test_of_depth(r: Read, loops: int) -> Test:
    """Another number of loops: what it does to the answers decides, not how the states look."""

    def loss(reading: Reading) -> list[float]:
        return [a - b for a, b in zip(reading.nll[loops], reading.nll[r.R], strict=True)]

    nll = r.mean(loss(r.own))
    change = r.change(r.R, loops)
    answers = r.mean(change)
    meets = depth_meets(nll, answers)
    baselines = [
        r.mean(loss(t)).high <= MOST_NLL and r.tells(t, n, loops)
        for t, n in zip(r.baselines, r.baselines_noise, strict=True)
    ]
    numbers = [
        r.number(f"NLL above {r.R} loops'", lambda x: float(np.mean(loss(x))), nll),
        Number(f"right above {r.R} loops'", answers.value, (), None, answers),
        r.right_of(loops),
        r.number(f"KL from {r.R} loops", lambda x: float(np.mean(x.kl[loops]))),
        r.number("same first choice", lambda x: float(np.mean(x.agree[loops]))),
        r.number(f"cosine with {r.R} loops", lambda x: x.likeness[loops].cosine),
        r.number("  of other tokens", lambda x: x.likeness[loops].mismatched),
        r.number("  centred, minus others'", lambda x: x.likeness[loops].centred),
    ]
    words = {
        True: "as good as trained depth",
        False: "worse than trained depth",
        None: "these problems do not decide it",
    }[meets]
    why = f"{words}; right answers gained {change.count(1.0)}, lost {change.count(-1.0)}"
    said = verdict(meets, baselines)
    if not r.tells(r.own, r.noise, r.R):
        said, why = (
            "UNINFORMATIVE",
            "nothing to lose: the model tells no text from its shuffled one",
        )
    return Test(f"{loops} loops for {r.R}", said, why, numbers)


def only_if_used(test: Test, gain: Test) -> Test:
    """Return a depth's test; where no use of the loops is shown, doing as well says nothing."""
    if gain.verdict == "FAIL" and test.verdict != "FAIL":
        why = "one loop does as well, so another depth has nothing to lose"
        return replace(test, verdict="UNINFORMATIVE", why=why)
    if gain.verdict == "WARN" and test.verdict == "PASS":
        why = f"{test.why}, but that the loops are used at all is not shown"
        return replace(test, verdict="UNINFORMATIVE", why=why)
    return test


def depth_meets(nll: Interval, right: Interval) -> bool | None:
    """Return whether another depth is as good: shown (True), shown not to be (False), or open.

    Both are differences from the trained depth, with intervals over problems.
    """
    if nll.low > MOST_NLL or right.high < -MOST_DROP:
        return False
    if nll.high <= MOST_NLL and right.low >= -MOST_DROP:
        return True
    return None


def test_of_gain(r: Read) -> Test:
    """Whether the loops after the first are used at all."""

    def gain(reading: Reading) -> list[float]:
        return [a - b for a, b in zip(reading.nll[1], reading.nll[r.R], strict=True)]

    found, nll = r.mean(gain(r.own)), r.mean(r.own.nll[r.R])
    change = r.change(1, r.R)
    more = r.mean(change)
    meets = None
    if found.low > LEAST_GAIN or more.low > MOST_DROP:
        meets = True
    elif found.high < LEAST_GAIN and more.high <= MOST_DROP:
        meets = False
    baselines = [r.mean(gain(t)).low > LEAST_GAIN for t in r.baselines]
    numbers = [
        r.number(
            f"NLL of 1 above {r.R}, over {LEAST_GAIN}", lambda x: float(np.mean(gain(x))), found
        ),
        r.number(f"NLL of {r.R} loops", lambda x: float(np.mean(x.nll[r.R])), nll),
        Number(f"right above 1's, over {MOST_DROP}", more.value, (), None, more),
        r.right_of(r.R),
    ]
    said, why = verdict(meets, baselines), beside(baselines)
    if not r.tells(r.own, r.noise, r.R):
        said, why = "UNINFORMATIVE", "the model tells no text from its shuffled one"
    elif said != "PASS":
        words = "one loop does as well: the others are not used"
        why = words if said == "FAIL" else "these problems do not decide it"
    return Test("loops used", said, why, numbers)


def test_of_starvation(r: Read) -> Test:
    """Whether gradients reach what each loop writes: dL/du_t, before the gate."""
    meets, words = starvation(r.own.grads)
    baselines = [starvation(t.grads)[0] is True for t in r.baselines]
    kinds = flow(r.own.grads)
    numbers = [
        r.number(f"dL/du, loop {t + 1}: {kinds[t]}", lambda x, t=t: x.grads[t]) for t in range(r.R)
    ]
    said = verdict(meets, baselines)
    why = f"{words}; {beside(baselines)}" if said == "UNINFORMATIVE" else words
    return Test("gradient starvation", said, why, numbers)


def test_of_cache(gap: CacheGap, baselines: Sequence[CacheGap]) -> Test:
    """A decode through the cache against one forward over the text, exits on."""
    passed = [t.largest <= MOST_CACHE_GAP for t in baselines]
    numbers = [
        Number(
            f"largest gap, at most {MOST_CACHE_GAP:g}", gap.largest, [t.largest for t in baselines]
        ),
        Number(
            "tokens with other exits", float(gap.flipped), [float(t.flipped) for t in baselines]
        ),
        Number("mean loops", gap.loops, [t.loops for t in baselines]),
    ]
    said = verdict(gap.largest <= MOST_CACHE_GAP, passed)
    why = f"halt threshold {gap.threshold:.3g}; {beside(passed)}: it is the code's, not training's"
    return Test("cached decode", said, why, numbers)


def without_control(r: Read) -> str:
    """Return the three numbers that were once printed without a control, with the control."""
    beyond = [t for t in r.own.likeness if t > r.R]
    deep = min(beyond) if beyond else min(r.own.likeness)

    def three(reading: Reading) -> tuple[float, float, float]:
        return reading.shock.jitter, reading.likeness[deep].cosine, reading.carry[-1] or 0.0

    def passes(values: tuple[float, float, float]) -> bool:
        return values[0] <= PUBLISHED_JITTER and values[1] >= PUBLISHED_COSINE and values[2] > 0

    baselines = [three(t) for t in r.baselines]
    words = []
    named = (
        f"step std (at most {PUBLISHED_JITTER})",
        f"cosine of {deep} with {r.R} loops (at least {PUBLISHED_COSINE})",
        "dL/dh of the last loop (not 0)",
    )
    for i, name in enumerate(named):
        values = [t[i] for t in baselines]
        words.append(f"{name} {three(r.own)[i]:.3g}, random {min(values):.3g} to {max(values):.3g}")
    count = sum(passes(t) for t in baselines)
    return f"{'; '.join(words)}: {count} of {len(baselines)} random models pass all three"
