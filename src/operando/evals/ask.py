"""Two arms, one set of prompts: the base model and a saved step of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from operando.errors import UserError
from operando.models.load import Loaded, load_model, stop_ids
from operando.models.policy import Policy
from operando.recipe import PromptConfig, Recipe
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Sampler, Sampling, as_rollouts, uniform_streams
from operando.run import SeedTree
from operando.run_folder import read_recipe, start_of
from operando.tasks.prompts import make_prompts
from operando.types import Example, Prompt, Rollout
from operando.update.checkpoint import load_weights, pick_step

Format = Literal["raw", "chat"]


@dataclass(frozen=True)
class Asked:
    """Prompts and how they are answered. Example: Asked("gsm8k", prompts, Sampling(256))

    `temperature` None: greedily, once; else `samples` times, each from its own random stream,
    the same stream in both arms.
    """

    name: str
    prompts: Sequence[Prompt]
    sampling: Sampling
    temperature: float | None = None
    samples: int = 1


@dataclass(frozen=True)
class Arms:
    """The answers of both arms, in the order of what was asked; siblings are adjacent."""

    base: list[list[Rollout]]
    trained: list[list[Rollout]]


class Contest:
    """A run's model, ready to be asked before and after its trained weights are put in."""

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder = folder
        self.recipe: Recipe = read_recipe(folder)
        self.day = start_of(folder)
        self.step = pick_step(folder, step)
        self.loaded: Loaded = load_model(self.recipe.model)
        config = self.loaded.model.config.get_text_config()
        self.context = int(config.max_position_embeddings)

    def length(self, given: int | None) -> int:
        """Return the completion length: as given, else that of the run's own evaluation."""
        recipe = self.recipe
        return given or recipe.eval.max_completion_length or recipe.rollout.max_completion_length

    def room(self, length: int) -> int:
        """Return the most tokens a prompt may have before `length` tokens of completion."""
        if length >= self.context:
            raise UserError(
                f"completions of {length} tokens leave no room for a prompt: the model has a "
                f"context of {self.context}. Lower --max-completion-length"
            )
        return self.context - length

    def prompts(
        self,
        examples: Sequence[Example],
        shots: Sequence[Example],
        config: PromptConfig,
        max_length: int,
    ) -> list[Prompt]:
        """Return the prompts; one over `max_length` tokens is an error."""
        return make_prompts(examples, shots, config, self.loaded.tokenizer, max_length, self.day)

    def answer(self, asked: Sequence[Asked]) -> Arms:
        """Return the answers of the base model and of the saved step; the weights stay in."""
        policy = Policy(self.loaded, self.recipe.model, SeedTree(self.recipe.seed))
        tokenizer = self.loaded.tokenizer
        sampler = make_sampler(
            self.recipe.rollout.engine,
            policy.base,
            tokenizer,
            stop_ids(policy.base, tokenizer),
            self.recipe.rollout.max_batch,
        )
        base = [self._answer(sampler, one) for one in asked]  # LoRA's B is zero: the base model
        load_weights(self.folder, self.step, policy)
        return Arms(base, [self._answer(sampler, one) for one in asked])

    def _answer(self, sampler: Sampler, asked: Asked) -> list[Rollout]:
        order = list(range(len(asked.prompts)))
        uniforms_BT = None
        sampling = asked.sampling
        if asked.temperature is not None:
            sampling = sampling._replace(temperature=asked.temperature)
            seeds = SeedTree(SeedTree(self.recipe.seed).derive("outside", asked.name))
            uniforms_BT = uniform_streams(
                seeds, 0, order, asked.samples, sampling.max_completion_length
            )
        sampled = sampler.sample(
            [p.ids for p in asked.prompts], asked.samples, sampling, uniforms_BT
        )
        return as_rollouts(asked.prompts, order, asked.samples, sampled)


def foreign_prompt(
    own: PromptConfig, format: Format | None, template: str | None, few_shot: int | None
) -> PromptConfig:
    """Return the prompt settings for a task that is not the run's own.

    In the run's own format its system message, prefill, separator and chat_template_kwargs stay,
    for the model was trained behind them; in the other format they are the defaults. The template
    is the task's.
    """
    kind = format or own.format
    shots = own.few_shot if few_shot is None else few_shot
    if kind != own.format:
        return PromptConfig(format=kind, template=template, few_shot=shots)
    return PromptConfig(
        format=kind,
        template=template,
        few_shot=shots,
        system=own.system,
        prefill=own.prefill,
        separator=own.separator,
        chat_template_kwargs=own.chat_template_kwargs,
    )
