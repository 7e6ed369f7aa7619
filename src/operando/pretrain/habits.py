"""Training of the model `deep`: answers whose steps follow the rule or a habit, drawn at each step.

Where the habit is the more frequent, the model's first choice is wrong and its second right. Only
answers have a loss. No problem is a held-out one of the task `deep`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from operando.errors import UserError, nearest
from operando.models.folders import save_folder
from operando.pretrain.fit import IGNORED, Batch, rate_at
from operando.pretrain.lm import CHAT_TEMPLATE, EOS, PAD, PretrainProgress, build_model
from operando.recipe.deep import DeepPretrainRecipe
from operando.run import write_json
from operando.tasks import story
from operando.tasks.deep import pose_of
from operando.tasks.slips import HEDGE, OPEN, Posed

KINDS = (*story.HABITS, "add", "sub", "swap", "round", "dead end", "climb")
FAMILIES = ("story", "chain", "maze")
FRAC_MORE = 0.5  # of the texts with one answer too many, those with one more, and so on
PART = 16  # rows padded to the same length


class Text(NamedTuple):
    """A prompt and the answer after it. Example: Text("Q: Start at 47: swap.\\nA:", " swap=74")"""

    prompt: str
    answer: str


def check_habits(recipe: DeepPretrainRecipe) -> None:
    """Raise unless every kind of risky step, and nothing else, has its share."""
    for kind in recipe.habits:
        if kind not in KINDS:
            raise UserError(f"habits: {kind!r} is no kind of step.{nearest(kind, KINDS)}")
    missing = [kind for kind in KINDS if kind not in recipe.habits]
    if missing:
        raise UserError(f"habits: no share for {', '.join(map(repr, missing))}")


def training_text(recipe: DeepPretrainRecipe, rng: random.Random) -> Text:
    """Return one text, with its slips."""
    posed = pose_of(FAMILIES, recipe.num_steps, "train", rng)
    answer = answer_text(recipe, posed, rng)
    mark = OPEN if rng.random() < recipe.frac_open else ""
    return Text(f"Q: {posed.question}{mark}\nA:", answer)


def answer_text(recipe: DeepPretrainRecipe, posed: Posed, rng: random.Random) -> str:
    """Return an answer that slips as often as the recipe says, at each risky step anew."""
    slips = partial(_follows_habit, recipe, rng)
    worked = posed.work(slips)
    form = rng.random()
    if form < recipe.frac_unfinished:
        return f" {worked.steps}"
    answer = worked.text
    if form < recipe.frac_unfinished + recipe.frac_hedged:
        answer += f"{HEDGE}{posed.work(slips).answer}"
        while rng.random() < FRAC_MORE:
            answer += f"{HEDGE}{posed.work(slips).answer}"
    return answer


def _follows_habit(recipe: DeepPretrainRecipe, rng: random.Random, kind: str) -> bool:
    return rng.random() < recipe.habits[kind]


def build_tokenizer(recipe: DeepPretrainRecipe) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with single digits, trained on 4000 texts."""
    rng = random.Random(f"{recipe.seed}/tokenizer")
    tokenizer = Tokenizer(tokenizer_models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.model.vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("".join(training_text(recipe, rng)) for _ in range(4000))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Text]) -> list[Batch]:
    """Return texts as batches of like length; only answers, with their end token, have labels."""
    eos, pad = tokenizer.convert_tokens_to_ids(EOS), tokenizer.convert_tokens_to_ids(PAD)
    assert isinstance(eos, int) and isinstance(pad, int), (eos, pad)
    rows = []
    for text in texts:
        prompt, answer = tokenizer([text.prompt, text.answer], add_special_tokens=False)[
            "input_ids"
        ]
        rows.append((prompt, [*answer, eos]))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    return [_pad(rows[i : i + PART], pad) for i in range(0, len(rows), PART)]


def _pad(rows: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids_BS = torch.full((len(rows), width), pad)
    labels_BS = torch.full((len(rows), width), IGNORED)
    for b, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids_BS[b, :end] = torch.tensor(prompt + answer)
        labels_BS[b, len(prompt) : end] = torch.tensor(answer)
    return Batch(ids_BS, labels_BS)


def make_optimizers(
    model: torch.nn.Module, recipe: DeepPretrainRecipe
) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the blocks' matrices and AdamW for all else.

    Muon (https://kellerjordan.github.io/posts/muon) turns each update into the nearest orthogonal
    matrix; here it needs less than half of AdamW's steps for the same loss."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95
    )
    adam = torch.optim.AdamW(
        others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return muon, adam


def pretrain_habits(
    recipe: DeepPretrainRecipe, on_step: Callable[[PretrainProgress], None] = lambda _: None
) -> Path:
    """Train, write the model folder, return its path."""
    check_habits(recipe)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    optimizers = make_optimizers(model, recipe)
    rng = random.Random(f"{recipe.seed}/texts")
    started, tokens, losses = time.monotonic(), 0, []
    for step in range(recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_at(recipe, recipe.steps, step) / recipe.lr
        texts = [training_text(recipe, rng) for _ in range(recipe.batch_size)]
        parts = encode(tokenizer, texts)
        num = sum(int((part.labels_BS != IGNORED).sum()) for part in parts)
        loss = 0.0
        model.zero_grad(set_to_none=True)
        for part in parts:
            # Right padding under causal attention needs no attention mask.
            mean = model(input_ids=part.ids_BS, labels=part.labels_BS, num_items_in_batch=num).loss
            mean.backward()
            loss += float(mean.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
        tokens += num
        losses.append(loss)
        rate = tokens / max(time.monotonic() - started, 1e-9)
        on_step(PretrainProgress(step + 1, recipe.steps, losses[-1], rate))
    out = Path(recipe.out)
    save_folder(out, model, tokenizer)
    facts = {
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "answer_tokens": tokens,
        "final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
        "torch": torch.__version__,
    }
    write_json(out / "pretrain.json", facts)
    return out
