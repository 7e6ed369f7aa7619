"""GRPO on one page, from operando's own parts.

P prompts, G samples of each, B = P * G rollouts, T completion tokens, b rollouts of a micro-batch.
    python examples/loop.py     # the starter model, 20 steps, half a minute on 2 cores

src/operando/train.py is the whole loop: PPO, KL, your rewards, resuming, the run folder. On this
recipe both give the same numbers.
"""

from datetime import UTC, datetime

import torch

from operando import Policy, Recipe, Request, Sampling, load_model, load_task, make_sampler
from operando.models.load import pad_id, stop_ids
from operando.rollout.greedy_eval import grade, greedy_eval
from operando.rollout.sampler import as_rollouts, uniform_streams
from operando.run import SeedTree
from operando.tasks.prompts import make_prompts
from operando.train import prompt_order
from operando.types import make_batch
from operando.update.advantages import group_advantages
from operando.update.losses import clip_loss, count_totals, token_weights

RECIPE = Recipe.model_validate(
    {
        "name": "loop",
        "steps": 20,
        "model": {"id": "starter", "lora": {"rank": 16, "alpha": 16}},
        "task": {"kind": "words", "num_train": 1000},
        "rewards": {"correct": {"kind": "correct"}},
        "optim": {"lr": 1e-3},
        "eval": {"every": 1, "num": 100},
    }
)


def grpo(recipe: Recipe) -> Policy:
    """Train, print the mean reward and the held-out accuracy of every step; return the policy."""
    P, G = recipe.rollout.num_prompts, recipe.rollout.num_generations
    T = recipe.rollout.max_completion_length
    seeds, task, day = SeedTree(recipe.seed), load_task(recipe.task), datetime.now(UTC)
    loaded = load_model(recipe.model)
    tokenizer, policy = loaded.tokenizer, Policy(loaded, recipe.model, seeds)
    sampler = make_sampler("auto", policy.base, tokenizer, stop_ids(policy.base, tokenizer), P * G)
    train, held_out = (
        make_prompts(examples, [], recipe.prompt, tokenizer, 512, day)
        for examples in (task.train, task.held_out[: recipe.eval.num])
    )
    weights, optim = list(policy.trainable().values()), recipe.optim
    optimizer = torch.optim.AdamW(weights, optim.lr, optim.betas, weight_decay=optim.weight_decay)
    for step in range(1, recipe.steps + 1):
        # sample: G completions of each prompt; siblings are adjacent
        prompts = [train[i] for i in prompt_order(seeds, step, P, len(train))]
        uniforms_BT = uniform_streams(seeds, step, range(P), G, T)
        request = Request([prompt.ids for prompt in prompts], G, Sampling(T), uniforms_BT)
        sampled = sampler.sample(request)
        rollouts = as_rollouts(prompts, range(P), G, sampled)
        batch = make_batch(rollouts, G, pad_id(tokenizer))
        mask_BT = batch.mask_BT

        # reward: 1 for a right answer, on its last token
        reward_B = torch.tensor([float(one.verdict.correct) for one in grade(task, rollouts)])
        reward_BT = torch.zeros(mask_BT.shape)
        reward_BT[torch.arange(P * G), mask_BT.sum(1) - 1] = reward_B

        # advantage: better or worse than one's siblings
        adv_BT = group_advantages(reward_BT, mask_BT, G)

        # loss and gradient, a micro-batch at a time; on policy, so the old log-probs are the new
        weight_BT = token_weights(mask_BT, "token_mean", count_totals(mask_BT), T)
        for packs in policy.micro_batches(batch, None, recipe.update.micro_tokens):
            rows = [row for pack in packs for row in pack]
            new_bT = policy.scored(batch, packs).logp_BT
            loss_bT = clip_loss(new_bT, new_bT.detach(), adv_BT[rows], 0.2, 0.2, None).loss_BT
            (weight_BT[rows] * loss_bT).sum().backward()

        # step
        torch.nn.utils.clip_grad_norm_(weights, optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        answers = greedy_eval(sampler, task, held_out, Sampling(T))
        accuracy = sum(one.verdict.correct for one in answers) / len(answers)
        print(f"step {step}  reward {reward_B.mean():.3f}  held-out {accuracy:.1%}")
    return policy


if __name__ == "__main__":
    grpo(RECIPE)
