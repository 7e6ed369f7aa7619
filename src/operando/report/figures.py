"""The charts of the page: one function a figure, each with the table of its numbers.

Colours are CSS variables, so that one SVG serves light and dark: matplotlib draws with stand-in
colours, which are replaced in its output. The same data always gives the same text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from operando.doctor.findings import Point, held_out_counts, series
from operando.report.collect import RunTables
from operando.stats.intervals import wilson

INK, GRID = "#010a01", "#010a02"  # stand-ins: replaced by CSS variables
HUES = 6
MAX_TABLE_ROWS = 25


@dataclass(frozen=True)
class Intervals:
    """An interval around a line, at the line's steps."""

    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Line:
    """One curve. Example: Line("reward", points, hue=0, dash="")"""

    label: str
    points: Sequence[Point]
    hue: int
    dash: str = ""  # SVG stroke-dasharray: empty, "6 3" or "2 2"
    band: Intervals | None = None


@dataclass(frozen=True)
class Table:
    """Numbers as text, ready to be shown."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure, what it means, its legend and its numbers."""

    key: str
    title: str
    meaning: str
    lines: Sequence[Line]
    svg: str
    narrow_svg: str  # of a wide chart, for phones; else empty
    table: Table
    is_wide: bool


@dataclass(frozen=True)
class Look:
    """How the axes of a figure look."""

    is_share: bool = False
    is_wide: bool = False
    level: float | None = None  # a dotted horizontal line
    form: str = "{:#.3g}"


def charts(runs: Sequence[RunTables]) -> list[Chart]:
    """Return every chart that the runs have numbers for."""
    figures: Sequence[Callable[[Sequence[RunTables]], Chart | None]] = (
        proxy_and_truth,
        reward,
        reward_parts,
        train_accuracy,
        kl,
        entropy,
        length,
        truncation,
        zero_variance,
        grad_norm,
        update_norm,
        sampler_gap,
    )
    return [chart for figure in figures if (chart := figure(runs)) is not None]


def proxy_and_truth(runs: Sequence[RunTables]) -> Chart | None:
    """What the reward says of held-out answers, beside what the verifier says."""
    lines = []
    for r, run in enumerate(runs):
        scores = {step: wilson(*count) for step, count in held_out_counts(run.rows).items()}
        right, around = [Point(s, i.value) for s, i in scores.items()], list(scores.values())
        band = Intervals([i.low for i in around], [i.high for i in around])
        lines.append(Line(_label(runs, run, "truly right"), right, r, band=band))
        for i, name in enumerate(run.recipe.rewards):
            part = series(run.rows, f"eval/rewards/{name}")
            hue = r if len(runs) > 1 else i + 1
            lines.append(Line(_label(runs, run, f"reward: {name}"), part, hue, dash="6 3"))
    return _chart(
        "proxy",
        "Reward and truth on held-out problems",
        "Solid: share judged right by the task's verifier, with its 95% Wilson interval. Dashed: "
        "mean of each reward part on the same answers. A dashed line that rises while its solid "
        "line falls is a reward hack.",
        lines,
        Look(is_share=_all_shares(lines), is_wide=True),
    )


def reward(runs: Sequence[RunTables]) -> Chart | None:
    """What was rewarded in training."""
    return _metric(
        runs,
        "reward",
        "reward",
        "Reward in training",
        "Mean weighted reward of the rollouts of a step.",
    )


def reward_parts(runs: Sequence[RunTables]) -> Chart | None:
    """The parts of the reward, unweighted."""
    dashes = ("", "6 3", "2 2", "8 2 2 2")
    lines = [
        Line(
            _label(runs, run, name),
            series(run.rows, f"rewards/{name}/mean"),
            r if len(runs) > 1 else i,
            dash=dashes[i % len(dashes)] if len(runs) > 1 else "",
        )
        for r, run in enumerate(runs)
        for i, name in enumerate(run.recipe.rewards)
    ]
    if all(len(run.recipe.rewards) == 1 for run in runs):
        return None  # the one part is the reward, up to its weight
    return _chart("parts", "Reward parts in training", "Unweighted means of a step.", lines, Look())


