"""What halting and drafting share: a source model, its completions, timings, the written folder.

    operando calibrate halting RUN          operando calibrate drafting RUN

Heads are fitted on completions of training prompts. Choices (a threshold, a number of drafts) are
made on further training prompts, and what is reported is measured on held-out prompts.

Dims: N texts, S their tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from operando.errors import UserError, nearest
from operando.evals.ask import day_of, is_run
from operando.models.folders import save_folder
from operando.models.freeze import digests, joint_digest
from operando.models.load import load_model, pad_id, stop_ids
from operando.models.policy import Policy
from operando.models.recursive import RecursiveCausalLM
from operando.recipe.base import Config
from operando.recipe.data import ModelConfig, PromptConfig
from operando.recipe.run import TaskConfig
from operando.recipe_io import apply_override, check
from operando.rollout.greedy_eval import grade
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Request, Sampled, Sampling, as_rollouts, uniform_streams
from operando.run import SeedTree, atomic_path, write_json
from operando.run_folder import read_recipe
from operando.tables import TextTable, table
from operando.tasks.base import Task
from operando.tasks.load import KINDS, UNASKABLE, answering_after, load_task
from operando.tasks.prompts import make_prompts
from operando.types import Prompt
from operando.update.checkpoint import load_weights, pick_step

MANIFESTS = ("halting.json", "drafting.json")
BATCH = 64  # rows of a forward without gradient


class QuestionConfig(Config):
    """What is asked of the model: its own run's tables, or those of --task and overrides."""

    task: TaskConfig
    prompt: PromptConfig = PromptConfig()


@dataclass(frozen=True)
class SourceConfig:
    """Which model, and which prompts. Example: SourceConfig("words", ("task.num_steps=[1]",))

    `task` None: the run's own. `num_fit` and `num_choose` count training prompts, which do not
    overlap; `num_held_out` counts held-out prompts, the first n.
    """

    task: str | None = None
    overrides: tuple[str, ...] = ()
    step: int | None = None
    num_fit: int = 400
    num_choose: int = 200
    num_held_out: int = 200
    max_completion_length: int | None = None
    seed: int = 0


class OpenedRecursive(NamedTuple):
    """A recursive model; `identity` says where its weights are from."""

    name: str
    model: RecursiveCausalLM
    tokenizer: PreTrainedTokenizerBase
    identity: Mapping[str, str | int]


class Prompts(NamedTuple):
    """The three sets of prompts; no two share one."""

    fit: list[Prompt]
    choose: list[Prompt]
    held_out: list[Prompt]


@dataclass(frozen=True)
class Source:
    """A recursive model with what it is asked. `identity` says where its weights are from."""

    folder: Path
    model: RecursiveCausalLM
    tokenizer: PreTrainedTokenizerBase
    identity: Mapping[str, str | int]
    asked: QuestionConfig
    task: Task
    prompts: Prompts
    max_completion_length: int
    stops: tuple[int, ...]


class Texts(NamedTuple):
    """Prompts with completions as right-padded rows.

    `read_NS` marks tokens that the sampler read, so all but the last of each text;
    `predicts_NS` those of them whose next token belongs to the completion.
    """

    ids_NS: Int[Tensor, "N S"]
    read_NS: Bool[Tensor, "N S"]
    predicts_NS: Bool[Tensor, "N S"]

    def parts(self) -> Iterator[Texts]:
        """Give the rows in batches."""
        for at in range(0, len(self.ids_NS), BATCH):
            yield Texts(*(x[at : at + BATCH] for x in self))


class Race(NamedTuple):
    """Seconds of each arm, in interleaved rounds, and the tokens that a round wrote."""

    seconds: Mapping[str, Sequence[float]]
    tokens: Mapping[str, int]

    def rate(self, arm: str) -> float:
        """Return the median tokens per second."""
        return self.tokens[arm] / statistics.median(self.seconds[arm])

    def gain(self, arm: str, over: str) -> float:
        """Return the median over rounds of the rate of `arm` over that of `over`."""
        share = self.tokens[arm] / self.tokens[over]
        pairs = zip(self.seconds[over], self.seconds[arm], strict=True)
        return statistics.median(share * slow / fast for slow, fast in pairs)

    def as_json(self, over: str) -> dict[str, object]:
        """Return seconds, rates and gains over the arm `over`, by arm."""
        return {
            arm: {
                "seconds": list(taken),
                "tokens": self.tokens[arm],
                "tokens_per_second": self.rate(arm),
                "gain": self.gain(arm, over),
            }
            for arm, taken in self.seconds.items()
        }


# --- the source ----------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Refuse a folder that is there already."""
    if out.exists():
        raise UserError(f"{out} exists and is kept as it is: name another folder with --out")


def open_source(folder: Path, config: SourceConfig) -> Source:
    """Return the model of a run or model folder, LoRA merged, in float32, with its prompts."""
    asked, length = _asked(folder, config)
    opened = open_recursive(folder, config.step)
    model, tokenizer = opened.model, opened.tokenizer
    task = answering_after(load_task(asked.task), asked.prompt.answer_after)
    length = config.max_completion_length or length or _longest(asked, task, tokenizer)
    day = day_of(folder)
    prompts = _prompts(task, asked.prompt, config, model, tokenizer, length, day)
    stops = stop_ids(model, tokenizer)
    return Source(folder, model, tokenizer, opened.identity, asked, task, prompts, length, stops)


