"""The command `operando calibrate drafting`: fits the heads, chooses how many, measures, writes.

The control is untrained heads, which propose the next token's own argmax, in the same engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Group

from operando.errors import UserError
from operando.recursive import draft_heads
from operando.recursive.data import (
    BATCH,
    Race,
    Source,
    SourceConfig,
    about,
    check_out,
    complete,
    make_texts,
    only_changing,
    open_source,
    plain_engine,
    race_table,
    write_folder,
)
from operando.recursive.draft_heads import Drafted, HeadScore
from operando.recursive.halting import RACE, OnStage
from operando.run import write_json
from operando.stats.intervals import wilson
from operando.tables import table

HEADS = "speculative_projs"


@dataclass(frozen=True)
class DraftingConfig:
    """How to fit and choose. `batch_size` is the one that the number of drafts is chosen for.

    Example: DraftingConfig(SourceConfig("words", num_fit=2000), batch_size=64)
    """

    source: SourceConfig
    epochs: int = 30
    lr: float = 3e-3
    temperature: float = 0.0
    batch_size: int = 1
    repeats: int = 5


@dataclass(frozen=True)
class Drafting:
    """What the command found.

    `rates` are gains over no drafts, by number of drafts, on the prompts of the choice.
    """

    n: int
    before: Sequence[HeadScore]
    after: Sequence[HeadScore]
    rates: Mapping[int, float]
    chosen: int
    """The fastest number of drafts; `written` is 0 instead if no drafts are faster still."""
    written: int
    drafted: Drafted
    untrained: Drafted
    num_equal: int
    races: Mapping[int, Race]
    untrained_races: Mapping[int, Race]
    halt_threshold: float | None
    file: Path

    def is_exact(self) -> bool:
        return self.num_equal == self.n


def calibrate_drafting(
    folder: Path, out: Path, config: DraftingConfig, on_stage: OnStage = lambda *_: None
) -> Drafting:
    """Fit the heads, choose how many draft, measure them, and write the model folder `out`.

    If a completion with drafts differs from the one without, only the manifest is written.
    """
    check_out(out)
    source = open_source(folder, config.source)
    model, prompts = source.model, source.prompts
    heads = len(model.speculative_projs)
    if not heads:
        raise UserError(f"{folder}: the model has no speculative heads (num_speculative_heads = 0)")
    sampled = complete(
        source,
        prompts.fit,
        plain_engine(source),
        config.temperature,
        config.source.seed,
        partial(on_stage, "completions of the fit prompts"),
    )
    places = draft_heads.collect_places(model, make_texts(source, prompts.fit, sampled))
    plain, _ = draft_heads.draft(source, prompts.held_out, 0)
    seen = draft_heads.collect_places(model, make_texts(source, prompts.held_out, plain))
    with only_changing(model, HEADS):
        draft_heads.forget_heads(model)
        before = draft_heads.score_heads(model, places, seen)
        _, untrained = draft_heads.draft(source, prompts.held_out, heads)
        untrained_races = _races(source, heads, config.repeats, on_stage, "untrained heads")
        draft_heads.fit_heads(
            model, places, config.epochs, config.lr, config.source.seed, partial(on_stage, "heads")
        )
    tried = draft_heads.race_drafts(
        source,
        prompts.choose[: _count(config.batch_size)],
        range(heads + 1),
        config.batch_size,
        config.repeats,
        partial(on_stage, "number of drafts"),
    )
    rates = {g: tried.gain(str(g), "0") for g in range(heads + 1)}
    chosen = max(range(1, heads + 1), key=lambda g: rates[g])
    fast, drafted = draft_heads.draft(source, prompts.held_out, chosen)
    after = draft_heads.score_heads(model, places, seen)
    result = Drafting(
        n=len(plain),
        before=before,
        after=after,
        rates=rates,
        chosen=chosen,
        written=chosen if rates[chosen] > 1 else 0,
        drafted=drafted,
        untrained=untrained,
        num_equal=sum(a.ids == b.ids for a, b in zip(fast, plain, strict=True)),
        races=_races(source, chosen, config.repeats, on_stage, "timing"),
        untrained_races=untrained_races,
        halt_threshold=model.config.halt_threshold,
        file=out / "drafting.json",
    )
    manifest = _manifest(source, config, result)
    if result.is_exact():
        model.config.draft_tokens = result.written
        write_folder(out, source, "drafting.json", manifest)
    else:
        write_json(result.file, manifest)
    return result


def _races(
    source: Source, drafts: int, repeats: int, on_stage: OnStage, what: str
) -> dict[int, Race]:
    """Time `drafts` drafts beside none on held-out prompts, in batches of one and of many."""
    return {
        batch: draft_heads.race_drafts(
            source,
            source.prompts.held_out[:count],
            (0, drafts),
            batch,
            repeats,
            partial(on_stage, f"{what}, batch {batch}"),
        )
        for batch, count in RACE.items()
    }


def _count(batch_size: int) -> int:
    """Return how many prompts are timed in batches of this size."""
    return max(16, min(batch_size, BATCH))


def _manifest(source: Source, config: DraftingConfig, result: Drafting) -> dict[str, object]:
    return {
        "command": "operando calibrate drafting",
        **about(source, HEADS, config.source, result.n),
        "settings": asdict(config),
        "draft_tokens": result.written,
        "fastest_drafts": result.chosen,
        "halt_threshold": result.halt_threshold,
        "heads": [
            {"head": i, "untrained": b._asdict(), "trained": a._asdict()}
            for i, (b, a) in enumerate(zip(result.before, result.after, strict=True), start=1)
        ],
        "gain_by_drafts": {str(g): rate for g, rate in result.rates.items()},
        "drafting": drafted_as_json(result.drafted),
        "untrained": drafted_as_json(result.untrained),
        "equal_completions": {
            "count": result.num_equal,
            "n": result.n,
            "share": wilson(result.num_equal, result.n)._asdict(),
        },
        "timings": {str(batch): r.as_json("0") for batch, r in result.races.items()},
        "untrained_timings": {
            str(batch): r.as_json("0") for batch, r in result.untrained_races.items()
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def drafted_as_json(drafted: Drafted) -> dict[str, object]:
    """Return acceptance by head, of the drafts that were looked at, with its interval."""
    heads = [
        {
            "accepted": accepted,
            "tried": tried,
            "share": wilson(accepted, tried)._asdict() if tried else None,
        }
        for accepted, tried in zip(drafted.accepted, drafted.tried, strict=True)
    ]
    return {"heads": heads, "tokens_per_call": drafted.tokens_per_call}


# --- the terminal --------------------------------------------------------------------------------


def drafting_tables(result: Drafting) -> Group:
    """Return the heads, the numbers of drafts, and on held-out prompts drafting beside none."""
    rows = [
        (
            f"{i + 1}",
            f"{before.loss:.3f}",
            f"{after.loss:.3f}",
            f"{after.top1:.1%}",
            f"{before.top1:.1%}",
            f"{after.table:.1%}",
            _acceptance(result.drafted, i),
            _acceptance(result.untrained, i),
            f"{after.n}",
        )
        for i, (before, after) in enumerate(zip(result.before, result.after, strict=True))
    ]
    heads = ("head", "CE untrained", "CE trained", "right", "untrained", "table")
    heads = (*heads, "accepted", "untrained", "n")
    rates = ", ".join(f"{g}: {rate:.2f}x" for g, rate in result.rates.items() if g)
    written = result.written or "none, for no drafts are faster"
    parts: list[object] = [
        table(f"heads, {result.n} held-out prompts", heads, rows),
        f"gain by drafts, on training prompts: {rates}; chosen: {written}",
        f"tokens per call: {result.drafted.tokens_per_call:.2f}, untrained "
        f"{result.untrained.tokens_per_call:.2f}, without drafts 1.00",
        "",
    ]
    for batch, race in result.races.items():
        drafts = f"{result.chosen} drafts"
        named = Race(
            {"no drafts": race.seconds["0"], drafts: race.seconds[str(result.chosen)]},
            {"no drafts": race.tokens["0"], drafts: race.tokens[str(result.chosen)]},
        )
        parts.append(race_table(f"wall-clock, batch {batch}", named, "no drafts"))
        other = result.untrained_races[batch]
        heads = max(other.seconds, key=int)
        parts.append(f"untrained heads, {heads} drafts: {other.gain(heads, '0'):.2f}x")
    verdict = "the same tokens" if result.is_exact() else "NOT the same tokens: no model folder"
    parts.append(f"{result.num_equal} of {result.n} greedy completions have {verdict} (float32)")
    return Group(*parts)  # pyright: ignore[reportArgumentType]


def _acceptance(drafted: Drafted, head: int) -> str:
    if head >= len(drafted.tried) or not drafted.tried[head]:
        return ""
    return f"{wilson(drafted.accepted[head], drafted.tried[head]).value:.1%}"
