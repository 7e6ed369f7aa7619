"""Tables and pictures of drift: never a real number without its null beside it."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from operando.drift.report import DriftReport
from operando.run import atomic_path


def drift_table(report: DriftReport) -> Table:
    """Return one row a transition: decoder drift real, null, share, excess, p."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = (
        f"{report.run}: decoder drift (1 - mean cosine), {report.seeds} seeds an arm, "
        f"{report.tokens:,} tokens; 95 % intervals over seeds"
    )
    for column in ("site", "steps", "real", "null", "null / real", "excess", "p"):
        table.add_column(column, justify="left" if column in ("site", "steps") else "right")
    for row in report.transitions:
        table.add_row(
            row.site.removesuffix(".hook_resid_post"), f"{row.from_step} to {row.to_step}",
            f"{row.real:.4f}", f"{row.null:.4f}", _share(row.share),
            f"{row.excess[0]:+.4f} ({row.excess[1]:+.4f} to {row.excess[2]:+.4f})",
            f"{row.p:.3f} (floor {row.p_floor:.3f})",
        )  # fmt: skip
    return table


def _share(share: tuple[float, float, float]) -> str:
    value, low, high = share
    if abs(low) == float("inf") or abs(high) == float("inf"):
        return f"{value:.0%} (unbounded)"
    return f"{value:.0%} ({low:.0%} to {high:.0%})"


def stage_table(report: DriftReport) -> Table:
    """Return features in use by stage, both arms."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = "features in use: 2^H by frequency and by energy; births and deaths, tested"
    for column in ("site", "step", "arm", "2^H", "2^H energy", "alive", "born", "died"):
        table.add_column(column, justify="left" if column in ("site", "arm") else "right")
    for row in report.stages:
        table.add_row(
            row.site.removesuffix(".hook_resid_post"), str(row.step), row.arm, f"{row.count:.0f}",
            f"{row.energy_count:.0f}", f"{row.alive:.0f}", f"{row.born:.1f}", f"{row.died:.1f}",
        )  # fmt: skip
    return table


def verdict_lines(report: DriftReport) -> list[str]:
    """Return one sentence a site: what the null arm lets be said."""
    lines = []
    for site in report.sites:
        rows = [row for row in report.transitions if row.site == site.site]
        share = sum(r.null for r in rows) / sum(r.real for r in rows)
        shown = [r for r in rows if r.q_t <= 0.05]
        name = site.site.removesuffix(".hook_resid_post")
        said = f"{name}: {share:.0%} of the drift is also there without RL"
        if shown:
            spans = ", ".join(f"{r.from_step} to {r.to_step}" for r in shown)
            said += f"; more than its null arm at steps {spans} (q <= 0.05)"
        else:
            said += "; no transition drifts more than its null arm"
        lines.append(f"{said}; arms apart: {'yes' if site.complete else 'no'} (p = {site.p:.2f})")
    return lines


def draw_drift(report: DriftReport, target: Path) -> Path:
    """Write real and null drift of every transition, one panel a site, as an SVG file."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    sites = [site.site for site in report.sites]
    figure = Figure(figsize=(3.2 * len(sites), 2.8), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(sites), sharey=True, squeeze=False)[0]
    for axes, site in zip(panels, sites, strict=True):
        rows = [row for row in report.transitions if row.site == site]
        places = range(len(rows))
        axes.bar([x - 0.2 for x in places], [r.real for r in rows], 0.4, label="real")
        axes.bar([x + 0.2 for x in places], [r.null for r in rows], 0.4, label="null", hatch="//")
        axes.set_xticks(places, [f"{r.from_step}-{r.to_step}" for r in rows])
        axes.set_title(site.removesuffix(".hook_resid_post"), fontsize=9)
        axes.set_xlabel("steps")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("decoder drift")
    panels[0].legend(frameon=False, fontsize=8)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return target
