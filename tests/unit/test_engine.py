"""The engine against HF generate, the exact distribution, and its own promises."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare

from operando.errors import UserError
from operando.rollout import hf
from operando.rollout.decoding import STOP_EVERY, Decoding
from operando.rollout.engine import Engine
from operando.rollout.graphs import Step, StepRunner
from operando.rollout.hf import HfSampler
from operando.rollout.kernels import pick
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Request, Sampling, first_stop, uniform_streams
from operando.run import SeedTree
from tests.unit.tiny import byte_tokenizer, tiny_model

PROMPTS = [[5, 9, 40, 7], [100, 3], [77, 78, 79, 80, 81, 82, 83], [9]]
EOS = (1,)


def add_lora(model: torch.nn.Module, layers: list[int] | None = None) -> torch.nn.Module:
    peft = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "down_proj"],
            layers_to_transform=layers,
            layers_pattern="layers" if layers else None,
        ),
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft.eval()


def hf_greedy(model: torch.nn.Module, prompt: list[int], num: int) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=int),
        max_new_tokens=num,
        do_sample=False,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_greedy_equals_hf_generate(family: str, lora: bool) -> None:
    model = tiny_model(family)
    if lora:
        add_lora(model, layers=[1, 2])
    got = Engine(model, byte_tokenizer(), EOS).sample(Request(PROMPTS, 1, Sampling(24), None))
    for prompt, one in zip(PROMPTS, got, strict=True):
        assert list(one.ids) == hf_greedy(model, prompt, 24)


def test_fixed_buffers_of_a_captured_step_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph demands, without one: capturing runs nothing, and a step works in place."""

    def capture(_: StepRunner, step: Step) -> Step:
        captures.append(step)
        return step

    captures: list[Step] = []
    monkeypatch.setattr(StepRunner, "_capture", capture)
    engine = Engine(tiny_model("qwen2"), byte_tokenizer(), tuple(range(60)))
    uniforms = uniform_streams(SeedTree(0), 2, range(4), 6, 70)
    plain = engine.sample(Request(PROMPTS, 6, Sampling(70), uniforms))
    assert not captures
    engine.use_graphs = True
    assert [one.ids for one in engine.sample(Request(PROMPTS, 6, Sampling(70), uniforms))] == [
        one.ids for one in plain
    ]
    assert len(captures) >= 3, "room grew and rows were compacted"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_sampling_logps_are_the_models(family: str) -> None:
    model = tiny_model(family)
    uniforms = uniform_streams(SeedTree(3), 1, range(4), 3, 20)
    sampling = Sampling(20, temperature=0.7)
    for row, one in enumerate(
        Engine(model, byte_tokenizer(), EOS).sample(Request(PROMPTS, 3, sampling, uniforms))
    ):
        prompt = PROMPTS[row // 3]
        ids = torch.tensor([prompt + list(one.ids)])
        logp = (model(ids).logits[0].float() / 0.7).log_softmax(-1)
        want = logp[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]]
        torch.testing.assert_close(torch.tensor(one.logp), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("max_batch", [1, 5, 12, 512])
def test_rollouts_do_not_depend_on_batch_size(max_batch: int) -> None:
    model = tiny_model("qwen2")
    uniforms = uniform_streams(SeedTree(0), 2, range(4), 6, 30)
    whole = Engine(model, byte_tokenizer(), EOS, 512).sample(
        Request(PROMPTS, 6, Sampling(30), uniforms)
    )
    split = Engine(model, byte_tokenizer(), EOS, max_batch).sample(
        Request(PROMPTS, 6, Sampling(30), uniforms)
    )
    assert [one.ids for one in whole] == [one.ids for one in split]
    assert len({one.ids for one in whole}) > 12, "the rows should differ from each other"


def test_finished_rows_leave_and_neighbours_do_not_notice() -> None:
    model = tiny_model("llama", seed=4)
    with torch.no_grad():
        model.lm_head.weight[1] = model.lm_head.weight.mean(0)
    uniforms = uniform_streams(SeedTree(1), 0, range(4), 16, 40)
    # With many end tokens rows finish at many different steps.
    eos = tuple(range(1, 40))
    got = Engine(model, byte_tokenizer(), eos).sample(Request(PROMPTS, 16, Sampling(40), uniforms))
    alone = [
        Engine(model, byte_tokenizer(), eos).sample(
            Request([PROMPTS[r // 16]], 1, Sampling(40), uniforms[r : r + 1])
        )[0]
        for r in range(64)
    ]
    assert [one.ids for one in got] == [one.ids for one in alone]
    assert len({len(one.ids) for one in got}) > 3
    for one in got:
        assert all(token not in eos for token in one.ids[:-1])
        assert one.is_truncated == (one.ids[-1] not in eos)


def test_first_token_distribution_is_exact() -> None:
    model = tiny_model("llama", vocab_size=12)
    prompt = [3, 4, 5]
    p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
    uniforms = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    got = Engine(model, byte_tokenizer(), EOS, 20_000).sample(
        Request([prompt], 20_000, Sampling(1), uniforms)
    )
    counts = torch.bincount(torch.tensor([one.ids[0] for one in got]), minlength=12)
    big = p * 20_000 >= 5
    observed = [*counts[big].tolist(), int(counts[~big].sum())]
    expected = [*(p[big] * 20_000).tolist(), float(p[~big].sum() * 20_000)]
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
    scale = sum(observed) / sum(expected)
    assert chisquare(observed, [e * scale for e in expected]).pvalue > 1e-3


def test_pick_never_takes_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    token, logp = pick(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert token.tolist() == [1, 3, 3]
    torch.testing.assert_close(logp, torch.full((3,), 0.5).log())


def test_stop_text_ends_a_completion() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("qwen2", seed=2)
    uniforms = uniform_streams(SeedTree(5), 0, range(4), 8, 40)
    free = Engine(model, tokenizer, EOS).sample(Request(PROMPTS, 8, Sampling(40), uniforms))
    letter = free[0].text[5]
    got = Engine(model, tokenizer, EOS).sample(
        Request(PROMPTS, 8, Sampling(40, stop=(letter,)), uniforms)
    )
    assert got[0].text == free[0].text[: free[0].text.index(letter)]
    assert not got[0].is_truncated
    for before, after in zip(free, got, strict=True):
        assert after.ids == before.ids[: len(after.ids)], "a stop text may only cut"
        assert letter not in after.text
        if letter not in before.text:
            assert after.ids == before.ids


def test_lora_updates_are_seen_without_any_sync() -> None:
    model = tiny_model("qwen2")
    peft = add_lora(model)
    engine = Engine(model, byte_tokenizer(), EOS)
    before = engine.sample(Request(PROMPTS, 1, Sampling(16), None))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2)
    assert engine.sample(Request(PROMPTS, 1, Sampling(16), None)) != before
    with peft.disable_adapter():
        bare = engine.sample(Request(PROMPTS, 1, Sampling(16), None))
    assert bare == Engine(tiny_model("qwen2"), byte_tokenizer(), EOS).sample(
        Request(PROMPTS, 1, Sampling(16), None)
    )


def test_hf_sampler_gives_the_same_rollouts() -> None:
    model = tiny_model("llama")
    uniforms = uniform_streams(SeedTree(0), 0, range(4), 3, 12)
    ours = Engine(model, byte_tokenizer(), EOS).sample(
        Request(PROMPTS, 3, Sampling(12, 0.8), uniforms)
    )
    theirs = HfSampler(model, byte_tokenizer(), EOS).sample(
        Request(PROMPTS, 3, Sampling(12, 0.8), uniforms)
    )
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-4, rtol=1e-4)


def test_hf_sampler_stops_at_a_stop_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollouts are those that are cut after the last token, with fewer forward passes."""
    model = tiny_model("llama")
    sampler = HfSampler(model, byte_tokenizer(), EOS)
    uniforms = uniform_streams(SeedTree(0), 0, range(4), 3, 64)
    whole = sampler.sample(Request(PROMPTS, 3, Sampling(64), uniforms))
    common = [c for c in "abcdefghijklmnopqrstuvwxyz0123456789 .,:" if c in whole[0].text]
    stop = (*common, *(one.text[3:4] for one in whole if len(one.text) > 3))
    sampling = Sampling(64, stop=stop)
    calls: list[int] = []
    forward = model.forward

    def counted(*a: object, **k: object):
        calls.append(1)
        return forward(*a, **k)

    monkeypatch.setattr(model, "forward", counted)
    early = sampler.sample(Request(PROMPTS, 3, sampling, uniforms))
    few = len(calls)
    monkeypatch.setattr(hf, "STOP_EVERY", 10**9)
    late = sampler.sample(Request(PROMPTS, 3, sampling, uniforms))
    assert early == late
    assert any(first_stop(one.text, stop) is None and not one.is_truncated for one in early)
    assert few <= 16 and len(calls) - few > 2 * few, (few, len(calls))


def test_unserved_models_fall_back_or_are_refused() -> None:
    model = tiny_model("gpt2")
    assert make_sampler("auto", model, byte_tokenizer(), EOS, 8).name == "hf"
    with pytest.raises(UserError, match="gpt2"):
        make_sampler("operando", model, byte_tokenizer(), EOS, 8)
    got = HfSampler(model, byte_tokenizer(), EOS).sample(Request(PROMPTS, 1, Sampling(8), None))
    for prompt, one in zip(PROMPTS, got, strict=True):
        assert list(one.ids) == hf_greedy(model, prompt, 8)[: len(one.ids)]


def test_a_row_that_left_for_its_tail_alone_has_no_token_that_was_not_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tail may read otherwise than the whole text does: such a row is cut, and did not end."""

    def end_all(decoding: Decoding, drawn: int) -> None:
        if drawn % STOP_EVERY == 0:
            decoding.rows.alive_B.zero_()

    monkeypatch.setattr(Decoding, "end_at_stop_texts", end_all)
    engine = Engine(tiny_model("llama"), byte_tokenizer(), (1,))
    uniforms = uniform_streams(SeedTree(0), 0, range(4), 2, 30)
    found = engine.sample(Request(PROMPTS, 2, Sampling(30, stop=("no such text",)), uniforms))
    whole = engine.sample(Request(PROMPTS, 2, Sampling(30), uniforms))
    for one, other in zip(found, whole, strict=True):
        assert one.ids == other.ids[:8] and one.logp == other.logp[:8]
        assert one.is_truncated == (1 not in one.ids)
