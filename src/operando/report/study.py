"""The table, the picture and the page of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from operando.recipe.study import BASE, StudyRecipe
from operando.run import atomic_path, write_json
from operando.study.analysis import Point, Row, Visible, is_dominated
from operando.study.claims import Judgement, headline, percent, points
from operando.tables import TextTable, table

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
MARKS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class StudyResult:
    """Everything that a study found, and the page that says it."""

    recipe: StudyRecipe
    rows: Sequence[Row]
    judgements: Sequence[Judgement]
    visible: Sequence[Visible]
    pareto: Sequence[Point]
    amendments: Sequence[str]
    file: Path

    @property
    def is_falsified(self) -> bool:
        return any(j.verdict == "falsified" for j in self.judgements)


HEADS = ("metric", "arm", "runs", "rate", "minus control", "Holm p", "")


def study_cells(result: StudyResult) -> list[tuple[str, ...]]:
    """Return the table's cells: one row for each metric and arm, base and control first."""
    cells = []
    for row in result.rows:
        runs = "" if row.arm == BASE else str(len(row.by_seed))
        own = (row.metric, row.arm, runs, percent(row.rate))
        against = row.against_control
        if against is None:
            cells.append((*own, "", "", "control" if row.arm == result.recipe.control else ""))
            continue
        verdict = "significant" if against.is_significant else "not significant"
        difference = points(against.hierarchical.interval).replace(" points", "")
        cells.append((*own, difference, f"{against.holm_p:.2g}", verdict))
    return cells


def study_tables(result: StudyResult) -> list[TextTable]:
    """Return a table for each metric, for the terminal."""
    seeds = len(result.recipe.seeds)
    return [
        table(
            f"{metric} ({config.better} is better), {seeds} seeds per arm",
            ("arm", *HEADS[3:]),
            [(row[1], *row[3:]) for row in study_cells(result) if row[0] == metric],
            words=("arm", ""),
        )
        for metric, config in result.recipe.metrics.items()
    ]


def visible_sentences(result: StudyResult) -> list[str]:
    """Return what the number of seeds can see, for each metric."""
    sentences = []
    for v in result.visible:
        text = f"{v.metric}: the runs of an arm are all alike, so what the seeds can see is unknown"
        if v.difference is not None:
            text = (
                f"{v.metric}: a difference to the control has a standard error of "
                f"{100 * v.se:.1f} points, paired by seed and problem, so {v.num_seeds} seeds per "
                f"arm show one of {100 * v.difference:.1f} points with 80 % power"
            )
        sentences.append(f"{text}.")
    return sentences


def write_study(result: StudyResult) -> Path:
    """Write study.json, pareto.svg (if there is a Pareto table) and study.md; return the page."""
    folder = result.file.parent
    write_json(
        folder / "study.json",
        {
            "name": result.recipe.name,
            "headline": headline(result.recipe, result.judgements),
            "seeds": result.recipe.seeds,
            "amendments": result.amendments,
            "rows": [asdict(row) for row in result.rows],
            "claims": [asdict(j) for j in result.judgements],
            "smallest_visible_difference": [asdict(v) for v in result.visible],
            "pareto": [asdict(p) for p in result.pareto],
        },
    )
    if result.pareto:
        draw_pareto(result.recipe, result.pareto, _base_place(result), folder / "pareto.svg")
    with atomic_path(result.file) as temporary:
        temporary.write_text(study_page(result), encoding="utf-8")
    return result.file