def train_accuracy(runs: Sequence[RunTables]) -> Chart | None:
    """What the verifier says of the rollouts that are trained on."""
    return _metric(
        runs,
        "train/correct",
        "right",
        "Right answers in training",
        "Share of the sampled rollouts that the verifier calls right. Training "
        "problems, sampled; not comparable with greedy held-out accuracy.",
        Look(is_share=True),
    )


def kl(runs: Sequence[RunTables]) -> Chart | None:
    """How far the policy is from where it began."""
    return _metric(
        runs,
        "kl",
        "KL",
        "KL to the reference",
        "Nats per token, k3 estimator on the sampled tokens.",
    )


def entropy(runs: Sequence[RunTables]) -> Chart | None:
    """How much choice the policy keeps."""
    return _metric(
        runs,
        "entropy",
        "entropy",
        "Entropy",
        "Nats per token, mean of the completions.",
        Look(level=0.0),
    )


def length(runs: Sequence[RunTables]) -> Chart | None:
    """How long completions are."""
    return _metric(
        runs,
        "completions/mean_length",
        "tokens",
        "Completion length",
        "Mean tokens of a completion.",
    )


def truncation(runs: Sequence[RunTables]) -> Chart | None:
    """How many completions hit the length limit."""
    return _metric(
        runs,
        "completions/clipped_ratio",
        "truncated",
        "Truncated completions",
        "Share of the completions cut at the length limit.",
        Look(is_share=True),
    )


def zero_variance(runs: Sequence[RunTables]) -> Chart | None:
    """How many groups teach nothing."""
    return _metric(
        runs,
        "frac_reward_zero_std",
        "share",
        "Groups without signal",
        "Share of the groups whose siblings were all rewarded alike: their group-relative "
        "advantage is zero.",
        Look(is_share=True),
    )


def grad_norm(runs: Sequence[RunTables]) -> Chart | None:
    """How the gradient stands to its clip."""
    clips = {run.recipe.optim.max_grad_norm for run in runs}
    limits = ", ".join(f"{clip:g}" for clip in sorted(clips))
    largest = max((p.value for run in runs for p in series(run.rows, "grad_norm")), default=0.0)
    # a clip far above the curve would press it flat
    level = min(clips) if len(clips) == 1 and min(clips) < 3 * largest else None
    meaning = f"Before the clip at {limits}" + (" (dotted)." if level is not None else ".")
    return _metric(runs, "grad_norm", "norm", "Gradient norm", meaning, Look(level=level))


def update_norm(runs: Sequence[RunTables]) -> Chart | None:
    """How far a step moves the weights."""
    return _metric(
        runs,
        "update_norm",
        "relative",
        "Size of a step",
        "Norm of the weight change over the norm of the trained weights.",
        Look(form="{:.2e}"),
    )


def sampler_gap(runs: Sequence[RunTables]) -> Chart | None:
    """How far the sampler and the trainer disagree."""
    return _metric(
        runs,
        "sampler/gap_mean",
        "gap",
        "Sampler gap",
        "Mean difference between sampling and scoring log-probs, nats per token.",
        Look(form="{:.2e}"),
    )


def _metric(
    runs: Sequence[RunTables], key: str, label: str, title: str, meaning: str, look: Look = Look()
) -> Chart | None:
    lines = [
        Line(run.label if len(runs) > 1 else label, series(run.rows, key), r)
        for r, run in enumerate(runs)
    ]
    return _chart(key.replace("/", "-"), title, meaning, lines, look)


def _label(runs: Sequence[RunTables], run: RunTables, what: str) -> str:
    return f"{run.label}: {what}" if len(runs) > 1 else what


def _all_shares(lines: Sequence[Line]) -> bool:
    return all(-1e-9 <= p.value <= 1 + 1e-9 for line in lines for p in line.points)


