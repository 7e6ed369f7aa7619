"""What ails a recursive model's loops, and what a random model would show: `audit pathology`.

    operando audit pathology RUN
    operando audit pathology FOLDER --task words task.num_steps=[1]

Every number stands beside those of untrained models of the same config and of the trained model on
the same tokens in random order. A test passes only where the model meets it and no untrained model
does: a threshold that a random model meets says nothing about training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from operando.audit.loop_measures import bootstrap, flow, starvation
from operando.audit.loop_reading import (
    CacheGap,
    Reading,
    Texts,
    at_depth,
    cache_gap,
    pack_texts,
    read,
    shuffled,
    twin,
)
from operando.audit.outside import TEMPLATES, WORKED
from operando.audit.side_by_side import ANSWERS, RAW, Question, token_limit
from operando.errors import UserError
from operando.models.load import load_model, pad_id, stop_ids
from operando.models.policy import Policy
from operando.models.recursive import RecursiveCausalLM
from operando.recipe import ModelConfig, PromptConfig, Recipe, TaskConfig
from operando.recipe.base import Config
from operando.recipe_io import apply_override, check
from operando.rollout.held_out import answer_greedily
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Sampling
from operando.run import SeedTree, read_recipe, write_json
from operando.study.stats import Interval
from operando.tasks.load import load_task
from operando.tasks.loops import NEXT_QUESTION_STOPS
from operando.tasks.prompts import make_prompts
from operando.update.checkpoint import load_weights, pick_step

Verdict = Literal["PASS", "FAIL", "WARN", "SAYS NOTHING"]

MOST_JITTER, MOST_SPIKE, DRIFT = 0.10, 4.0, (0.5, 2.0)
FAR, FAR_DRIFT = 3, (0.25, 4.0)  # what is a failure: times the limits of jitter and spike
MOST_NLL, MOST_DROP = 0.02, 0.02  # nats a token; share of right answers
LEAST_GAIN = 0.01  # nats a token of R loops over one; CART's was about 0.01
LEAST_SENSE = 0.10  # nats a token of the texts below the same tokens in random order
MOST_CACHE_GAP = 1e-4
SEED_JITTER, SEED_COSINE = 0.10, 0.735  # what the first report of this model called healthy


@dataclass(frozen=True)
class Number:
    """One measure: the model's, those of untrained models, and the model's on shuffled tokens."""

    name: str
    value: float | None  # None: it does not exist, such as the norm of no gradient
    twins: Sequence[float | None] = ()
    shuffled: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Test:
    """A verdict with its reason and its numbers."""

    name: str
    verdict: Verdict
    why: str
    numbers: Sequence[Number]


@dataclass(frozen=True)
class Pathology:
    """The whole audit. `seeds_way` is what three numbers without a control would have said."""

    model: str
    task: str
    n: int
    loops: int
    depths: Sequence[int]
    twin_seeds: Sequence[int]
    halt_threshold: float
    tests: Sequence[Test]
    seeds_way: str
    file: Path

    @property
    def failed(self) -> bool:
        return any(test.verdict == "FAIL" for test in self.tests)


class Asked(Config):
    """The task of a model folder, as a recipe's table."""

    task: TaskConfig


class Subject(NamedTuple):
    """The model that is audited, and the problems that it is read on."""

    name: str
    model: RecursiveCausalLM
    tokenizer: PreTrainedTokenizerBase
    question: Question


