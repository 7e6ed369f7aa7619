"""What the terminal shows of a calibration."""

from __future__ import annotations

from rich.console import Group

from operando.recursive.data import Race
from operando.recursive.draft_heads import Drafted
from operando.recursive.drafting import Drafting
from operando.recursive.halting import Halting
from operando.stats.intervals import wilson
from operando.tables import TextTable, interval, table

# --- halting -------------------------------------------------------------------------------------


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
    for batch, race in result.races.items():
        parts.append(_race(f"wall-clock, batch {batch}", race, "full depth"))
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


def _race(title: str, race: Race, over: str) -> TextTable:
    rows = [
        (name, f"{race.rate(name):,.0f}", f"{race.gain(name, over):.2f}x", f"{len(seconds)}")
        for name, seconds in race.seconds.items()
    ]
    return table(title, ("", "tokens/s, median", "gain, median", "rounds"), rows)


# --- drafting ------------------------------------------------------------------------------------


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
        parts.append(_race(f"wall-clock, batch {batch}", named, "no drafts"))
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
