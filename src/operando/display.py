"""What the terminal shows of a run: a live table on a terminal, else one line an evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from operando.setup import StepReport

SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("true accuracy, rollouts", "train/correct", "{:.1%}"),
    ("groups without signal", "frac_reward_zero_std", "{:.0%}"),
    ("KL to the start", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length", "completions/mean_length", "{:.1f}"),
    ("cut at the limit", "completions/clipped_ratio", "{:.0%}"),
    ("gradient norm", "grad_norm", "{:.3f}"),
    ("sampler gap", "sampler/gap_mean", "{:.5f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)


class RunDisplay:
    """Shows a run while it goes. Use as a context manager; call `show` with every StepReport."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self.console = console
        self.title = title
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.held_out: list[tuple[int, float]] = []
        self.sample = ""
        self.started = time.monotonic()
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self.task = self.progress.add_task("train", total=steps)
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> RunDisplay:
        if self.console.is_terminal:
            self.live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.live.__exit__(kind, error, trace)

    def show(self, report: StepReport) -> None:
        """Take in one step."""
        metrics = report.metrics
        self.last |= metrics
        for key, value in metrics.items():
            self.first.setdefault(key, value)
        if report.batch is not None:
            best = max(report.batch.rollouts, key=lambda r: len(r.completion))
            self.sample = best.prompt.text[-160:] + best.completion[:240]
        if "eval/correct" in metrics:
            self.held_out.append((report.step, metrics["eval/correct"]))
        if self.console.is_terminal:
            self.progress.update(self.task, completed=report.step)
            self.live.update(Group(self._table(), Text(self.sample, style="dim"), self.progress))
            self.live.refresh()
        elif "eval/correct" in metrics:
            self.console.print(self._line(report), highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        table.add_column("start", justify="right")
        table.add_column("now", justify="right", style="bold")
        rows = list(SHOWN)
        parts = [k for k in self.last if k.startswith("rewards/") and k.endswith("/mean")]
        rows[1:1] = [(f"  {key.split('/')[1]}", key, "{:.3f}") for key in parts]
        for label, key, form in rows:
            if key in self.last:
                table.add_row(label, form.format(self.first[key]), form.format(self.last[key]))
        if self.held_out:
            path = " ".join(f"{100 * accuracy:.0f}" for _, accuracy in self.held_out)
            table.add_row("held-out accuracy, %", "", path)
        return table

    def _line(self, report: StepReport) -> str:
        m: Mapping[str, float] = report.metrics
        seconds = time.monotonic() - self.started
        text = f"step {report.step}/{report.steps}  held-out {m['eval/correct']:.1%}"
        for label, key, form in SHOWN:
            if key in m:
                text += f"  {label} {form.format(m[key])}"
        if report.step:
            left = seconds / report.step * (report.steps - report.step)
            text += f"  {seconds:.0f} s, {left:.0f} s left"
        return text
