"""pass@k of a run's base and of its trained model, on the same held-out problems.

pass@k is the chance that one of k answers is right, estimated from n >= k of them without bias:
1 - C(n - c, k) / C(n, k) with c right ones (2107.03374).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from operando.errors import UserError
from operando.models.load import load_model, stop_ids
from operando.models.policy import Policy
from operando.rollout.held_out import judge
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Sampling, as_rollouts, uniform_streams
from operando.run import SeedTree
from operando.run_folder import read_recipe, start_of
from operando.setup import make_prompt_sets
from operando.tasks.load import load_task
from operando.update.checkpoint import load_weights, pick_step


@dataclass(frozen=True)
class PassAt:
    """Right answers of each problem, out of `samples`, of the base and of the trained model.

    Example: PassAt(step=50, samples=16, base=(0, 3, 16), trained=(12, 16, 16))
    """

    step: int
    samples: int
    base: tuple[int, ...]
    trained: tuple[int, ...]

    def curve(self, right: tuple[int, ...]) -> dict[int, float]:
        """Return the mean pass@k for k = 1, 2, 4, ... up to the samples drawn."""
        ks = [2**i for i in range(self.samples.bit_length()) if 2**i <= self.samples]
        return {k: sum(pass_at(self.samples, c, k) for c in right) / len(right) for k in ks}


def pass_at(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from `right` right ones of n. pass_at(4, 1, 2) = .5"""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def measure_pass_at(
    run: Path, *, step: int | None = None, num: int = 200, samples: int = 16
) -> PassAt:
    """Return how often base and a saved step (None: the last) are right, drawn at temperature 1.

    Both draw with the same random numbers.
    """
    recipe = read_recipe(run)
    step = pick_step(run, step)
    task = load_task(recipe.task)
    if num > len(task.held_out):
        raise UserError(f"num = {num}: the held-out split has {len(task.held_out)} problems")
    wanted = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"num": num})})
    loaded = load_model(recipe.model)
    _, prompts = make_prompt_sets(
        wanted, task, loaded.tokenizer, loaded.model.config, start_of(run)
    )
    policy = Policy(loaded, recipe.model, SeedTree(recipe.seed))
    sampler = make_sampler(
        recipe.rollout.engine,
        policy.base,
        loaded.tokenizer,
        stop_ids(policy.base, loaded.tokenizer),
        recipe.rollout.max_batch,
    )
    length = recipe.eval.max_completion_length or recipe.rollout.max_completion_length
    sampling = Sampling(length, 1.0, recipe.rollout.stop)
    seeds = SeedTree(SeedTree(recipe.seed).derive("pass_at"))

    def count() -> tuple[int, ...]:
        uniforms_BT = uniform_streams(seeds, 0, range(num), samples, length)
        sampled = sampler.sample([p.ids for p in prompts], samples, sampling, uniforms_BT)
        judged = judge(task, as_rollouts(prompts, range(num), samples, sampled))
        return tuple(
            sum(j.verdict.correct for j in judged[i : i + samples])
            for i in range(0, num * samples, samples)
        )

    base = count()  # LoRA's B is zero: the base model
    load_weights(run, step, policy)
    return PassAt(step, samples, base, count())
