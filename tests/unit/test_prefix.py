"""Frozen-prefix reuse gives the log-probs and gradients of the plain path."""

from __future__ import annotations

import pytest
import torch

from operando.models.policy import Policy
from operando.models.prefix import Prefix
from operando.models.scoring import Scored, flat_rows, whole_site
from operando.rollout.engine import Engine
from operando.rollout.sampler import Request, Sampling, as_rollouts, uniform_streams
from operando.run import SeedTree
from operando.types import Example, Prompt, make_batch
from tests.unit.test_packing import LORA, make_policy
from tests.unit.tiny import random_batch


def gradients(policy: Policy, prefix: bool, micro_tokens: int = 200) -> dict[str, torch.Tensor]:
    """Score, move the weights a little (as an optimizer step does), then take a gradient."""
    batch = random_batch(3, 4)
    scoring = policy.score(batch, reference=True)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    for packs in policy.micro_batches(batch, None, micro_tokens):
        new = policy.scored(batch, packs, scoring.prefix if prefix else None)
        weight_BT = torch.linspace(-1, 1, new.logp_BT.numel()).view_as(new.logp_BT)
        (new.logp_BT * weight_BT * batch.mask_BT[flat_rows(packs)]).sum().backward()
    return {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_gradients_equal_the_plain_paths(family: str, lora: object, checkpointing: bool) -> None:
    settings = {"lora": lora, "layers": "2", "gradient_checkpointing": checkpointing}
    want = gradients(make_policy(family, **settings), prefix=False)
    got = gradients(make_policy(family, **settings), prefix=True)
    assert want.keys() == got.keys() and want
    for name, grad in want.items():
        gap = (got[name] - grad).norm() / grad.norm()
        assert gap < 1e-6, (name, float(gap))


def test_the_reference_is_that_of_the_plain_path() -> None:
    policy, batch = make_policy(lora=LORA, layers="1-2"), random_batch(3, 4)
    reused = policy.score(batch, reference=True)
    assert reused.prefix is not None and len(reused.prefix.rows) == len(batch)
    policy.first_trained = 0
    plain = policy.score(batch, reference=True)
    assert plain.prefix is None
    torch.testing.assert_close(reused.trace.ref_logp_BT, plain.trace.ref_logp_BT)
    assert torch.equal(reused.trace.logp_BT, plain.trace.logp_BT)


def test_blocks_below_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = make_policy(lora=LORA, layers="2"), random_batch(3, 4)
    prefix = policy.score(batch).prefix
    calls = []
    for index, block in enumerate(policy.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    packs = policy.micro_batches(batch, None, 10_000)[0]
    scored = policy.scored(batch, packs, prefix)
    assert isinstance(scored, Scored) and calls == [2]
    policy.scored(batch, packs)
    assert calls == [2, 0, 1, 2], "afterwards the blocks run again"


def test_a_broken_forward_leaves_the_blocks_whole() -> None:
    policy, batch = make_policy(lora=LORA, layers="2"), random_batch(3, 4)
    prefix = policy.score(batch).prefix

    def breaks(*_: object) -> None:
        raise RuntimeError("planted")

    policy.blocks[2].mlp.register_forward_hook(breaks)
    with pytest.raises(RuntimeError, match="planted"):
        policy.scored(batch, [[0]], prefix)
    assert all("forward" not in vars(block) for block in policy.blocks)


@pytest.mark.parametrize("max_batch", [512, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_the_sampler_sees_what_the_scoring_pass_sees(family: str, max_batch: int) -> None:
    """Rows end at different lengths and are compacted; their hidden states must stay theirs."""
    policy = make_policy(family, lora=LORA, layers="2")
    engine = Engine(policy.base, policy.tokenizer, tuple(range(40)), max_batch)
    prompts = [Prompt(Example(str(i), "", ""), "", (9, 80 + i) * (i + 1)) for i in range(3)]
    seen = Prefix(2)
    uniforms_BT = uniform_streams(SeedTree(0), 1, range(3), 4, 20)
    sampled = engine.sample(Request([p.ids for p in prompts], 4, Sampling(20), uniforms_BT), seen)
    batch = make_batch(as_rollouts(prompts, range(3), 4, sampled), 4, pad_id=0)
    assert len({len(one.ids) for one in sampled}) > 3
    computed = policy.score(batch).prefix
    assert computed is not None
    for group in range(3):
        torch.testing.assert_close(
            seen.prompts[group], computed.prompts[group], atol=1e-4, rtol=1e-4
        )
    for row, one in enumerate(sampled):
        # Nothing reads the last token: no prediction hangs on it, and the sampler never ran it.
        last = len(one.ids) - 1
        torch.testing.assert_close(
            seen.rows[row][:last], computed.rows[row][:last], atol=1e-5, rtol=1e-4
        )
    scored, plain = policy.score(batch, prefix=seen), policy.score(batch)
    torch.testing.assert_close(scored.trace.logp_BT, plain.trace.logp_BT, atol=1e-5, rtol=1e-4)
    assert scored.prefix is seen
    grads = []
    for prefix in (seen, None):
        packs = policy.micro_batches(batch, None, 10_000)[0]
        new = policy.scored(batch, packs, prefix)
        weight_BT = torch.linspace(-1, 1, new.logp_BT.numel()).view_as(new.logp_BT)
        total = (new.logp_BT * weight_BT * batch.mask_BT[flat_rows(packs)]).sum()
        grads.append(torch.autograd.grad(total, list(policy.trainable().values())))
    for given, plain_grad in zip(*grads, strict=True):
        assert (given - plain_grad).norm() <= 1e-4 * plain_grad.norm()


def test_sites_are_read_in_a_whole_forward() -> None:
    policy, batch = make_policy(lora=LORA, layers="2"), random_batch(3, 4)
    prefix, site = policy.score(batch).prefix, "blocks.1.hook_resid_post"
    again = policy.score(batch, prefix=prefix, taps={site: whole_site(site)})
    assert again.prefix is not prefix and again.trace.acts[site].abs().sum() > 0
