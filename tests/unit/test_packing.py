"""Packing, chunked heads and hooks give exactly what plain forwards give."""

from __future__ import annotations

import pytest
import torch

from operando.errors import UserError
from operando.models.hooks import ActivationReader
from operando.models.load import Loaded
from operando.models.logprobs import HeadConfig, token_logps
from operando.models.packing import pack_rows, plan_micro_batches, plan_packs
from operando.models.policy import Policy
from operando.models.scoring import flat_rows, whole_site
from operando.recipe.data import LoraConfig, ModelConfig
from operando.run import SeedTree
from operando.update.checks import check_padding
from tests.unit.tiny import byte_tokenizer, random_batch, tiny_model

LORA = LoraConfig(rank=4, alpha=8)


def make_policy(family: str = "qwen2", temperature: float = 1.0, **config: object) -> Policy:
    loaded = Loaded(tiny_model(family), byte_tokenizer(), {})
    policy = Policy(
        loaded,
        ModelConfig(**config),
        SeedTree(0),
        reference=True,
        value_head=True,
        temperature=temperature,
    )
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return policy


def slow_logps(policy: Policy, row: int, batch, temperature: float = 1.0) -> torch.Tensor:
    rollout = batch.rollouts[row]
    ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids])
    logits = policy.base(input_ids=ids).logits[0].float() / temperature
    start = len(rollout.prompt.ids)
    at = torch.arange(start - 1, ids.shape[1] - 1)
    return logits.log_softmax(-1)[at, ids[0, start:]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gpt2"])
def test_scores_equal_one_row_at_a_time(family: str) -> None:
    targets = ("c_attn", "c_fc") if family == "gpt2" else ("q_proj", "down_proj")
    config = {"lora": None} if family == "gpt2" else {"lora": LoraConfig(rank=4, targets=targets)}
    policy = make_policy(family, temperature=0.7, **config)
    batch = random_batch(groups=3, group_size=4)
    trace = policy.score(batch, micro_tokens=64).trace
    for row in range(len(batch)):
        want = slow_logps(policy, row, batch, 0.7)
        got = trace.logp_BT[row, : len(want)]
        torch.testing.assert_close(got, want.detach(), atol=3e-5, rtol=1e-4)
        assert not trace.logp_BT[row, len(want) :].any()
    assert policy.shares_prompts == (family != "gpt2")


def test_gradient_does_not_depend_on_cut_sharing_or_order() -> None:
    batch = random_batch(groups=3, group_size=4)
    weight_BT = torch.randn(batch.mask_BT.shape, generator=torch.Generator().manual_seed(1))

    def gradient(micro_tokens: int, share: bool, order: list[int]) -> torch.Tensor:
        policy = make_policy(lora=LORA)
        policy.shares_prompts = share
        half = len(order) // 2
        for rows in (order[:half], order[half:]):
            for packs in policy.micro_batches(batch, rows, micro_tokens):
                scored = policy.scored(batch, packs)
                index = flat_rows(packs)
                value = scored.logp_BT + 0.1 * scored.entropy_BT + scored.value_BT
                (value * weight_BT[index] * batch.mask_BT[index]).sum().backward()
        grads = [p.grad.flatten() for p in policy.trainable().values()]
        return torch.cat([*grads, policy.value_head.weight.grad.flatten()])

    rows = list(range(12))
    want = gradient(10**6, share=False, order=rows)
    assert want.abs().max() > 0.1
    for micro_tokens, share, order in [
        (1, False, rows),
        (60, True, rows),
        (10**6, True, rows),
        (90, True, rows[::-1]),
        (200, True, [0, 5, 1, 9, 2, 11, 3, 4, 6, 7, 8, 10]),
    ]:
        got = gradient(micro_tokens, share, order)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_first_ratio_is_exactly_one() -> None:
    policy = make_policy(lora=LORA)
    batch = random_batch(groups=4, group_size=4)
    trace = policy.score(batch, micro_tokens=100).trace
    for packs in policy.micro_batches(batch, None, 100):
        assert torch.equal(policy.scored(batch, packs).logp_BT, trace.logp_BT[flat_rows(packs)])
    kept = policy.score(batch, keep_graph=True)
    whole = policy.score(batch)
    assert kept.graph is not None and whole.graph is None
    assert torch.equal(kept.trace.logp_BT, whole.trace.logp_BT)
    assert policy.score(batch, micro_tokens=100, keep_graph=True).graph is None


@pytest.mark.parametrize("moved", ["everything", "the head alone", "blocks alone", "the adapter"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])  # a tied head and one of its own
def test_reference_is_the_whole_base_model(family: str, moved: str) -> None:
    """Each part moves by noise: a constant added to a whole head is invisible to a softmax."""
    batch = random_batch(groups=2, group_size=3)
    if moved == "the adapter":
        policy = make_policy(family, lora=LORA)
    else:
        policy = make_policy(family)
        head = policy.base.get_output_embeddings().weight
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                if moved == "everything" or (parameter is head) == (moved == "the head alone"):
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    trace = policy.score(batch, reference=True).trace
    bare = Policy(Loaded(tiny_model(family), byte_tokenizer(), {}), ModelConfig(), SeedTree(0))
    want = bare.score(batch).trace.logp_BT
    torch.testing.assert_close(trace.ref_logp_BT, want, atol=1e-5, rtol=1e-5)
    assert (trace.logp_BT - want).abs().max() > 1e-2


def test_positions_run_on_over_padding_so_that_causality_is_the_mask() -> None:
    batch = random_batch(groups=2, group_size=3)
    alone = pack_rows(batch, [[0], [1], [4]], torch.device("cpu"))
    assert alone.mask_b1SS is None
    width = alone.ids_bS.shape[1]
    assert alone.position_bS.tolist() == [list(range(width))] * 3
    shared = pack_rows(batch, [[0, 1, 2]], torch.device("cpu"))
    starts = [int(shared.position_bS[0, at]) for at in shared.at_N[shared.t_N == 0].tolist()]
    assert starts == [int(batch.prompt_len_B[0])] * 3  # each sibling goes on from the prompt


def test_packs_hold_only_siblings_and_respect_the_limit() -> None:
    batch = random_batch(groups=3, group_size=4)
    for pack in plan_packs(batch, range(12), share=True):
        assert len({row // 4 for row in pack}) == 1
    assert plan_packs(batch, range(12), share=False) == [[row] for row in range(12)]
    micro = plan_micro_batches(batch, range(12), 80, share=True)
    assert sorted(row for packs in micro for row in flat_rows(packs)) == list(range(12))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunked_head_equals_autograd(softcap: float | None, monkeypatch) -> None:
    monkeypatch.setattr("operando.models.logprobs.LOGITS_BYTES", {"cpu": 4 * 11 * 3})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=generator, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, requires_grad=True)
    target = torch.randint(11, (10,), generator=generator)
    a, b = torch.randn(2, 10, generator=generator)

    def plain() -> torch.Tensor:
        z = hidden @ weight.T
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        logp = (z / 0.8).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return (a * logp[torch.arange(10), target] + b * entropy).sum()

    want = torch.autograd.grad(plain(), (hidden, weight))
    got = token_logps(hidden, weight, target, HeadConfig(0.8, softcap))
    value = (a * got.logp_N + b * got.entropy_N).sum()
    torch.testing.assert_close(value, plain(), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(value, (hidden, weight)), want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_the_row_alone(checkpointing: bool) -> None:
    policy = make_policy(lora=LORA, gradient_checkpointing=checkpointing)
    batch = random_batch(groups=2, group_size=3)
    sites = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.0.hook_mlp_out"]
    trace = policy.score(batch, taps={site: whole_site(site) for site in sites}).trace
    for row in range(len(batch)):
        rollout = batch.rollouts[row]
        ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids])
        reader = ActivationReader(policy.base, sites)
        with reader.reading() as acts:
            policy.base(input_ids=ids)
        for site in sites:
            want = acts[site][0, len(rollout.prompt.ids) :].detach()
            torch.testing.assert_close(
                trace.acts[site][row, : len(want)], want, atol=2e-5, rtol=1e-4
            )
    torch.testing.assert_close(trace.acts[sites[0]], trace.acts[sites[1]])


def test_hooks_are_removed_even_after_an_error_and_fire_once() -> None:
    policy = make_policy(lora=LORA, gradient_checkpointing=True)
    reader = ActivationReader(policy.base, ["blocks.0.hook_resid_post"])

    def count_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in policy.base.modules())

    before = count_hooks()
    with pytest.raises(RuntimeError, match="planted"), reader.reading():
        assert count_hooks() == before + 1
        raise RuntimeError("planted")
    assert count_hooks() == before
    batch = random_batch(groups=1, group_size=2)
    with reader.reading() as acts:
        scored = policy.scored(batch, [[0, 1]])
        first = acts["blocks.0.hook_resid_post"]
        scored.logp_BT.sum().backward()  # recomputes the blocks
    assert acts["blocks.0.hook_resid_post"] is first


def test_bad_sites_are_named() -> None:
    policy = make_policy()
    with pytest.raises(UserError, match="blocks 0-2"):
        ActivationReader(policy.base, ["blocks.3.hook_resid_post"])
    with pytest.raises(UserError, match="hook_resid_post"):
        ActivationReader(policy.base, ["blocks.1.hook_resid_pots"])


def test_a_model_that_looks_at_its_padding_is_found() -> None:
    policy, batch = make_policy("qwen2", lora=LORA), random_batch(3, 4)
    assert check_padding(policy, batch) == []

    def leak(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(1, keepdim=True)  # every position sees every other

    handle = policy.blocks[0].register_forward_hook(leak)
    assert "not causal under right padding" in check_padding(policy, batch)[0]
    handle.remove()
