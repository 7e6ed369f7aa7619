"""Advantages by loop: the ratio is of a mean over the loops, everything else of the last."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from operando.errors import UserError
from operando.models.load import Loaded
from operando.models.policy import Policy
from operando.models.recursive.credit import composite, loop_weights
from operando.models.scoring import Scored, flat_rows, whole_site
from operando.recipe.data import LoraConfig, ModelConfig
from operando.recipe.run import Recipe
from operando.recipe_io import check
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Request, Sampling, as_rollouts
from operando.run import SeedTree
from operando.types import Batch, Example, Prompt, make_batch
from operando.update.objective import Targets, micro_objective
from tests.unit.recursive_models import random_recursive
from tests.unit.tiny import byte_tokenizer, random_batch, tiny_model

R = 4
PROMPTS = [(5, 9, 40, 2), (77, 8)]


def policy_of(loop_credit: str, **config: object) -> Policy:
    model = random_recursive(num_loops=R)
    loaded = Loaded(model, byte_tokenizer(), {})
    policy = Policy(loaded, ModelConfig(**config), SeedTree(0), loop_credit=loop_credit)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return policy


def sampled_batch(policy: Policy, threshold: float | None = None) -> Batch:
    """Three completions a prompt; with a threshold, each token with the loops that it took."""
    engine = RecursiveEngine(policy.base, byte_tokenizer(), (1,), halt_threshold=threshold)
    u_BT = torch.rand(6, 9, generator=torch.Generator().manual_seed(3))
    sampled = engine.sample(Request(PROMPTS, 3, Sampling(9), u_BT))
    prompts = [Prompt(Example("e", "q", "7"), "q", ids) for ids in PROMPTS]
    return make_batch(as_rollouts(prompts, [0, 1], 3, sampled), 3, 0)


def test_weights_by_hand() -> None:
    assert loop_weights("last", 4).tolist() == [0, 0, 0, 1]
    assert loop_weights("uniform", 4).tolist() == [0.25] * 4
    torch.testing.assert_close(loop_weights("progressive", 4), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    logps = [torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, 0.0])]
    assert composite(logps, torch.tensor([0.25, 0.75])).tolist() == [-2.5, -1.0]
    with pytest.raises(AssertionError, match="2 loops, 3 weights"):
        composite(logps, loop_weights("uniform", 3))


def slow_logps(policy: Policy, batch: Batch, row: int, loops: int) -> Tensor:
    """A plain forward of one row with so many loops."""
    rollout = batch.rollouts[row]
    ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids])
    exits = torch.tensor([(*rollout.exit_loops, 1)]) if rollout.exit_loops else None
    logits = policy.base(input_ids=ids, num_loops=loops, exit_loops=exits).logits[0]
    at = torch.arange(len(rollout.prompt.ids) - 1, ids.shape[1] - 1)
    return logits.log_softmax(-1)[at, ids[0, len(rollout.prompt.ids) :]].detach()


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize(
    ("kind", "weights"), [("uniform", [0.25] * 4), ("progressive", [0.1, 0.2, 0.3, 0.4])]
)
def test_credit_is_the_mean_of_models_with_one_to_all_loops(
    kind: str, weights: list[float], threshold: float | None
) -> None:
    policy = policy_of(kind, lora=LoraConfig(rank=2, targets=("q_proj", "down_proj")))
    batch = sampled_batch(policy, threshold)
    exits = {loops for r in batch.rollouts for loops in r.exit_loops}
    assert len(exits) > 1 if threshold else exits == {R}
    trace = policy.score(batch, micro_tokens=40).trace
    assert trace.credit_BT is not None
    for row in range(len(batch)):
        by_loop = [slow_logps(policy, batch, row, t) for t in range(1, R + 1)]
        n = len(by_loop[0])
        want = sum(w * logp for w, logp in zip(weights, by_loop, strict=True))
        torch.testing.assert_close(trace.credit_BT[row, :n], want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(trace.logp_BT[row, :n], by_loop[-1], atol=2e-5, rtol=1e-4)
        assert not trace.credit_BT[row, n:].any()
    assert float((trace.credit_BT - trace.logp_BT).abs().max()) > 0.05
    gap = (trace.logp_BT - batch.sampling_logp_BT)[batch.mask_BT].abs().max()
    assert float(gap) < 1e-4  # the sampler's gap compares last loops, whatever is credited


def test_the_last_loops_credit_is_the_policy_as_it_was_bit_for_bit() -> None:
    plain, last = policy_of("last"), policy_of("uniform")
    batch = sampled_batch(plain)
    a, b = plain.score(batch).trace, last.score(batch).trace
    assert a.credit_BT is None and b.credit_BT is not None
    assert torch.equal(a.logp_BT, b.logp_BT) and torch.equal(a.entropy_BT, b.entropy_BT)
    scored = plain.scored(batch, [[row] for row in range(6)])
    assert scored.credit_BT is None


def test_what_is_read_inside_the_coda_is_the_last_loops() -> None:
    taps = {
        site: whole_site(site) for site in ("blocks.9.hook_resid_post", "blocks.6.hook_mlp_out")
    }
    plain, credited = policy_of("last"), policy_of("uniform")
    batch = sampled_batch(plain)
    a, b = plain.score(batch, taps=taps).trace, credited.score(batch, taps=taps).trace
    for site in taps:
        assert torch.equal(a.acts[site], b.acts[site]), site


def credit_gradients(kind: str, micro_tokens: int, share: bool, **config: object) -> dict:
    policy = policy_of(kind, **config)
    batch = sampled_batch(policy, 0.6)
    policy.shares_prompts = share
    weight_BT = torch.randn(batch.mask_BT.shape, generator=torch.Generator().manual_seed(1))
    for packs in policy.micro_batches(batch, None, micro_tokens):
        scored = policy.scored(batch, packs)
        index = flat_rows(packs)
        credit_BT = scored.logp_BT if scored.credit_BT is None else scored.credit_BT
        (credit_BT * weight_BT[index] * batch.mask_BT[index]).sum().backward()
    return {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}


def test_gradient_does_not_depend_on_cut_sharing_or_recomputation() -> None:
    lora = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    want = credit_gradients("uniform", 10**6, share=False, lora=lora)
    assert max(float(g.abs().max()) for g in want.values()) > 0.1
    for micro_tokens, share, extra in [
        (1, False, {}),
        (30, True, {}),
        (10**6, True, {}),
        (30, True, {"gradient_checkpointing": True}),
    ]:
        got = credit_gradients("uniform", micro_tokens, share, lora=lora, **extra)
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, atol=2e-4, rtol=1e-3)


def test_credit_reaches_what_the_first_loop_writes_more_than_the_last_alone_does() -> None:
    def share_of_first(kind: str) -> float:
        """How much of the gradient of all loops' updates arrives at the first."""
        policy = policy_of(kind)
        batch = sampled_batch(policy)
        kept: list[Tensor] = []
        gate = policy.base.model._gate

        def watch(h: Tensor, u: Tensor) -> Tensor:
            u.retain_grad()
            kept.append(u)
            return gate(h, u)

        policy.base.model._gate = watch
        scored = policy.scored(batch, [[row] for row in range(6)])
        credit_BT = scored.logp_BT if scored.credit_BT is None else scored.credit_BT
        credit_BT.sum().backward()
        norms = [float(u.grad.norm()) for u in kept]
        assert len(norms) == R
        return norms[0] / sum(norms)

    assert share_of_first("uniform") > share_of_first("progressive") > share_of_first("last") > 0


