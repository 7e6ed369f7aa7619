"""The report: one HTML file that needs nothing outside itself; equal runs give equal bytes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from operando.doctor.findings import series
from operando.files import read_object
from operando.report.collect import Change, HeldOut, RunTables, Score, collect_all, step_files
from operando.report.figures import Chart, Table, charts
from operando.report.samples import MAX_TOKENS, SampleSet, choose_samples, pack
from operando.run import atomic_path
from operando.text import encodable

HERE = Path(__file__).parent
MAX_CHANGES = 20  # of each list in the page; the rest is in evals/
MAX_TEXT = 1200  # characters of one held-out completion
LAPS = ("sample", "score", "reward", "update")


@dataclass(frozen=True)
class RunView:
    """One run as the template sees it."""

    tables: RunTables
    headline: str
    depth: str  # where the gain lies, if `operando depth` has looked
    sets: Sequence[SampleSet]
    gained: Sequence[Change]
    lost: Sequence[Change]
    facts: Sequence[tuple[str, str]]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page about one or more runs; return its path.

    The page needs nothing outside itself. `out` absent: report.html in the first run's folder.

    Example: report([Path("runs/first"), Path("runs/second")], Path("both.html"))
    """
    runs = collect_all(folders)
    target = out if out is not None else folders[0] / "report.html"
    page = render(runs)
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def render(runs: Sequence[RunTables]) -> str:
    """Return the page as text."""
    import jinja2

    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = lambda x: f"{x:.1%}"
    environment.filters["points"] = lambda x: f"{100 * x:+.1f}"
    environment.filters["chance"] = chance
    environment.filters["short"] = short
    names = [run.label for run in runs]
    views = [_view(run, MAX_TOKENS // len(runs)) for run in runs]
    drawn: Sequence[Chart] = charts(runs)
    script = (HERE / "viewer.js").read_text(encoding="utf-8")
    return environment.get_template("template.html.j2").render(
        title=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        runs=views,
        charts=drawn,
        times=time_table(runs),
        samples=embed(pack({n: v.sets for n, v in zip(names, views, strict=True)})),
        has_samples=any(view.sets for view in views),
        max_changes=MAX_CHANGES,
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=hash_of(script),
    )


def hash_of(script: str) -> str:
    """Return the source that a Content-Security-Policy allows: this script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _view(run: RunTables, budget: int) -> RunView:
    return RunView(
        tables=run,
        headline=headline(run.held_out),
        depth=depth_said(run.folder),
        sets=choose_samples(run.folder, budget),
        gained=run.held_out.gained[:MAX_CHANGES],
        lost=run.held_out.lost[:MAX_CHANGES],
        facts=facts(run.manifest),
    )


def depth_said(folder: Path) -> str:
    """Return what the newest `operando depth` of the run said, or nothing."""
    files = step_files(folder / "evals", "depth_step", ".json")
    if not files:
        return ""
    return str(read_object(files[max(files)], said=str)["said"])


def headline(held_out: HeldOut) -> str:
    """Return the result in one sentence."""
    before, after, paired = held_out.before, held_out.after, held_out.paired
    if before is None:
        return "No held-out evaluation was recorded."
    if after is None:
        return f"One held-out evaluation so far: {_right(before)} at step {before.step}."
    change = f"from {_right(before)} at step {before.step} to {_right(after)} at step {after.step}"
    if paired is None:
        return f"Held-out accuracy went {change}; the answers of both are not on file to pair them."
    if paired.p_value >= 0.05:
        return f"Held-out accuracy went {change}: no change that chance would not also give."
    verb = "rose" if paired.difference.value > 0 else "fell"
    return f"Held-out accuracy {verb} {change}."


def _right(score: Score) -> str:
    return f"{score.accuracy.value:.1%} ({score.correct}/{score.n})"


def chance(p: float) -> str:
    """Return a p-value as text."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}" if p < 0.1 else f"p = {p:.2f}"


def short(text: str) -> str:
    """Return a text cut to what the page shows, and say how much is left out."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]} [{len(text) - MAX_TEXT} more characters]"


def time_table(runs: Sequence[RunTables]) -> list[tuple[str, Table]]:
    """Return, for each run, the mean seconds of a step and where they went."""
    tables = []
    for run in runs:
        step = [p.value for p in series(run.rows, "time/step")]
        if not step:
            continue
        total = fmean(step)
        laps = {lap: [p.value for p in series(run.rows, f"time/{lap}")] for lap in LAPS}
        means = {lap: sum(values) / len(step) for lap, values in laps.items() if values}
        means["everything else"] = max(0.0, total - sum(means.values()))
        rows = [[lap, f"{s:.3f}", f"{s / total:.0%}"] for lap, s in means.items()]
        rows.append(["whole step", f"{total:.3f}", "100%"])
        speed = [p.value for p in series(run.rows, "tokens_per_second")]
        rate = f"; {fmean(speed):.0f} completion tokens per second" if speed else ""
        note = f"{len(step)} steps, {sum(step):.0f} s in all{rate}. Evaluation is not in a step."
        tables.append((run.label, Table(["part", "seconds per step", "share"], rows, note)))
    return tables


def facts(manifest: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the manifest as rows, nested names joined by dots; warnings have a place above."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif prefix != "warnings":
            rows.append((prefix, value if isinstance(value, str) else json.dumps(value)))

    walk("", manifest)
    return rows


def embed(value: object) -> str:
    """Return JSON that can stand inside a script element: no text can end it or open another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = encodable(text)  # a folder may be anybody's
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
