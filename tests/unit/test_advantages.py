"""Advantages: values worked by hand, slow loops as second opinions, properties."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from operando.update.advantages import (
    gae,
    group_advantages,
    kl_penalised_reward,
    leave_one_group_out_advantages,
    reward_to_go,
    reward_to_go_advantages,
    rloo_advantages,
    whiten,
)
from operando.update.reduce import masked_mean, masked_sum, zero_outside

NAN, INF = math.nan, math.inf
MASK = torch.tensor([[True, True, True], [True, True, False]])
SEEDS = st.integers(0, 2**31)

Advantage = Callable[[Tensor, Tensor, int], Tensor]
ESTIMATORS: dict[str, Advantage] = {
    "group": lambda r, m, g: group_advantages(r, m, g),
    "group_batch": lambda r, m, g: group_advantages(r, m, g, scale="batch"),
    "group_none": lambda r, m, g: group_advantages(r, m, g, scale="none"),
    "rloo": rloo_advantages,
    "leave_one_group_out": leave_one_group_out_advantages,
    "reward_to_go": lambda r, m, g: reward_to_go_advantages(r, m, g, gamma=0.9),
}


class Batch:
    """P groups of G rollouts with random dense rewards, lengths 1..T and garbage under the mask."""

    def __init__(self, seed: int, prompts: int = 3, group: int = 4, tokens: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = prompts * group
        length_B = torch.randint(1, tokens + 1, (rows,), generator=generator)
        self.group = group
        self.mask_BT = torch.arange(tokens) < length_B[:, None]
        self.reward_BT = torch.randn(rows, tokens, generator=generator)
        self.value_BT = torch.randn(rows, tokens, generator=generator)
        self.order_G = torch.randperm(group, generator=generator)

    def returns(self) -> list[float]:
        return [
            sum(float(r) for r, m in zip(rs, ms, strict=True) if m)
            for rs, ms in zip(self.reward_BT, self.mask_BT, strict=True)
        ]


def test_masked_reductions_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])
    assert masked_sum(x, MASK).tolist() == [6.0, 9.0]
    assert float(masked_mean(x, MASK)) == 3.0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_masked_reductions_never_read_padding(bad: float) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, bad]], requires_grad=True)
    (masked_sum(x, MASK).sum() + 2 * masked_mean(x, MASK)).backward()
    assert masked_sum(x, MASK).tolist() == [6.0, 9.0]
    assert masked_mean(x, MASK).tolist() == 3.0
    assert x.grad is not None
    assert_close(x.grad, torch.where(MASK, 1.4, 0.0))


def test_empty_mask_gives_zero() -> None:
    empty = torch.zeros_like(MASK)
    x = torch.full((2, 3), NAN)
    assert masked_sum(x, empty).tolist() == [0.0, 0.0]
    assert float(masked_mean(x, empty)) == 0.0
    for estimator in ESTIMATORS.values():
        group = 1 if estimator is leave_one_group_out_advantages else 2
        assert estimator(x, empty, group).tolist() == [[0.0] * 3] * 2
    assert gae(x, x, empty, 1.0, 1.0).adv_BT.tolist() == [[0.0] * 3] * 2
    assert gae(x, x, empty, 1.0, 1.0).return_BT.tolist() == [[0.0] * 3] * 2
    assert reward_to_go(x, empty, 1.0).tolist() == [[0.0] * 3] * 2
    assert whiten(x, empty).tolist() == [[0.0] * 3] * 2


def test_bf16_rewards_are_summed_in_float32() -> None:
    ones = torch.ones(1, 300, dtype=torch.bfloat16)
    everywhere = torch.ones(1, 300, dtype=torch.bool)
    assert masked_sum(ones, everywhere).dtype == torch.float32
    assert float(masked_sum(ones * 1.0078125, everywhere)) == 302.34375


def test_group_advantages_by_hand() -> None:
    reward = torch.tensor([[0.0, 0.0, 3.0], [0.0, 1.0, 99.0]])
    # Returns 3 and 1: mean 2, std (ddof 1) sqrt(2).
    a = 1 / (math.sqrt(2) + 1e-4)
    assert_close(group_advantages(reward, MASK, 2), torch.tensor([[a, a, a], [-a, -a, 0.0]]))
    plain = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]])
    assert_close(group_advantages(reward, MASK, 2, scale="none"), plain)
    assert_close(rloo_advantages(reward, MASK, 2), 2 * plain)
    assert_close(leave_one_group_out_advantages(reward, MASK, 1), 2 * plain)


def test_one_success_in_four_uses_ddof_one() -> None:
    reward = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    adv = group_advantages(reward, torch.ones(4, 1, dtype=torch.bool), 4, eps=0.0)
    assert_close(adv, torch.tensor([[1.5], [-0.5], [-0.5], [-0.5]]))


def test_batch_scale_by_hand() -> None:
    reward = torch.tensor([[0.0], [2.0], [4.0], [8.0]])
    adv = group_advantages(reward, torch.ones(4, 1, dtype=torch.bool), 2, scale="batch", eps=0.0)
    std = math.sqrt((3.5**2 + 1.5**2 + 0.5**2 + 4.5**2) / 3)
    assert_close(adv, torch.tensor([[-1.0], [1.0], [-2.0], [2.0]]) / std)


def test_leave_one_group_out_by_hand() -> None:
    reward = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    adv = leave_one_group_out_advantages(reward, torch.ones(4, 1, dtype=torch.bool), 2)
    assert_close(adv, torch.tensor([[-14.0], [-12.0], [8.0], [18.0]]))


@settings(max_examples=25)
@given(SEEDS)
def test_return_estimators_equal_slow_loops(seed: int) -> None:
    batch = Batch(seed)
    returns, group = batch.returns(), batch.group
    mean_all = sum(returns) / len(returns)
    std_all = math.sqrt(sum((r - mean_all) ** 2 for r in returns) / (len(returns) - 1))
    slow: dict[str, list[float]] = {name: [] for name in ESTIMATORS if name != "reward_to_go"}
    for i, value in enumerate(returns):
        start = i - i % group
        mine = returns[start : start + group]
        others = returns[:start] + returns[start + group :]
        mean = sum(mine) / group
        std = math.sqrt(sum((r - mean) ** 2 for r in mine) / (group - 1))
        slow["group"].append((value - mean) / (std + 1e-4))
        slow["group_batch"].append((value - mean) / (std_all + 1e-4))
        slow["group_none"].append(value - mean)
        slow["rloo"].append(value - (sum(mine) - value) / (group - 1))
        slow["leave_one_group_out"].append(value - sum(others) / len(others))
    for name, expected in slow.items():
        got = ESTIMATORS[name](batch.reward_BT, batch.mask_BT, group)
        assert_close(got, torch.tensor(expected)[:, None] * batch.mask_BT, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(SEEDS)
def test_permuting_a_group_permutes_its_advantages(seed: int) -> None:
    batch = Batch(seed)
    order = torch.arange(len(batch.mask_BT))
    order[: batch.group] = batch.order_G
    for estimator in ESTIMATORS.values():
        adv = estimator(batch.reward_BT, batch.mask_BT, batch.group)
        moved = estimator(batch.reward_BT[order], batch.mask_BT[order], batch.group)
        assert_close(moved, adv[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, 7.0, NAN, INF])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_padding_does_not_matter(name: str, bad: float) -> None:
    batch = Batch(seed=0)
    adv = ESTIMATORS[name](batch.reward_BT, batch.mask_BT, batch.group)
    assert (adv[~batch.mask_BT] == 0).all()
    dirty = torch.where(batch.mask_BT, batch.reward_BT, bad)
    wide = torch.nn.functional.pad(dirty, (0, 2), value=bad)
    wide_mask = torch.nn.functional.pad(batch.mask_BT, (0, 2))
    assert_close(ESTIMATORS[name](wide, wide_mask, batch.group)[:, :-2], adv)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("gone", [NAN, None])
def test_rows_without_a_return_leave_the_baseline(name: str, gone: float | None) -> None:
    """A NaN return, or a row without tokens, counts as if the rollout had not been drawn."""
    batch = Batch(seed=1, prompts=2, group=3)
    reward, mask = batch.reward_BT.clone(), batch.mask_BT.clone()
    if gone is None:
        mask[[2, 5]] = False
    else:
        reward[[2, 5], 0] = gone
    keep = [0, 1, 3, 4]
    adv = ESTIMATORS[name](reward, mask, 3)
    assert_close(adv[keep], ESTIMATORS[name](reward[keep], mask[keep], 2))
    assert (adv[[2, 5]] == 0).all()


def test_a_single_valid_return_gets_no_advantage() -> None:
    reward = torch.tensor([[NAN], [5.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    for estimator in ESTIMATORS.values():
        group = 1 if estimator is leave_one_group_out_advantages else 2
        assert estimator(reward, mask, group).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_of_one_is_refused(scale: str) -> None:
    reward, mask = torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="given 1, expected at least 2"):
        group_advantages(reward, mask, 1, scale=scale)
    with pytest.raises(ValueError, match="given 1, expected at least 2"):
        rloo_advantages(reward, mask, 1)
    with pytest.raises(ValueError, match=r"given 1 group\(s\), expected at least 2"):
        leave_one_group_out_advantages(reward, mask, 2)
    with pytest.raises(ValueError, match="given 3 for 2 rollouts"):
        group_advantages(reward, mask, 3)


def test_reward_to_go_by_hand() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 99.0]])
    expected = torch.tensor([[3.0, 4.0, 4.0], [2.0, 2.0, 0.0]])
    assert_close(reward_to_go(reward, MASK, 0.5), expected)
    # Both rollouts reach tokens 0 and 1; only the first reaches token 2.
    adv = torch.tensor([[0.5, 1.0, 0.0], [-0.5, -1.0, 0.0]])
    assert_close(reward_to_go_advantages(reward, MASK, 2, 0.5), adv)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([0.0, 0.7, 1.0]))
def test_reward_to_go_equals_slow_loop(seed: int, gamma: float) -> None:
    batch = Batch(seed)
    rows, tokens = batch.mask_BT.shape
    length = batch.mask_BT.sum(1).tolist()
    to_go = torch.zeros(rows, tokens)
    for b in range(rows):
        for t in range(length[b]):
            for s in range(t, length[b]):
                to_go[b, t] += gamma ** (s - t) * batch.reward_BT[b, s]
    adv = to_go.clone()
    for b in range(rows):
        start = b - b % batch.group
        for t in range(length[b]):
            alive = [i for i in range(start, start + batch.group) if t < length[i]]
            adv[b, t] -= sum(to_go[i, t] for i in alive) / len(alive)
    assert_close(reward_to_go(batch.reward_BT, batch.mask_BT, gamma), to_go, rtol=1e-5, atol=1e-5)
    got = reward_to_go_advantages(batch.reward_BT, batch.mask_BT, batch.group, gamma)
    assert_close(got, adv, rtol=1e-5, atol=1e-5)


def test_gae_by_hand() -> None:
    reward = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 99.0]])
    value = torch.tensor([[0.5, 0.25, 0.5], [0.0, 0.5, 99.0]])
    # Row 0, gamma = lam = 0.5: deltas -0.375, 0, 0.5.  Row 1: deltas 0.25, 0.5.
    out = gae(reward, value, MASK, gamma=0.5, lam=0.5)
    adv = torch.tensor([[-0.34375, 0.125, 0.5], [0.375, 0.5, 0.0]])
    assert_close(out.adv_BT, adv)
    assert_close(out.return_BT, torch.tensor([[0.15625, 0.375, 1.0], [0.375, 1.0, 0.0]]))


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([0.5, 1.0]), st.sampled_from([0.0, 0.9, 1.0]))
def test_gae_equals_the_sum_of_deltas(seed: int, gamma: float, lam: float) -> None:
    batch = Batch(seed)
    rows, tokens = batch.mask_BT.shape
    expected = torch.zeros(rows, tokens)
    for b in range(rows):
        length = int(batch.mask_BT[b].sum())
        value = [*batch.value_BT[b, :length].tolist(), 0.0]
        for t in range(length):
            for s in range(t, length):
                delta = float(batch.reward_BT[b, s]) + gamma * value[s + 1] - value[s]
                expected[b, t] += (gamma * lam) ** (s - t) * delta
    out = gae(batch.reward_BT, batch.value_BT, batch.mask_BT, gamma, lam)
    assert_close(out.adv_BT, expected, rtol=1e-4, atol=1e-5)
    target = zero_outside(expected + batch.value_BT, batch.mask_BT)
    assert_close(out.return_BT, target, rtol=1e-4, atol=1e-5)


def test_gae_lambda_one_targets_are_the_rewards_to_go() -> None:
    batch = Batch(seed=3)
    out = gae(batch.reward_BT, batch.value_BT, batch.mask_BT, gamma=0.9, lam=1.0)
    assert_close(out.return_BT, reward_to_go(batch.reward_BT, batch.mask_BT, 0.9))


def test_gae_skips_masked_tokens_inside_a_completion() -> None:
    """A hole of observation tokens changes nothing for the real tokens around it."""
    reward, value = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.3, 0.6]])
    whole = torch.ones(1, 2, dtype=torch.bool)
    hole = torch.tensor([[True, False, False, True]])
    wide_reward = torch.tensor([[1.0, NAN, 8.0, 2.0]])
    wide_value = torch.tensor([[0.3, 9.0, NAN, 0.6]])
    plain, holed = gae(reward, value, whole, 0.9, 0.8), gae(wide_reward, wide_value, hole, 0.9, 0.8)
    assert_close(holed.adv_BT[hole], plain.adv_BT[0])
    assert_close(holed.return_BT[hole], plain.return_BT[0])
    assert (holed.adv_BT[~hole] == 0).all()


def test_gae_refuses_nan_rewards_and_names_the_row() -> None:
    reward = torch.tensor([[1.0, 1.0, 1.0], [1.0, NAN, 1.0]])
    with pytest.raises(AssertionError, match=r"NaN rewards in rows \[1\]"):
        gae(reward, torch.zeros(2, 3), MASK, 1.0, 1.0)


def test_whiten_by_hand() -> None:
    adv = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, NAN]])
    unit = 1 / math.sqrt(2.5 + 1e-8)
    expected = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 0.0]]) * unit
    assert_close(whiten(adv, MASK), expected)


def test_whiten_of_one_token_is_zero() -> None:
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert (whiten(torch.full((2, 3), 4.0), one) == 0).all()


def test_kl_penalised_reward_by_hand() -> None:
    reward = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, NAN]])
    logp = torch.tensor([[-1.0, -2.0, -1.0], [-3.0, -1.0, NAN]], requires_grad=True)
    ref = torch.tensor([[-2.0, -1.0, -1.0], [-1.0, -1.0, INF]])
    # d = [[1, -1, 0], [-2, 0, -]]
    k1 = kl_penalised_reward(reward, logp, ref, MASK, 0.5, "k1")
    assert_close(k1, torch.tensor([[-0.5, 0.5, 1.0], [1.0, 1.0, 0.0]]))
    k2 = kl_penalised_reward(reward, logp, ref, MASK, 0.5, "k2")
    assert_close(k2, torch.tensor([[-0.25, -0.25, 1.0], [-1.0, 1.0, 0.0]]))
    k3 = kl_penalised_reward(reward, logp, ref, MASK, 0.5, "k3")
    e = math.e
    row_0 = [-0.5 / e, -0.5 * (e - 2), 1.0]
    assert_close(k3, torch.tensor([row_0, [-0.5 * (e**2 - 3), 1.0, 0.0]]))
    assert not k1.requires_grad
