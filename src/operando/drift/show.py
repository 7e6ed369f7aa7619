"""Tables and pictures of drift: never a real number without its null beside it."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from operando.drift.report import DriftReport
from operando.drift.without_refit import Effect, FrozenReport, GridReport
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


def frozen_table(report: FrozenReport) -> Table:
    """Return one row a stage, then the warning row of unpaired halves of the base's texts."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = (
        f"{report.run}: one SAE at {report.site}, not refitted; the same {report.tokens:,} tokens "
        f"at all stages, {report.sinks} sinks left out"
    )
    table.add_column("step")
    for column in ("FVU", "cosine", "changed (q <= 0.05)", "|delta|", "beta", "delta CE"):
        table.add_column(column, justify="right")
    for row in report.stages:
        first = row is report.stages[0]
        changed = report.control if first else row.changed
        table.add_row(
            f"{row.step} (base against itself)" if first else str(row.step), f"{row.fvu:.4f}",
            f"{row.cosine:.6f}", f"{changed} of {report.features}", f"{row.abs_delta:.2e}",
            _quartiles(row.beta), f"{row.delta_ce:+.4f}",
        )  # fmt: skip
    table.add_row(
        "0 (warning: unpaired halves of its texts)", "", "",
        f"{report.halves.changed} of {report.features}", f"{report.halves.abs_delta:.2e}", "", "",
    )  # fmt: skip
    return table


def _quartiles(beta: tuple[float, float, float] | None) -> str:
    if beta is None:
        return "none in use"
    low, median, high = beta
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def feature_table(report: FrozenReport, num: int = 10) -> Table:
    """Return the features whose mean activation changed most from the base to the last stage."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    last = report.stages[-1].step
    diff = report.diff
    order = diff.delta_act_TM[-1].abs().argsort(descending=True)[:num]
    moved = [j for j in order.tolist() if diff.delta_act_TM[-1, j] != 0]
    table.title = f"features with the largest |delta|, base to step {last}"
    if not moved:
        table.title += ": none, every mean activation is the base's"
    for column in ("feature", "rate", "mean activation", "delta", "beta", "q"):
        table.add_column(column, justify="right")
    for j in moved:
        rate, act, beta = diff.rate_TM.value[:, j], diff.mean_act_TM[:, j], diff.beta_TM[:, j]
        low, high = float(diff.rate_TM.low[-1, j]), float(diff.rate_TM.high[-1, j])
        table.add_row(
            str(j), f"{rate[0]:.2%} to {rate[-1]:.2%} ({low:.2%} to {high:.2%})",
            f"{act[0]:.4f} to {act[-1]:.4f}", f"{diff.delta_act_TM[-1, j]:+.4f}",
            f"{beta[0]:.3f} to {beta[-1]:.3f}", f"{diff.q_TM[-1, j]:.3f}",
        )  # fmt: skip
    return table


def grid_table(report: GridReport) -> Table:
    """Return for each site and measure the 2 x 2 of model and text with the effects beside it."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = (
        f"{report.run}: the base and step {report.step} on the base's text ({report.prompts[0]} "
        f"prompts, {report.tokens[0]:,} tokens) and the last steps' ({report.prompts[1]} prompts, "
        f"{report.tokens[1]:,} tokens); 95 % intervals over prompts"
    )
    for column in ("site", "measure", "text by", "base", "last", "model changed", "text changed"):
        left = column in ("site", "measure", "text by")
        table.add_column(column, justify="left" if left else "right")
    for row in report.rows:
        table.add_row(
            row.site.removesuffix(".hook_resid_post"), row.measure, "base",
            f"{row.base_on_base:.4f}", f"{row.last_on_base:.4f}", _effect(row.model_on_base), "",
        )  # fmt: skip
        table.add_row(
            "", "", "last", f"{row.base_on_last:.4f}", f"{row.last_on_last:.4f}",
            _effect(row.model_on_last), _effect(row.text),
        )  # fmt: skip
    return table


def _effect(effect: Effect) -> str:
    return f"{effect.value:+.4f} ({effect.low:+.4f} to {effect.high:+.4f}), p {effect.p:.3f}"


def grid_lines(report: GridReport) -> list[str]:
    """Return what the words of the table mean, and the features that changed."""
    lines = [
        "mean activation: 1 - cosine with the base on its own text. text changed: the base on both "
        "texts. model changed: both models on the same text. p: permutation over prompts."
    ]
    for row in report.features:
        name = row.site.removesuffix(".hook_resid_post")
        lines.append(
            f"{name}: features with q <= 0.05: {row.text} by the text, {row.model_on_base} by the "
            f"model on the base's text, {row.model_on_last} on the last model's"
        )
    return lines
