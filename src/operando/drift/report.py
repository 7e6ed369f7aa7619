"""The drift of a run's chains beside their null arms, as numbers ready to be shown and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from operando.drift import measures
from operando.drift.chain import ARMS, Arm, decoders, load_chain, trained_seeds, trained_sites
from operando.drift.collect import Texts, load_acts
from operando.drift.transitions import (
    MEASURES,
    NO_DRIFT,
    Cosines,
    DriftRow,
    Measure,
    cosines,
    matched,
    name,
    numbers,
    resampled,
    rows_of,
    shown,
)
from operando.errors import UserError
from operando.run import atomic_path, write_json, write_parquet
from operando.sae.sae import SAE
from operando.stats.null_arms import separation
from operando.tables import TextTable, table

MIN_SEEDS = 2


@dataclass(frozen=True)
class ShapeRow:
    """One transition of one site and arm, over features, mean over chains.

    `quadrants` are the shares of stable, rotated, reweighted and redirected features; `decoder` and
    `encoder` describe the cosines by index (mean, median, quartiles, minimum).
    """

    site: str
    from_step: int
    to_step: int
    arm: str
    quadrants: dict[str, float]
    decoder: dict[str, float]
    encoder: dict[str, float]


@dataclass(frozen=True)
class NameRow:
    """The name of a transition; see drift/transitions.py:name."""

    site: str
    from_step: int
    to_step: int
    name: str
    sentence: str


@dataclass(frozen=True)
class StageRow:
    """One stage of one site: how many features are in use, mean over seeds.

    `count` is 2^H by frequency, `energy_count` by squared activation; `born` and `died` since the
    stage before, by two thresholds and a counting test, `published_born` and `published_died`
    by sae_rl's one threshold.
    """

    site: str
    step: int
    arm: str
    count: float
    energy_count: float
    alive: float
    born: float
    died: float
    published_born: float
    published_died: float


@dataclass(frozen=True)
class SiteRow:
    """One site at the last stage: did the chains of an arm move in a common direction?

    `statistic` is the mean similarity of the chains' movements within arms minus that across arms.
    It says nothing of how far they moved.
    """

    site: str
    statistic: float
    p: float
    p_floor: float
    complete: bool


@dataclass(frozen=True)
class DriftReport:
    """Every drift number of a run with the null beside it."""

    run: str
    seeds: int
    tokens: int
    transitions: tuple[DriftRow, ...]
    by_match: tuple[DriftRow, ...]  # decoder and encoder by best match, where a drift was shown
    names: tuple[NameRow, ...]
    shapes: tuple[ShapeRow, ...]
    stages: tuple[StageRow, ...]
    sites: tuple[SiteRow, ...]
    file: Path


def drift_report(run: Path, texts: Texts) -> DriftReport:
    """Return and write the drift of all chains of a run; refuses to give a number without nulls."""
    seeds, sites = trained_seeds(run), trained_sites(run)
    if not sites:
        raise UserError(f"{run} has no SAE chains; run: operando sae train {run}")
    if len(seeds) < MIN_SEEDS:
        raise UserError(
            f"{run} has chains of one seed: drift needs {MIN_SEEDS} or more, or there is no spread "
            f"to judge it by; run: operando sae train {run} --seeds 3"
        )
    cells: list[tuple[str, int, int]] = []
    moved: dict[Arm, list[list[dict[Measure, Tensor]]]] = {arm: [] for arm in ARMS}
    shapes: list[ShapeRow] = []
    stages: list[StageRow] = []
    apart: list[SiteRow] = []
    for site in sites:
        chains = {arm: [load_chain(run, site, arm, seed) for seed in seeds] for arm in ARMS}
        steps = list(chains["real"][0])
        spans = [(site, *span) for span in zip(steps, steps[1:], strict=False)]
        cells += spans
        for arm in ARMS:
            turned = [cosines(chain) for chain in chains[arm]]
            moved[arm].append([numbers(chain) for chain in turned])
            shapes += [_shape(span, arm, [c[i] for c in turned]) for i, span in enumerate(spans)]
        apart.append(_separation(site, chains["real"], chains["null"]))
        for arm in ARMS:
            stages += _stages(run, texts, site, arm, chains[arm])
    rows = rows_of(cells, *(_joined(moved[arm]) for arm in ARMS))
    by_match = _by_match(run, seeds, [cell for cell in cells if _moved(_at(rows, cell))])
    names = [NameRow(*cell, *name(_at(rows, cell), _at(by_match, cell))) for cell in cells]
    file = run / "drift" / "chain.json"
    report = DriftReport(
        run.name,
        len(seeds),
        texts.num_tokens,
        tuple(rows),
        tuple(by_match),
        tuple(names),
        tuple(shapes),
        tuple(stages),
        tuple(apart),
        file,
    )
    write_json(file, asdict(report) | {"file": str(file)})
    columns = [asdict(row) for row in rows]
    write_parquet(
        file.with_suffix(".parquet"), {key: [r[key] for r in columns] for key in columns[0]}
    )
    return report


def _joined(sites: Sequence[Sequence[dict[Measure, Tensor]]]) -> dict[Measure, Tensor]:
    """Return each measure as [R, cells], the transitions of all sites side by side."""
    return {
        measure: torch.cat(
            [torch.stack([chain[measure] for chain in chains]) for chains in sites], dim=1
        )
        for measure in MEASURES
    }


def _at(rows: Sequence[DriftRow], cell: tuple[str, int, int]) -> list[DriftRow]:
    return [row for row in rows if (row.site, row.from_step, row.to_step) == cell]


def _moved(rows: Sequence[DriftRow]) -> bool:
    return any(shown(row) for row in rows if row.measure != "decoupling")


def _by_match(
    run: Path, seeds: Sequence[int], cells: Sequence[tuple[str, int, int]]
) -> list[DriftRow]:
    """Return decoder and encoder rows by best match. A match costs M^2 D, so it is made only where
    a drift was shown."""
    if not cells:
        return []
    found: dict[Arm, list[dict[Measure, Tensor]]] = {arm: [] for arm in ARMS}
    for site in dict.fromkeys(cell[0] for cell in cells):
        spans = [cell[1:] for cell in cells if cell[0] == site]
        for arm in ARMS:
            turned = []
            for seed in seeds:
                chain = load_chain(run, site, arm, seed)
                turned.append([matched(chain[a], chain[b]) for a, b in spans])
            dec, enc = (
                torch.tensor([[measures.drift(c[which]) for c in t] for t in turned])
                for which in (0, 1)
            )
            found[arm].append({"decoder": dec, "encoder": enc})
    kept: tuple[Measure, ...] = ("decoder", "encoder")
    joined: dict[Arm, dict[Measure, Tensor]] = {
        arm: {key: torch.cat([site[key] for site in found[arm]], dim=1) for key in kept}
        for arm in ARMS
    }
    return rows_of(cells, joined["real"], joined["null"])


def _shape(span: tuple[str, int, int], arm: Arm, turned: Sequence[Cosines]) -> ShapeRow:
    shares = {key: 0.0 for key in measures.QUADRANTS}
    for c in turned:
        place_M = measures.quadrants(c.decoder_M, c.encoder_M)
        for number, key in enumerate(measures.QUADRANTS):
            shares[key] += float((place_M == number).double().mean()) / len(turned)
    decoder, encoder = (
        [measures.summarise(c[which])._asdict() for c in turned] for which in (0, 1)
    )
    means = [{key: _mean([s[key] for s in part]) for key in part[0]} for part in (decoder, encoder)]
    return ShapeRow(*span, arm, shares, *means)


def _separation(
    site: str, real: Sequence[dict[int, SAE]], null: Sequence[dict[int, SAE]]
) -> SiteRow:
    """Compare chains by how they moved from the first SAE of their seed to the last stage."""
    moved = torch.stack([d[-1] - d[0] for d in map(decoders, [*real, *null])])
    found = separation(measures.pairwise_similarity(moved), len(real), paired=True)
    return SiteRow(site, found.statistic, found.p_value, found.p_floor, found.complete)


def _stages(
    run: Path, texts: Texts, site: str, arm: Arm, chains: Sequence[dict[int, SAE]]
) -> list[StageRow]:
    """Count features on the same tokens at every stage: the stage's own activations (real arm) or
    the base's (null arm)."""
    steps = list(chains[0])
    sources = [step if arm == "real" else 0 for step in steps]
    acts = {source: load_acts(run, texts, source, site) for source in sources}
    kept: list[list[measures.Usage]] = [
        [_usage(acts[source], chain[step]) for source, step in zip(sources, steps, strict=True)]
        for chain in chains
    ]
    rows = []
    lives = []
    for chain, used in zip(chains, kept, strict=True):
        gone_SM = torch.stack([resampled(chain[step]) for step in steps])
        counts_SM = torch.stack([u.count_M for u in used])
        lives.append(measures.lifecycle(counts_SM, used[0].num_tokens, gone_SM))
    for s, step in enumerate(steps):
        seeds = [
            measures.published_lifecycle(measures.density(u[max(s - 1, 0)]), measures.density(u[s]))
            for u in kept
        ]
        rows.append(
            StageRow(
                site,
                step,
                arm,
                count=_mean([measures.effective_count(u[s], "frequency") for u in kept]),
                energy_count=_mean([measures.effective_count(u[s], "energy") for u in kept]),
                alive=_mean([float(x.alive[s].sum()) for x in lives]),
                born=_mean([float(x.born[s - 1].sum()) if s else 0.0 for x in lives]),
                died=_mean([float(x.died[s - 1].sum()) if s else 0.0 for x in lives]),
                published_born=_mean([float(x.born.sum()) for x in seeds]),
                published_died=_mean([float(x.died.sum()) for x in seeds]),
            )
        )
    return rows