def audit_pathology(
    folder: Path,
    *,
    task: str | None = None,
    overrides: Sequence[str] = (),
    step: int | None = None,
    num: int = 100,
    twins: int = 5,
    depths: Sequence[int] = (),
    seed: int = 0,
) -> Pathology:
    """Audit a run's trained model or a model folder; write FOLDER/audits/pathology.json."""
    subject = open_subject(folder, task, overrides, step, num)
    R, most = subject.model.config.num_loops, subject.model.config.max_loops
    chosen = sorted(set(depths or (max(1, R // 2), R * 3 // 2, 2 * R)) - {R})
    if not chosen or chosen[0] < 1 or chosen[-1] > most:
        raise UserError(
            f"--depths {','.join(map(str, chosen))}: expected loops from 1 to {most}, other than "
            f"{R}: the model has embeddings of {most} loops (max_loops) and runs {R}"
        )
    return judge_model(subject, chosen, list(range(seed, seed + twins)), folder)


def judge_model(
    subject: Subject, depths: Sequence[int], seeds: Sequence[int], folder: Path
) -> Pathology:
    """Read the model and its twins, and judge what was read."""
    model, seed = subject.model, seeds[0]
    texts = gold_texts(subject)
    own = read(model, texts, depths, seed)
    noise = read(model, shuffled(texts, seed), depths, seed)
    others, sense, gaps = [], [], []
    for one in (twin(model, s) for s in seeds):
        others.append(read(one, texts, depths, seed))
        sense.append(read(one, shuffled(texts, seed), depths, seed))
        gaps.append(cache_gap(one, texts))
    R, gap = model.config.num_loops, cache_gap(model, texts)
    right = {t: greedy(subject, model, t) for t in (R, *depths)}
    twin_right = np.mean(greedy(subject, twin(model, seed), R))
    read_all = Read(own, noise, others, sense, R, seed)
    gain = judge_gain(read_all)
    depth_tests = [judge_depth(read_all, t, right[R], right[t], float(twin_right)) for t in depths]
    tests = [
        gain,
        *[_only_if_used(test, gain) for test in depth_tests],
        judge_shock(read_all),
        judge_starvation(read_all),
        judge_cache(gap, gaps),
    ]
    result = Pathology(
        subject.name, subject.question.task.name, len(texts.ids_PS), R, tuple(depths), tuple(seeds),
        gap.threshold, tests, seeds_way(read_all), folder / "audits" / "pathology.json",
    )  # fmt: skip
    document = {"format": 1, **asdict(result), "file": result.file.name, "right": right}
    write_json(result.file, _plain(document))
    return result


def _plain(value: object) -> object:
    """Return a value as JSON can hold it: NaN and infinity as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(x) for x in value]
    return value


# --- what is read --------------------------------------------------------------------------------


def open_subject(
    folder: Path, task: str | None, overrides: Sequence[str], step: int | None, num: int
) -> Subject:
    """Return the model of a run's step or of a model folder, in float32, with its problems."""
    is_run = (folder / "manifest.json").is_file()
    if not is_run and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: neither a run folder (with manifest.json) nor a model folder (with "
            "config.json)"
        )
    recipe = read_recipe(folder) if is_run else None
    if recipe is None and step is not None:
        raise UserError(f"--step {step}: {folder} is a model folder; it has no steps")
    config = recipe.model if recipe is not None else ModelConfig(id=str(folder))
    question = _question(recipe, task, overrides, num)
    loaded = load_model(config)
    if not isinstance(loaded.model, RecursiveCausalLM):
        raise UserError(
            f"{folder}: {type(loaded.model).__name__} has no loops to audit; expected a "
            "RecursiveCausalLM"
        )
    policy, name = Policy(loaded, config, SeedTree(0)), folder.name
    if recipe is not None:
        at = pick_step(folder, step)
        load_weights(folder, at, policy)
        name = f"{folder.name} step {at}"
    model = policy.base
    assert isinstance(model, RecursiveCausalLM), type(model)
    return Subject(name, model.float().eval(), loaded.tokenizer, question)


def _question(
    recipe: Recipe | None, task: str | None, overrides: Sequence[str], num: int
) -> Question:
    known = (*ANSWERS, *WORKED)
    if task is None and overrides:
        raise UserError(f"{' '.join(overrides)}: keys of a task need --task")
    if recipe is None and task is None:
        raise UserError(f"a model folder has no task of its own: --task {'|'.join(known)}")
    own = recipe is not None and task is None
    kind = recipe.task.kind if own and recipe is not None else str(task)
    if kind not in known:
        raise UserError(f"--task {kind}: its gold answers are no text; expected {'|'.join(known)}")
    if own and recipe is not None:
        loaded, prompt = load_task(recipe.task), recipe.prompt
        prompt = prompt.model_copy(update={"few_shot": 0, "max_prompt_length": None})
    else:
        tables: dict[str, object] = {"task": {"kind": kind}}
        if kind in RAW:
            tables = {"task": {"kind": kind, "num_train": 1, "num_held_out": num}}
        for override in overrides:
            tables = apply_override(tables, override)
        loaded = load_task(check(Asked, tables, "--task").task)
        prompt = PromptConfig(template=RAW[kind] if kind in RAW else TEMPLATES[kind]["raw"])
    examples = loaded.held_out[:num]
    worked = ANSWERS[kind] if kind in ANSWERS else WORKED[kind]
    return Question(loaded, examples, prompt, worked, kind != "clrs")


def gold_texts(subject: Subject) -> Texts:
    """Return the held-out prompts with their gold answers and end tokens."""
    tokenizer, question = subject.tokenizer, subject.question
    context = subject.model.config.max_position_embeddings
    end = tokenizer.eos_token_id
    assert isinstance(end, int), end
    answers = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
        for text in (
            question.worked.replace("{solution}", e.solution).replace("{answer}", e.answer)
            for e in question.examples
        )
    ]
    room = context - max(map(len, answers))
    prompts = make_prompts(question.examples, (), question.prompt, tokenizer, room)
    pairs = [(p.ids, answer) for p, answer in zip(prompts, answers, strict=True)]
    return pack_texts(pairs, pad_id(tokenizer))


def greedy(subject: Subject, model: RecursiveCausalLM, loops: int) -> list[bool]:
    """Return which held-out problems a model answers right with so many loops, exits off."""
    tokenizer, question = subject.tokenizer, subject.question
    limit = token_limit(question, tokenizer, None)
    room = model.config.max_position_embeddings - limit
    prompts = make_prompts(question.examples, (), question.prompt, tokenizer, room)
    engine = RecursiveEngine(
        model, tokenizer, stop_ids(model, tokenizer), draft_tokens=0, halt_threshold=math.inf
    )
    stop = NEXT_QUESTION_STOPS if question.is_cut else ()
    with at_depth(model, loops):
        judged = answer_greedily(engine, question.task, prompts, Sampling(limit, stop=stop))
    return [j.verdict.correct for j in judged]


# --- what is judged ------------------------------------------------------------------------------


class Read(NamedTuple):
    """What was read of the model, of the model on shuffled tokens, and of the twins on both."""

    own: Reading
    noise: Reading
    twins: list[Reading]
    twins_noise: list[Reading]
    R: int
    seed: int

    def number(
        self,
        name: str,
        get: Callable[[Reading], float | None],
        interval: Interval | None = None,
    ) -> Number:
        return Number(name, get(self.own), [get(t) for t in self.twins], get(self.noise), interval)

    def mean(self, values: Sequence[float]) -> Interval:
        return bootstrap([[v] for v in values], lambda x_bK: x_bK[:, 0], self.seed)

    def tells(self, reading: Reading, noise: Reading, loops: int) -> bool:
        """Return whether texts are told from their own tokens in random order."""
        gap = [b - a for a, b in zip(reading.nll[loops], noise.nll[loops], strict=True)]
        return self.mean(gap).low > LEAST_SENSE


def verdict(meets: bool | None, twins: Sequence[bool]) -> Verdict:
    """Return what a test says: nothing, where an untrained model meets it too."""
    if meets is None:
        return "WARN"
    if not meets:
        return "FAIL"
    return "SAYS NOTHING" if any(twins) else "PASS"


def beside(twins: Sequence[bool]) -> str:
    return f"{sum(twins)} of {len(twins)} random models pass too"


def judge_shock(r: Read) -> Test:
    """Jitter, spike and drift of the steps between loops.

    Beyond a limit is a warning, for loops that do much work move much; far beyond is a failure.
    """

    def meets(reading: Reading) -> bool | None:
        s = reading.shock
        within = [
            s.jitter <= k * MOST_JITTER and s.spike <= k * MOST_SPIKE and low <= s.drift <= high
            for k, (low, high) in ((1, DRIFT), (FAR, FAR_DRIFT))
        ]
        return True if within[0] else None if within[1] else False

    def jitter(mean_bT: np.ndarray) -> np.ndarray:
        return mean_bT.std(1)

    def spike(mean_bT: np.ndarray) -> np.ndarray:
        return mean_bT.max(1) / np.median(mean_bT, 1)

    numbers = [
        r.number(f"jitter J, at most {MOST_JITTER}", lambda x: x.shock.jitter,
                 bootstrap(r.own.steps, jitter, r.seed)),
        r.number(f"spike S, at most {MOST_SPIKE:g}", lambda x: x.shock.spike,
                 bootstrap(r.own.steps, spike, r.seed)),
        r.number(f"drift D, {DRIFT[0]:g} to {DRIFT[1]:g}", lambda x: x.shock.drift),
        r.number("bend a", lambda x: x.shock.bend),
        r.number("p99 of a step", lambda x: x.shock.p99),
    ]  # fmt: skip
    twins, own = [meets(t) is True for t in r.twins], meets(r.own)
    words = {True: beside(twins), None: "beyond a limit", False: "far beyond a limit"}[own]
    return Test("update shock", verdict(own, twins), words, numbers)


def judge_depth(
    r: Read, loops: int, right_R: Sequence[bool], right: Sequence[bool], twin_right: float
) -> Test:
    """Another number of loops: what it does to the answers decides, not how the states look."""

    def loss(reading: Reading) -> list[float]:
        return [a - b for a, b in zip(reading.nll[loops], reading.nll[r.R], strict=True)]

    nll = r.mean(loss(r.own))
    change = [float(b) - float(a) for a, b in zip(right_R, right, strict=True)]
    answers = r.mean(change)
    meets = depth_meets(nll, answers)
    twins = [
        r.mean(loss(t)).high <= MOST_NLL and r.tells(t, n, loops)
        for t, n in zip(r.twins, r.twins_noise, strict=True)
    ]
    numbers = [
        r.number(f"NLL above {r.R} loops'", lambda x: float(np.mean(loss(x))), nll),
        Number(f"right above {r.R} loops'", answers.value, (), None, answers),
        Number("right", float(np.mean(right)), [twin_right]),
        r.number(f"KL from {r.R} loops", lambda x: float(np.mean(x.kl[loops]))),
        r.number("same first choice", lambda x: float(np.mean(x.agree[loops]))),
        r.number(f"cosine with {r.R} loops", lambda x: x.likeness[loops].cosine),
        r.number("  of other tokens", lambda x: x.likeness[loops].mismatched),
        r.number("  centred, minus others'", lambda x: x.likeness[loops].centred),
    ]  # fmt: skip
    words = {True: "as good as trained depth", False: "worse than trained depth",
             None: "these problems do not decide it"}[meets]  # fmt: skip
    why = f"{words}; right answers gained {change.count(1.0)}, lost {change.count(-1.0)}"
    said = verdict(meets, twins)
    if not r.tells(r.own, r.noise, r.R):
        said, why = "SAYS NOTHING", "nothing to lose: the model tells no text from its shuffled one"
    return Test(f"{loops} loops for {r.R}", said, why, numbers)


def _only_if_used(test: Test, gain: Test) -> Test:
    """Return a depth's test; where one loop does as well, another depth that does says nothing."""
    if gain.verdict != "FAIL" or test.verdict == "FAIL":
        return test
    why = "one loop does as well, so another depth has nothing to lose"
    return replace(test, verdict="SAYS NOTHING", why=why)


def depth_meets(nll: Interval, right: Interval) -> bool | None:
    """Return whether another depth is as good: shown (True), shown not to be (False), or open.

    Both are differences from the trained depth, with intervals over problems.
    """
    if nll.low > MOST_NLL or right.high < -MOST_DROP:
        return False
    if nll.high <= MOST_NLL and right.low >= -MOST_DROP:
        return True
    return None


def judge_gain(r: Read) -> Test:
    """Whether the loops after the first are used at all."""

    def gain(reading: Reading) -> list[float]:
        return [a - b for a, b in zip(reading.nll[1], reading.nll[r.R], strict=True)]

    found = r.mean(gain(r.own))
    meets = True if found.low > LEAST_GAIN else False if found.high < LEAST_GAIN else None
    twins = [r.mean(gain(t)).low > LEAST_GAIN for t in r.twins]
    numbers = [
        r.number(f"NLL of 1 above {r.R}, over {LEAST_GAIN}", lambda x: float(np.mean(gain(x))), found),
        r.number(f"NLL of {r.R} loops", lambda x: float(np.mean(x.nll[r.R])), r.mean(r.own.nll[r.R])),
    ]  # fmt: skip
    said, why = verdict(meets, twins), beside(twins)
    if not r.tells(r.own, r.noise, r.R):
        said, why = "SAYS NOTHING", "the model tells no text from its shuffled one"
    elif said == "FAIL":
        why = "one loop does as well: the others are not used"
    return Test("loops used", said, why, numbers)


def judge_starvation(r: Read) -> Test:
    """Whether gradients reach what each loop writes: dL/du_t, before the gate."""
    meets, words = starvation(r.own.grads)
    twins = [starvation(t.grads)[0] is True for t in r.twins]
    kinds = flow(r.own.grads)
    numbers = [
        r.number(f"dL/du, loop {t + 1}: {kinds[t]}", lambda x, t=t: x.grads[t])
        for t in range(r.R)
    ]
    said = verdict(meets, twins)
    why = f"{words}; {beside(twins)}" if said == "SAYS NOTHING" else words
    return Test("gradient starvation", said, why, numbers)


def judge_cache(gap: CacheGap, twins: Sequence[CacheGap]) -> Test:
    """A decode through the cache against one forward over the text, exits on."""
    passed = [t.largest <= MOST_CACHE_GAP for t in twins]
    numbers = [
        Number(f"largest gap, at most {MOST_CACHE_GAP:g}", gap.largest,
               [t.largest for t in twins]),
        Number("tokens with other exits", float(gap.flipped), [float(t.flipped) for t in twins]),
        Number("mean loops", gap.loops, [t.loops for t in twins]),
    ]  # fmt: skip
    said = verdict(gap.largest <= MOST_CACHE_GAP, passed)
    why = f"halt threshold {gap.threshold:.3g}; {beside(passed)}: it is the code's, not training's"
    return Test("cached decode", said, why, numbers)


def seeds_way(r: Read) -> str:
    """Return the three numbers that were once printed without a control, with the control."""
    deep = max(r.own.likeness)

    def three(reading: Reading) -> tuple[float, float, float]:
        return reading.shock.jitter, reading.likeness[deep].cosine, reading.carry[-1] or 0.0

    def passes(values: tuple[float, float, float]) -> bool:
        return values[0] <= SEED_JITTER and values[1] >= SEED_COSINE and values[2] > 0

    twins = [three(t) for t in r.twins]
    words = []
    named = (f"step std (at most {SEED_JITTER})", f"cosine of {deep} with {r.R} loops (at least "
             f"{SEED_COSINE})", "dL/dh of the last loop (not 0)")  # fmt: skip
    for i, name in enumerate(named):
        values = [t[i] for t in twins]
        words.append(f"{name} {three(r.own)[i]:.3g}, random {min(values):.3g} to {max(values):.3g}")
    count = sum(passes(t) for t in twins)
    return f"{'; '.join(words)}: {count} of {len(twins)} random models pass all three"