def _asked(folder: Path, config: SourceConfig) -> tuple[QuestionConfig, int | None]:
    """Return what is asked, and the completion length of a run that is asked its own task."""
    tables: dict[str, object] = {}
    length = None
    if is_run(folder):
        recipe = read_recipe(folder)
        tables = {
            "task": recipe.task.model_dump(mode="json"),
            "prompt": recipe.prompt.model_dump(mode="json"),
        }
        length = recipe.rollout.max_completion_length
    if config.task is not None:
        known = [kind for kind in KINDS if kind not in UNASKABLE]
        if config.task not in known:
            raise UserError(
                f"--task {config.task}: no such task; expected {', '.join(known)}."
                f"{nearest(config.task, known)}"
            )
        given = tables.get("task")
        if not (isinstance(given, dict) and given["kind"] == config.task):
            tables = {"task": {"kind": config.task}}
            length = None
    if "task" not in tables:
        raise UserError(f"{folder} is a model folder and has no task of its own: --task words")
    for override in config.overrides:
        tables = apply_override(tables, override)
    return check(QuestionConfig, tables, "calibrate"), length


def open_recursive(folder: Path, step: int | None) -> OpenedRecursive:
    """Return a run's or model folder's recursive model, LoRA merged, in float32 and eval mode."""
    from_run = is_run(folder)
    if not from_run and step is not None:
        raise UserError(f"--step {step}: {folder} is a model folder; it has no steps")
    given = read_recipe(folder).model if from_run else ModelConfig(id=str(folder))
    if given.quantization != "none":
        raise UserError(f"model.quantization = {given.quantization!r}: 4-bit weights can't be read")
    given = given.model_copy(update={"dtype": "float32", "gradient_checkpointing": False})
    loaded = load_model(given)
    model = loaded.model
    if not isinstance(model, RecursiveCausalLM):
        raise UserError(
            f"{folder}: {type(model).__name__} has no loops, halting or drafting heads; expected a "
            "RecursiveCausalLM"
        )
    name, identity = folder.name, dict(loaded.identity)
    if from_run:
        at = pick_step(folder, step)
        policy = Policy(loaded, given, SeedTree(0))
        load_weights(folder, at, policy)
        if isinstance(policy.model, PeftModel):
            policy.model.merge_and_unload()
        model = policy.base
        assert isinstance(model, RecursiveCausalLM), type(model)
        name = f"{folder.name} step {at}"
        identity |= {"run": folder.name, "step": at}
    return OpenedRecursive(name, model.eval().requires_grad_(False), loaded.tokenizer, identity)


