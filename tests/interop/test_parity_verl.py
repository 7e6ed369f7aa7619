"""Our losses and advantages equal verl's own, on random tensors."""

import pytest

pytest.importorskip("verl", reason="verl is not installed: make interop")

from parity import SEEDS, TOLERANCE, Case, max_difference, random_batch  # noqa: E402
from verl_cases import CASES  # noqa: E402

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.quantity} | {c.peer}")
def test_equal(case: Case) -> None:
    assert max_difference(case) <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.quantity} | {c.peer}")
def test_random_batches_are_not_trivial(case: Case) -> None:
    """The peer's numbers are not all 0 and change with the batch, so equality says something."""
    first, second = (case.pairs(random_batch(seed)) for seed in list(SEEDS)[:2])
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert float(a.detach().abs().sum()) > 0
        assert float((a.detach() - b.detach()).abs().max()) > 1e-4
