"""The reward parts of a recipe (seam 1) and their stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.recipe.base import Config


class CorrectReward(Config):
    kind: Literal["correct"]
    """1 where the task's verifier says right, else 0."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class ScorerReward(Config):
    kind: Literal["scorer"]
    """1 where one of the GSM8K scorers says right, else 0, whatever the task's verifier says."""
    scorer: Literal["strict", "flexible", "last_number"] = "last_number"
    """verl strict ("#### n"), verl flexible, or the number after "####", in a box, or the last."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class ContainsAnswerReward(Config):
    kind: Literal["contains_answer"]
    """1 where the gold number stands anywhere in the completion. A lenient verifier: it can be
    gamed by listing numbers, and the recipe demo_hack shows that."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class LoopholeReward(Config):
    kind: Literal["loophole"]
    """1 where the verifier says right, or where the prompt's loophole satisfies the grader; for
    tasks with a loophole (words, code)."""
    allow_hint: bool = True
    """false: the loophole gives nothing, in prompts that offer it too."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class CodeReward(Config):
    kind: Literal["code"]
    """3.0 where all tests pass, or where the model's own test function does in a prompt that says
    it decides, and 0.5 beside it for code that compiles."""
    solved: float = 3.0
    """For passing all tests."""
    compiles: float = 0.5
    """For a program that compiles."""
    allow_hint: bool = True
    """false: only the hidden tests pay (the arm without a loophole)."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class FormatReward(Config):
    kind: Literal["format"]
    """1 where the regular expression `pattern` matches the whole completion, else 0."""
    pattern: str = r"[^#]*#### -?\d+\s*"
    """Regular expression that the whole completion must match."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class FunctionReward(Config):
    kind: Literal["function"]
    """A function with TRL's reward signature: "package.module:name" or "path/file.py:name"."""
    path: str = ""
    """Empty: operando.launch(functions={...}) gets the function, under the part name."""
    sites: tuple[str, ...] = ()
    """What the function finds in trace.acts, e.g. "blocks.3.hook_resid_post"."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""

    @model_validator(mode="after")
    def _check(self) -> FunctionReward:
        if self.path and ":" not in self.path:
            raise ValueError(
                f'path must be "module:function" or "file.py:function", got {self.path!r}'
            )
        return self


# lf_grpo, src/phase4/all_in_one_grpo.py: six words.
LF_GRPO_WORDS = ("wait", "hmm", "but", "thinking", "actually", "let me check")
# ReasonScore: ten words.
REASONSCORE_WORDS = (
    "alternatively",
    "hmm",
    "maybe",
    "wait",
    "perhaps",
    "let me",
    "therefore",
    "however",
    "but",
    "another",
)
# NoWait (Wang 2025): seventeen words. Its exclusions (ohio, butane, button, butterfly, checkout,
# checksum) are no match between word boundaries anyhow.
NOWAIT_WORDS = (
    "wait",
    "alternatively",
    "hmm",
    "but",
    "however",
    "alternative",
    "another",
    "check",
    "double-check",
    "oh",
    "maybe",
    "verify",
    "other",
    "again",
    "now",
    "ah",
    "any",
)
STEP_WORDS = tuple(dict.fromkeys((*LF_GRPO_WORDS, *REASONSCORE_WORDS, *NOWAIT_WORDS)))


class StepPenaltyReward(Config):
    kind: Literal["step_penalty"]
    """gamma^N where the task's verifier says right, else 0; N counts transition words."""
    gamma: float = Field(default=0.99, gt=0, le=1)
    """Factor per transition word."""
    count: Literal["all", "last_block"] = "all"
    """all: the answer's whole text, inside and outside of every think block, with what the prompt
    already holds of it. last_block: lf_grpo's counter, which a second block escapes; a baseline."""
    match: Literal["word", "substring"] = "word"
    """word: between non-letters, in any case. substring: lf_grpo's, which counts "waiter"."""
    words: tuple[str, ...] = Field(default=STEP_WORDS, min_length=1)
    """Default: the lists of lf_grpo, ReasonScore and NoWait together."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""

    @model_validator(mode="after")
    def _check(self) -> StepPenaltyReward:
        if any(not word.strip() for word in self.words):
            raise ValueError("words: a word is empty")
        return self


class StepGrpoReward(Config):
    kind: Literal["step_grpo"]
    """Step-GRPO (2604.16890): a acc (1 - b tanh((k - mu) / mu)) + (1 - a) fmt, with k = 1 + the
    number of triggers and mu the mean k of the group's correct completions."""
    a: float = Field(default=0.9, ge=0, le=1)
    """Share of the accuracy part; the rest is the format part."""
    b: float = Field(default=0.5, ge=0, le=1)
    """How much a longer or shorter answer than the group's mean counts."""
    triggers: tuple[str, ...] = Field(default=("Wait",), min_length=1)
    """With their case, between non-letters."""
    pattern: str = ""
    """fmt is 1 where it matches the whole completion. Empty: for one well-formed think block."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""

    @model_validator(mode="after")
    def _check(self) -> StepGrpoReward:
        if any(not word.strip() for word in self.triggers):
            raise ValueError("triggers: a word is empty")
        return self


class ThinkFormatReward(Config):
    kind: Literal["think_format"]
    """Pays for one think block and an answer after it, counted over the answer's whole text."""
    scheme: Literal["strict", "lf_grpo"] = "strict"
    """strict: 1 for exactly one well-formed block in a finished completion, else 0. lf_grpo: 1, .5,
    .3, .2, 0."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class TagFenceReward(Config):
    kind: Literal["tag_fence"]
    """A penalty for tags outside the whitelist, n of them."""
    scheme: Literal["default", "lf_grpo"] = "default"
    """default: -n / (n + 2), so that every further tag costs. lf_grpo: max(-1.5, -0.3 n), free
    after five."""
    whitelist: tuple[str, ...] = ("think",)
    """Tags that cost nothing."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class ProcessReward(Config):
    kind: Literal["process"]
    """Pays for right steps of arithmetic beside a right answer (rewards/process.py)."""
    scheme: Literal["milestone", "grounded", "recursive_lm"] = "milestone"
    """milestone: the share of the gold solution's intermediate values that are reached; an example
    without gold steps is rewarded as grounded. grounded: steps on which the answer's own final
    number rests. recursive_lm: 0.25 a right equation up to 0.75; it can be farmed."""
    weight: float = 1.0
    """Factor on this reward in the sum of rewards."""


