"""From examples to prompts: raw or chat, with or without worked examples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import jinja2
import jinja2.ext
from jinja2 import meta, nodes
from transformers import PreTrainedTokenizerBase

from operando.errors import UserError, nearest
from operando.models.tokens import prompt_ids, start_ids, text_ids
from operando.recipe.data import PromptConfig
from operando.types import Example, Prompt

OPENED = re.compile(r"<think>\s*\Z")
NOW = re.compile(r"""\bstrftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
# What a chat template is given by transformers or by operando itself.
GIVEN = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "lipsum",
    "cycler",
    "joiner",
}
Messages = list[dict[str, str]]


def make_prompts(
    examples: Sequence[Example],
    shots: Sequence[Example],
    config: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    day: datetime,
) -> list[Prompt]:
    """Return each example as the model reads it; a prompt over `max_length` tokens is an error.

    Raw prompts begin with the tokenizer's beginning-of-sequence, if it adds one, and never end with
    an end-of-sequence. Chat prompts hold the special tokens that the chat template writes and no
    others. A text that the ids don't hold is an error. `day` is what a template prints that asks
    for the date: a run's own, so that its prompts are the same whenever it is asked.
    """
    if config.format == "chat":
        prompts = _chat_prompts(examples, shots, config, tokenizer, day)
    else:
        prompts = _raw_prompts(examples, shots, config, tokenizer)
    too_long = [p for p in prompts if len(p.ids) > max_length]
    if too_long:
        longest = max(too_long, key=lambda p: len(p.ids))
        raise UserError(
            f"{len(too_long)} of {len(prompts)} prompts are over the limit of {max_length} tokens; "
            f"the longest ({longest.example.id}) has {len(longest.ids)}. Raise "
            "prompt.max_prompt_length, lower prompt.few_shot, or choose a model with more context"
        )
    return prompts


def answer_so_far(text: str, prefill: str) -> str:
    """Return what the end of a prompt's text already holds of the answer.

    That is the recipe's prefill, and before it a <think> that the template itself opens.
    """
    opened = OPENED.search(text.removesuffix(prefill))
    return prefill if opened is None else opened[0] + prefill


def missing_start(
    config: PromptConfig, tokenizer: PreTrainedTokenizerBase, day: datetime
) -> str | None:
    """Return a warning where chat prompts lack the beginning of sequence that raw ones have.

    The chat template decides, as it does in vLLM and TRL.
    """
    start = start_ids(tokenizer)
    if config.format == "raw" or not start:
        return None
    chat = _open_chat(config, tokenizer, day)
    text = _render([{"role": "user", "content": "a"}], chat)
    if tuple(text_ids(tokenizer, [text], "the chat template")[0][: len(start)]) == start:
        return None
    return (
        f"the chat template does not begin with {tokenizer.decode(list(start))!r}, which the "
        "tokenizer puts before raw text: chat prompts have none, as in vLLM and TRL"
    )


def _raw_prompts(
    examples: Sequence[Example],
    shots: Sequence[Example],
    config: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Prompt]:
    with_system = next((example.id for example in examples if example.system), None)
    if with_system is not None:
        raise UserError(
            f'{with_system} has a system message: set prompt.format = "chat", or put it into the '
            "question (task.template)"
        )
    worked = [
        config.ask(shot.question) + config.worked_answer(shot.solution, shot.answer)
        for shot in shots
    ]
    texts = [
        config.separator.join([*worked, config.ask(example.question)]) + config.prefill
        for example in examples
    ]
    rows = prompt_ids(tokenizer, texts, "a prompt")
    return [
        Prompt(example, text, tuple(ids), prefill=_prefill(text, config))
        for example, text, ids in zip(examples, texts, rows, strict=True)
    ]


def _chat_prompts(
    examples: Sequence[Example],
    shots: Sequence[Example],
    config: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    day: datetime,
) -> list[Prompt]:
    chat = _open_chat(config, tokenizer, day)
    _check_template(config, chat)
    before: Messages = []
    for shot in shots:
        answer = config.worked_answer(shot.solution, shot.answer).strip()
        before.append({"role": "user", "content": config.ask(shot.question)})
        before.append({"role": "assistant", "content": answer})
    asked: list[Messages] = [
        [
            *_system(example, config),
            *before,
            {"role": "user", "content": config.ask(example.question)},
        ]
        for example in examples
    ]
    texts = [_render(messages, chat) + config.prefill for messages in asked]
    rows = text_ids(tokenizer, texts, "a prompt")  # the template holds every special token
    return [
        Prompt(example, text, tuple(ids), tuple(messages), _prefill(text, config))
        for example, text, ids, messages in zip(examples, texts, rows, asked, strict=True)
    ]