def _chart(key: str, title: str, meaning: str, lines: Sequence[Line], look: Look) -> Chart | None:
    """Return the chart of the lines that have points; None if there are none."""
    drawn = [replace(line, hue=line.hue % HUES) for line in lines if line.points]
    if not drawn:
        return None
    words = f"{title}. {meaning}"
    narrow = _draw(drawn, replace(look, is_wide=False), words) if look.is_wide else ""
    svg, table = _draw(drawn, look, words), _table(drawn, look)
    return Chart(key, title, meaning, drawn, svg, narrow, table, look.is_wide)


def _table(lines: Sequence[Line], look: Look) -> Table:
    """Return the numbers of a chart, thinned evenly; first and last rows always stay."""
    steps = sorted({p.step for line in lines for p in line.points})
    kept = steps
    if len(steps) > MAX_TABLE_ROWS:
        last = len(steps) - 1
        places = {round(i * last / (MAX_TABLE_ROWS - 1)) for i in range(MAX_TABLE_ROWS)}
        kept = [steps[i] for i in sorted(places)]
    form = "{:.1%}" if look.is_share else look.form
    values = [dict(line.points) for line in lines]
    columns, bands = ["step"], []
    for line in lines:
        columns.append(line.label)
        if line.band is not None:
            columns.append("95% interval")
        places = [p.step for p in line.points]
        bands.append(
            None
            if line.band is None
            else dict(zip(places, zip(line.band.low, line.band.high, strict=True), strict=True))
        )
    rows = []
    for step in kept:
        row = [str(step)]
        for value, band in zip(values, bands, strict=True):
            row.append(form.format(value[step]).rstrip(".") if step in value else "")
            if band is not None:
                row.append(
                    f"{form.format(band[step][0])} to {form.format(band[step][1])}"
                    if step in band
                    else ""
                )
        rows.append(row)
    thinned = len(kept) < len(steps)
    note = f"{len(kept)} of {len(steps)} steps; all are in metrics.jsonl." if thinned else ""
    return Table(columns, rows, note)


def _draw(lines: Sequence[Line], look: Look, words: str) -> str:
    """Return a figure as SVG text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with matplotlib.rc_context(
        {
            "svg.hashsalt": "operando",
            "svg.fonttype": "none",
            "font.size": 9,
            "font.family": "DejaVu Sans",
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "path.simplify": True,
        }
    ):
        figure = Figure(figsize=(9.2, 3.3) if look.is_wide else (4.8, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in lines:
            _draw_line(axes, line)
        if look.level is not None:
            axes.axhline(look.level, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("step")
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if look.is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(-0.02, 1.02)
        elif _spread(lines) == 0 and look.level is None:
            middle = lines[0].points[0].value
            axes.set_ylim(middle - max(abs(middle), 1e-6), middle + max(abs(middle), 1e-6))
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _for_the_page(text.getvalue(), words)


def _draw_line(axes, line: Line) -> None:
    steps, values = [p.step for p in line.points], [p.value for p in line.points]
    colour = _stand_in(line.hue)
    if line.band is not None:
        axes.fill_between(
            steps, line.band.low, line.band.high, color=colour, alpha=0.16, linewidth=0
        )
    dash = (0, tuple(float(n) for n in line.dash.split())) if line.dash else "-"
    marker = "o" if len(steps) <= 15 else None
    axes.plot(
        steps, values, color=colour, linestyle=dash, marker=marker, markersize=3, linewidth=1.5
    )


def _spread(lines: Sequence[Line]) -> float:
    values = [p.value for line in lines for p in line.points]
    return max(values) - min(values)


def _stand_in(hue: int) -> str:
    return f"#010b0{hue}"


def _for_the_page(svg: str, words: str) -> str:
    """Return the SVG without prologue, namespaces, unused ids or fixed colours and sizes."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    box = re.search(r'viewBox="([^"]+)"', body)
    assert box is not None, body[:200]
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    opening = f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}">'
    body = re.sub(r"<svg[^>]*>", lambda _: opening, body, count=1)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: m.group(0) if m.group(1) in used else "", body)
    body = body.replace(INK, "var(--ink-soft)").replace(GRID, "var(--grid)")
    for hue in range(HUES):
        body = body.replace(_stand_in(hue), f"var(--c{hue})")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    return re.sub(r"\n\s*", "\n", body).strip()
