"""Our strict and flexible GSM8K scorers agree with verl's own on every string."""

import random

import pytest

verl_gsm8k = pytest.importorskip(
    "verl.utils.reward_score.gsm8k", reason="verl is not installed: make interop"
)

from operando.tasks.gsm8k import verl_flexible, verl_strict  # noqa: E402

pytestmark = pytest.mark.interop

PIECES = (
    "#### ", "#### ", "#### ", "####", "#", " ", "\n", ".", ",", "-", "$", "%", "0", "7", "72",
    "72", "1,000", "72.0", "-5", "so ", "it is ", "x" * 120, "٣", "\u2028",
)  # fmt: skip
GOLDS = ("72", "1000", "-5", "7", "72.0", "0", ".", "")


def random_completion(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(9)))


@pytest.mark.parametrize(("method", "ours"), [("strict", verl_strict), ("flexible", verl_flexible)])
def test_same_score(method, ours) -> None:
    rng = random.Random(0)
    right = 0
    for _ in range(100_000):
        completion, gold = random_completion(rng), rng.choice(GOLDS)
        theirs = verl_gsm8k.compute_score(completion, gold, method=method)
        assert ours(completion, gold).correct == (theirs == 1.0), (completion, gold, theirs)
        right += theirs == 1.0
    # Both verdicts occur often, so agreement says something.
    assert 1_000 < right < 99_000
