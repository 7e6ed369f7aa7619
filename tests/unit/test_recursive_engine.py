"""The recursive sampler: drafts change nothing, exits are recorded, the learner replays them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from operando.models.load import Loaded
from operando.models.policy import Policy
from operando.models.recursive import RecursiveCausalLM
from operando.recipe.data import ModelConfig
from operando.rollout.hf import HfSampler
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Request, Sampling, as_rollouts
from operando.run import SeedTree
from operando.types import Example, Prompt, make_batch

from .recursive_models import random_recursive
from .tiny import byte_tokenizer

PROMPTS = [(5, 9, 40), (77, 8), (30, 31, 32, 33, 34, 35), (101,)]
HALT = 0.6


def engine(model: RecursiveCausalLM, **changes: object) -> RecursiveEngine:
    return RecursiveEngine(model, byte_tokenizer(), (1,), **changes)


def uniforms(rows: int, length: int, seed: int = 3) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("greedy", [True, False])
def test_the_engine_samples_what_hf_generate_samples(greedy: bool) -> None:
    model = random_recursive()
    u_BT = None if greedy else uniforms(8, 14)
    ours = engine(model).sample(Request(PROMPTS, 2, Sampling(14), u_BT))
    theirs = HfSampler(model, byte_tokenizer(), (1,)).sample(
        Request(PROMPTS, 2, Sampling(14), u_BT)
    )
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-4)


def echoing(seed: int) -> RecursiveCausalLM:
    """A model that leans to repeating, and whose untrained heads (P = 0) so guess often right."""
    model = random_recursive(seed)
    with torch.no_grad():
        for proj in model.speculative_projs:
            proj.weight.mul_(0.05)
            proj.bias.mul_(0.05)
        model.model.embed_tokens.weight.mul_(3)
    return model


@pytest.mark.parametrize("threshold", [None, HALT])
@pytest.mark.parametrize("greedy", [True, False])
def test_drafting_changes_no_token_and_no_log_prob(greedy: bool, threshold: float | None) -> None:
    model = echoing(4)
    u_BT = None if greedy else uniforms(12, 20)
    run = {"halt_threshold": threshold}
    plain = engine(model, **run).sample(Request(PROMPTS, 3, Sampling(20), u_BT))
    drafting = engine(model, draft_tokens=4, **run)
    drafted = drafting.sample(Request(PROMPTS, 3, Sampling(20), u_BT))
    assert [one.ids for one in drafted] == [one.ids for one in plain]
    assert [one.exit_loops for one in drafted] == [one.exit_loops for one in plain]
    for one, other in zip(drafted, plain, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-4)
    stats = drafting.stats
    assert 0 < sum(stats.accepted) < sum(stats.tried)  # some held and some did not
    assert stats.tried[0] == stats.row_calls
    assert stats.tokens == stats.row_calls + sum(stats.accepted)


def test_drafted_samples_have_the_target_distribution() -> None:
    """Of 4000 samples of two tokens, each token's frequency is the model's own probability."""
    model = echoing(4)
    n = 4000
    sampled = engine(model, draft_tokens=2, max_batch=n).sample(
        Request([PROMPTS[0]], n, Sampling(2), uniforms(n, 2))
    )
    first = torch.tensor([one.ids[0] for one in sampled])
    head = int(first.mode().values)
    second = torch.tensor([one.ids[1] for one in sampled if one.ids[0] == head])
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[*PROMPTS[0], head]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(second, minlength=258) / len(second)
    expected_tv = 0.5 * (2 * p * (1 - p) / (torch.pi * len(second))).sqrt().sum()
    assert len(second) > 200
    assert float((seen - p).abs().sum() / 2) < 1.5 * float(expected_tv)


def test_one_loop_for_all_and_compaction_do_not_mix_rows() -> None:
    model = random_recursive()
    alone = [
        engine(model, halt_threshold=HALT).sample(Request([p], 1, Sampling(12), None))[0]
        for p in PROMPTS
    ]
    together = engine(model, halt_threshold=HALT).sample(Request(PROMPTS, 1, Sampling(12), None))
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert [one.exit_loops for one in together] == [one.exit_loops for one in alone]
    assert len({loops for one in together for loops in one.exit_loops}) > 1


def test_the_learner_replays_the_exits_and_gets_the_sampling_log_probs() -> None:
    model = random_recursive(halt_threshold=HALT)
    tokenizer = byte_tokenizer()
    prompts = [Prompt(Example("e", "q", "7"), "q", ids) for ids in PROMPTS]
    sampled = engine(model).sample(Request(PROMPTS, 2, Sampling(10), uniforms(8, 10)))
    for one, prompt in zip(sampled, [p for p in PROMPTS for _ in range(2)], strict=True):
        assert len(one.exit_loops) == len(prompt) + len(one.ids) - 1
    batch = make_batch(as_rollouts(prompts, list(range(4)), 2, sampled), 2, 0)
    policy = Policy(Loaded(model, tokenizer, {}), ModelConfig(id="starter"), SeedTree(0))
    model.config.halt_threshold = 0.999  # the learner's halt head would decide otherwise
    logp_BT = policy.score(batch).trace.logp_BT
    gap = (logp_BT - batch.sampling_logp_BT)[batch.mask_BT].abs().max()
    assert float(gap) < 1e-4
    without = [r.__class__(**(r.__dict__ | {"exit_loops": ()})) for r in batch.rollouts]
    other_BT = policy.score(make_batch(without, 2, 0)).trace.logp_BT
    assert float((other_BT - logp_BT)[batch.mask_BT].abs().max()) > 1e-3