def _longest(asked: QuestionConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a completion length that holds the longest gold answer, and a quarter more."""
    examples = [*task.train[:500], *task.held_out[:500]]
    gold = [asked.prompt.worked_answer(e.solution, e.answer) for e in examples]
    longest = max(len(ids) for ids in tokenizer(gold, add_special_tokens=False)["input_ids"]) + 1
    return longest + longest // 4


def _prompts(
    task: Task,
    prompt: PromptConfig,
    config: SourceConfig,
    model: RecursiveCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    day: datetime,
) -> Prompts:
    shots = list(task.train[: prompt.few_shot])
    train = task.train[len(shots) :]
    wanted = config.num_fit + config.num_choose
    if wanted > len(train):
        raise UserError(
            f"--num-fit {config.num_fit} and --num-choose {config.num_choose}: {task.name} has "
            f"{len(train)} training problems"
        )
    if config.num_held_out > len(task.held_out):
        raise UserError(
            f"--num {config.num_held_out}: {task.name} has {len(task.held_out)} held-out problems"
        )
    room = model.config.max_position_embeddings - length
    if room < 1:
        raise UserError(
            f"--max-completion-length {length} leaves no room for a prompt: the model's context is "
            f"{model.config.max_position_embeddings}"
        )
    limit = min(prompt.max_prompt_length or room, room)
    sets = (
        train[: config.num_fit],
        train[config.num_fit : wanted],
        task.held_out[: config.num_held_out],
    )
    return Prompts(*(make_prompts(one, shots, prompt, tokenizer, limit, day) for one in sets))


# --- completions ---------------------------------------------------------------------------------


def plain_engine(source: Source, **changes: object) -> RecursiveEngine:
    """Return the engine with the source's settings but for `changes`; no drafts."""
    settings: dict[str, object] = {"draft_tokens": 0, "max_batch": BATCH} | changes
    return RecursiveEngine(source.model, source.tokenizer, source.stops, **settings)  # pyright: ignore[reportArgumentType]


def complete(
    source: Source,
    prompts: Sequence[Prompt],
    engine: RecursiveEngine,
    temperature: float = 0.0,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> list[Sampled]:
    """Return one completion of each prompt: greedy, or sampled from the seed's streams."""
    uniforms = None
    if temperature > 0:
        indices = range(len(prompts))
        uniforms = uniform_streams(SeedTree(seed), 0, indices, 1, source.max_completion_length)
    sampling = Sampling(source.max_completion_length, temperature or 1.0)
    done: list[Sampled] = []
    stats = None
    for at in range(0, len(prompts), engine.max_batch):
        part = slice(at, at + engine.max_batch)
        rows = None if uniforms is None else uniforms[part]
        done += engine.sample(Request([p.ids for p in prompts[part]], 1, sampling, rows))
        stats = engine.stats if stats is None else stats.plus(engine.stats)
        on_progress(len(done), len(prompts))
    assert stats is not None, "no prompts"
    engine.stats = stats
    return done


def right(source: Source, prompts: Sequence[Prompt], sampled: Sequence[Sampled]) -> list[bool]:
    """Return what the task's verifier says of each completion."""
    rollouts = as_rollouts(prompts, range(len(prompts)), 1, sampled)
    return [one.verdict.correct for one in grade(source.task, rollouts)]


def make_texts(source: Source, prompts: Sequence[Prompt], sampled: Sequence[Sampled]) -> Texts:
    """Return prompts and completions as rows."""
    rows = [p.ids + s.ids for p, s in zip(prompts, sampled, strict=True)]
    width = max(map(len, rows))
    ids_NS = torch.full((len(rows), width), pad_id(source.tokenizer))
    for n, row in enumerate(rows):
        ids_NS[n, : len(row)] = torch.tensor(row)
    at_S = torch.arange(width)
    read_NS = at_S < torch.tensor([len(row) - 1 for row in rows])[:, None]
    first_N1 = torch.tensor([len(p.ids) - 1 for p in prompts])[:, None]
    device = source.model.device
    return Texts(*(x.to(device) for x in (ids_NS, read_NS, read_NS & (at_S >= first_N1))))


# --- timing --------------------------------------------------------------------------------------


def race(
    source: Source,
    prompts: Sequence[Prompt],
    engines: Mapping[str, RecursiveEngine],
    repeats: int,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Race:
    """Time greedy sampling of the same prompts by each engine: a warm-up, then rounds in turn.

    The arms take turns at every batch, and the order of the turns moves on by one, so that a
    machine that slows down slows all of them. Only `sample` is timed, prefill included.
    """
    names = list(engines)
    seconds = {name: [0.0] * (repeats + 1) for name in names}
    tokens = {name: 0 for name in names}
    batch = min(engine.max_batch for engine in engines.values())
    starts = range(0, len(prompts), batch)
    for number in range(repeats + 1):
        for at in starts:
            turn = (number + at // batch) % len(names)
            for name in names[turn:] + names[:turn]:
                started = time.perf_counter()
                sampled = complete(source, prompts[at : at + batch], engines[name])
                seconds[name][number] += time.perf_counter() - started
                tokens[name] += sum(len(one.ids) for one in sampled) if not number else 0
        on_progress(number + 1, repeats + 1)
    return Race({name: taken[1:] for name, taken in seconds.items()}, tokens)


# --- what is written -----------------------------------------------------------------------------


def frozen_digest(model: RecursiveCausalLM, prefix: str) -> str:
    """Return the sha256 of every tensor but those whose names begin with `prefix`."""
    return joint_digest({n: sha for n, sha in digests(model).items() if not n.startswith(prefix)})


@contextmanager
def only_changing(model: RecursiveCausalLM, prefix: str) -> Iterator[None]:
    """Assert that no tensor changes but those whose names begin with `prefix`."""
    before = frozen_digest(model, prefix)
    yield
    after = frozen_digest(model, prefix)
    assert before == after, f"a tensor outside {prefix} changed: sha256 {before} -> {after}"


def about(source: Source, prefix: str, config: SourceConfig, num: int) -> dict[str, object]:
    """Return what a manifest says of model and prompts; `prefix` names the tensors that changed."""
    return {
        "model": dict(source.identity),
        "frozen_sha256": frozen_digest(source.model, prefix),
        "asked": source.asked.model_dump(mode="json"),
        "data": dict(source.task.source),
        "max_completion_length": source.max_completion_length,
        "n": {"fit": config.num_fit, "choose": config.num_choose, "held_out": num},
    }


def write_folder(out: Path, source: Source, name: str, manifest: Mapping[str, object]) -> None:
    """Write model, tokenizer and manifest as a whole, with the source's own calibrations."""
    check_out(out)
    with atomic_path(out) as part:
        part.mkdir(parents=True)
        for former in MANIFESTS:
            if former != name and (source.folder / former).is_file():
                shutil.copy(source.folder / former, part / former)
        save_folder(part, source.model, source.tokenizer)
        write_json(part / name, manifest)


# --- the terminal --------------------------------------------------------------------------------


def race_table(title: str, race: Race, over: str) -> TextTable:
    """Return the rates of each arm and its gain over one of them."""
    rows = [
        (name, f"{race.rate(name):,.0f}", f"{race.gain(name, over):.2f}x", f"{len(seconds)}")
        for name, seconds in race.seconds.items()
    ]
    return table(title, ("", "tokens/s, median", "gain, median", "rounds"), rows)
