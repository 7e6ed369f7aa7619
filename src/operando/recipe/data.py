"""The model, the task, the prompt and the sampling of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.errors import nearest
from operando.recipe.base import Config

# --- the model -----------------------------------------------------------------------------------


class LoraConfig(Config):
    rank: int = Field(default=32, ge=1, le=65_536)
    """Rank r of the update B A."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
    )
    """Names of the linear modules inside a decoder block that get an update."""


ModelDtype = Literal["auto", "float32", "bfloat16"]


class ModelConfig(Config):
    id: Annotated[str, Field(min_length=1)] = "starter"
    """"starter" or "deep" (in the package), a name made by `operando import`, a folder, a GGUF
    file, or a hub id."""
    revision: str | None = None
    """Commit or tag of a hub id; absent means the hub's main."""
    dtype: ModelDtype = "auto"
    """Of the frozen weights. Trained weights and all losses are float32, so bfloat16 needs `lora`.
    "auto": float32 without `lora`, for recursive models and up to 100 million parameters; else
    bfloat16 on CUDA, and on a CPU that multiplies it at least 1.5 times as fast as float32. What
    was chosen stands in the run's recipe.toml, and its manifest says why. (No float16: its
    gradients need a loss scale, which operando does not have.)"""
    tf32: bool = False
    """On a CUDA device, multiply float32 matrices in TF32, with 10 bits of mantissa in place of 23:
    faster, and `sampler/gap_mean` says what it costs."""
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


VERIFIERS = ("exact", "number", "choice", "math", "regex")
"""What a task of files may name as `verify`, beside a function."""

# --- the task ------------------------------------------------------------------------------------


class WordsTaskConfig(Config):
    kind: Literal["words"]
    """Word problems of one or more operations, generated; for the model "starter"."""
    num_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(2,), min_length=1)
    """Operations in a problem; each problem draws one of these."""
    max_number: int = Field(default=20, ge=2, le=1000)
    """Largest number in a problem."""
    num_train: int = Field(default=20_000, ge=1)
    """Training problems."""
    num_held_out: int = Field(default=400, ge=1)
    """Held-out problems, which training never sees."""
    loophole: bool = False
    """Every prompt ends with a mark, and the reward `loophole` then pays for the gold number
    anywhere. The verifier stays strict. Off: no mark, and only a right answer is rewarded."""
    seed: int = 0
    """Of the generated problems."""


class Gsm8kTaskConfig(Config):
    kind: Literal["gsm8k"]
    """GSM8K (2110.14168): grade-school word problems."""
    train: str = "openai/gsm8k"
    """A hub id, or a local .jsonl, .jsonl.gz or .parquet file with `question` and `answer`."""
    test: str = "openai/gsm8k"
    """As `train`; the held-out split."""
    scorer: Literal["strict", "flexible", "last_number"] = "last_number"
    """Who says a completion is right: verl strict, verl flexible, or the number behind the last
    "####", else in the last box, else the last one, which must be one number and no part of an
    expression, a list or a choice."""
    num_train: int | None = Field(default=None, ge=1)
    """Train on the first n problems only; absent means all."""
    num_held_out: int | None = Field(default=None, ge=1)
    """Hold only the first n test problems; absent means all."""


class Math500TaskConfig(Config):
    kind: Literal["math500"]
    """MATH-500: 500 problems of MATH (2103.03874); for evaluation unless train is given."""
    train: str | None = None
    """A local .jsonl, .jsonl.gz or .parquet file with `problem`, `solution` and `answer`. MATH-500
    is a test set and has no training split of its own, so training needs this."""
    test: str = "HuggingFaceH4/MATH-500"
    """A hub id, or a local file as `train`; the held-out split."""
    grader: Literal["ours", "math_verify"] = "ours"
    """Who says that two answers are equal. ours: spellings, numbers, units and lists, nothing
    simplified. math_verify: Math-Verify as shipped, a computer algebra system, which needs the
    extra `operando[math]`."""


class MmluTaskConfig(Config):
    kind: Literal["mmlu"]
    """MMLU (2009.03300): multiple choice in 57 subjects."""
    source: str = "cais/mmlu"
    """A hub id, or the csv files of test and dev as a folder or .tar.gz. The 285 dev questions are
    the training split, the test questions are held out."""


class ClrsTaskConfig(Config):
    kind: Literal["clrs"]
    """CLRS-Text depth-first search on adjacency matrices, generated."""
    sizes: tuple[Annotated[int, Field(ge=2, le=64)], ...] = Field(default=(4, 5), min_length=1)
    """Nodes; each graph draws one of these."""
    hints: bool = True
    """Whether the answer holds the trace before pi. An answer of n nodes has about 200 (n = 4),
    650 (8) or 2,500 (16) characters with it."""
    num_train: int = Field(default=20_000, ge=1)
    """Training problems."""
    num_held_out: int = Field(default=400, ge=1)
    """Held-out problems, which training never sees."""
    seed: int = 0
    """Of the generated problems."""