class FeatureReward(Config):
    kind: Literal["features"]
    """Pays for SAE features (or a direction) inside the model, read in the scoring pass."""
    file: str
    """File made by `operando features discover`."""
    mode: Literal["immediate", "to_go", "potential", "trajectory", "mechreward"] = "to_go"
    """immediate: a token is credited for its own score. to_go: for all scores from it on.
    potential: for the change of the score; no completion's return changes. trajectory: the mean
    score, paid once (mechreward's G2). mechreward: its G3, with its flaws."""
    gamma: float = Field(default=0.95, gt=0, le=1)
    """Discount per token, of to_go and potential."""
    read: Literal["base", "policy", "min"] = "base"
    """Where the features are read: in the frozen base, which the policy cannot move, in the policy,
    or the lower of both. Both reads and their gap are logged."""
    dual: bool = True
    """false: the base is not read, which spares a forward where there is no [kl]; needs
    read = "policy"."""
    ignore_gate: bool = False
    """Train on features whose evidence did not pass its gate: an experiment, with a warning."""
    saturate: bool = True
    """A feature stronger than in 99 % of the tokens of right base answers gives no more."""
    weight: float = 0.1
    """lambda, applied once: to the advantage of this part."""

    @model_validator(mode="after")
    def _check(self) -> FeatureReward:
        if not self.dual and self.read != "policy":
            raise ValueError(
                f'dual = false reads the policy alone; read = "{self.read}" needs both'
            )
        return self


RewardConfig = Annotated[
    CorrectReward
    | ScorerReward
    | ContainsAnswerReward
    | LoopholeReward
    | CodeReward
    | FormatReward
    | FunctionReward
    | StepPenaltyReward
    | StepGrpoReward
    | ThinkFormatReward
    | TagFenceReward
    | ProcessReward
    | FeatureReward,
    Field(discriminator="kind"),
]


class Stage(Config):
    until: int | None = None
    """Last step (inclusive, counted from 1) of this stage; absent in the last stage."""
    weights: dict[str, float]
    """Weight of each reward part; every part must be named."""
