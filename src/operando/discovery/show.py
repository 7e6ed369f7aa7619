"""What a discovery found, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from operando.discovery.directions import Extracted, Steered
from operando.discovery.features import Discovery
from operando.stats.intervals import Interval
from operando.tables import TextTable, table


def show_discovery(console: Console, found: Discovery) -> None:
    """Print the features, the AUC table with its controls, and the gate."""
    (right, num), (judge_right, judge_num) = found.find, found.judge
    console.print(
        f"{found.site}, {found.encoder}, {found.num_features} features. Found on {num} answers "
        f"({right} right; {found.mixed_prompts} prompts with both), judged on {judge_num} answers "
        f"of other prompts ({judge_right} right).",
        highlight=False,
    )
    if found.features:
        console.print(_features(found))
    console.print(_measures(found))
    gate = "open" if found.gate.passed else "closed: " + "; ".join(found.gate.reasons)
    console.print(f"gate {gate}", highlight=False, markup=False)


def _features(found: Discovery) -> TextTable:
    rows = [
        (
            str(feature.id),
            "helpful" if feature.sign > 0 else "harmful",
            f"{feature.d:+.2f}",
            f"{feature.q_value:.3f}",
            f"{feature.scale:.2f}",
        )
        for feature in found.features
    ]
    title = f"features (under shuffled labels the largest |d| reaches {found.null_max:.2f}, 95 %)"
    return table(title, ("feature", "sign", "d", "q", "scale"), rows, words=("sign",))


def _measures(found: Discovery) -> TextTable:
    rows = [
        (
            m.name,
            f"{m.auc:.3f}",
            f"[{m.low:.3f}, {m.high:.3f}]",
            f"{m.within:.3f}",
            f"{m.controlled:.3f} [{m.controlled_low:.3f}, {m.controlled_high:.3f}]",
            f"{m.rho:+.2f} ({m.rho_bound:.2f})",
        )
        for m in found.measured
    ]
    rows += [
        (
            f"{n.name}, {n.n} draws",
            f"{n.auc:.3f}",
            f"95 %: {n.auc_q95:.3f}",
            f"95 %: {n.within_q95:.3f}",
            "",
            f"{n.rho:+.2f}",
        )
        for n in found.nulls
    ]
    heads = ("score", "AUC", "95 %", "same prompt", "same length", "rho (bound)")
    return table("right against wrong answers of prompts held out", heads, rows, words=("score",))


def show_directions(console: Console, found: Extracted) -> None:
    """Print the arms' accuracies and what denoising keeps of the real one."""
    layers = f"{found.layers[0]}-{found.layers[-1]}"
    console.print(f"layers {layers}, {found.num_pairs} pairs", highlight=False)
    console.print(accuracy_table(found.accuracy, found.num_held_out, found.cosine_to_real))
    rows = []
    for row in found.retained:
        side = "left, writers" if row.side == "left" else "right, readers"
        numbers = (f"{row.kept:.3f}", f"{row.null:.3f}", f"{row.cosine:.3f}")
        rows.append((side, str(row.m), *numbers))
    heads = ("side", "m", "energy kept", "chance m/d", "cosine to the raw vector")
    title = "the real vector in the span of m singular vectors of W, mean of modules"
    console.print(table(title, heads, rows, words=("side",)))


def accuracy_table(
    accuracy: Mapping[str, Interval], num: int, cosine: Mapping[str, float]
) -> TextTable:
    """Return the table of pairs ordered rightly."""
    rows = []
    for arm, share in accuracy.items():
        near = f"{cosine[arm]:+.3f}" if arm in cosine else ""
        rows.append((arm, f"{share.value:.0%}", f"[{share.low:.0%}, {share.high:.0%}]", near))
    heads = ("direction", "right", "95 %", "cosine to real")
    title = f"pairs whose hack side scores higher, {num} held out"
    return table(title, heads, rows, words=("direction",))


def steering_table(rows: Sequence[Steered]) -> TextTable:
    """Return what answers turn into when a direction is added."""
    labels = sorted({label for row in rows for label in row.labels})
    cells = [
        (
            row.arm,
            f"{row.scale:+g}",
            str(row.correct),
            *(str(row.labels.get(label, 0)) for label in labels),
        )
        for row in rows
    ]
    title = f"greedy answers to {rows[0].n} held-out prompts with scale * v added"
    return table(title, ("direction", "scale", "right", *labels), cells, words=("direction",))
