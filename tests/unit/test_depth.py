"""Decision depth: rules by hand, decoding against generate, and pairs whose depth is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from operando.evals.depth import by_position, random_places, share_of_gain
from operando.evals.forced import Choice, Edit, Pair, written
from operando.models.recursive import RecursiveCausalLM
from operando.recipe.data import WordsTaskConfig
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Request, Sampling
from operando.tasks.words import load_words
from operando.types import Example, Prompt
from tests.unit.recursive_models import random_recursive
from tests.unit.tiny import byte_tokenizer, tiny_model

IDS = [(5, 9, 40, 7), (100, 3), (77, 78, 79, 80, 81, 82, 83), (9,)]
PROMPTS = [Prompt(Example(str(i), "q", "a"), "", ids) for i, ids in enumerate(IDS)]


def pair(base: PreTrainedModel, trained: PreTrainedModel, greedy: bool = True) -> Pair:
    task = load_words(WordsTaskConfig(kind="words", num_train=2, num_held_out=2))
    return Pair(base, trained, byte_tokenizer(), task, Sampling(12), greedy, seed=0)


def generated(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Greedy answers by transformers, one prompt at a time."""
    answers = []
    for ids in IDS:
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        row = out[0, len(ids) :].tolist()
        answers.append(tuple(row[: row.index(1) + 1] if 1 in row else row))
    return answers


def ids_of(decoded: Any) -> list[tuple[int, ...]]:
    return [one.ids for one in decoded.answers]


def test_what_is_written_by_hand() -> None:
    choice = Choice(*(torch.tensor(x) for x in ([1, 2, 3], [1, 5, 6], [7, 8, 9])))
    forced_B, rows = torch.tensor([0, 0, 2]), range(4, 7)

    def of(edit: Edit, t: int) -> tuple[list[int], list[bool]]:
        token_B, here_B = written(edit, t, choice, forced_B, rows)
        return token_B.tolist(), here_B.tolist()

    assert of(Edit(), 0) == ([1, 2, 3], [False] * 3)
    assert of(Edit("other", 1), 0) == ([1, 5, 3], [False, True, False])
    assert of(Edit("other", 3), 0) == ([1, 5, 6], [False, True, True])
    assert of(Edit("next_best", 1), 0) == ([1, 8, 3], [False, True, False])
    places = tuple(frozenset({i}) for i in range(7))
    assert of(Edit("random", 1, places), 6) == ([1, 2, 9], [False, False, True])
    constant = Edit("constant", place=1, ids=(40, 41))
    assert of(constant, 0) == ([1, 2, 3], [False] * 3)
    assert of(constant, 2) == ([41, 41, 41], [True] * 3)


def test_both_ends_are_the_two_models() -> None:
    """No token forced is the base as transformers decodes it; all forced is the trained model."""
    base, trained = tiny_model("qwen2", 0), tiny_model("qwen2", 1)
    both = pair(base, trained)
    assert ids_of(both.decode(PROMPTS, "base", Edit())) == generated(base)
    assert ids_of(both.decode(PROMPTS, "trained", Edit())) == generated(trained)
    every = both.decode(PROMPTS, "base", Edit("other", 12), measured=True)
    assert ids_of(every) == generated(trained)
    back = both.decode(PROMPTS, "trained", Edit("other", 12))
    assert ids_of(back) == generated(base)
    for answer, forced, flip in zip(every.answers, every.forced, every.flip, strict=True):
        assert [t for t, f in enumerate(flip) if f] == [t for t, _ in forced]
        assert all(answer.ids[t] == token for t, token in forced)
    assert min(every.rank) >= 2 and all(k >= 0 for row in every.kl for k in row)


def test_a_recursive_model_that_exits_is_decoded_as_its_engine_does() -> None:
    """Both read with exits and left padding; the engine reads neither padding nor the other model.
    The two models' exits differ from full depth, so a read that ignored them would be seen."""
    base, trained, full = (
        random_recursive(seed, num_loops=4, halt_threshold=halt)
        for seed, halt in ((0, 0.6), (1, 0.6), (0, None))
    )

    def engine(model: RecursiveCausalLM) -> list[tuple[int, ...]]:
        sampler = RecursiveEngine(model, byte_tokenizer(), (1,))
        return [one.ids for one in sampler.sample(Request(IDS, 1, Sampling(12)))]

    both = pair(base, trained)
    assert ids_of(both.decode(PROMPTS, "base", Edit())) == engine(base) != engine(full)
    assert ids_of(both.decode(PROMPTS, "base", Edit("other", 12))) == engine(trained)
    assert ids_of(both.decode(PROMPTS, "trained", Edit("other", 12))) == engine(base)
    forced = both.decode(PROMPTS, "base", Edit("other", 1)).forced
    assert [len(row) for row in forced] == [1] * 4, "the two differ in every answer"


