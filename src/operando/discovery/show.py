"""What a discovery found, as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from operando.discovery.features import Discovery


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


def _features(found: Discovery) -> Table:
    table = Table(
        title=f"features (under shuffled labels the largest |d| reaches {found.null_max:.2f}, 95 %)"
    )
    for name in ("feature", "sign", "d", "q", "scale"):
        table.add_column(name, justify="right")
    for feature in found.features:
        table.add_row(
            str(feature.id),
            "helpful" if feature.sign > 0 else "harmful",
            f"{feature.d:+.2f}",
            f"{feature.q_value:.3f}",
            f"{feature.scale:.2f}",
        )
    return table


def _measures(found: Discovery) -> Table:
    table = Table(title="right against wrong answers of prompts held out")
    table.add_column("score")
    for name in ("AUC", "95 %", "same prompt", "same length", "rho (bound)"):
        table.add_column(name, justify="right")
    for m in found.measured:
        table.add_row(
            m.name,
            f"{m.auc:.3f}",
            f"[{m.low:.3f}, {m.high:.3f}]",
            f"{m.within:.3f}",
            f"{m.controlled:.3f}",
            f"{m.rho:+.2f} ({m.rho_bound:.2f})",
        )
    for n in found.nulls:
        table.add_row(
            f"{n.name}, {n.n} draws", f"{n.auc:.3f}", f"95 %: {n.auc_q95:.3f}", "", "",
            f"{n.rho:+.2f}",
        )  # fmt: skip
    return table
