"""What is printed of a run off a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from operando import display
from operando.display import RunDisplay, counting
from operando.setup import StepReport


@pytest.mark.parametrize(("seconds", "told"), [(1.0, [0, 4]), (25.0, [0, 3, 4]), (70.0, range(5))])
def test_slow_steps_are_told_between_evaluations(
    seconds: float, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    written = io.StringIO()
    with RunDisplay(Console(file=written, width=400), "x", 4) as shown:
        for step in range(5):
            metrics = {"reward": 0.5} | ({"eval/correct": 0.25} if step in (0, 4) else {})
            shown.show(StepReport(step, 4, metrics, None))
            clock[0] += seconds
    lines = written.getvalue().splitlines()
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == list(told)
    assert ["held-out" in line for line in lines] == [step in (0, 4) for step in told]
    assert all("reward 0.500" in line for line in lines)


def test_counting_is_told_once_a_minute_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    written = io.StringIO()
    with counting(Console(file=written, width=80), "answers") as tell:
        for done in range(5):
            tell(done, 9)
            clock[0] += 25.0
    assert written.getvalue() == "answers 3/9\n"