def test_the_first_k_are_forced_and_no_more() -> None:
    both = pair(tiny_model("llama", 0), tiny_model("llama", 1))
    for k in (1, 3):
        for kind in ("other", "next_best"):
            decoded = both.decode(PROMPTS, "base", Edit(kind, k))
            assert max(len(row) for row in decoded.forced) == k
    other = both.decode(PROMPTS, "base", Edit("other", 1)).forced
    best = both.decode(PROMPTS, "base", Edit("next_best", 1)).forced
    assert [row[0][0] for row in other] == [row[0][0] for row in best], "the same places"
    assert all(a[0][1] != b[0][1] for a, b in zip(other, best, strict=True))


class _Switch(nn.Module):
    """A head that adds to one token's logit where the last token read is another one's."""

    def __init__(self, head: nn.Module, after: set[int], token: int) -> None:
        super().__init__()
        self.head, self.after, self.token = head, after, token

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        logits[..., self.token] += 1e4 * self.read
        return logits


@pytest.mark.parametrize("greedy", [True, False])
def test_a_switch_is_one_token_deep(greedy: bool) -> None:
    """A trained model that differs in its first token alone: one forced token is all of it."""
    base, trained = tiny_model("qwen2", 0), tiny_model("qwen2", 0)
    first = {ids[-1] for ids in IDS}
    head = trained.lm_head
    assert isinstance(head, nn.Module)
    switch = _Switch(head, first, token=200)
    trained.lm_head = switch

    def note(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        prompt = kwargs["input_ids"].shape[1] > 1 or kwargs["attention_mask"].shape[1] == 1
        switch.read = float(prompt)

    trained.register_forward_pre_hook(note, with_kwargs=True)
    both = pair(base, trained, greedy)
    one = both.decode(PROMPTS, "base", Edit("other", 1))
    assert ids_of(one) == ids_of(both.decode(PROMPTS, "trained", Edit()))
    assert all(row == [(0, 200)] for row in one.forced)
    every = both.decode(PROMPTS, "base", Edit("other", 12), measured=True)
    assert [sum(row) for row in every.flip] == [1] * 4
    constant = both.decode(PROMPTS, "base", Edit("constant", ids=(200,)))
    assert ids_of(constant) == ids_of(one)


def test_the_share_of_the_gain_by_hand() -> None:
    before = [False] * 60 + [True] * 40
    after = [True] * 80 + [False] * 20
    assert share_of_gain(before, after, before, 0) == (0, 0, 0)
    assert share_of_gain(before, after, after, 0) == (1, 1, 1)
    half = [True] * 10 + [False] * 50 + [True] * 40
    found = share_of_gain(before, after, half, 0)
    assert found.value == pytest.approx(0.25) and found.low < 0.25 < found.high


def test_places_are_drawn_once_and_within_the_answer() -> None:
    places = random_places([3, 1, 20], 2, seed=0)
    assert [len(p) for p in places] == [2, 1, 2] and places == random_places([3, 1, 20], 2, seed=0)
    assert all(max(p) < n for p, n in zip(places, [3, 1, 20], strict=True))


def test_the_mean_by_position_is_over_answers_that_reach_it() -> None:
    assert by_position([[1.0, 2.0], [3.0]]) == (2.0, 2.0)


def test_kl_flips_and_ranks_by_hand() -> None:
    """p = (1/2, 1/4, 1/4) of the other model beside q = (1/4, 1/4, 1/2) of this one."""
    own_BV = torch.tensor([[1.0, 1.0, 2.0], [3.0, 1.0, 1.0]]).log()
    other_BV = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).log()
    kl: list[list[float]] = [[], []]
    flip: list[list[bool]] = [[], []]
    rank: list[int] = []
    Pair._measure(own_BV, other_BV, torch.tensor([True, False]), kl, flip, rank)
    assert kl[0] == [pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item())] and kl[1] == []
    assert flip == [[True], []] and rank == [2]
