"""The command `operando calibrate halting`: fits, chooses, measures on held-out prompts, writes.

Beside the exits stand full depth, a fixed depth of as many loops, and exits drawn at random as
often at each loop. Exits that do no better than the fixed depth have found nothing in the states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Group

from operando.errors import UserError
from operando.models.recursive import RecursiveCausalLM
from operando.recursive import halt_head
from operando.recursive.data import (
    BATCH,
    Race,
    Source,
    SourceConfig,
    Texts,
    about,
    check_out,
    complete,
    make_texts,
    only_changing,
    open_source,
    plain_engine,
    race,
    race_table,
    right,
    write_folder,
)
from operando.recursive.halt_head import Calibration, Exits, Rule, Saved, Trial
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Sampled
from operando.run import SeedTree, write_json
from operando.stats.bootstrap import bootstrap_mean
from operando.stats.intervals import Interval, PairedDifference, paired_difference
from operando.tables import TextTable, interval, table
from operando.types import Prompt

HEAD = "model.halt_head"
RACE = {1: 16, BATCH: BATCH}  # held-out prompts that are timed, by batch size
OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HaltingConfig:
    """How to calibrate. `temperature` is that of the completions to fit on; 0: greedy.

    Example: HaltingConfig(SourceConfig("words"), Rule(max_loss=0.01))
    """

    source: SourceConfig
    rule: Rule = Rule()
    min_loops: int = 1
    temperature: float = 0.0
    repeats: int = 5


@dataclass(frozen=True)
class Way:
    """One way to leave the loops, on held-out prompts; `against` is paired with full depth."""

    exits: Exits
    accuracy: float
    against: PairedDifference
    agreement: Interval
    saved: Saved
    completion_mean: float


@dataclass(frozen=True)
class Halting:
    """What the command found. `chosen` None: no threshold keeps the rule, and there are no ways."""

    n: int
    rule: Rule
    calibration: Calibration
    completion_calibration: Calibration
    trials: Sequence[Trial]
    chosen: Trial | None
    full_accuracy: float
    ways: Sequence[Way]
    races: Mapping[int, Race]
    verdict: str
    file: Path


def calibrate_halting(
    folder: Path, out: Path, config: HaltingConfig, on_stage: OnStage = lambda *_: None
) -> Halting:
    """Fit the halt head, choose its threshold, measure it, and write the model folder `out`.

    Without a threshold that keeps the rule, only the manifest is written.
    """
    check_out(out)
    source = open_source(folder, config.source)
    model, prompts = source.model, source.prompts
    if not 1 <= config.min_loops <= model.config.num_loops:
        raise UserError(
            f"--min-loops {config.min_loops}: the model has 1 to {model.config.num_loops} loops"
        )
    model.config.min_loops = config.min_loops
    fit = _at_full_depth(source, prompts.fit, "fit", config, on_stage, config.temperature)
    states = halt_head.collect_states(model, make_texts(source, prompts.fit, fit))
    with only_changing(model, HEAD):
        halt_head.fit_halt_head(model, states)
    known = _at_full_depth(source, prompts.choose, "choice's", config, on_stage)
    right_known = mean(right(source, prompts.choose, known))
    trials = halt_head.try_thresholds(
        source,
        make_texts(source, prompts.choose, known),
        right_known,
        partial(on_stage, "thresholds"),
    )
    chosen = halt_head.choose(trials, config.rule)
    full = _at_full_depth(source, prompts.held_out, "held-out", config, on_stage)
    texts = make_texts(source, prompts.held_out, full)
    right_full = right(source, prompts.held_out, full)
    ways: list[Way] = []
    races: dict[int, Race] = {}
    if chosen is not None:
        found = _measure(source, chosen.tau, full, texts, config.source.seed, on_stage)
        ways = [_way(model, exits, right_full, config.source.seed) for exits in found]
        races = _races(source, chosen.tau, found, config.repeats, on_stage)
    seen = halt_head.collect_states(model, texts)
    result = Halting(
        len(full),
        config.rule,
        halt_head.calibration_of(model, seen, halt_head.base_rate_of(states)),
        halt_head.calibration_of(
            model, halt_head.predicting(seen), halt_head.base_rate_of(halt_head.predicting(states))
        ),
        trials,
        chosen,
        mean(right_full),
        ways,
        races,
        _verdict(ways, config, right_known, mean(right_full)),
        out / "halting.json",
    )
    manifest = _manifest(source, config, result)
    if chosen is None:
        write_json(result.file, manifest)
    else:
        model.config.halt_threshold = chosen.tau
        write_folder(out, source, "halting.json", manifest)
    return result


def _at_full_depth(
    source: Source,
    prompts: Sequence[Prompt],
    which: str,
    config: HaltingConfig,
    on_stage: OnStage,
    temperature: float = 0.0,
) -> list[Sampled]:
    return complete(
        source,
        prompts,
        plain_engine(source, halt_threshold=math.inf),
        temperature,
        config.source.seed,
        partial(on_stage, f"completions of the {which} prompts"),
    )


def _races(
    source: Source, tau: float, found: Sequence[Exits], repeats: int, on_stage: OnStage
) -> dict[int, Race]:
    """Time full depth, the exits and the fixed depth, in batches of one and of many."""
    races = {}
    for batch, count in RACE.items():
        engines = {
            "full depth": plain_engine(source, halt_threshold=math.inf, max_batch=batch),
            "exits": plain_engine(source, halt_threshold=tau, max_batch=batch),
            found[1].name: halt_head.fixed_depth(source, round(found[0].mean_loops()), batch),
        }
        stage = partial(on_stage, f"timing, batch {batch}")
        races[batch] = race(source, source.prompts.held_out[:count], engines, repeats, stage)
    return races


def _measure(
    source: Source, tau: float, full: Sequence[Sampled], texts: Texts, seed: int, on_stage: OnStage
) -> list[Exits]:
    """Return the exits at `tau`, the fixed depth nearest to their mean, and random exits."""
    model, prompts = source.model, source.prompts.held_out
    draws = SeedTree(seed).generator("halting", "random exits")

    def one(
        name: str, engine: RecursiveEngine, settings: Callable[[Texts], Mapping[str, Any]]
    ) -> Exits:
        shares = halt_head.agreement(model, texts, settings)
        return halt_head.measure(
            name, source, prompts, engine, full, shares, partial(on_stage, name)
        )

    exits = one(
        "exits", plain_engine(source, halt_threshold=tau), lambda _: {"halt_threshold": tau}
    )
    depth = round(exits.mean_loops())
    fixed = one(
        f"fixed depth {depth}",
        halt_head.fixed_depth(source, depth),
        lambda _: {"num_loops": depth, "halt_threshold": math.inf},
    )
    drawn = one(
        "random exits",
        halt_head.random_exits(source, exits.loops, draws),
        lambda part: {"exit_loops": halt_head.draw_loops(exits.loops, part.ids_NS.shape, draws)},
    )
    return [exits, fixed, drawn]


def _way(model: RecursiveCausalLM, exits: Exits, full: Sequence[bool], seed: int) -> Way:
    return Way(
        exits,
        mean(exits.correct),
        paired_difference(full, exits.correct),
        bootstrap_mean(exits.agreement, seed),
        halt_head.saved_at(model, exits.mean_loops()),
        halt_head.mean_of(exits.completion_loops),
    )


def _verdict(ways: Sequence[Way], config: HaltingConfig, train: float, held_out: float) -> str:
    """Return in words whether the exits keep the rule, and do better than the controls."""
    if not ways:
        return "no threshold keeps the rule"
    exits, *controls = ways
    said = [_against(exits, control, config.source.seed) for control in controls]
    lost = -exits.against.difference.value
    if lost > config.rule.max_loss + 1e-9:
        said.append(
            f"the rule was kept on training prompts, and is not on held-out ones: {lost:.1%} lost, "
            f"{config.rule.max_loss:.1%} allowed (full depth is right on {train:.1%} of training "
            f"prompts, {held_out:.1%} of held-out ones)"
        )
    return "; ".join(said)


def _against(exits: Way, control: Way, seed: int) -> str:
    right_more = paired_difference(control.exits.correct, exits.exits.correct).difference
    pairs = zip(exits.exits.agreement, control.exits.agreement, strict=True)
    agree_more = bootstrap_mean([a - b for a, b in pairs], seed)
    name = control.exits.name
    if right_more.low > 0 or agree_more.low > 0:
        return (
            f"the exits do better than {name}: right {right_more.value:+.1%}, agreement "
            f"{agree_more.value:+.1%} ({agree_more.low:+.1%} to {agree_more.high:+.1%})"
        )
    if right_more.high < 0 or agree_more.high < 0:
        return f"the exits do worse than {name}"
    return f"{name} does as well: beside it the halt head adds nothing measurable"


# --- the manifest --------------------------------------------------------------------------------


def _manifest(source: Source, config: HaltingConfig, result: Halting) -> dict[str, object]:
    return {
        "command": "operando calibrate halting",
        **about(source, HEAD, config.source, result.n),
        "settings": asdict(config),
        "threshold": None if result.chosen is None else result.chosen.tau,
        "min_loops": config.min_loops,
        "trials": [t._asdict() for t in result.trials],
        "calibration": {
            "all tokens": result.calibration._asdict(),
            "tokens that predict the completion": result.completion_calibration._asdict(),
        },
        "full_depth": {"loops": source.model.config.num_loops, "accuracy": result.full_accuracy},
        "ways": {way.exits.name: _as_json(way, source.model) for way in result.ways},
        "timings": {str(batch): r.as_json("full depth") for batch, r in result.races.items()},
        "verdict": result.verdict,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _as_json(way: Way, model: RecursiveCausalLM) -> dict[str, object]:
    difference = way.against
    return {
        "accuracy": way.accuracy,
        "minus_full_depth": difference.difference._asdict(),
        "p_value": difference.p_value,
        "gained": difference.gained,
        "lost": difference.lost,
        "agreement": way.agreement._asdict(),
        "same_text": way.exits.same_text,
        "tokens_by_loops": list(way.exits.loops),
        "completion_tokens_by_loops": list(way.exits.completion_loops),
        "mean_loops": way.exits.mean_loops(),
        "mean_core_passes": way.exits.mean_loops() * model.config.num_core_blocks,
        "mean_loops_completion": way.completion_mean,
        "saved_core": way.saved.passes,
        "saved_whole_model": way.saved.whole,
    }


# --- the terminal --------------------------------------------------------------------------------


def halting_tables(result: Halting) -> Group:
    """Return the thresholds that were tried, and on held-out prompts the exits beside controls."""
    rule = result.rule
    kept = (
        f"rule: fewest loops with at most {rule.max_loss:.1%} of training prompts' accuracy lost "
        f"and agreement with full depth of at least {rule.min_agreement:.1%}"
    )
    parts: list[object] = [_trials(result), kept]
    if result.chosen is None:
        return Group(*parts, "no threshold keeps the rule: there is no model folder")  # pyright: ignore[reportArgumentType]
    parts += ["", _ways(result), _loops(result), _probabilities(result), ""]
    parts += [
        race_table(f"wall-clock, batch {batch}", timed, "full depth")
        for batch, timed in result.races.items()
    ]
    return Group(*parts, result.verdict)  # pyright: ignore[reportArgumentType]


def _trials(result: Halting) -> TextTable:
    rows = [
        (
            f"{trial.tau}",
            f"{trial.mean_loops:.2f}",
            f"{trial.accuracy:.1%}",
            f"{trial.loss:+.1%}",
            f"{trial.agreement:.2%}",
            "chosen" if trial == result.chosen else "" if result.rule.allows(trial) else "no",
        )
        for trial in result.trials
    ]
    heads = ("tau", "mean loops", "right", "lost", "agreement", "")
    return table("thresholds, on training prompts", heads, rows)


def _ways(result: Halting) -> TextTable:
    rows = [("full depth", f"{result.full_accuracy:.1%}")]
    rows += [
        (
            way.exits.name,
            f"{way.accuracy:.1%}",
            interval(way.against.difference, "+.1%"),
            f"{way.against.gained}",
            f"{way.against.lost}",
            interval(way.agreement, ".1%"),
        )
        for way in result.ways
    ]
    heads = ("", "right", "minus full depth, 95 %", "+", "-", "agreement, 95 %")
    return table(f"{result.n} held-out prompts", heads, rows)


def _loops(result: Halting) -> TextTable:
    rows = [
        (
            way.exits.name,
            f"{way.exits.mean_loops():.2f}",
            f"{way.completion_mean:.2f}",
            f"{way.saved.passes:.1%}",
            f"{way.saved.whole:.1%}",
            " ".join(map(str, way.exits.loops)),
        )
        for way in result.ways
    ]
    each = "tokens by loops 1, 2, ..."
    heads = ("", "loops", "in completions", "core saved", "model saved", each)
    return table("", heads, rows, words=("", each))


def _probabilities(result: Halting) -> TextTable:
    named = {
        "all tokens": result.calibration,
        "predict the completion": result.completion_calibration,
    }
    rows = [
        (
            name,
            f"{one.ece:.4f}",
            f"{one.ece_base_rate:.4f}",
            f"{one.log_loss:.4f}",
            f"{one.log_loss_base_rate:.4f}",
            f"{one.settled:.2%}",
            f"{one.n}",
        )
        for name, one in named.items()
    ]
    first = "halt probabilities"
    heads = (first, "ECE", "base rate", "log loss", "base rate", "settled", "n")
    return table("", heads, rows, words=(first,))
