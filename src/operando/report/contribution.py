"""The picture and the table of a layer-contribution sweep."""

from __future__ import annotations

from pathlib import Path

from operando.run import atomic_path
from operando.study.contribution import ContributionResult
from operando.tables import TextTable, interval, table


def contribution_table(result: ContributionResult) -> TextTable:
    """Return one row per layer set, with intervals over seeds."""
    seeds = result.rows[0].num_seeds
    return table(
        f"{result.name}: gain over {result.base:.1%} held out, {seeds} seeds, 95 % t-intervals",
        ("layers trained", "gain", "share of all layers' gain"),
        [(r.layers, interval(r.gain, "+.1%"), interval(r.share, "+.1%")) for r in result.rows],
        words=("layers trained",),
    )


def agreement_line(result: ContributionResult) -> str | None:
    """Return in a sentence whether the seeds order the layer sets alike; None: nothing to order."""
    found = result.agreement
    if found is None:
        return None
    how = "counted out" if found.is_exact else "drawn"
    return (
        f"the order of the sets over {result.rows[0].num_seeds} seeds: Kendall's W = {found.w:.2f} "
        f"(chance {found.chance:.2f} on average, p = {found.p_value:.2g}, {how})"
    )


def draw_contribution(result: ContributionResult, target: Path) -> Path:
    """Write the shares as an SVG file: one bar a layer set, with its interval."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    alone = result.rows[1:]
    figure = Figure(figsize=(1.5 + 0.45 * len(alone), 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    shares = [row.share for row in alone]
    axes.bar(range(len(alone)), [s.value for s in shares], color="#4477aa", width=0.7)
    below = [s.value - s.low for s in shares]
    above = [s.high - s.value for s in shares]
    axes.errorbar(
        range(len(alone)),
        [s.value for s in shares],
        yerr=[below, above],
        fmt="none",
        ecolor="#333333",
        elinewidth=1,
        capsize=3,
    )
    axes.axhline(1.0, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(alone)), [row.layers for row in alone])
    axes.set_xlabel("layers trained alone")
    axes.set_ylabel("share of all layers' gain")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "operando"}), atomic_path(target) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return target
