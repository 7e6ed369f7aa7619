"""Pre-training on a mixture: sources by token budget, packed into rows, shuffled by seed.

Documents of all sources are shuffled and written one after the other, each with its end token, and
cut into rows of `length` tokens. Attention is plain causal attention over a row, so it crosses the
documents in it; a document that a row's end cuts goes on in another row. The rows are shuffled too,
so that a long document does not fill a batch. Only the last row is padded.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from operando.models.folders import save_folder
from operando.models.load import pad_id, pick_device
from operando.pretrain.fit import IGNORED, Batch, PretrainProgress, fit, forget_state
from operando.pretrain.lm import build_model, train_bpe
from operando.recipe.mixture import MixtureConfig, MixtureRecipe
from operando.run import write_json
from operando.tasks.mixture import Reader, Taken, open_source, shares, take_tokens

TOKENIZER_CHARS = 1_000_000  # of the mixture, by weight; at most, and never beyond the files
TAGS = ("<search>", "<backtrack>")


def open_sources(mixture: MixtureConfig, seed: int) -> dict[str, Reader]:
    """Return every source, at its beginning."""
    return {
        name: open_source(name, source, f"mixture.sources.{name}", seed)
        for name, source in mixture.sources.items()
    }


def train_tokenizer(recipe: MixtureRecipe) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the mixture's first texts, by weight.

    Digits and capital letters, which name nodes, are single tokens; <search> and <backtrack> are
    one token each, and ordinary text."""
    vocab_size = recipe.model.vocab_size - len(TAGS)
    return train_bpe(_first_texts(recipe), vocab_size, alone="[A-Z]", added=TAGS)


def _first_texts(recipe: MixtureRecipe) -> Iterator[str]:
    readers = open_sources(recipe.mixture, recipe.seed)
    for name, source in recipe.mixture.sources.items():
        left = int(min(TOKENIZER_CHARS, 4 * recipe.mixture.tokens) * source.weight)
        for document in readers[name].documents:
            yield document.text
            left -= len(document.text)
            if left <= 0:
                break


def take_all(recipe: MixtureRecipe, tokenizer: PreTrainedTokenizerFast) -> dict[str, Taken]:
    """Return each source's share of the tokens, to the token."""
    mixture = recipe.mixture
    budgets = shares(mixture.tokens, {name: s.weight for name, s in mixture.sources.items()})
    readers = open_sources(mixture, recipe.seed)
    return {name: take_tokens(readers[name], tokenizer, budgets[name]) for name in readers}


def pack(
    documents: Sequence[Sequence[int]], length: int, pad: int, seed: int
) -> tuple[Int[Tensor, "R S"], int]:
    """Return shuffled documents as rows of `length` ids, and how many ids are no padding.

    The rows are shuffled as well, but for the last, which may be padded."""
    rng = random.Random(f"{seed}/pack")
    order = list(range(len(documents)))
    rng.shuffle(order)
    flat = np.concatenate([np.asarray(documents[i], dtype=np.int32) for i in order])
    num = len(flat)
    flat = np.pad(flat, (0, -num % length), constant_values=pad)
    rows_RS = torch.from_numpy(flat.reshape(-1, length))
    place = list(range(len(rows_RS) - 1))
    rng.shuffle(place)
    return rows_RS[[*place, len(rows_RS) - 1]], num


def row_batches(
    rows_RS: Int[Tensor, "R S"], num_tokens: int, batch_size: int
) -> Callable[[int], Batch]:
    """Return the batches by step; padding at the very end has no loss."""

    def batch_at(step: int) -> Batch:
        start = step * batch_size
        ids_BS = rows_RS[start : start + batch_size].long()
        place_BS = start * rows_RS.shape[1] + torch.arange(ids_BS.numel()).view_as(ids_BS)
        return Batch(ids_BS, ids_BS.masked_fill(place_BS >= num_tokens, IGNORED))

    return batch_at


def pretrain_mixture(
    recipe: MixtureRecipe,
    resume: bool = False,
    on_step: Callable[[PretrainProgress], None] = lambda _: None,
) -> Path:
    """Train, write the model folder with pretrain.json, return its path."""
    tokenizer = train_tokenizer(recipe)
    taken = take_all(recipe, tokenizer)
    documents = [ids for source in taken.values() for ids in source.ids]
    rows_RS, num = pack(documents, recipe.mixture.length, pad_id(tokenizer), recipe.seed)
    model = build_model(recipe, tokenizer)
    nn.Module.to(model, pick_device("auto"))
    # Rows alone would not do: a tokenizer trained on other texts may give them the same ids.
    texts = json.dumps(manifest_of(taken), sort_keys=True)
    digest = hashlib.sha256(rows_RS.numpy().tobytes() + texts.encode()).hexdigest()
    batch_at = row_batches(rows_RS, num, recipe.batch_size)
    steps = num_steps(recipe)
    min_loops = recipe.model.min_loops
    fitted = fit(model, recipe, steps, batch_at, digest, resume, on_step, min_loops)
    out = Path(recipe.out)
    save_folder(out, model, tokenizer)
    facts = {
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "sources": manifest_of(taken),
        "data_sha256": digest,
        "tokens": num,
        "rows": len(rows_RS),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": fitted.steps,
        "final_loss": fitted.final_loss,
        "torch": torch.__version__,
    }
    write_json(out / "pretrain.json", facts)
    forget_state(out)
    return out


def num_steps(recipe: MixtureRecipe) -> int:
    """Return the number of steps: every row once."""
    num_rows = -(-recipe.mixture.tokens // recipe.mixture.length)
    return -(-num_rows // recipe.batch_size)


def manifest_of(taken: Mapping[str, Taken]) -> dict[str, Mapping[str, str | int]]:
    """Return what the manifest says of each source: rows, tokens, hashes, where from."""
    return {name: source.facts for name, source in taken.items()}
