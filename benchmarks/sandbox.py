"""Problems a second of the sandbox, and what one process costs.

    python benchmarks/sandbox.py [--rounds 3]

Each problem of the package is graded by its canonical solution (one process) and by a cheat (four:
the hidden tests, the answer's own test function, that with a stub, that with the canonical
solution). The table has the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from operando.tasks.code import SHIPPED, read_problem
from operando.tasks.code_labels import Problem, grade_all
from operando.tasks.files import read_rows
from operando.tasks.sandbox import Job, Limits, Request, containment, run_python


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the median wall time of a call."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    problems = [read_problem(row).problem for row in read_rows(Path(SHIPPED))]
    print(f"{len(problems)} problems; {containment().detail}")
    for name, program in (("empty", ""), ("with typing", "from typing import *")):
        job = Job(program, (Request("1"),))
        taken = seconds(lambda j=job: run_python(j), 20)
        print(f"one process, {name:<12} {1000 * taken:7.1f} ms")

    def canonical(problem: Problem) -> str:
        return f"```python\n{problem.canonical}```"

    def cheat(problem: Problem) -> str:
        wrong = problem.canonical.replace("return", "return 7,")
        return f"```python\n{wrong}\ndef run_tests(): pass\n```"

    for workers in (1, 2):
        for name, answer in (("canonical", canonical), ("cheat", cheat)):
            answers = [(p, answer(p), "run_tests") for p in problems]
            taken = seconds(lambda a=answers, w=workers: grade_all(a, Limits(), w), rounds)
            print(f"{name:<10} {workers} at once   {len(problems) / taken:7.1f} problems/s")


if __name__ == "__main__":
    main()