def _usage(acts_ND: Float[Tensor, "N D"], sae: SAE) -> measures.Usage:
    codes = sae.encode(acts_ND)
    return measures.usage(codes.idx_Nk, codes.value_Nk, sae.d_sae)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- the terminal --------------------------------------------------------------------------------


def drift_table(report: DriftReport) -> TextTable:
    """Return one row a transition and measure: real, null, share, excess, p and q."""
    floor = max((row.p_floor for row in report.transitions), default=float("nan"))
    rows: list[Sequence[str]] = []
    for site in dict.fromkeys(row.site for row in report.transitions):
        rows.append([site.removesuffix(".hook_resid_post")])
        rows += [_drift_row(row) for row in report.transitions if row.site == site]
        matched = [_drift_row(row) for row in report.by_match if row.site == site]
        rows += [["best match"], *matched] if matched else []
    title = (
        f"{report.run}: drift of decoder and encoder (1 - mean cosine), decoupling (1 - r), "
        f"{report.seeds} seeds per arm, {report.tokens:,} tokens; 95 % intervals over seeds; "
        f"p can't be under {floor:.3f}; q of all measures"
    )
    heads = ("steps", "measure", "real", "null", "null/real %", "excess, 1e-3", "p", "q")
    return table(title, heads, rows, words=("steps", "measure"))


