"""A whole recipe: one run, one arm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.errors import nearest
from operando.recipe.base import Config, Folder, FolderName
from operando.recipe.data import (
    CanaryTaskConfig,
    ClrsTaskConfig,
    CodeTaskConfig,
    FileTaskConfig,
    GraphSearchTaskConfig,
    Gsm8kTaskConfig,
    Math500TaskConfig,
    MmluTaskConfig,
    ModelConfig,
    PromptConfig,
    PythonTaskConfig,
    RolloutConfig,
    WordsTaskConfig,
)
from operando.recipe.deep import DeepTaskConfig
from operando.recipe.projection import (
    InterventionConfig,
    ProjectionConfig,
    ScreeningShift,
    ShiftConfig,
)
from operando.recipe.rewards import FeatureReward, RewardConfig, Stage
from operando.recipe.update import (
    AdvantageConfig,
    ClipLoss,
    GaeAdvantage,
    GroupAdvantage,
    KlConfig,
    OptimConfig,
    OtherGroupsAdvantage,
    PolicyLossConfig,
    RlooAdvantage,
    UpdateConfig,
)

TaskConfig = Annotated[
    WordsTaskConfig
    | Gsm8kTaskConfig
    | Math500TaskConfig
    | MmluTaskConfig
    | CanaryTaskConfig
    | CodeTaskConfig
    | ClrsTaskConfig
    | GraphSearchTaskConfig
    | DeepTaskConfig
    | FileTaskConfig
    | PythonTaskConfig,
    Field(discriminator="kind"),
]


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


class DiscoverConfig(Config):
    """How `operando features discover` looks for features, with the recipe's model and prompt."""

    sae: str = ""
    """An SAE of any format. Absent: one is trained on the base's own answers, at `site`."""
    site: str = ""
    """Where to read, e.g. "blocks.3.hook_resid_post"; absent: the SAE says it itself."""
    expansion: int = Field(default=8, ge=1)
    """Of an SAE trained here: features per dimension."""
    k: int = Field(default=16, ge=1)
    """Of an SAE trained here: active features per token."""
    epochs: int = Field(default=10, ge=1)
    """Of an SAE trained here."""
    num_prompts: int = Field(default=128, ge=4)
    """Training prompts to answer; half of them find the features, half judge them."""
    num_generations: int = Field(default=8, ge=2)
    """Answers per prompt."""
    contrast: Literal["within", "across"] = "within"
    """within: right against wrong answers of the same prompt. across: of all, as in mechreward."""
    adjust: Literal["none", "length"] = "length"
    """length: what is linear in the answer's length, its square and truncation is taken out of a
    feature before it is compared."""
    top: int = Field(default=10, ge=1)
    """Most features of each sign."""
    max_q: float = Field(default=0.1, gt=0, le=1)
    """Largest share of false finds."""
    min_support: float = Field(default=0.05, gt=0, lt=1)
    """Smallest share of answers in which a feature must fire."""
    permutations: int = Field(default=500, ge=20)
    """Of the labels, for the null."""
    measure: Literal["auc", "rho"] = "auc"
    """What the gate tests, on the prompts held out."""
    minimum: float = Field(default=0.6, gt=0, lt=1)
    """The gate: the measure must reach this (mechreward: rho 0.30) and beat the nulls."""


class DirectionConfig(Config):
    """How `operando direction extract` makes a direction, with the recipe's model and task."""

    source: Literal["activation", "gradient"] = "activation"
    """activation: one vector of the residual stream. gradient: besides, one of its own for each
    module, from the gradients of the two sides' likelihoods."""
    layers: str = "60%:75%"
    """The band whose residual streams are read."""
    position: Literal["last", "mean"] = "last"
    """Of the answer: its last token, or the mean over its tokens."""
    num_pairs: int = Field(default=60, ge=8)
    """Contrastive pairs that make the direction."""
    num_held_out: int = Field(default=20, ge=5)
    """Further pairs that judge it."""
    min_accuracy: float = Field(default=0.9, ge=0.5, le=1)
    """The gate: share of held-out pairs whose hack side must score higher, or training refuses."""
    denoise: int = Field(default=0, ge=0)
    """Keep what lies in each module's first m singular vectors (projected_grpo: 16); 0: the whole
    vector."""


class TrackingConfig(Config):
    kind: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """Where metrics also go; each needs its extra, as operando[wandb]."""
    project: str = "operando"
    """Project there."""