def _system(example: Example, config: PromptConfig) -> Messages:
    """Return the system message: the example's own or the recipe's; both is an error."""
    if example.system and config.system is not None:
        raise UserError(
            f"prompt.system, and {example.id} has a system message of its own: leave one out"
        )
    text = example.system or config.system
    return [] if text is None else [{"role": "system", "content": text}]


def _prefill(text: str, config: PromptConfig) -> str:
    so_far = answer_so_far(text, config.prefill)
    if so_far != config.prefill and config.prefill.lstrip().startswith("<think>"):
        raise UserError(
            f"prompt.prefill = {config.prefill!r}: the template already ends with <think>, so the "
            "answer would open it twice. Leave prompt.prefill out"
        )
    return so_far


# --- the chat template ---------------------------------------------------------------------------


class _Chat(NamedTuple):
    """A tokenizer with its chat template as a run renders it: the day fixed, the names given."""

    tokenizer: PreTrainedTokenizerBase
    source: str
    names: Mapping[str, bool | int | float | str]


def _open_chat(config: PromptConfig, tokenizer: PreTrainedTokenizerBase, day: datetime) -> _Chat:
    if not tokenizer.chat_template:
        raise UserError(
            'prompt.format = "chat", but the tokenizer has no chat template: use "raw", or an '
            "instruct model"
        )
    source = tokenizer.get_chat_template()
    _check_names(config.chat_template_kwargs, source)
    return _Chat(tokenizer, _dated(source, day), config.chat_template_kwargs)


def _dated(source: str, day: datetime) -> str:
    """Return a chat template that prints `day` where it would print the date of today."""
    dated = NOW.sub(lambda found: json.dumps(day.strftime(found[1] or found[2] or "")), source)
    if left := re.search(r"\bstrftime_now\(.{0,40}", dated):
        raise UserError(
            f"the chat template asks for the time in a way that can't be fixed to the run's day: "
            f"{left[0]!r}; expected strftime_now with a format in quotes. Put the date into the "
            "model's chat template"
        )
    return dated


def _check_names(names: Mapping[str, object], source: str) -> None:
    """Raise for a name that the chat template never reads: it would change nothing."""
    if not names:
        return
    tree = jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).parse(
        GENERATION.sub("", source)
    )
    read = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    for name in names:
        if name in GIVEN:
            raise UserError(f"prompt.chat_template_kwargs: {name!r} is set by operando itself")
        if name not in read:
            free = sorted(meta.find_undeclared_variables(tree) - GIVEN)
            raise UserError(
                f"prompt.chat_template_kwargs: the chat template never reads {name!r}."
                f"{nearest(name, free)} It reads: {', '.join(free) or 'nothing of this kind'}"
            )


def _render(messages: Sequence[Mapping[str, str]], chat: _Chat, ask_for_answer: bool = True) -> str:
    """Return messages as the chat template writes them; one that it refuses is an error."""
    try:
        text = chat.tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            chat_template=chat.source,
            add_generation_prompt=ask_for_answer,
            tokenize=False,
            **chat.names,  # pyright: ignore[reportArgumentType]
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        raise UserError(
            f"the chat template refuses messages of the roles {roles}: {error}. Leave out "
            "prompt.system (put it into prompt.template) or prompt.few_shot, or use "
            'prompt.format = "raw"'
        ) from error
    assert isinstance(text, str), type(text)
    return text


def _check_template(config: PromptConfig, chat: _Chat) -> None:
    """Raise for a template that drops the question or the system message, or begins no answer.

    A template need not write anything before an answer ("[INST] ... [/INST]"), but what it does
    write there, a role's name, must be in the prompt.
    """
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    asked = [*system, {"role": "user", "content": "QUESTION"}]
    text = _render(asked, chat)
    for key, content in (("prompt.system", config.system), ("the question", "QUESTION")):
        if content is not None and content.strip() not in text:
            raise UserError(
                f"the chat template drops {key}: {content[:80]!r} is not in {text[:200]!r}. "
                'Put it into prompt.template, or use prompt.format = "raw"'
            )
    if text != _render(asked, chat, ask_for_answer=False):
        return
    answered = [*asked, {"role": "assistant", "content": "ANSWER"}]
    head = _render(answered, chat, ask_for_answer=False).partition("ANSWER")[0]
    if head.removeprefix(text).strip():
        raise UserError(
            "the chat template ignores add_generation_prompt: a prompt ends with "
            f"{text[-40:]!r}, and the model would continue as any speaker, but an answer begins "
            f"with {head.removeprefix(text)[-40:]!r}. Fix the model's chat template, or use "
            'prompt.format = "raw"'
        )