def test_first_ratio_is_exactly_one() -> None:
    policy = policy_of("progressive", lora=LoraConfig(rank=2, targets=("q_proj",)))
    batch = sampled_batch(policy, 0.6)
    trace = policy.score(batch, micro_tokens=40).trace
    assert trace.credit_BT is not None
    for packs in policy.micro_batches(batch, None, 40):
        scored = policy.scored(batch, packs)
        assert torch.equal(scored.credit_BT, trace.credit_BT[flat_rows(packs)])


def test_a_model_without_loops_is_refused() -> None:
    loaded = Loaded(tiny_model("qwen2"), byte_tokenizer(), {})
    with pytest.raises(UserError, match='loop_credit = "?.uniform.*Qwen2ForCausalLM has no loops'):
        Policy(loaded, ModelConfig(), SeedTree(0), loop_credit="uniform")
    assert (
        Policy(loaded, ModelConfig(), SeedTree(0)).score(random_batch(2, 2)).trace.credit_BT is None
    )


def test_the_ratio_is_of_the_credit_and_the_kl_of_the_last_loop() -> None:
    recipe = check(
        Recipe,
        {
            "name": "x",
            "steps": 1,
            "task": {"kind": "words"},
            "rewards": {"c": {"kind": "correct"}},
            "kl": {"coef": 0.5, "estimator": "k1"},
            "update": {"loop_credit": "uniform"},
        },
        "here",
    )
    one, logp, old, ref = torch.ones(1, 1), *(torch.tensor([[x]]) for x in (-1.0, -1.2, -1.5))
    credit, old_credit = torch.log(one * 1.1) - 3, one * 0 - 3
    targets = Targets(one.bool(), one, 2 * one, old, ref, None, None, old_credit)
    found = micro_objective(recipe, Scored(logp, one * 0, None, credit), targets)
    # - A exp(credit - old_credit) + coef exp(logp - old) (logp - ref)
    assert float(found.loss) == pytest.approx(-2 * 1.1 + 0.5 * math.exp(0.2) * 0.5)
    assert found.ratio_gap == pytest.approx(0.1)


def test_sharding_is_refused() -> None:
    tables = {
        "name": "x",
        "steps": 1,
        "task": {"kind": "words"},
        "rewards": {"c": {"kind": "correct"}},
        "update": {"loop_credit": "uniform"},
        "parallel": {"kind": "fsdp"},
    }
    with pytest.raises(UserError, match="loop_credit runs the coda outside the sharded forward"):
        check(Recipe, tables, "here")
    assert check(Recipe, tables | {"parallel": {}}, "here").update.loop_credit == "uniform"
