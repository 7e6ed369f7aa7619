"""Training of the model `deep`: answers whose steps follow the rule or a habit, drawn at each step.

Where the habit is the more frequent, the model's first choice is wrong and its second right. Only
answers have a loss. No problem is a held-out one of the task `deep`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from operando.errors import UserError, nearest
from operando.models.folders import save_folder
from operando.pretrain.fit import Batch, Pair, PretrainProgress, collate, fit_drawn
from operando.pretrain.lm import EOS, PAD, TOKENIZER_TEXTS, build_model, train_bpe
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
            raise UserError(f"habits: {kind!r} is not a kind of step.{nearest(kind, KINDS)}")
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
    """Return a byte-level BPE tokenizer trained on the first texts of a stream of its own."""
    rng = random.Random(f"{recipe.seed}/tokenizer")
    texts = ("".join(training_text(recipe, rng)) for _ in range(TOKENIZER_TEXTS))
    return train_bpe(texts, recipe.model.vocab_size)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Text]) -> list[Batch]:
    """Return texts as batches of like length; only answers, with their end token, have labels."""
    eos, pad = tokenizer.convert_tokens_to_ids(EOS), tokenizer.convert_tokens_to_ids(PAD)
    assert isinstance(eos, int) and isinstance(pad, int), (eos, pad)
    pairs = []
    for text in texts:
        prompt, answer = tokenizer([*text], add_special_tokens=False)["input_ids"]
        pairs.append(Pair(tuple(prompt), (*answer, eos)))
    pairs.sort(key=lambda pair: len(pair.prompt) + len(pair.answer))
    return [collate(pairs[i : i + PART], pad) for i in range(0, len(pairs), PART)]


def make_optimizers(
    model: torch.nn.Module, recipe: DeepPretrainRecipe
) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the blocks' matrices and AdamW for all else.

    Muon (https://kellerjordan.github.io/posts/muon) turns each update into the nearest orthogonal
    matrix; here it needs less than half of AdamW's steps for the same loss."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    ratio = recipe.muon_lr / recipe.lr
    muon = torch.optim.Muon(
        [{"params": matrices, "lr_scale": ratio}],
        lr=recipe.muon_lr,
        weight_decay=recipe.weight_decay,
        momentum=0.95,
    )
    adam = torch.optim.AdamW(
        others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    return muon, adam


def pretrain_habits(
    recipe: DeepPretrainRecipe, on_step: Callable[[PretrainProgress], None] = lambda _: None
) -> Path:
    """Train, write the model folder, return its path."""
    check_habits(recipe)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    rng = random.Random(f"{recipe.seed}/texts")

    def draw() -> list[Batch]:
        return encode(tokenizer, [training_text(recipe, rng) for _ in range(recipe.batch_size)])

    fitted = fit_drawn(model, make_optimizers(model, recipe), recipe, draw, on_step)
    out = Path(recipe.out)
    save_folder(out, model, tokenizer)
    facts = {
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "answer_tokens": fitted.tokens,
        "final_loss": fitted.final_loss,
        "torch": torch.__version__,
    }
    write_json(out / "pretrain.json", facts)
    return out
