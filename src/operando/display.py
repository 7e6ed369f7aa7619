"""What the terminal shows of a run: a live table on a terminal, else one line an evaluation, and
one a minute where steps are slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from operando.models.freeze import Certificate
from operando.pretrain.fit import PretrainProgress
from operando.setup import StepReport
from operando.tables import TextTable, progress_bar, table
from operando.text import shown

QUIET = 60.0  # seconds without a line, off a terminal
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


def make_console() -> Console:
    """Return the console for progress and tables: stderr, so that stdout holds only the result."""
    return Console(stderr=True)


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a callable (done, of) that shows a bar with rate and time left; off a terminal a line a
    minute."""
    told = time.monotonic()

    def tell(done: int, of: int) -> None:
        nonlocal told
        progress.update(task, completed=done, total=of)
        if not console.is_terminal and time.monotonic() - told >= QUIET:
            told = time.monotonic()
            console.print(f"{what} {done}/{of}", highlight=False, markup=False)

    with progress_bar(console) as progress:
        task = progress.add_task(what, total=None)
        yield tell


class RunDisplay:
    """Shows a run while it goes. Use as a context manager; call `show` with every StepReport."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self.console = console
        self.title = title
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.held_out: list[tuple[int, float]] = []
        self.sample = ""
        self.started = self.told = time.monotonic()
        self.progress = progress_bar(console, "step {task.completed}/{task.total}")
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
            self.sample = shown(best.prompt.text[-160:] + best.completion[:240])
        if "eval/correct" in metrics:
            self.held_out.append((report.step, metrics["eval/correct"]))
        if self.console.is_terminal:
            self.progress.update(self.task, completed=report.step)
            self.live.update(Group(self._table(), Text(self.sample, style="dim"), self.progress))
            self.live.refresh()
        elif "eval/correct" in metrics or time.monotonic() - self.told >= QUIET:
            self.told = time.monotonic()
            self.console.print(self._line(report), highlight=False, soft_wrap=True)

    def _table(self) -> TextTable:
        kinds = list(SHOWN)
        parts = [k for k in self.last if k.startswith("rewards/") and k.endswith("/mean")]
        kinds[1:1] = [(f"  {key.split('/')[1]}", key, "{:.3f}") for key in parts]
        rows: list[tuple[str | Text, ...]] = [
            (label, form.format(self.first[key]), Text(form.format(self.last[key]), style="bold"))
            for label, key, form in kinds
            if key in self.last
        ]
        if self.held_out:
            path = " ".join(f"{100 * accuracy:.0f}" for _, accuracy in self.held_out)
            rows.append((f"held-out accuracy, %: {path}",))
        return table(self.title, ("", "start", "now"), rows)

    def _line(self, report: StepReport) -> str:
        m: Mapping[str, float] = report.metrics
        seconds = time.monotonic() - self.started
        text = f"step {report.step}/{report.steps}"
        if "eval/correct" in m:
            text += f"  held-out {m['eval/correct']:.1%}"
        for label, key, form in SHOWN:
            if key in m:
                text += f"  {label} {form.format(m[key])}"
        if report.step:
            left = seconds / report.step * (report.steps - report.step)
            text += f"  {seconds:.0f} s, {left:.0f} s left"
        return text


class PretrainDisplay:
    """A progress bar of training on text on a terminal, a line each tenth elsewhere."""

    def __init__(self, console: Console, steps: int, verb: str = "pre-training") -> None:
        self.console = console
        self.first: tuple[int, float] | None = None
        self.progress = progress_bar(console, "{task.description}")
        self.task = self.progress.add_task(verb, total=steps)

    def __enter__(self) -> PretrainDisplay:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def show(self, at: PretrainProgress) -> None:
        """Take in one step."""
        text = f"step {at.step}/{at.steps} loss {at.loss:.3f} {at.tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.task, completed=at.step, description=text)
        step, began = self.first = self.first or (at.step, time.monotonic())
        if not self.console.is_terminal and at.step % max(1, at.steps // 10) == 0:
            pace = (time.monotonic() - began) / max(1, at.step - step)
            left = f", {pace * (at.steps - at.step):.0f} s left" if at.step > step else ""
            self.console.print(text + left, highlight=False)


class StageDisplay:
    """Work of several stages: a bar with the stage's name on a terminal, a line each elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console, self.stage = console, ""
        self.started = time.monotonic()
        self.progress = progress_bar(console)
        self.task = self.progress.add_task("", total=None)

    def __enter__(self) -> StageDisplay:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def show(self, stage: str, done: int, of: int) -> None:
        """Take in how far a stage is."""
        if stage != self.stage:
            self.stage = stage
            self.progress.reset(self.task, total=of, description=stage)
            if not self.console.is_terminal:
                seconds = time.monotonic() - self.started
                self.console.print(f"{seconds:.0f} s  {stage}", highlight=False)
        self.progress.update(self.task, completed=done, total=of)


class StudyDisplay:
    """A bar of runs on a terminal; elsewhere a line for each, with the rate and the time left."""

    def __init__(self, console: Console, verb: str, total: int, left: int) -> None:
        self.console, self.verb, self.total = console, verb, total
        self.done = self.skipped = total - left
        self.started = time.monotonic()
        self.progress = progress_bar(console, "{task.description}")
        self.task = self.progress.add_task(self._text(), total=total, completed=self.done)

    def __enter__(self) -> StudyDisplay:
        if self.console.is_terminal:
            self.progress.start()
        elif self.skipped:
            self.console.print(f"{self.skipped} of {self.total} runs are done", highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def show(self, name: str) -> None:
        """Take in one run that is done."""
        self.done += 1
        self.progress.update(self.task, completed=self.done, description=self._text())
        if not self.console.is_terminal:
            each = (time.monotonic() - self.started) / (self.done - self.skipped)
            text = f"{self._text()}: {name}, {each:.1f} s each, "
            text += f"{each * (self.total - self.done):.0f} s left"
            self.console.print(text, highlight=False, soft_wrap=True)

    def _text(self) -> str:
        return f"{self.verb} {self.done} of {self.total}"


def show_certificate(console: Console, certificate: Certificate) -> None:
    """Print the checks of an insulation certificate."""
    rows = []
    for check in certificate.checks:
        style = "" if check.passed else "bold red"
        verdict = "pass" if check.passed else "FAIL"
        rows.append([Text(cell, style) for cell in (check.name, verdict, check.detail)])
    heads = ("check", "", "found")
    console.print(table("", heads, rows, words=heads))
    first, last = certificate.layers[0], certificate.layers[-1]
    console.print(
        f"step {certificate.step}: {certificate.trained_parameters:,} parameters trained in "
        f"{len(certificate.layers)} of {certificate.num_layers} layers ({first} to {last}); "
        f"{'insulated' if certificate.passed else 'NOT insulated'}",
        highlight=False,
    )
