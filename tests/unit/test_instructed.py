"""The form of an answer in the prompt: the edits by hand, and a base that obeys one of them."""

from __future__ import annotations

from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from operando.evals.forced import Edit, Pair
from operando.evals.instructed import best_instructed, instructed, prompt_edits
from operando.recipe.data import PromptConfig, WordsTaskConfig
from operando.rollout.sampler import Sampling
from operando.tasks.base import TaskText
from operando.tasks.words import load_words
from operando.types import Example
from tests.unit.tiny import byte_tokenizer, tiny_model

DAY = datetime(2026, 1, 1)
SHOT = Example("s", "1+1?", "2", "1+1=2")
SHOWN = [Example("no", "0?", "0"), Example("t", "2+3?", "5", "2+3=5")]


def test_the_edits_by_hand() -> None:
    before, after, shown = prompt_edits(PromptConfig(), TaskText(), [SHOT], SHOWN)
    said = "Answer in this form: (steps) #### (answer)"
    assert before.config.ask("7?") == f"Q: {said}\n7?\nA:" and before.text == f"{said}\n..."
    assert after.config.ask("7?") == f"Q: 7?\n{said}\nA:" and after.text == f"...\n{said}"
    assert before.shots == after.shots == (SHOT,)
    assert shown.shots == (SHOT, SHOWN[1]) and shown.config.ask("7?") == "Q: 7?\nA:"
    assert shown.text == "Q: 2+3?\nA: 2+3=5 #### 5"


def test_the_form_is_the_recipes_where_it_says_one_else_the_tasks() -> None:
    text = TaskText(answer=" {answer}")
    (*_, said, shown) = prompt_edits(PromptConfig(format="chat"), text, [], SHOWN)
    assert said.config.ask("7?") == "7?\nAnswer in this form: (answer)"
    assert shown.shots == (SHOWN[0],), "no solution is needed"
    own = PromptConfig(template="{question}!", answer_template="<{answer}> {solution}")
    (*_, said, shown) = prompt_edits(own, text, [], SHOWN)
    assert said.config.ask("7?") == "7?\nAnswer in this form: <(answer)> (steps)!"
    assert shown.text == "2+3?!<5> 2+3=5"


def test_a_form_that_is_the_solution_is_shown_and_not_said() -> None:
    text = TaskText(answer=" {solution}")
    (shown,) = prompt_edits(PromptConfig(), text, [], SHOWN)
    assert shown.text == "Q: 2+3?\nA: 2+3=5"
    assert prompt_edits(PromptConfig(), text, [], SHOWN[:1]) == []


class Obedient:
    """A forward that writes the gold number where `when` stands in a row's prompt, else another."""

    def __init__(self, examples: list[Example], when: str) -> None:
        self.tokenizer, self.when = byte_tokenizer(), when
        self.gold = {example.question: example.answer for example in examples}

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        if input_ids.shape[1] > 1:
            self.at, self.rows = 0, []
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                text = self.tokenizer.decode(ids[mask.bool()].tolist())
                gold = next(a for q, a in self.gold.items() if q in text.split("\n\n")[-1])
                answer = f" #### {gold if self.when in text else int(gold) + 1}"
                self.rows.append([*self.tokenizer(answer)["input_ids"], 1])
        logits = torch.zeros(len(self.rows), 1, 258)
        for b, row in enumerate(self.rows):
            logits[b, 0, row[min(self.at, len(row) - 1)]] = 9.0
        self.at += 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("when", "chosen", "tried"),
    [
        ("\nAnswer in this form: (steps)", "...\nAnswer in this form", 3),
        ("Q: Answer in this form: (steps)", "Answer in this form: (steps) #### (answer)\n...", 3),
        ("####", "Answer in this form", 3),  # a tie: the first
        ("\n\nQ", "Q: ", 3),
    ],
)
def test_the_edit_that_the_base_obeys_is_found(when: str, chosen: str, tried: int) -> None:
    task = load_words(WordsTaskConfig(kind="words", num_train=9, num_held_out=6))
    examples = [*task.train, *task.held_out]
    base = tiny_model("qwen2")
    base.forward = Obedient(examples, when)
    pair = Pair(base, base, byte_tokenizer(), task, Sampling(16), True, seed=0)
    edits = prompt_edits(PromptConfig(), task.text, [], task.train[8:])
    found = instructed(pair, edits, task.train[:8], task.held_out, 10**4, DAY)
    assert len(found) == tried
    best = best_instructed(pair, found)
    assert best is not None and best.text.startswith(chosen)
    assert [p.example for p in best.search] == list(task.train[:8])
    assert [p.example for p in best.held_out] == list(task.held_out)
    assert all(pair.right(best.held_out, pair.decode(best.held_out, "base", Edit())))


def test_an_edit_that_does_not_fit_is_not_tried() -> None:
    task = load_words(WordsTaskConfig(kind="words", num_train=9, num_held_out=6))
    model = tiny_model("qwen2")
    pair = Pair(model, model, byte_tokenizer(), task, Sampling(4), True, seed=0)
    edits = prompt_edits(PromptConfig(), task.text, [], task.train[8:])
    ask = [e.config for e in edits]
    asked = [*task.train[:8], *task.held_out]
    said = max(len(ask[0].ask(e.question)) for e in asked)  # a byte is a token
    assert len(instructed(pair, edits, task.train[:8], task.held_out, said, DAY)) == 2
    assert instructed(pair, edits, task.train[:8], task.held_out, said - 1, DAY) == []
    assert best_instructed(pair, []) is None
