"""A long run must not grow: memory and open files every 100 steps, the report's time at times.

    python -m tests.storm.long --steps 2000 --seconds 240

The exit code is 1 if the second half of the run takes over 5 % more memory, or one open file more,
than its middle.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
EVERY = 100
SMALL = (
    "eval={every=100,num=4}",
    "rollout.num_prompts=2",
    "rollout.num_generations=2",
    "rollout.max_completion_length=8",
    "checkpoint={every=100,keep=2}",
    "rewards={watch={kind='function'}}",
)


class Enough(BaseException):
    """The time is spent."""


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def memory() -> float:
    """Return the MB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def report_seconds(run: Path) -> float:
    """Return how long a process of its own takes for the report, imports included."""
    began = time.monotonic()
    command = [sys.executable, "-m", "operando", "report", str(run)]
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=240.0)
    given = parser.parse_args()

    from rich.console import Console

    from operando.launch import launch
    from operando.rewards.base import TrainerState
    from tests.integration.runs import tiny

    began, seen = time.monotonic(), []

    with tempfile.TemporaryDirectory(prefix="long-") as folder:
        run = Path(folder) / "tiny"

        def watch(
            completion_ids: Sequence[Sequence[int]], trainer_state: TrainerState, **_: object
        ) -> list[float]:
            step = trainer_state.global_step
            if step and step % EVERY == 0 and (not seen or seen[-1][0] != step):
                row = (step, memory(), len(os.listdir("/proc/self/fd")))
                seen.append(row)
                text = f"step {step:5}: {row[1]:6.1f} MB, {row[2]} open files"
                if step % (given.steps // 4) == 0:
                    text += f", report in {report_seconds(run):.1f} s"
                say(f"{text}, {time.monotonic() - began:.0f} s since the start")
                if time.monotonic() - began > given.seconds:
                    raise Enough
            return [float(sum(ids) % 5) for ids in completion_ids]

        try:
            recipe = tiny(Path(folder), *SMALL, f"steps={given.steps}")
            launch(Console(quiet=True), recipe, functions={"watch": watch})
        except Enough:
            say(f"stopped after {given.seconds:.0f} s")
    (_, middle, files), (_, last, files_last) = seen[len(seen) // 2], seen[-1]
    say(f"from the middle to the end: {last - middle:+.1f} MB, {files_last - files:+d} open files")
    return int(last > 1.05 * middle or files_last > files)


if __name__ == "__main__":
    sys.exit(main())