class ParallelConfig(Config):
    kind: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun. ddp: every process holds the model. fsdp: FSDP2 (fully_shard)."""


class Recipe(Config):
    """Every setting of one run: one TOML file, one arm. The keys are on the page of recipe keys.

    Frozen, and checked as a whole when it is made: an unknown key, a wrong type or settings that
    exclude each other are an error (pydantic's ValidationError; from `load_recipe`, a UserError).

    Example: Recipe.model_validate({"name": "a", "steps": 4, "task": {"kind": "words"},
                                    "rewards": {"correct": {"kind": "correct"}}})
    """

    name: FolderName
    """The run is written to runs/<name>."""
    steps: int = Field(ge=1)
    """Batches of rollouts to train on."""
    seed: int = Field(default=0, ge=0)
    """Root of every random stream."""
    runs_dir: Folder = "runs"
    """Folder of the run folders."""
    model: ModelConfig = ModelConfig()
    """The model, its trained layers and LoRA."""
    task: TaskConfig
    """Problems, and the verifier of their answers."""
    prompt: PromptConfig = PromptConfig()
    """How a problem becomes a prompt."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are sampled."""
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    """Named parts; what is rewarded is their weighted sum."""
    stages: tuple[Stage, ...] = ()
    """A curriculum: weights by step. Absent: each part's own `weight` throughout."""
    shift: ShiftConfig | None = None
    """What is added to the paid total by what a direction or a monitor says."""
    advantage: AdvantageConfig = GroupAdvantage()
    """From rewards to advantages."""
    loss: PolicyLossConfig = ClipLoss()
    """Policy loss."""
    kl: KlConfig | None = None
    """Absent: no KL to the base model."""
    update: UpdateConfig = UpdateConfig()
    """Passes over a batch, and its size in memory."""
    optim: OptimConfig = OptimConfig()
    """AdamW and its schedule."""
    projection: ProjectionConfig | None = None
    """Keeps updates off a direction."""
    intervention: InterventionConfig | None = None
    """Changes the residual stream along a direction, in sampling or in training too."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation while training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved, and what is in them."""
    discover: DiscoverConfig | None = None
    """Only for `operando features discover`."""
    direction: DirectionConfig | None = None
    """Only for `operando direction extract`."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics to a tracker."""
    parallel: ParallelConfig = ParallelConfig()
    """Training on several processes."""

    @model_validator(mode="after")
    def _answers_of_files(self) -> Recipe:
        """Let a worked answer of a task of files be the answer alone, if nothing else is said."""
        unsaid = "answer_template" not in self.prompt.model_fields_set
        if isinstance(self.task, FileTaskConfig) and unsaid:
            prompt = self.prompt.model_copy(update={"answer_template": " {answer}"})
            object.__setattr__(self, "prompt", prompt)  # frozen for everybody else
        return self

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = [*self._check_groups(), *self._check_stages(), *self._check_features()]
        problems += self._check_directions()
        if self.model.quantization != "none" and self.model.lora is None:
            problems.append("model.quantization needs model.lora: 4-bit weights can't be trained")
        if self.update.loop_credit != "last" and self.parallel.kind == "fsdp":
            problems.append(
                "update.loop_credit runs the coda outside the sharded forward: "
                'parallel.kind = "fsdp" shards it; use "ddp"'
            )
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
        if self.rollout.max_batch < group:
            problems.append(
                f"rollout.max_batch = {self.rollout.max_batch} is less than num_generations = "
                f"{group}: the siblings of a prompt are decoded together"
            )
        rows = self.rollout.num_prompts * group
        if rows % self.update.num_minibatches:
            problems.append(
                f"update.num_minibatches = {self.update.num_minibatches} does not divide "
                f"num_prompts * num_generations = {rows}"
            )
        return problems

    def _check_features(self) -> list[str]:
        return [
            f'rewards.{name}: mode = "mechreward" is a z-score in a group and needs '
            f'advantage.kind = "group", got {self.advantage.kind!r}'
            for name, part in self.rewards.items()
            if isinstance(part, FeatureReward)
            and part.mode == "mechreward"
            and not isinstance(self.advantage, GroupAdvantage)
        ]

    def _check_directions(self) -> list[str]:
        problems = []
        if self.projection is not None and self.parallel.kind == "fsdp":
            problems.append(
                'projection needs whole tensors: parallel.kind = "fsdp" shards them; use "ddp"'
            )
        if self.projection is not None and self.model.lora is None:
            if self.projection.mode == "token":
                problems.append('projection.mode = "token" acts on the LoRA branch: add model.lora')
            if self.projection.purge:
                problems.append("projection.purge empties an adapter along v: add model.lora")
        if self.intervention is not None and self.rollout.engine != "hf":
            problems.append(
                "intervention hooks the model's blocks, which operando's engine does not run: set "
                'rollout.engine = "hf"'
            )
        if self.shift is not None and self.rollout.num_generations < 2:
            problems.append("shift compares siblings: rollout.num_generations must be at least 2")
        if isinstance(self.shift, ScreeningShift) and isinstance(self.advantage, GaeAdvantage):
            problems.append(
                'shift.kind = "screening" leaves rollouts without a reward; not for gae'
            )
        dense = [n for n, p in self.rewards.items() if isinstance(p, FeatureReward)]
        if self.shift is not None and dense:
            problems.append(
                f"shift changes the reward of a whole completion; rewards.{dense[0]} is by token"
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
