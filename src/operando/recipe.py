"""Every setting of a run: frozen pydantic models, TOML files, `a.b=value` overrides.

One recipe is one TOML file is one arm. Variants are tagged unions (`kind = "..."`); a feature that
is off is a table that is absent. A recipe may name one `base = "other.toml"`, which it is merged
over (tables merge, everything else replaces). All mistakes are reported at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from operando.errors import nearest


class Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True
    )


# --- the model -----------------------------------------------------------------------------------


class LoraConfig(Config):
    rank: int = Field(default=32, ge=1)
    """Rank r of the update B A."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Names of the linear modules inside a decoder block that get an update."""


class ModelConfig(Config):
    id: str = "starter"
    """"starter" (ships in the package), a name made by `operando import`, a local folder, a GGUF
    file, or a hub id."""
    revision: str | None = None
    """Commit or tag of a hub id; absent means the hub's main."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights. Trained weights and all losses are float32."""
    device: str = "auto"
    """"auto" is cuda where there is one, else cpu."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 needs the extra `operando[quant]`."""
    lora: LoraConfig | None = None
    """Absent: the weights themselves are trained."""
    layers: str = "all"
    """Which decoder blocks may change: "all", "24-27", "3,5", "last:4", "first:2", "60%:75%"."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more time."""


# --- the task ------------------------------------------------------------------------------------


class WordsTaskConfig(Config):
    kind: Literal["words"]
    num_steps: tuple[int, ...] = (2,)
    """Operations in a problem; each problem draws one of these."""
    max_number: int = Field(default=20, ge=2, le=1000)
    num_train: int = Field(default=20_000, ge=1)
    num_held_out: int = Field(default=400, ge=1)
    seed: int = 0


class Gsm8kTaskConfig(Config):
    kind: Literal["gsm8k"]
    train: str = "openai/gsm8k"
    """A hub id, or a local .jsonl, .jsonl.gz or .parquet file with `question` and `answer`."""
    test: str = "openai/gsm8k"
    """As `train`; the held-out split."""
    scorer: Literal["strict", "flexible", "last_number"] = "last_number"
    """Who says a completion is right: verl strict, verl flexible, or the last number."""
    num_held_out: int | None = Field(default=None, ge=1)
    """Hold only the first n test problems; absent means all."""


class PromptConfig(Config):
    format: Literal["raw", "chat"] = "raw"
    """raw: the template as text. chat: the tokenizer's chat template around it."""
    template: str | None = None
    """Text of one question; `{question}` is replaced. Absent: "Q: {question}\\nA:" for raw text,
    "{question}" for chat."""
    few_shot: int = Field(default=0, ge=0, le=32)
    """Worked training examples before the question (raw: as text; chat: as earlier turns)."""
    answer_template: str = " {solution} #### {answer}"
    """Text of a worked example's answer, for `few_shot`."""
    separator: str = "\n\n"
    """Between worked examples; raw only."""
    system: str | None = None
    """System message; chat only."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens; a longer one is an error at the start. Absent: model limit."""

    @model_validator(mode="after")
    def _check(self) -> PromptConfig:
        if self.template is not None and "{question}" not in self.template:
            raise ValueError(f"template must contain {{question}}, got {self.template!r}")
        if self.system is not None and self.format == "raw":
            raise ValueError('system is for format = "chat"; in raw text put it in the template')
        return self

    def ask(self, question: str) -> str:
        """Return the text of one question."""
        plain = "Q: {question}\nA:" if self.format == "raw" else "{question}"
        return (self.template or plain).replace("{question}", question)

    def worked_answer(self, solution: str, answer: str) -> str:
        """Return the text of one worked answer."""
        text = self.answer_template.replace("{solution}", solution)
        return text.replace("{answer}", answer)


# --- sampling ------------------------------------------------------------------------------------


