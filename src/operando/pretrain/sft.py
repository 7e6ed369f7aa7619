"""Supervised fine-tuning: a model learns the answers to prompts, not the prompts.

Prompt and answer are tokenized apart, as they are when a model is asked; the end token belongs to
the answer. Every label of a prompt is ignored, so prompts get no gradient of their own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from operando.errors import UserError
from operando.models.folders import save_folder
from operando.models.load import load_model, pad_id
from operando.models.tokens import prompt_ids, text_ids
from operando.pretrain.fit import Batch, Pair, PretrainProgress, collate, fit, forget_state
from operando.recipe.data import ModelConfig
from operando.recipe.mixture import SftRecipe
from operando.run import write_json
from operando.tasks.mixture import Document, check_plain, open_source, shares, take_pairs


class TakenPairs(NamedTuple):
    """A source's pairs as text, and what the manifest says of it."""

    documents: Sequence[Document]
    facts: Mapping[str, str | int]


def take_documents(recipe: SftRecipe) -> dict[str, TakenPairs]:
    """Return each source's share of the pairs; a source that can't be read is an error."""
    counts = shares(recipe.num_pairs, {name: s.weight for name, s in recipe.sources.items()})
    return {
        name: TakenPairs(
            *take_pairs(open_source(name, source, f"sources.{name}", recipe.seed), counts[name])
        )
        for name, source in recipe.sources.items()
    }


def take_all(
    recipe: SftRecipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Pair], dict[str, Mapping[str, str | int]]]:
    """Return the pairs of all sources, shuffled, and what the manifest says of each source."""
    taken = take_documents(recipe)
    pairs: list[Pair] = []
    for name, source in taken.items():
        check_plain(name, tokenizer, source.documents)
        pairs += encode_pairs(source.documents, tokenizer, recipe.max_length, name)
    random.Random(f"{recipe.seed}/sft").shuffle(pairs)
    return pairs, {name: source.facts for name, source in taken.items()}


def encode_pairs(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_length: int, name: str
) -> list[Pair]:
    """Return the ids of pairs, prompts as a model is asked; one over `max_length` is an error."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int), eos
    prompts = prompt_ids(tokenizer, [d.prompt for d in documents], f"source {name}: a prompt")
    answers = text_ids(tokenizer, [d.answer for d in documents], f"source {name}: an answer")
    pairs = [Pair(tuple(p), (*a, eos)) for p, a in zip(prompts, answers, strict=True)]
    sizes = [len(pair.prompt) + len(pair.answer) for pair in pairs]
    if max(sizes) > max_length:
        count = sum(size > max_length for size in sizes)
        raise UserError(
            f"source {name}: {count} of {len(pairs)} pairs are over max_length = {max_length} "
            f"tokens; the longest has {max(sizes)}. Raise max_length, or leave the long ones out "
            "of the source"
        )
    return pairs


def pair_batches(pairs: Sequence[Pair], batch_size: int, pad: int) -> Callable[[int], Batch]:
    """Return the batches by step: right-padded, with a loss on answers only."""

    def batch_at(step: int) -> Batch:
        return collate(pairs[step * batch_size : (step + 1) * batch_size], pad)

    return batch_at


def num_steps(recipe: SftRecipe) -> int:
    """Return the number of steps: every pair once."""
    return -(-recipe.num_pairs // recipe.batch_size)


def finetune(
    recipe: SftRecipe,
    resume: bool = False,
    on_step: Callable[[PretrainProgress], None] = lambda _: None,
) -> Path:
    """Train, write the model folder with sft.json, return its path."""
    if Path(recipe.out).resolve() == Path(recipe.model).resolve():
        raise UserError(f"out = {recipe.out!r} is the model's own folder, which is kept as it is")
    model, tokenizer, identity = load_model(ModelConfig(id=recipe.model))
    context = int(model.config.get_text_config().max_position_embeddings)
    if recipe.max_length > context:
        raise UserError(
            f"max_length = {recipe.max_length} is over the context of {recipe.model}: {context}"
        )
    pairs, facts = take_all(recipe, tokenizer)
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()
    batch_at = pair_batches(pairs, recipe.batch_size, pad_id(tokenizer))
    model.requires_grad_(True)
    steps, min_loops = num_steps(recipe), recipe.min_loops
    fitted = fit(model, recipe, steps, batch_at, digest, resume, on_step, min_loops)
    out = Path(recipe.out)
    save_folder(out, model, tokenizer)
    manifest = {
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "model": identity,
        "sources": facts,
        "data_sha256": digest,
        "pairs": len(pairs),
        "answer_tokens": fitted.tokens,
        "steps": fitted.steps,
        "final_loss": fitted.final_loss,
        "torch": torch.__version__,
    }
    write_json(out / "sft.json", manifest)
    forget_state(out)
    return out