def _drift_row(row: DriftRow) -> tuple[str, ...]:
    head = (f"{row.from_step}-{row.to_step}", row.measure)
    if row.real != row.real:
        return (*head, "undefined")
    digits = 0 if row.measure == "decoupling" else 1
    value, low, high = (f"{1e3 * x:+.{digits}f}" for x in row.excess)
    return (
        *head,
        f"{row.real:.4f}",
        f"{row.null:.4f}",
        _share(row.share),
        f"{value} [{low}, {high}]",
        f"{row.p:.3f}",
        f"{row.q:.3f}",
    )


def _share(share: tuple[float, float, float]) -> str:
    value, low, high = share
    if abs(low) == float("inf") or abs(high) == float("inf"):
        return f"{100 * value:.0f} [any]"
    return f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def stage_table(report: DriftReport) -> TextTable:
    """Return features in use by stage, both arms."""
    title = (
        "features in use: 2^H by frequency and by energy; births and deaths beyond counting noise "
        "(bursts within a text count as firings: read them beside the null arm)"
    )
    rows = [
        (
            row.site.removesuffix(".hook_resid_post"),
            str(row.step),
            row.arm,
            f"{row.count:.0f}",
            f"{row.energy_count:.0f}",
            f"{row.alive:.0f}",
            f"{row.born:.1f}",
            f"{row.died:.1f}",
        )
        for row in report.stages
    ]
    heads = ("site", "step", "arm", "2^H", "2^H energy", "alive", "born", "died")
    return table(title, heads, rows, words=("site", "arm"))