class RolloutConfig(Config):
    num_prompts: int = Field(default=16, ge=1)
    """Prompts a step (P)."""
    num_generations: int = Field(default=8, ge=1)
    """Completions of each prompt (G); B = P * G."""
    max_completion_length: int = Field(default=64, ge=1)
    """Tokens; a completion cut here is truncated."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits in sampling and in every log-prob."""
    top_p: float = 1.0
    """Only 1.0. Sampling from a truncated support would make every log-prob that of another
    distribution."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the end-of-sequence token."""
    discard: tuple[Literal["zero_variance", "truncated"], ...] = ()
    """Rollouts that are not trained on: groups whose rewards are all equal, truncated completions.
    They stay in the parquet files, marked."""
    engine: Literal["auto", "operando", "hf"] = "auto"
    """auto: operando's engine where it serves the architecture, else HF generate (noted in the
    manifest)."""
    max_batch: int = Field(default=512, ge=1)
    """Most rows decoded at once."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.top_p != 1.0:
            raise ValueError(
                f"top_p = {self.top_p}: RL samples from the full distribution only (1.0); a "
                "truncated support makes the log-probs those of another distribution"
            )
        return self


# --- rewards (seam 1) ----------------------------------------------------------------------------


class CorrectReward(Config):
    kind: Literal["correct"]
    """1 where the task's verifier says right, else 0."""
    weight: float = 1.0


class ContainsAnswerReward(Config):
    kind: Literal["contains_answer"]
    """1 where the gold number stands anywhere in the completion. A lenient verifier: it can be
    gamed by listing numbers, and the hack demo shows that."""
    weight: float = 1.0


class FormatReward(Config):
    kind: Literal["format"]
    """1 where the regular expression `pattern` matches the whole completion, else 0."""
    pattern: str = r"[^#]*#### -?\d+\s*"
    weight: float = 1.0


class FunctionReward(Config):
    kind: Literal["function"]
    """A function with TRL's reward signature: "package.module:name" or "path/file.py:name"."""
    path: str = ""
    """Empty: operando.launch.launch(functions={...}) gets the function, under the part name."""
    weight: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> FunctionReward:
        if self.path and ":" not in self.path:
            raise ValueError(
                f'path must be "module:function" or "file.py:function", got {self.path!r}'
            )
        return self


RewardConfig = Annotated[
    CorrectReward | ContainsAnswerReward | FormatReward | FunctionReward,
    Field(discriminator="kind"),
]


class Stage(Config):
    until: int | None = None
    """Last step (inclusive, counted from 1) of this stage; absent in the last stage."""
    weights: dict[str, float]
    """Weight of each reward part; every part must be named."""


# --- advantages (seam 2) -------------------------------------------------------------------------


class GroupAdvantage(Config):
    kind: Literal["group"] = "group"
    """GRPO: return minus the group's mean."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the group's std (GRPO), the batch's, or not at all (Dr. GRPO)."""
    eps: float = 1e-4


class RlooAdvantage(Config):
    kind: Literal["rloo"]
    """Return minus the mean of the siblings."""


class OtherGroupsAdvantage(Config):
    kind: Literal["leave_one_group_out"]
    """Return minus the mean over all other groups of the batch."""


class RewardToGoAdvantage(Config):
    kind: Literal["reward_to_go"]
    """Per token: reward still to come, minus the group's mean at the same position."""
    gamma: float = Field(default=1.0, gt=0, le=1)


class GaeAdvantage(Config):
    kind: Literal["gae"]
    """PPO: generalised advantage estimation with a value head."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount a token."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """1: returns minus values; 0: one-step differences."""
    whiten: bool = True
    """Scale advantages to mean 0 and std 1 over the batch's tokens."""
    value_lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the value head."""
    value_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss, which also reaches the trained layers below the head."""
    value_clip: float | None = Field(default=0.5, gt=0)
    """Largest change of a value in one update; absent: none."""


AdvantageConfig = Annotated[
    GroupAdvantage | RlooAdvantage | OtherGroupsAdvantage | RewardToGoAdvantage | GaeAdvantage,
    Field(discriminator="kind"),
]


# --- the loss ------------------------------------------------------------------------------------


class ClipLoss(Config):
    kind: Literal["clip"] = "clip"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    """Above clip_low it is DAPO's clip-higher."""
    dual_clip: float | None = Field(default=None, gt=1)
    """verl uses 3.0; absent means none, as in TRL."""