def study_page(result: StudyResult) -> str:
    """Return the page in Markdown: headline, claims, table, tests, picture."""
    lines = [f"# {result.recipe.name}", "", headline(result.recipe, result.judgements), ""]
    lines += [f"Amended after preregistration: {text}." for text in result.amendments]
    lines += ["## Claims, as written before the first run", ""]
    lines += [f"- {j.sentence}" for j in result.judgements] or ["None."]
    lines += ["", "## Every arm", "", *_markdown(HEADS, study_cells(result)), ""]
    lines += [
        "Differences in points. Intervals (95 %) and p: hierarchical bootstrap over seeds and "
        "problems, paired by both; Holm over the arms of a metric.",
        "",
        "## The other tests",
        "",
        "Differences to the control. Seed-paired: each run's mean. Problem-paired treats the seeds "
        "as fixed: it speaks of these runs, not of the method.",
        "",
    ]
    heads = ("metric", "arm", "seed-paired t", "df", "p", "problem-paired t", "df", "p")
    lines += [*_markdown(heads, _test_cells(result.rows)), "", "## What the seeds can see", ""]
    lines += [f"- {sentence}" for sentence in visible_sentences(result)]
    if result.pareto:
        best = sum(p.is_best for p in result.pareto)
        lines += [
            "",
            "## Pareto",
            "",
            "![runs](pareto.svg)",
            "",
            f"{best} of {len(result.pareto)} runs are not dominated by a run of the same seed: "
            + ", ".join(_best_counts(result))
            + ".",
        ]
    return "\n".join(lines) + "\n"


def _best_counts(result: StudyResult) -> list[str]:
    arms = {arm: [p for p in result.pareto if p.arm == arm] for arm in result.recipe.arms}
    return [f"{arm} {sum(p.is_best for p in own)} of {len(own)}" for arm, own in arms.items()]


def _test_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    cells = []
    for row in rows:
        if row.against_control is not None:
            texts = [row.metric, row.arm]
            for test in (row.against_control.seed_paired, row.against_control.problem_paired):
                chance = "all alike" if test.p_value is None else f"{test.p_value:.2g}"
                texts += [points(test.difference), str(test.df), chance]
            cells.append(tuple(texts))
    return cells


def _markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    rows = [heads, ["---"] * len(heads), *cells]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _base_place(result: StudyResult) -> tuple[float, float]:
    """Return the untrained model's place on the Pareto plot."""
    assert result.recipe.pareto is not None
    base = {row.metric: row.rate.value for row in result.rows if row.arm == BASE}
    return base[result.recipe.pareto.x], base[result.recipe.pareto.y]


def draw_pareto(
    study: StudyRecipe, runs: Sequence[Point], base: tuple[float, float], target: Path
) -> Path:
    """Write the runs as an SVG file: a mark per arm, a large one its mean; a cross the untrained
    model; dotted the frontier of the runs."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    assert study.pareto is not None
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for place, arm in enumerate(study.arms):
        own = [p for p in runs if p.arm == arm]
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        x_all, y_all = [p.x for p in own], [p.y for p in own]
        axes.scatter(x_all, y_all, s=22, alpha=0.55, linewidth=0, color=colour, marker=mark)
        axes.scatter(
            [sum(x_all) / len(own)],
            [sum(y_all) / len(own)],
            s=90,
            edgecolor="#333333",
            linewidth=1,
            label=arm,
            color=colour,
            marker=mark,
        )
    axes.scatter([base[0]], [base[1]], s=50, color="#333333", marker="x", label=BASE)
    front = frontier(study, runs)
    axes.plot(
        [x for x, _ in front],
        [y for _, y in front],
        color="#333333",
        linewidth=0.9,
        linestyle=":",
        zorder=0,
    )
    for axis, name in ((axes.xaxis, study.pareto.x), (axes.yaxis, study.pareto.y)):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_label_text(f"{name} ({study.metrics[name].better} is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with rc_context({"svg.hashsalt": "operando"}), atomic_path(target) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return target


def frontier(study: StudyRecipe, runs: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the places that no run of any arm and seed beats in both metrics, by x."""
    assert study.pareto is not None
    x, y = (
        1 if study.metrics[name].better == "higher" else -1
        for name in (study.pareto.x, study.pareto.y)
    )
    places = {(p.x, p.y) for p in runs}
    gains = [(x * a, y * b) for a, b in places]
    return sorted((a, b) for a, b in places if not is_dominated((x * a, y * b), gains))
