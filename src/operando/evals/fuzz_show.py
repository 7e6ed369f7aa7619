"""What the terminal shows of fuzzed rewards: breaches, and the smallest example of each."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from operando.evals.fuzz import EPSILON, FuzzResult, Row
from operando.tables import table


def show_fuzz(result: FuzzResult) -> Group:
    """Return every breach as a table, whether each reward reads the answer, then the smallest
    example of each finding."""
    cells = []
    for name, reads in result.reads.items():
        rows = [row for row in result.rows if row.reward == name]
        if not any(row.breaches and not row.is_evasion for row in rows):
            tried = sum(row.tried for row in rows if not row.is_evasion)
            said = "nothing found" if reads == "right" else "nothing else found"
            cells.append((name, said if tried else "nothing tried", "", f"0/{tried}"))
        for row in sorted(rows, key=lambda row: row.is_evasion):
            if row.breaches:
                must = "(evasion)" if row.is_evasion else row.must
                most = f"{row.largest_gain:.3f}" if row.largest_gain > EPSILON else "free"
                tried = f"{row.breaches}/{row.tried}"
                cells.append((name, f"{row.prop} {row.edit}", must, tried, most))
    cells += [(name, "left out: it wants trace") for name in result.left_out]
    title = (
        f"{result.target}: {result.num_right} right and {result.num_wrong} wrong answers; "
        f"{len(result.findings)} findings"
    )
    heads = ("reward", "edit", "must", "breached/tried", "most")
    shown = table(title, heads, cells, words=heads[:3])
    said = [Text(line) for name in result.reads for line in _reads_words(result, name)]
    return Group(shown, *said, *(_example(row) for row in result.findings))


def _reads_words(result: FuzzResult, name: str) -> list[str]:
    """Return what is to say of a reward's answer to the first question; [] if it pays as it must"""
    is_accused = any(row.reward == name and row.prop == "P0" for row in result.findings)
    match result.reads[name]:
        case "never" if is_accused:
            return [f"{name}: it never reads the answer: a wrong one is rewarded like a right one."]
        case "never":
            return [
                f"{name}: this part alone never reads the answer; what is rewarded beside it must."
            ]
        case "not asked":
            return [
                f"{name}: it pays no right answer more than none, so whether it reads the "
                "answer could not be asked."
            ]
        case _:
            return []


def _example(row: Row) -> Text:
    assert row.smallest is not None, row
    one = row.smallest
    return Text(
        f"\n{row.reward}, {row.edit}:\n"
        f"  {one.paid_before:.3f}  {_short(one.before)!r}\n"
        f"  {one.paid_after:.3f}  {_short(one.after)!r}"
    )


def _short(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:55]} ... {text[-30:]}"
