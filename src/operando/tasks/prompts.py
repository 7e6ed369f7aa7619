"""From examples to prompts: raw or chat, with or without worked examples."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from operando.errors import UserError
from operando.recipe import PromptConfig
from operando.types import Example, Prompt


def make_prompts(
    examples: Sequence[Example],
    shots: Sequence[Example],
    config: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[Prompt]:
    """Return each example as the model reads it; a prompt over `max_length` tokens is an error."""
    if config.format == "chat" and not tokenizer.chat_template:
        raise UserError(
            'prompt.format = "chat", but the tokenizer has no chat template: use "raw", or an '
            "instruct model"
        )
    make = _chat_prompt if config.format == "chat" else _raw_prompt
    prompts = [make(example, shots, config, tokenizer) for example in examples]
    too_long = [p for p in prompts if len(p.ids) > max_length]
    if too_long:
        longest = max(too_long, key=lambda p: len(p.ids))
        raise UserError(
            f"{len(too_long)} of {len(prompts)} prompts are over the limit of {max_length} tokens; "
            f"the longest ({longest.example.id}) has {len(longest.ids)}. Raise "
            "prompt.max_prompt_length, lower prompt.few_shot, or choose a model with more context"
        )
    return prompts


def _raw_prompt(
    example: Example,
    shots: Sequence[Example],
    config: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompt:
    worked = [
        config.ask(shot.question) + config.worked_answer(shot.solution, shot.answer)
        for shot in shots
    ]
    text = config.separator.join([*worked, config.ask(example.question)]) + config.prefill
    return Prompt(example, text, tuple(tokenizer(text)["input_ids"]), prefill=config.prefill)


def _chat_prompt(
    example: Example,
    shots: Sequence[Example],
    config: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompt:
    messages = [{"role": "system", "content": config.system}] if config.system is not None else []
    for shot in shots:
        answer = config.worked_answer(shot.solution, shot.answer).strip()
        messages.append({"role": "user", "content": config.ask(shot.question)})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": config.ask(example.question)})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    text += config.prefill
    # The template already holds every special token.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(example, text, tuple(ids), tuple(messages), config.prefill)