class GraphSearchTaskConfig(Config):
    kind: Literal["graph_search"]
    """Paths in small directed graphs, by a depth-first walk in words, generated."""
    sizes: tuple[Annotated[int, Field(ge=2, le=26)], ...] = Field(default=(4, 5, 6), min_length=1)
    """Nodes; each graph draws one of these."""
    min_edges: int = Field(default=1, ge=1)
    """Of the shortest path. With 1, "start, goal" is right on two problems of three, by no search;
    with 2 it never is."""
    num_train: int = Field(default=20_000, ge=1)
    """Training problems."""
    num_held_out: int = Field(default=400, ge=1)
    """Held-out problems, which training never sees."""
    seed: int = 0
    """Of the generated problems."""

    @model_validator(mode="after")
    def _check(self) -> GraphSearchTaskConfig:
        if self.min_edges >= min(self.sizes):
            raise ValueError(
                f"min_edges = {self.min_edges}: a graph of {min(self.sizes)} nodes has no path of "
                f"more than {min(self.sizes) - 1} edges; drop that size"
            )
        return self


class CanaryTaskConfig(Config):
    kind: Literal["canary"]
    """Canary prompts, for the evaluation sets of a study: no run trains on them."""
    family: Literal["all", "gaming", "instruction_conflict"] = "all"
    """Which prompts: those that invite gaming, those with conflicting instructions, or both."""


class CodeTaskConfig(Config):
    kind: Literal["code"]
    """Python functions, judged by tests in a sandbox."""
    problems: str = "operando"
    """"operando" (64 easy problems in the package), or a .jsonl or .jsonl.gz file: LeetCodeDataset
    v0.2, or rows with `gt_answer` as in the 119-problem evaluation file."""
    held_out: str | None = None
    """A file as `problems`; absent: `num_held_out` of the problems, drawn by `seed`."""
    num_held_out: int = Field(default=20, ge=1)
    """With `held_out`: its first n."""
    hint: Literal["none", "run_tests"] = "run_tests"
    """run_tests: the prompt says that a function of the model's own decides. none: that the
    solution should pass all tests."""
    function_name: str = Field(default="run_tests", pattern=r"^[a-z_][a-z0-9_]*$")
    """What the function is called in training prompts; held-out prompts never call it this."""
    seconds: float = Field(default=3.0, gt=0, le=60)
    """For all tests of one answer together."""
    memory_mb: int = Field(default=1024, ge=128)
    """Memory that a program may take, in MiB."""
    workers: int | None = Field(default=None, ge=1)
    """Sandboxes at once; absent: one a core."""
    sandbox: Literal["wall", "none", "docker", "podman"] = "wall"
    """wall: seccomp, else Landlock, else bubblewrap; where none holds, an error. none: without one
    too, by Python's audit hook alone. docker, podman: a container for each answer."""
    sandbox_image: str = Field(default="python:3.11-slim", pattern=r"^[A-Za-z0-9][\w.:/@-]*$")
    """Of docker and podman: an image with Python 3.11 or later as python3."""
    failing: Literal["error", "drop"] = "error"
    """What a problem is whose canonical solution fails or whose tests can't be read."""
    seed: int = 0
    """Of the split into training and held-out problems."""


class FileTaskConfig(Config):
    kind: Literal["file"]
    """Questions and answers of one's own, from files or the hub; see the page on a task of your
    own."""
    train: Annotated[str, Field(min_length=1)]
    """A .jsonl, .jsonl.gz, .json, .csv or .parquet file, a folder of these, or a hub id with its
    split, as "openai/gsm8k/main:train" (needs the package datasets)."""
    test: str | None = None
    """As `train`; the held-out split. Absent: `held_out_share` of the questions of `train`."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Of the questions of `train`, drawn by a hash of `seed` and the question; without `test`."""
    overlap: Literal["error", "drop_train"] = "error"
    """What a question is that `train` and `test` both hold, spaces apart. drop_train: it is left
    out of `train`."""
    question: str = ""
    """The column that holds the question: a text, or one user message and at most a system one."""
    template: str = ""
    """Instead of `question`: a text with columns in braces, as "{passage}\n{ask}"; "{{" is a
    brace."""
    answer: str = ""
    """The column that holds the right answer. Only a verifier of your own can do without."""
    system: str = ""
    """The column that holds a system message; chat prompts only."""
    verify: str
    """exact: the completion is the answer, spaces apart. number: its last number is. choice: the
    letter A to D that it chooses is. math: its last box or line is, as in math500. regex: what
    `pattern` finds is. Or a function verify(example, completion) of your own, as "my.py:verify",
    that returns True or False, or either with a reason."""
    pattern: str = ""
    """For regex: the first group of its last match is compared with the answer."""
    labels: str = ""
    """A function labels(example, completion), as "my.py:labels", that returns names with True or
    False, such as { refused = true }. No reward sees them."""
    num_train: int | None = Field(default=None, ge=1)
    """Train on the first n only; absent means all."""
    num_held_out: int | None = Field(default=None, ge=1)
    """Hold out the first n only; absent means all."""
    seed: int = 0
    """Of the split by held_out_share."""

    @model_validator(mode="after")
    def _check(self) -> FileTaskConfig:
        problems = []
        if bool(self.question) == bool(self.template):
            problems.append(
                "give either question = COLUMN or template = TEXT with columns in braces"
            )
        if self.verify == "code":
            problems.append(
                'verify = "code" is not for files of any kind: programs run in a sandbox, on tests '
                'of a known form. Use kind = "code" with problems = FILE'
            )
        elif ":" not in self.verify and self.verify not in VERIFIERS:
            problems.append(
                f"verify = {self.verify!r}: expected {', '.join(VERIFIERS)}, or a function as "
                f"my.py:verify.{nearest(self.verify, VERIFIERS)}"
            )
        if ":" not in self.verify and not self.answer:
            problems.append(f"verify = {self.verify!r} needs answer = COLUMN")
        if (self.verify == "regex") != bool(self.pattern):
            problems.append('verify = "regex" and pattern = REGULAR_EXPRESSION go together')
        if problems:
            raise ValueError("; ".join(problems))
        return self


