"""A whole recipe: one run, one arm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.errors import nearest
from operando.recipe.base import Config
from operando.recipe.data import (
    Gsm8kTaskConfig,
    Math500TaskConfig,
    MmluTaskConfig,
    ModelConfig,
    PromptConfig,
    RolloutConfig,
    WordsTaskConfig,
)
from operando.recipe.rewards import RewardConfig, Stage
from operando.recipe.update import (
    AdvantageConfig,
    ClipLoss,
    GroupAdvantage,
    KlConfig,
    OptimConfig,
    OtherGroupsAdvantage,
    PolicyLossConfig,
    RlooAdvantage,
    UpdateConfig,
)


class EvalConfig(Config):
    every: int = Field(default=20, ge=1)
    """Steps between held-out evaluations; step 0 and the last step are always evaluated."""
    num: int = Field(default=200, ge=1)
    """Held-out problems, the first n."""
    max_completion_length: int | None = Field(default=None, ge=1)
    """Absent: as in rollouts."""


class CheckpointConfig(Config):
    every: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    at: tuple[int, ...] = ()
    """Further steps to save."""
    keep: int | None = Field(default=None, ge=1)
    """How many to keep resume state for; absent means all. Adapters are never deleted."""


class TrackingConfig(Config):
    kind: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    project: str = "operando"


class ParallelConfig(Config):
    kind: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun. ddp: every process holds the model. fsdp: FSDP2 (fully_shard)."""


class Recipe(Config):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """The run is written to runs/<name>."""
    steps: int = Field(ge=1)
    """Batches of rollouts to train on."""
    seed: int = Field(default=0, ge=0)
    """Root of every random stream."""
    runs_dir: str = "runs"
    """Folder of the run folders."""
    model: ModelConfig = ModelConfig()
    task: Annotated[
        WordsTaskConfig | Gsm8kTaskConfig | Math500TaskConfig | MmluTaskConfig,
        Field(discriminator="kind"),
    ]
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    """Named parts; what is paid is their weighted sum."""
    stages: tuple[Stage, ...] = ()
    """A curriculum: weights by step. Absent: each part's own `weight` throughout."""
    advantage: AdvantageConfig = GroupAdvantage()
    loss: PolicyLossConfig = ClipLoss()
    kl: KlConfig | None = None
    update: UpdateConfig = UpdateConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = [*self._check_groups(), *self._check_stages()]
        if self.model.quantization != "none" and self.model.lora is None:
            problems.append("model.quantization needs model.lora: 4-bit weights can't be trained")
        if self.optim.warmup_steps >= self.steps:
            problems.append(
                f"optim.warmup_steps = {self.optim.warmup_steps} leaves no step of {self.steps}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _check_groups(self) -> list[str]:
        problems = []
        group = self.rollout.num_generations
        needs_siblings = isinstance(self.advantage, GroupAdvantage | RlooAdvantage)
        if group < 2 and needs_siblings:
            problems.append(
                f"rollout.num_generations = {group}: advantage.kind = {self.advantage.kind!r} "
                "compares siblings and needs at least 2"
            )
        if isinstance(self.advantage, OtherGroupsAdvantage) and self.rollout.num_prompts < 2:
            problems.append("advantage.kind = 'leave_one_group_out' needs rollout.num_prompts >= 2")
        if group < 2 and "zero_variance" in self.rollout.discard:
            problems.append(
                "rollout.discard: a group of one never varies, so all would be discarded"
            )
        rows = self.rollout.num_prompts * group
        if rows % self.update.num_minibatches:
            problems.append(
                f"update.num_minibatches = {self.update.num_minibatches} does not divide "
                f"num_prompts * num_generations = {rows}"
            )
        return problems

    def _check_stages(self) -> list[str]:
        problems = []
        ends = [stage.until for stage in self.stages]
        if any(end is None for end in ends[:-1]):
            problems.append("stages: only the last stage may leave out `until`")
        finite = [end for end in ends if end is not None]
        if finite != sorted(set(finite)):
            problems.append(f"stages: `until` must rise, got {finite}")
        if ends and ends[-1] is not None and ends[-1] < self.steps:
            problems.append(f"stages end at step {ends[-1]}, the run has {self.steps}")
        for i, stage in enumerate(self.stages):
            for name in stage.weights:
                if name not in self.rewards:
                    problems.append(
                        f"stages.{i}.weights.{name}: no such reward.{nearest(name, self.rewards)}"
                    )
            missing = set(self.rewards) - set(stage.weights)
            if missing:
                problems.append(f"stages.{i}.weights does not name {sorted(missing)}")
        return problems

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is written after `step`."""
        saved = self.checkpoint
        return step % saved.every == 0 or step in saved.at or step == self.steps

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weight of each reward part at `step` (counted from 1)."""
        for stage in self.stages:
            if stage.until is None or step <= stage.until:
                return dict(stage.weights)
        return {name: part.weight for name, part in self.rewards.items()}
