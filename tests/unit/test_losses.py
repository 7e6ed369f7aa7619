"""Losses: values by hand, expected gradients by enumeration, micro-batch split invariance."""

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
    rloo_advantages,
)
from operando.update.losses import (
    PolicyLoss,
    Totals,
    cispo_loss,
    clip_loss,
    count_totals,
    effective_sample_size,
    gspo_token_loss,
    kl_estimate,
    kl_loss,
    sampler_weights,
    token_weights,
    value_loss,
)
from operando.update.reduce import zero_outside

NAN, INF = math.nan, math.inf
MASK = torch.tensor([[True, True, True], [True, True, False]])
AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "constant", "seq_mean_token_sum"]
SEEDS = st.integers(0, 2**31)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], PolicyLoss]
POLICY_LOSSES: dict[str, Loss] = {
    "clip": lambda lp, old, adv, _mask: clip_loss(lp, old, adv, 0.2, 0.28, None),
    "dual_clip": lambda lp, old, adv, _mask: clip_loss(lp, old, adv, 0.2, 0.28, 3.0),
    "gspo_token": lambda lp, old, adv, mask: gspo_token_loss(lp, old, adv, mask, 0.2, 0.28),
    "cispo": lambda lp, old, adv, _mask: cispo_loss(lp, old, adv, 1.0),
}


def grad(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at, retain_graph=True)[0]


# Weights


def test_token_weights_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    totals = count_totals(mask)
    assert totals == Totals(tokens=4, rows=2)
    m = mask.float()
    expected = {
        "token_mean": m / 4,
        "seq_mean_token_mean": m * torch.tensor([[1 / 6], [1 / 2], [0.0]]),
        "constant": m / (2 * 8),
        "seq_mean_token_sum": m / 2,
    }
    for name, weight in expected.items():
        assert_close(token_weights(mask, name, totals, max_completion_length=8), weight)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_empty_mini_batch_weighs_nothing(aggregation: str) -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert (token_weights(empty, aggregation, count_totals(empty), 8) == 0).all()


