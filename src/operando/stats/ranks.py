"""Whether several orders of the same things agree. Dims: m orders, n things."""

from __future__ import annotations

import math
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy.stats import rankdata

DRAWS = 20_000  # of chance orders, where there are more than can be counted out


class Agreement(NamedTuple):
    """Kendall's W: 1 if all orders are the same, on average `chance` = 1/m if none has to do with
    another. `p_value` is the share of chance orders that agree as well; `is_exact`: all of them
    were counted out.

    Example: Agreement(w=0.91, chance=0.333, p_value=0.009, is_exact=True)
    """

    w: float
    chance: float
    p_value: float
    is_exact: bool


def kendall_w(value_mn: np.ndarray, generator: Generator) -> Agreement | None:
    """Return how well the rows order the columns alike; None where no row orders anything.

    W = 12 S / (m^2 (n^3 - n) - m sum_i sum_ties (t^3 - t)), S the sum of squares of the columns'
    rank sums about their mean (Kendall and Babington Smith 1939, with mid-ranks). Under chance each
    row's values are in any order, the first's as they are.
    """
    m, n = value_mn.shape
    assert m > 1 and n > 1, (m, n)
    rank_mn = np.stack([rankdata(row) for row in value_mn])
    ties = sum(float(t**3 - t) for row in rank_mn for t in np.unique(row, return_counts=True)[1])
    scale = m * m * (n**3 - n) - m * ties
    if scale == 0:
        return None

    def w_of(ranks_kmn: np.ndarray) -> np.ndarray:
        sum_kn = ranks_kmn.sum(1)
        return 12 * ((sum_kn - m * (n + 1) / 2) ** 2).sum(1) / scale

    is_exact = math.factorial(n) ** (m - 1) <= DRAWS
    if is_exact:
        orders = [np.array(list(permutations(row))) for row in rank_mn[1:]]
        chance_kmn = np.stack([np.stack([rank_mn[0], *rows]) for rows in product(*orders)])
    else:
        chance_kmn = generator.permuted(np.tile(rank_mn, (DRAWS, 1, 1)), axis=2)
    w = float(w_of(rank_mn[None])[0])
    as_well = int((w_of(chance_kmn) >= w - 1e-9).sum())
    extra = 0 if is_exact else 1  # the order that was seen is one of those that chance gives
    return Agreement(w, 1 / m, (as_well + extra) / (len(chance_kmn) + extra), is_exact)
