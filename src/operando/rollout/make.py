"""Which sampler serves a model."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from operando.errors import UserError
from operando.models.load import LLAMA_LIKE
from operando.models.recursive import RecursiveCausalLM
from operando.rollout.engine import Engine, serves
from operando.rollout.hf import HfSampler
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Sampler


def make_sampler(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: tuple[int, ...],
    max_batch: int,
) -> Sampler:
    """Return operando's engine where it serves the model, else HF generate (kind "auto").

    "operando" and "hf" ask for one of them. `stop_ids` end a completion; `max_batch` rows are
    decoded at once. The sampler's `sample` gives ids, log-probs and text of every completion.

    Example: make_sampler("auto", model, tokenizer, stop_ids(model, tokenizer), 128)
    """
    if isinstance(model, RecursiveCausalLM):
        if kind == "hf" and (model.config.halt_threshold is not None or model.config.draft_tokens):
            raise UserError(
                'rollout.engine = "hf" has neither early exits nor drafting, but this recursive '
                'model halts or drafts; use "auto"'
            )
        if kind != "hf":
            return RecursiveEngine(model, tokenizer, stop_ids, max_batch)
    if kind == "hf" or (kind == "auto" and not serves(model)):
        return HfSampler(model, tokenizer, stop_ids, max_batch)
    if not serves(model):
        raise UserError(
            f'rollout.engine = "operando" does not support {model.config.model_type!r} '
            f'(it supports {", ".join(LLAMA_LIKE)}); use "auto" or "hf"'
        )
    return Engine(model, tokenizer, stop_ids, max_batch)