@settings(max_examples=15)
@given(SEEDS, st.sampled_from(AGGREGATIONS), st.sampled_from(sorted(POLICY_LOSSES)))
def test_split_padding_and_order_leave_loss_and_gradient_unchanged(
    seed: int, aggregation: str, name: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = 6, 5
    length = torch.randint(0, tokens + 1, (rows,), generator=generator)
    mask = torch.arange(tokens) < length[:, None]
    old, adv = torch.randn(2, rows, tokens, generator=generator)
    logp = (old + 0.3 * torch.randn(rows, tokens, generator=generator)).requires_grad_()
    totals = count_totals(mask)

    def loss_of(pieces: list[Tensor], pad: int) -> Tensor:
        total = torch.zeros(())
        for piece in pieces:
            lp, ol, ad = (torch.nn.functional.pad(x[piece], (0, pad)) for x in (logp, old, adv))
            mk = torch.nn.functional.pad(mask[piece], (0, pad))
            weight = token_weights(mk, aggregation, totals, max_completion_length=8)
            total = total + (weight * POLICY_LOSSES[name](lp, ol, ad, mk).loss_BT).sum()
        return total

    order = torch.randperm(rows, generator=generator)
    whole = loss_of([torch.arange(rows)], pad=0)
    for pieces, pad in [
        ([torch.arange(1), torch.arange(1, rows)], 0),
        ([*torch.arange(rows)[:, None]], 0),
        ([torch.arange(rows)], 3),
        ([order[:2], order[2:]], 1),
    ]:
        other = loss_of(pieces, pad)
        assert_close(other, whole, rtol=1e-5, atol=1e-5)
        assert_close(grad(other, logp), grad(whole, logp), rtol=1e-5, atol=1e-6)


def test_mean_of_means_is_not_invariant() -> None:
    """Negative control: normalising in each micro-batch does change the loss."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    whole = (token_weights(mask, "token_mean", count_totals(mask), 8) * loss).sum()
    halves = [
        (token_weights(mask[i : i + 1], "token_mean", count_totals(mask[i : i + 1]), 8) * loss[i])
        for i in range(2)
    ]
    assert float(whole) == 2.0
    assert float(sum(h.sum() for h in halves) / 2) == 3.0


# Policy losses by hand

RATIO = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.5, 4.0]])
ADV = torch.tensor([[2.0, 2.0, 2.0], [-2.0, -2.0, -2.0]])


def test_clip_loss_by_hand() -> None:
    logp = RATIO.log().requires_grad_()
    out = clip_loss(logp, torch.zeros(2, 3), ADV, clip_low=0.2, clip_high=0.3, dual_clip=None)
    assert_close(out.loss_BT, torch.tensor([[-1.0, -2.0, -2.6], [1.6, 3.0, 8.0]]))
    assert out.clipped_low_BT.tolist() == [[False] * 3, [True, False, False]]
    assert out.clipped_high_BT.tolist() == [[False, False, True], [False] * 3]
    # d loss / d logp = -rho A where unclipped.
    expected = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 3.0, 8.0]])
    assert_close(grad(out.loss_BT.sum(), logp), expected)


def test_dual_clip_by_hand() -> None:
    logp = RATIO.log().requires_grad_()
    out = clip_loss(logp, torch.zeros(2, 3), ADV, clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    assert_close(out.loss_BT, torch.tensor([[-1.0, -2.0, -2.6], [1.6, 3.0, 6.0]]))
    assert out.clipped_low_BT.tolist() == [[False] * 3, [True, False, False]]
    assert out.clipped_high_BT.tolist() == [[False, False, True], [False, False, True]]
    expected = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 3.0, 0.0]])
    assert_close(grad(out.loss_BT.sum(), logp), expected)


def test_clipping_is_inert_on_policy() -> None:
    """rho = 1: the value is -A and the gradient that of plain policy gradient."""
    logp = torch.tensor([[-1.0, -2.0, -0.1], [-3.0, -1.0, -1.0]], requires_grad=True)
    for name in ("clip", "dual_clip", "gspo_token"):
        out = POLICY_LOSSES[name](logp, logp.detach(), ADV, torch.ones_like(MASK))
        assert_close(out.loss_BT, -ADV)
        assert not (out.clipped_low_BT | out.clipped_high_BT).any()
        assert_close(grad(out.loss_BT.sum(), logp), -ADV)


def test_cispo_loss_by_hand() -> None:
    logp = RATIO.log().requires_grad_()
    out = cispo_loss(logp, torch.zeros(2, 3), ADV, clip_high=1.0)
    weight = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.5, 2.0]])
    assert_close(out.loss_BT, -weight * ADV * RATIO.log())
    assert out.clipped_high_BT.tolist() == [[False] * 3, [False, False, True]]
    assert not out.clipped_low_BT.any()
    # The gradient keeps flowing at the capped token, with the capped weight.
    assert_close(grad(out.loss_BT.sum(), logp), -weight * ADV)


def test_gspo_token_by_hand() -> None:
    # Row 0: mean log-ratio log 1.5 over three tokens, clipped at A > 0. Row 1: two tokens, log 1.5.
    logp = torch.tensor([[3 * math.log(1.5), 0.0, 0.0], [0.0, 2 * math.log(1.5), NAN]])
    logp.requires_grad_()
    out = gspo_token_loss(logp, torch.zeros(2, 3), ADV, MASK, clip_low=0.2, clip_high=0.3)
    assert_close(out.loss_BT, torch.tensor([[-2.6] * 3, [3.0, 3.0, 0.0]]))
    assert out.clipped_high_BT.tolist() == [[True] * 3, [False] * 3]
    expected = torch.tensor([[0.0] * 3, [3.0, 3.0, 0.0]])
    assert_close(grad(out.loss_BT.sum(), logp), expected)


@settings(max_examples=20)
@given(SEEDS)
def test_gspo_token_equals_sequence_gspo_for_a_constant_advantage(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(4, 5, generator=generator)
    logp = (old + 0.3 * torch.randn(4, 5, generator=generator)).requires_grad_()
    adv_B = torch.randn(4, generator=generator)
    length = torch.randint(1, 6, (4,), generator=generator)
    mask = torch.arange(5) < length[:, None]
    weight = token_weights(mask, "seq_mean_token_mean", count_totals(mask), 8)
    adv = adv_B[:, None].expand(4, 5)
    ours = (weight * gspo_token_loss(logp, old, adv, mask, 0.2, 0.28).loss_BT).sum()
    slow = torch.zeros(())
    for b, n in enumerate(length.tolist()):
        ratio = ((logp[b, :n] - old[b, :n]).sum() / n).exp()
        slow = slow - torch.min(ratio * adv_B[b], ratio.clamp(0.8, 1.28) * adv_B[b]) / 4
    assert_close(ours, slow)
    assert_close(grad(ours, logp), grad(slow, logp), rtol=1e-5, atol=1e-6)


def test_bf16_log_probs_are_subtracted_in_float32() -> None:
    logp, old = torch.tensor([[-1.0]]).bfloat16(), torch.tensor([[-1.0078125]]).bfloat16()
    out = clip_loss(logp, old, torch.ones(1, 1).bfloat16(), 0.2, 0.2, None)
    assert_close(out.loss_BT, torch.tensor([[-math.exp(0.0078125)]]))


def test_log_ratios_beyond_the_clamp_stay_finite() -> None:
    logp = torch.tensor([[500.0, -500.0]], requires_grad=True)
    out = clip_loss(logp, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), 0.2, 0.2, None)
    assert_close(out.loss_BT, torch.tensor([[math.exp(20), -math.exp(-20)]]))
    assert grad(out.loss_BT.sum(), logp).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", [*sorted(POLICY_LOSSES), "kl", "kl_unbiased"])
def test_padding_cannot_reach_value_or_gradient(name: str, bad: float) -> None:
    def run(filler: float) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        clean = torch.randn(3, 2, 3, generator=generator)
        logp, old, adv = (torch.where(MASK, x, filler) for x in clean)
        logp.requires_grad_()
        new, old, adv = (zero_outside(x, MASK) for x in (logp, old, adv))
        match name:
            case "kl":
                loss = kl_loss(new, old, old, "k3", unbiased=False)
            case "kl_unbiased":
                loss = kl_loss(new, old, adv, "k3", unbiased=True)
            case _:
                loss = POLICY_LOSSES[name](new, old, adv, MASK).loss_BT
        total = (token_weights(MASK, "token_mean", count_totals(MASK), 8) * loss).sum()
        return total, grad(total, logp)

    value, gradient = run(bad)
    clean_value, clean_gradient = run(0.0)
    assert torch.isfinite(value)
    assert torch.equal(value, clean_value)
    assert torch.equal(gradient, clean_gradient)
    assert float(gradient[1, 2]) == 0.0


# Policy gradient by enumeration: token 0 stops, so completions have one or two tokens.

COMPLETIONS = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
REWARD_B = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.5, -0.7, 0.9])
POLICY_MASK = torch.tensor([[True, len(c) == 2] for c in COMPLETIONS])
REWARD_BT = torch.stack([REWARD_B * (POLICY_MASK.sum(1) == n) for n in (1, 2)], dim=1)


class Policy:
    """A softmax over 3 first tokens and, for each, over 3 second tokens; all completions listed."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.logits = torch.randn(4, 3, generator=generator).requires_grad_()
        logp = self.logits.log_softmax(dim=-1)
        rows = [
            torch.stack([logp[0, c[0]], logp[1 + c[0], c[1]] if len(c) == 2 else torch.zeros(())])
            for c in COMPLETIONS
        ]
        self.logp_BT = torch.stack(rows)
        self.prob_B = (self.logp_BT * POLICY_MASK).sum(1).exp()

    def exact(self) -> Tensor:
        return grad((self.prob_B * REWARD_B).sum(), self.logits)


def plain_loss(logp: Tensor, adv: Tensor) -> Tensor:
    return clip_loss(logp, logp.detach(), adv, 0.2, 0.2, None).loss_BT


@pytest.mark.parametrize("name", ["clip", "dual_clip", "cispo"])
def test_expected_gradient_of_the_loss_is_the_policy_gradient(name: str) -> None:
    policy = Policy()
    assert_close(policy.prob_B.sum(), torch.ones(()))
    adv = reward_to_go(REWARD_BT, POLICY_MASK, gamma=1.0)
    loss = POLICY_LOSSES[name](policy.logp_BT, policy.logp_BT.detach(), adv, POLICY_MASK).loss_BT
    expected = (policy.prob_B.detach() * (loss * POLICY_MASK).sum(1)).sum()
    assert_close(-grad(expected, policy.logits), policy.exact(), rtol=1e-5, atol=1e-6)


def test_gae_with_lambda_one_keeps_the_policy_gradient() -> None:
    """Any value that depends on the prefix alone is a baseline."""
    policy = Policy()
    prefix_value = torch.tensor([[0.7, [9.0, -0.4, 1.1][c[0]]] for c in COMPLETIONS])
    adv = gae(REWARD_BT, prefix_value, POLICY_MASK, gamma=1.0, lam=1.0).adv_BT
    loss = plain_loss(policy.logp_BT, adv)
    expected = (policy.prob_B.detach() * (loss * POLICY_MASK).sum(1)).sum()
    assert_close(-grad(expected, policy.logits), policy.exact(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "factor"), [("rloo", 1.0), ("leave_one_group_out", 1.0), ("group_mean", 0.5)]
)
def test_expected_gradient_over_all_pairs(estimator: str, factor: float) -> None:
    """Leave-one-out baselines are unbiased; the mean with the rollout itself scales by 1 - 1/G."""
    policy = Policy()
    total = torch.zeros(())
    for i in range(len(COMPLETIONS)):
        for j in range(len(COMPLETIONS)):
            reward, mask = REWARD_BT[[i, j]], POLICY_MASK[[i, j]]
            match estimator:
                case "rloo":
                    adv = rloo_advantages(reward, mask, 2)
                case "leave_one_group_out":
                    adv = leave_one_group_out_advantages(reward, mask, 1)
                case _:
                    adv = group_advantages(reward, mask, 2, scale="none")
            weight = token_weights(mask, "seq_mean_token_sum", count_totals(mask), 2)
            loss = (weight * plain_loss(policy.logp_BT[[i, j]], adv)).sum()
            total = total + (policy.prob_B[i] * policy.prob_B[j]).detach() * loss
    assert_close(-grad(total, policy.logits), factor * policy.exact(), rtol=1e-5, atol=1e-6)


# KL by enumeration on a vocabulary of five tokens: row a of the batch is token a.


class Kl:
    """Softmax policies pi, old and ref over five tokens, with the exact KL gradients."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        logits, old, ref = torch.randn(3, 5, generator=generator)
        self.logits = logits.requires_grad_()
        self.logp = logits.log_softmax(0)
        self.old, self.ref = old.log_softmax(0), ref.log_softmax(0)
        prob, diff = self.logp.exp(), self.logp - self.ref
        self.reverse = grad((prob * diff).sum(), logits)
        self.forward = grad((self.ref.exp() * -diff).sum(), logits)
        self.half_square = grad((prob * diff.square() / 2).sum(), logits)

    def expected(self, estimator: str, unbiased: bool, on_policy: bool) -> Tensor:
        old = self.logp.detach() if on_policy else self.old
        columns = (x[:, None] for x in (self.logp, old, self.ref))
        loss_B1 = kl_loss(*columns, estimator, unbiased)
        return grad((old.exp() * loss_B1[:, 0]).sum(), self.logits)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_plain_kl_losses_on_policy() -> None:
    kl = Kl()
    assert close(kl.expected("k1", unbiased=False, on_policy=True), torch.zeros(5))
    assert close(kl.expected("k2", unbiased=False, on_policy=True), kl.reverse)
    assert close(kl.expected("k3", unbiased=False, on_policy=True), kl.forward)
    assert not close(kl.forward, kl.reverse)


def test_plain_kl_losses_off_policy_are_none_of_these() -> None:
    kl = Kl()
    for estimator, on_policy_gradient in (("k2", kl.reverse), ("k3", kl.forward)):
        assert not close(kl.expected(estimator, False, on_policy=False), on_policy_gradient)


@pytest.mark.parametrize("on_policy", [True, False])
def test_ratio_weighted_kl_losses(on_policy: bool) -> None:
    kl = Kl()
    assert close(kl.expected("k1", unbiased=True, on_policy=on_policy), kl.reverse)
    assert close(kl.expected("k3", unbiased=True, on_policy=on_policy), kl.reverse)
    assert close(kl.expected("k2", unbiased=True, on_policy=on_policy), kl.half_square)
    assert not close(kl.half_square, kl.reverse)


def test_kl_estimates_have_the_stated_expectation() -> None:
    kl = Kl()
    prob = kl.logp.exp()
    exact = (prob * (kl.logp - kl.ref)).sum()
    mean = {
        k: (prob * kl_estimate(kl.logp[:, None], kl.ref[:, None], k)[:, 0]).sum()
        for k in ("k1", "k2", "k3")
    }
    assert_close(mean["k1"], exact)
    assert_close(mean["k3"], exact)
    assert not close(mean["k2"], exact)


def test_kl_in_the_reward_is_the_reverse_kl_for_k1_only() -> None:
    kl = Kl()
    prob, reward = kl.logp.exp(), torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0])
    exact = grad((prob * reward).sum(), kl.logits)
    mask = torch.ones(5, 1, dtype=torch.bool)

    def gradient(estimator: str) -> Tensor:
        adv = kl_penalised_reward(
            reward[:, None], kl.logp[:, None], kl.ref[:, None], mask, 0.3, estimator
        )
        loss = plain_loss(kl.logp[:, None], adv)[:, 0]
        return -grad((prob.detach() * loss).sum(), kl.logits)

    assert close(gradient("k1"), exact - 0.3 * kl.reverse)
    # The value of k3 is KL(pi||ref) but its own gradient, that of KL(ref||pi), is missing.
    assert close(gradient("k3"), exact - 0.3 * (kl.reverse - kl.forward))
    assert close(gradient("k2"), exact - 0.3 * (kl.half_square - kl.reverse))
    assert not close(gradient("k3"), exact - 0.3 * kl.reverse)


def test_kl_estimate_by_hand() -> None:
    logp = torch.tensor([[0.0, 1.0, -1.0], [2.0, 100.0, -100.0]])
    zero = torch.zeros(2, 3)
    e = math.e
    assert_close(kl_estimate(logp, zero, "k1"), logp.clamp(-20, 20))
    assert_close(kl_estimate(logp, zero, "k2"), logp.clamp(-20, 20).square() / 2)
    k3 = torch.tensor([[0.0, 1 / e, e - 2], [1 / e**2 + 1, 19.0, math.exp(20) - 21]])
    assert_close(kl_estimate(logp, zero, "k3"), k3)


# Critic and sampler correction


def test_value_loss_by_hand() -> None:
    value = torch.tensor([[1.0, 1.0, 0.2], [-1.0, 0.0, 3.0]], requires_grad=True)
    old, target = torch.zeros(2, 3), torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    # Clipped values 0.5, 0.5, 0.2 / -0.5, 0, 0.5: the larger of the two squared errors counts.
    clipped = value_loss(value, old, target, clip=0.5)
    assert_close(clipped, 0.5 * torch.tensor([[2.25, 1.0, 0.64], [4.0, 1.0, 9.0]]))
    expected = torch.tensor([[0.0, 1.0, -0.8], [-2.0, -1.0, 3.0]])
    assert_close(grad(clipped.sum(), value), expected)
    plain = value_loss(value, old, target, clip=None)
    assert_close(plain, 0.5 * torch.tensor([[1.0, 1.0, 0.64], [4.0, 1.0, 9.0]]))
    assert_close(grad(plain.sum(), value), (value - target).detach())


def test_sampler_weights_by_hand() -> None:
    log2 = math.log(2)
    old = torch.tensor([[log2, -log2, 2 * log2], [log2, log2, NAN]], requires_grad=True)
    sampling = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, INF]])
    none = sampler_weights(old, sampling, MASK, "none", cap=0.1)
    assert_close(none, MASK.float())
    token = sampler_weights(old, sampling, MASK, "token", cap=3.0)
    assert_close(token, torch.tensor([[2.0, 0.5, 3.0], [2.0, 2.0, 0.0]]))
    sequence = sampler_weights(old, sampling, MASK, "sequence", cap=5.0)
    assert_close(sequence, torch.tensor([[4.0, 4.0, 4.0], [4.0, 4.0, 0.0]]))
    capped = sampler_weights(old, sampling, MASK, "sequence", cap=3.0)
    assert_close(capped, torch.where(MASK, 3.0, 0.0))
    assert not token.requires_grad


def test_token_correction_makes_off_policy_samples_unbiased() -> None:
    """Samples from ref, weighted with pi/ref, give the on-policy gradient."""
    kl = Kl()
    reward = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0])
    mask = torch.ones(5, 1, dtype=torch.bool)
    weight = sampler_weights(kl.logp[:, None], kl.ref[:, None], mask, "token", cap=1e6)
    loss = plain_loss(kl.logp[:, None], reward[:, None])
    total = (kl.ref.exp()[:, None] * weight * loss).sum()
    exact = grad((kl.logp.exp() * reward).sum(), kl.logits)
    assert close(-grad(total, kl.logits), exact)


def test_effective_sample_size_by_hand() -> None:
    sampling = torch.zeros(2, 3)
    old = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, NAN]])
    assert effective_sample_size(old, sampling, MASK) == pytest.approx(1.0)
    assert effective_sample_size(old + 3.0, sampling, MASK) == pytest.approx(1.0)
    old[0, 0] = math.log(4)
    # (4 + 4)^2 / (5 (16 + 4)) = 0.64
    assert effective_sample_size(old, sampling, MASK) == pytest.approx(0.64)
    assert effective_sample_size(old, sampling, torch.zeros_like(MASK)) == 0.0