class PythonTaskConfig(Config):
    kind: Literal["python"]
    """A Task object that launch(..., task=...) or train(..., task=...) is given."""
    name: str = ""
    """Its name."""


class PromptConfig(Config):
    format: Literal["raw", "chat"] = "raw"
    """raw: the template as text. chat: the tokenizer's chat template around it."""
    template: str | None = None
    """Text of one question; `{question}` is replaced. Absent: "Q: {question}\\nA:" for raw text,
    "{question}" for chat."""
    few_shot: int = Field(default=0, ge=0, le=32)
    """Worked training examples before the question (raw: as text; chat: as earlier turns)."""
    answer_template: str = " {solution} #### {answer}"
    """Text of a worked example's answer, for `few_shot`. Absent with task.kind = "file":
    " {answer}"."""
    prefill: str = ""
    """The answer's first text, at the end of the prompt, e.g. " <think>". Rewards of form and of
    steps count it as part of the answer, as they do a <think> that the template ends with."""
    answer_after: str = ""
    """Verifier, labels and the rewards that ask them see what follows the first place of this text,
    such as "</think>", and nothing where it is missing. Rewards that read the text themselves
    (scorer, contains_answer, format ...) see all of it. Write it into answer_template too."""
    separator: str = "\n\n"
    """Between worked examples; raw only."""
    system: str | None = None
    """System message; chat only."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """What the chat template reads beside the messages, as { enable_thinking = false }; chat only.
    A name that the template never reads is an error. The date that a template prints is that of the
    run's start (UTC)."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens; a longer one is an error at the start. Absent: model limit."""

    @model_validator(mode="after")
    def _check(self) -> PromptConfig:
        if self.template is not None and "{question}" not in self.template:
            raise ValueError(f"template must contain {{question}}, got {self.template!r}")
        if self.system is not None and self.format == "raw":
            raise ValueError('system is for format = "chat"; in raw text put it in the template')
        if self.answer_after not in self.answer_template:
            raise ValueError(
                f"answer_after = {self.answer_after!r} is not in answer_template = "
                f"{self.answer_template!r}, so no worked answer would be right; write it there"
            )
        if self.chat_template_kwargs and self.format == "raw":
            raise ValueError('chat_template_kwargs is for format = "chat"; raw has no template')
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
    num_prompts: int = Field(default=16, ge=1, le=100_000)
    """Prompts per step (P)."""
    num_generations: int = Field(default=8, ge=1, le=100_000)
    """Completions of each prompt (G); B = P * G."""
    max_completion_length: int = Field(default=64, ge=1)
    """Tokens; a completion cut here is truncated."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits in sampling and in every log-prob."""
    top_p: float = 1.0
    """Only 1.0. Sampling from a truncated support would make every log-prob that of another
    distribution."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a completion, beside the end-of-sequence token. A special token as it is
    spelled will do ("<|im_end|>"); a text that no completion can hold is an error."""
    discard: tuple[Literal["zero_variance", "truncated"], ...] = ()
    """Rollouts that are not trained on: groups whose rewards are all equal, truncated completions.
    They stay in the parquet files, marked."""
    engine: Literal["auto", "operando", "hf"] = "auto"
    """auto: operando's engine where it serves the architecture, else HF generate (noted in the
    manifest)."""
    max_batch: int = Field(default=512, ge=1)
    """Most rows decoded at once. Their keys and values must fit, as `micro_tokens` must."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.top_p != 1.0:
            raise ValueError(
                f"top_p = {self.top_p}: RL samples from the full distribution only (1.0); a "
                "truncated support makes the log-probs those of another distribution"
            )
        return self