def verdict_lines(report: DriftReport) -> list[str]:
    """Return for each site what the null arm lets be said of decoder, encoder and decoupling."""
    lines = []
    for site in report.sites:
        shares = []
        for measure in ("decoder", "encoder"):
            rows = [r for r in report.transitions if (r.site, r.measure) == (site.site, measure)]
            share = sum(r.null for r in rows) / max(sum(r.real for r in rows), 1e-300)
            shares.append(f"{share:.0%} of the {measure}'s")
        name = site.site.removesuffix(".hook_resid_post")
        lines.append(f"{name}: {' and '.join(shares)} drift is also there without RL")
        named = [n for n in report.names if n.site == site.site]
        lines += [f"  {n.from_step} to {n.to_step}: {n.sentence}" for n in named]
        common = "more alike in" if site.complete else "no more alike in"
        lines.append(
            f"  chains of an arm are {common} the direction of their movement than chains across "
            f"arms (p = {site.p:.2f}); how far they moved is in the table"
        )
    if all(n.name == NO_DRIFT for n in report.names):
        lines.append("not shown is no evidence of absence: few seeds see only large differences")
    return lines


def draw_drift(report: DriftReport, target: Path) -> Path:
    """Write real and null drift of every measure and transition as an SVG file."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    sites = [site.site for site in report.sites]
    figure = Figure(figsize=(3.2 * len(sites), 2.2 * len(MEASURES)), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(len(MEASURES), len(sites), sharey="row", squeeze=False)
    for line, measure in zip(panels, MEASURES, strict=True):
        for axes, site in zip(line, sites, strict=True):
            rows = [r for r in report.transitions if (r.site, r.measure) == (site, measure)]
            places = range(len(rows))
            # the interval of the excess, drawn around the real bar: it clears the null bar or not
            down = [r.excess[0] - r.excess[1] for r in rows]
            up = [r.excess[2] - r.excess[0] for r in rows]
            axes.bar(
                [x - 0.2 for x in places],
                [r.real for r in rows],
                0.4,
                label="real",
                yerr=[down, up],
                error_kw={"elinewidth": 1, "capsize": 2},
            )
            axes.bar(
                [x + 0.2 for x in places], [r.null for r in rows], 0.4, label="null", hatch="//"
            )
            axes.set_xticks(places, [f"{r.from_step}-{r.to_step}" for r in rows])
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(measure if measure == "decoupling" else f"{measure} drift")
    for axes, site in zip(panels[0], sites, strict=True):
        axes.set_title(site.removesuffix(".hook_resid_post"), fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("steps")
    figure.suptitle(f"{report.run}: {report.seeds} seeds per arm, 95 % of the excess", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    with rc_context({"svg.hashsalt": "operando"}), atomic_path(target) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return target
