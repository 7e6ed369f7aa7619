"""Token heat maps for notebooks, coloured as in the report."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from operando.report.samples import MISSING, quantise, scale_of

BOX = "font: 13px/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap"


@dataclass(frozen=True)
class TokenView:
    """Tokens coloured by one or more channels; a notebook shows it as HTML.

    Example: show_tokens([" 3", "+", "2"], [[0.4, -0.1, 0.0]], ["advantage"])
    """

    tokens: Sequence[str]
    values: Sequence[Sequence[float]]
    labels: Sequence[str]

    def _repr_html_(self) -> str:
        return "".join(
            self._channel(label, values)
            for label, values in zip(self.labels, self.values, strict=True)
        )

    def _channel(self, label: str, values: Sequence[float]) -> str:
        scale = scale_of([values])
        spans = []
        for token, value, q in zip(
            self.tokens, values, quantise(values, scale).tolist(), strict=True
        ):
            text = html.escape(token.replace("\n", "\u21b5\n"))
            title = html.escape(f"{token!r} {label} {value:+.4g}", quote=True)
            spans.append(f'<span title="{title}" style="background:{_colour(q)}">{text}</span>')
        head = f"<b>{html.escape(label)}</b> {-scale:g} (blue) to {scale:g} (red)"
        tokens = f'<div style="{BOX}">{"".join(spans)}</div>'
        return f'<div style="margin:6px 0"><div>{head}</div>{tokens}</div>'


def show_tokens(
    tokens: Sequence[str], values: Sequence[Sequence[float]], labels: Sequence[str]
) -> TokenView:
    """Return tokens coloured by each channel: one row of values and one label a channel."""
    assert len(values) == len(labels), f"{len(values)} channels, {len(labels)} labels"
    for label, row in zip(labels, values, strict=True):
        assert len(row) == len(tokens), f"{label}: {len(row)} values for {len(tokens)} tokens"
    return TokenView(tokens, values, labels)


def _colour(q: int) -> str:
    if q in (0, MISSING):
        return "transparent"
    hue = "202,0,32" if q > 0 else "5,113,176"
    return f"rgba({hue},{0.7 * abs(q) / 127:.3f})"
