"""Plain language-model training of a small model on generated word problems: the starter model.

Three kinds of text are mixed, so that RL later has something to find. Most answers come at once
and are often wrong; some show the steps;
and where the prompt asks for <think>, the steps stand inside the tags. None is a held-out one.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from operando.models.folders import save_folder
from operando.models.recursive import RecursiveCausalLM, preset
from operando.pretrain.fit import IGNORED, Batch, PretrainProgress, fit_drawn, make_optimizer
from operando.recipe.deep import DeepPretrainRecipe
from operando.recipe.mixture import MixtureRecipe
from operando.recipe.pretrain import PretrainRecipe
from operando.run import write_json
from operando.tasks.words import is_held_out, make_problem
from operando.types import Example

logger = logging.getLogger(__name__)

EOS, PAD = "<eos>", "<pad>"
TOKENIZER_TEXTS = 4000
THINK_REQUEST = " Think in <think> tags."
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}Q: {{ m['content'] }}\nA:"
    "{% else %} {{ m['content'] }}" + EOS + "{% endif %}{% endfor %}"
)


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


def train_bpe(
    texts: Iterable[str], vocab_size: int, alone: str | None = None, added: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with single digits, trained on texts.

    What the pattern `alone` matches is never joined to its neighbours; `added` are one token each,
    beside the vocabulary, and ordinary text.
    """
    tokenizer = Tokenizer(tokenizer_models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    kept = [] if alone is None else [pre_tokenizers.Split(Regex(alone), "isolated")]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, *kept, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
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


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return right-padded ids [B S] and a bool mask [B S]."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    return batch["input_ids"], batch["attention_mask"].bool()


def pretrain(
    recipe: PretrainRecipe, on_step: Callable[[PretrainProgress], None] = lambda _: None
) -> Path:
    """Train, write the model folder, return its path."""
    drawn = random.Random(f"{recipe.seed}/tokenizer")
    first = (training_text(recipe, drawn).removesuffix(EOS) for _ in range(TOKENIZER_TEXTS))
    tokenizer = train_bpe(first, recipe.model.vocab_size)
    model = build_model(recipe, tokenizer)
    rng = random.Random(f"{recipe.seed}/texts")

    def draw() -> list[Batch]:
        texts = [training_text(recipe, rng) for _ in range(recipe.batch_size)]
        ids_BS, mask_BS = encode(tokenizer, texts)
        return [Batch(ids_BS, ids_BS.masked_fill(~mask_BS, IGNORED))]

    fitted = fit_drawn(model, [make_optimizer(model, recipe)], recipe, draw, on_step)
    out = Path(recipe.out)
    save_folder(out, model, tokenizer)
    facts = {
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": fitted.tokens,
        "final_loss": fitted.final_loss,
        "torch": torch.__version__,
    }
    write_json(out / "pretrain.json", facts)
    return out
