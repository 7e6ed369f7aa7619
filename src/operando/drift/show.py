"""Tables and pictures of drift: never a real number without its null beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from operando.drift.chain import ARMS, Arm, ChainConfig, sae_folder, training_of
from operando.drift.frozen_sae import FrozenReport
from operando.drift.model_diff import Effect, GridReport
from operando.drift.report import DriftReport
from operando.drift.transitions import MEASURES, NO_DRIFT, DriftRow
from operando.run import atomic_path
from operando.tables import TextTable, interval, table


def training_table(
    run: Path, configs: Mapping[str, ChainConfig], stages: Sequence[int], seeds: Sequence[int]
) -> TextTable:
    """Return how the training of the chains went: one row a site, stage and arm, mean over seeds.

    The curve of every SAE, an entry an epoch, is in its folder's training.json.
    """
    rows = []
    for site in configs:
        for step in stages:
            for arm in ("first",) if step == stages[0] else ARMS:
                own: Arm = "real" if arm == "first" else arm
                of_seed = [training_of(sae_folder(run, own, s, step, site)) for s in seeds]
                config, num = of_seed[0].settings, len(of_seed)
                rows.append(
                    (
                        site.removesuffix(".hook_resid_post"),
                        str(step),
                        arm,
                        str(config.k),
                        f"{config.lr:g}",
                        f"{sum(t.best_epoch for t in of_seed) / num:.1f} of {config.epochs}",
                        f"{sum(t.val_error for t in of_seed) / num:.4f}",
                        f"{sum(t.dead for t in of_seed) / num:.1%}",
                    )
                )
    title = f"{run.name}: SAE training, {len(seeds)} seeds an arm, error on held-out tokens"
    heads = ("site", "step", "arm", "k", "lr", "best epoch", "error / variance", "dead")
    return table(title, heads, rows, words=("site", "arm"))


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
        f"{report.seeds} seeds an arm, {report.tokens:,} tokens; 95 % intervals over seeds; "
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
    figure.suptitle(f"{report.run}: {report.seeds} seeds an arm, 95 % of the excess", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    with rc_context({"svg.hashsalt": "operando"}), atomic_path(target) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return target


def frozen_table(report: FrozenReport) -> TextTable:
    """Return one row a stage, then the warning row of unpaired halves of the base's texts."""
    rows = []
    for row in report.stages:
        first = row is report.stages[0]
        changed = report.control if first else row.changed
        rows.append(
            (
                f"{row.step} (base against itself)" if first else str(row.step),
                f"{row.fvu:.4f}",
                f"{row.cosine:.6f}",
                f"{changed} of {report.features}",
                f"{row.abs_delta:.2e}",
                _quartiles(row.beta),
                f"{row.delta_ce:+.4f}",
            )
        )
    changed = f"{report.halves.changed} of {report.features}"
    name = "0 (warning: unpaired halves of its texts)"
    rows.append((name, "", "", changed, f"{report.halves.abs_delta:.2e}"))
    title = (
        f"{report.run}: one SAE at {report.site}, not refitted; the same {report.tokens:,} tokens "
        f"at all stages, {report.sinks} sinks left out"
    )
    heads = ("step", "FVU", "cosine", "changed (q <= 0.05)", "|delta|", "beta", "delta CE")
    return table(title, heads, rows, words=("step",))


def _quartiles(beta: tuple[float, float, float] | None) -> str:
    if beta is None:
        return "none in use"
    low, median, high = beta
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def feature_table(report: FrozenReport, num: int = 10) -> TextTable:
    """Return the features whose mean activation changed most from the base to the last stage."""
    diff = report.diff
    order = diff.delta_act_TM[-1].abs().argsort(descending=True)[:num]
    moved = [j for j in order.tolist() if diff.delta_act_TM[-1, j] != 0]
    rows = []
    for j in moved:
        rate, act, beta = diff.rate_TM.value[:, j], diff.mean_act_TM[:, j], diff.beta_TM[:, j]
        low, high = float(diff.rate_TM.low[-1, j]), float(diff.rate_TM.high[-1, j])
        rows.append(
            (
                str(j),
                f"{rate[0]:.2%} to {rate[-1]:.2%} ({low:.2%} to {high:.2%})",
                f"{act[0]:.4f} to {act[-1]:.4f}",
                f"{diff.delta_act_TM[-1, j]:+.4f}",
                f"{beta[0]:.3f} to {beta[-1]:.3f}",
                f"{diff.q_TM[-1, j]:.3f}",
            )
        )
    title = f"features with the largest |delta|, base to step {report.stages[-1].step}"
    if not moved:
        title += ": none, every mean activation is the base's"
    return table(title, ("feature", "rate", "mean activation", "delta", "beta", "q"), rows)


def grid_table(report: GridReport) -> TextTable:
    """Return for each site and measure the 2 x 2 of model and text with the effects beside it."""
    rows = []
    for row in report.rows:
        base, last = f"{row.base_on_base:.4f}", f"{row.last_on_base:.4f}"
        site = row.site.removesuffix(".hook_resid_post")
        rows.append((site, row.measure, "base", base, last, _effect(row.model_on_base)))
        base, last = f"{row.base_on_last:.4f}", f"{row.last_on_last:.4f}"
        effects = (_effect(row.model_on_last), _effect(row.text))
        rows.append(("", "", "last", base, last, *effects))
    title = (
        f"{report.run}: the base and step {report.step} on the base's text ({report.prompts[0]} "
        f"prompts, {report.tokens[0]:,} tokens) and the last steps' ({report.prompts[1]} prompts, "
        f"{report.tokens[1]:,} tokens); 95 % intervals over prompts"
    )
    words = ("site", "measure", "text by")
    heads = (*words, "base", "last", "model changed", "text changed")
    return table(title, heads, rows, words)


def _effect(effect: Effect) -> str:
    limits = interval((effect.value, effect.low, effect.high), "+.4f")
    return f"{limits}, p {effect.p:.3f}"


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
