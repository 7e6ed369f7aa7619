"""Answers of a recipe's base model with their verdicts and the activations at every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from operando.errors import UserError
from operando.models.hooks import ActivationReader
from operando.models.load import Loaded, pad_id, stop_ids
from operando.models.policy import Policy
from operando.models.scoring import whole_site
from operando.recipe.run import Recipe
from operando.rollout.greedy_eval import grade
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Request, Sampling, as_rollouts, uniform_streams
from operando.run import SeedTree
from operando.setup import make_prompt_sets
from operando.tasks.load import recipe_task
from operando.types import Rollout, make_batch

AT_ONCE = 16  # prompts


@dataclass(frozen=True)
class Answers:
    """R answers of the base, and the activations at their N completion tokens.

    Example: sample_answers(recipe, load_model(recipe.model), "blocks.3.hook_resid_post", 64, 8)
    """

    rollouts: list[Rollout]
    correct_R: Bool[Tensor, "R"]
    truncated_R: Bool[Tensor, "R"]
    length_R: Int[Tensor, "R"]
    prompt_R: Int[Tensor, "R"]
    acts_ND: Float[Tensor, "N D"]
    row_N: Int[Tensor, "N"]  # the answer that a token belongs to

    def mean_acts(self) -> Float[Tensor, "R D"]:
        """Return each answer's mean activation."""
        return self.mean_of(self.acts_ND)

    def mean_of(self, x_NF: Float[Tensor, "N F"]) -> Float[Tensor, "R F"]:
        """Return the mean over each answer's tokens."""
        sum_RF = torch.zeros(len(self.rollouts), x_NF.shape[1])
        return sum_RF.index_add_(0, self.row_N, x_NF.float()) / self.length_R[:, None]

    def chosen(self, rows_R: Bool[Tensor, "R"]) -> Answers:
        """Return some of the answers."""
        keep_N = rows_R[self.row_N]
        renumbered_R = rows_R.long().cumsum(0) - 1
        return Answers(
            [r for r, keep in zip(self.rollouts, rows_R.tolist(), strict=True) if keep],
            self.correct_R[rows_R],
            self.truncated_R[rows_R],
            self.length_R[rows_R],
            self.prompt_R[rows_R],
            self.acts_ND[keep_N],
            renumbered_R[self.row_N[keep_N]],
        )


def sample_answers(
    recipe: Recipe,
    loaded: Loaded,
    site: str,
    num_prompts: int,
    num_generations: int,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Return the base model's answers to the first training prompts, sampled as in training."""
    task = recipe_task(recipe)
    prompts, _ = make_prompt_sets(
        recipe, task, loaded.tokenizer, loaded.model.config, datetime.now(UTC)
    )
    if len(prompts) < num_prompts:
        raise UserError(
            f"discover.num_prompts = {num_prompts}, but task {task.name} has {len(prompts)} "
            "training prompts"
        )
    seeds = SeedTree(recipe.seed)
    policy = Policy(loaded, recipe.model, seeds, temperature=recipe.rollout.temperature)
    ActivationReader(policy.base, [site])
    sampler = make_sampler(
        recipe.rollout.engine,
        policy.base,
        loaded.tokenizer,
        stop_ids(policy.base, loaded.tokenizer),
        recipe.rollout.max_batch,
    )
    length = recipe.rollout.max_completion_length
    sampling = Sampling(length, recipe.rollout.temperature, recipe.rollout.stop)
    rollouts: list[Rollout] = []
    acts: list[Tensor] = []
    for first in range(0, num_prompts, AT_ONCE):
        some = prompts[first : min(first + AT_ONCE, num_prompts)]
        groups = list(range(first, first + len(some)))
        # Step 0: training steps count from 1, so no stream is shared with a run.
        uniforms_BT = uniform_streams(seeds, 0, groups, num_generations, length)
        sampled = sampler.sample(
            Request([p.ids for p in some], num_generations, sampling, uniforms_BT)
        )
        new = as_rollouts(some, groups, num_generations, sampled)
        batch = make_batch(new, num_generations, pad_id(loaded.tokenizer))
        scoring = policy.score(
            batch, taps={site: whole_site(site)}, micro_tokens=recipe.update.micro_tokens
        )
        acts.append(scoring.trace.acts[site][batch.mask_BT])
        rollouts += new
        if progress is not None:
            progress(first + len(some), num_prompts)
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts])
    return Answers(
        rollouts,
        correct_R=torch.tensor([j.verdict.correct for j in grade(task, rollouts)]),
        truncated_R=torch.tensor([r.is_truncated for r in rollouts]),
        length_R=lengths,
        prompt_R=torch.tensor([r.group for r in rollouts]),
        acts_ND=torch.cat(acts),
        row_N=torch.repeat_interleave(torch.arange(len(rollouts)), lengths),
    )
