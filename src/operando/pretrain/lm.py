"""Plain language-model training of a small model on generated word problems: the starter model.

Three kinds of text are mixed, so that RL later has something to find. Most answers come at once
and are often wrong; some show the steps;
and where the prompt asks for <think>, the steps stand inside the tags. None is a held-out one.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from operando.errors import UserError
from operando.models.folders import save_folder
from operando.models.recursive import RecursiveCausalLM, preset
from operando.recipe import DeepPretrainRecipe, MixtureRecipe, PretrainRecipe
from operando.run import write_json
from operando.tasks.words import is_held_out, make_problem
from operando.types import Example

logger = logging.getLogger(__name__)

EOS, PAD = "<eos>", "<pad>"
THINK_REQUEST = " Think in <think> tags."
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}Q: {{ m['content'] }}\nA:"
    "{% else %} {{ m['content'] }}" + EOS + "{% endif %}{% endfor %}"
)


class PretrainProgress(NamedTuple):
    """Where pre-training stands. Example: PretrainProgress(250, 1200, 1.31, 11_500.0)"""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


def training_problem(recipe: PretrainRecipe, rng: random.Random) -> Example:
    """Return one problem that is not held out."""
    while True:
        problem = make_problem(rng, rng.choice(recipe.num_steps), recipe.max_number)
        if not is_held_out(problem.solution):
            return problem


def training_text(recipe: PretrainRecipe, rng: random.Random) -> str:
    """Return one text: prompt, answer in one of the three styles, end of sequence."""
    problem = training_problem(recipe, rng)
    style = rng.random()
    if style < recipe.frac_think:
        prompt = f"Q: {problem.question}{THINK_REQUEST}\nA:"
        answer = f" <think>{problem.solution}</think> #### {problem.answer}"
    elif style < recipe.frac_think + (1 - recipe.frac_think) * recipe.frac_direct:
        slip = rng.choice((-1, 1)) * rng.randint(1, 9) if rng.random() < recipe.frac_slip else 0
        given = abs(int(problem.answer) + slip)
        prompt, answer = f"Q: {problem.question}\nA:", f" #### {given}"
    else:
        prompt, answer = f"Q: {problem.question}\nA:", f" {problem.solution} #### {problem.answer}"
    return prompt + answer + EOS


def build_tokenizer(recipe: PretrainRecipe) -> PreTrainedTokenizerFast:
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
    texts = (training_text(recipe, rng).removesuffix(EOS) for _ in range(4000))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    recipe: PretrainRecipe | MixtureRecipe | DeepPretrainRecipe, tokenizer: PreTrainedTokenizerFast
) -> Qwen2ForCausalLM | RecursiveCausalLM:
    """Return the untrained model."""
    m = recipe.model
    pad, eos = tokenizer.convert_tokens_to_ids(PAD), tokenizer.convert_tokens_to_ids(EOS)
    assert isinstance(pad, int) and isinstance(eos, int), (pad, eos)
    torch.manual_seed(recipe.seed)
    if m.recursive is not None:
        return RecursiveCausalLM(
            preset(
                m.recursive,
                vocab_size=len(tokenizer),
                max_position_embeddings=m.max_length,
                pad_token_id=pad,
                eos_token_id=eos,
                bos_token_id=None,
            )
        )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads,
        max_position_embeddings=m.max_length,
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def draw_loops(min_loops: int | None, model: torch.nn.Module, rng: random.Random) -> dict[str, int]:
    """Return how many loops a step takes, as the model's argument; None: nothing, so all."""
    if min_loops is None:
        return {}
    if not isinstance(model, RecursiveCausalLM):
        raise UserError(
            f"min_loops = {min_loops} is for a recursive model; this is a {type(model).__name__}"
        )
    most = model.config.num_loops
    if min_loops > most:
        raise UserError(f"min_loops = {min_loops}: the model has {most} loops")
    return {"num_loops": rng.randint(min_loops, most)}


def learning_rate(recipe: PretrainRecipe | DeepPretrainRecipe, step: int) -> float:
    """Return the rate at `step` (from 0): linear warm-up, then cosine to min_lr_frac."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.lr * (recipe.min_lr_frac + (1 - recipe.min_lr_frac) * cosine)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return right-padded ids [B S] and a bool mask [B S]."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    return batch["input_ids"], batch["attention_mask"].bool()


def pretrain(
    recipe: PretrainRecipe, on_step: Callable[[PretrainProgress], None] = lambda _: None
) -> Path:
    """Train, write the model folder, return its path."""
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    rng, loops_rng = random.Random(f"{recipe.seed}/texts"), random.Random(f"{recipe.seed}/loops")
    started, tokens, losses = time.monotonic(), 0, []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        ids_BS, mask_BS = encode(
            tokenizer, [training_text(recipe, rng) for _ in range(recipe.batch_size)]
        )
        # Right padding under causal attention needs no attention mask.
        labels_BS = ids_BS.masked_fill(~mask_BS, -100)
        loops = draw_loops(recipe.model.min_loops, model, loops_rng)
        loss = model(input_ids=ids_BS, labels=labels_BS, **loops).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        tokens += int(mask_BS.sum())
        losses.append(float(loss.detach()))
        rate = tokens / max(time.monotonic() - started, 1e-9)
        on_step(PretrainProgress(step + 1, recipe.steps, losses[-1], rate))
    out = Path(recipe.out)
    save_folder(out, model, tokenizer)
    facts = {
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
        "torch": torch.__version__,
    }
    write_json(out / "pretrain.json", facts)
    return out