class GspoTokenLoss(Config):
    kind: Literal["gspo_token"]
    clip_low: float = Field(default=3e-4, gt=0, lt=1)
    clip_high: float = Field(default=4e-4, gt=0)


class CispoLoss(Config):
    kind: Literal["cispo"]
    clip_high: float = Field(default=5.0, gt=0)


PolicyLossConfig = Annotated[ClipLoss | GspoTokenLoss | CispoLoss, Field(discriminator="kind")]


class KlConfig(Config):
    coef: float = Field(ge=0)
    """0 is an error: leave the table out instead."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of d = logp - ref_logp: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d. In the reward only k1 has
    the gradient of a KL."""
    place: Literal["loss", "reward"] = "loss"
    """Where it acts: a term of the loss, or subtracted from every token's reward."""
    unbiased: bool = True
    """In the loss: multiply by the differentiable ratio (its gradient is then that of the reverse
    KL). TRL's use_bias_correction_kl."""

    @model_validator(mode="after")
    def _check(self) -> KlConfig:
        if self.coef == 0:
            raise ValueError("coef = 0 would be inert; leave the [kl] table out instead")
        if self.place == "reward" and not self.unbiased:
            raise ValueError("unbiased is about a KL in the loss; in the reward it is inert")
        if self.estimator == "k1" and self.place == "loss" and not self.unbiased:
            raise ValueError("k1 in the loss has zero expected gradient; use k2, k3 or unbiased")
        return self


class UpdateConfig(Config):
    aggregation: Literal["token_mean", "seq_mean_token_mean", "constant", "seq_mean_token_sum"] = (
        "token_mean"
    )
    """How per-token losses become one number; see docs/methods.md."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a batch of rollouts (mu)."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps a pass."""
    micro_tokens: int = Field(default=4096, ge=1)
    """Tokens (padding included) in one forward and backward. Changes memory, never the gradient."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus (nats a token)."""
    sampler_correction: Literal["none", "token", "sequence"] = "none"
    """Truncated importance weights for the gap between sampler and trainer."""
    sampler_cap: float = Field(default=2.0, gt=0)
    """Largest importance weight."""


class OptimConfig(Config):
    lr: float = Field(default=1e-4, gt=0)
    """Base learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes on after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averaging of gradient and squared gradient."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger L2 norm are scaled down to it."""


# --- around the loop -----------------------------------------------------------------------------


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
    task: Annotated[WordsTaskConfig | Gsm8kTaskConfig, Field(discriminator="kind")]
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

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weight of each reward part at `step` (counted from 1)."""
        for stage in self.stages:
            if stage.until is None or step <= stage.until:
                return dict(stage.weights)
        return {name: part.weight for name, part in self.rewards.items()}


# --- pre-training --------------------------------------------------------------------------------


class TinyModelConfig(Config):
    vocab_size: int = Field(default=512, ge=300)
    hidden_size: int = Field(default=128, ge=16)
    num_layers: int = Field(default=6, ge=1)
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(default=2, ge=1)
    intermediate_size: int = Field(default=384, ge=16)
    max_length: int = Field(default=512, ge=32)


class PretrainRecipe(Config):
    """Plain language-model training of a small model on generated text."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    out: str
    """Folder that gets the model, its tokenizer and pretrain.json."""
    steps: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=64, ge=1)
    model: TinyModelConfig = TinyModelConfig()
    num_steps: tuple[int, ...] = (1, 2)
    max_number: int = Field(default=20, ge=2)
    frac_direct: float = Field(default=0.5, ge=0, le=1)
    """Share of texts that answer at once, without the steps."""
    frac_slip: float = Field(default=0.5, ge=0, le=1)
    """Share of the answers given at once that are wrong by 1 to 9."""
    frac_think: float = Field(default=0.2, ge=0, le=1)
    """Share of texts whose prompt asks for <think> and whose answer has it."""
    lr: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    eval_every: int = Field(default=250, ge=1)
    num_eval: int = Field(default=300, ge=1)
