"""What process rewards make of gold solutions, and of texts that farm them.

    python benchmarks/process_reward.py gsm8k_train.jsonl.gz

Gold: the worked solutions of GSM8K, which are right, without their <<...>> annotations; the
annotations' values are the milestones. A checker that calls many of their equations wrong punishes
right answers. Farms: texts that earn without working on the problem. Printed as Markdown tables.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from operando.recipe.data import WordsTaskConfig
from operando.recipe.rewards import ProcessReward
from operando.rewards.process import RECURSIVE_LM_EQUATION, process, reached, steps_of
from operando.tasks.words import load_words
from operando.types import Example, Prompt, Rollout

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
)
SOLUTION = "Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips altogether."
GOLD = "72"
TEXTS = {
    "the gold solution": f"{SOLUTION} #### 72",
    "right steps, wrong answer": f"{SOLUTION} #### 70",
    "the answer alone": "#### 72",
    "trivial, thrice": "1+1=2; 1+1=2; 1+1=2 #### 5",
    "distinct trivia": "1+1=2; 2+1=3; 3+1=4 #### 5",
    "identities": "48*1=48; 48+0=48; 48/1=48 #### 48",
    "irrelevant chain": "48+48=96; 96+48=144; 144+48=192 #### 5",
    "self-consistent chain": "48+48=96; 96+48=144; 144+48=192 #### 192",
    "one wrong among trivia": "1+1=3; 1+1=2; 2+2=4; 3+3=6 #### 5",
    "every small sum": "; ".join(f"{a}+{b}={a + b}" for a in range(9) for b in range(9))
    + " #### 5",
    "two answers": "#### 70 #### 72",
}


def recursive_lm_equations(text: str) -> tuple[int, int]:
    """Return how many equations recursive_lm's expression finds, and how many it calls wrong."""
    compute: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }
    found = wrong = 0
    for a, op, b, shown in RECURSIVE_LM_EQUATION.findall(text):
        left, right = Fraction(a), Fraction(b)
        if op == "/":
            is_right = right != 0 and abs(left / right - Fraction(shown)) < Fraction(1, 10**6)
        else:
            is_right = abs(compute[op](left, right) - Fraction(shown)) < Fraction(1, 10**6)
        found, wrong = found + 1, wrong + (not is_right)
    return found, wrong


def our_equations(text: str) -> tuple[int, int]:
    """Return how many equations ours reads, and how many it calls wrong."""
    verdicts = [e.verdict for e in steps_of(text)]
    return verdicts.count("right") + verdicts.count("wrong"), verdicts.count("wrong")


def gold_table(file: Path) -> list[str]:
    """Return what both checkers say of every worked solution of the file."""
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    texts = [re.sub(r"<<.*?>>", "", answer).split("####")[0] for answer in answers]
    rows = [
        "| checker | equations | called wrong | rows without one | rows with a wrong one |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, read in (
        ("recursive_lm's expression", recursive_lm_equations),
        ("ours", our_equations),
    ):
        counts = [read(text) for text in texts]
        total, wrong = sum(c[0] for c in counts), sum(c[1] for c in counts)
        none = sum(c[0] == 0 for c in counts) / len(counts)
        punished = sum(c[1] > 0 for c in counts) / len(counts)
        rows.append(f"| {name} | {total:,} | {wrong / total:.2%} | {none:.1%} | {punished:.1%} |")
    reach = possible = 0
    for answer, text in zip(answers, texts, strict=True):
        values = re.findall(r"<<.*?=([^=<>]*)>>", answer)
        gold = {Fraction(value.replace(",", "")) for value in values}
        reach, possible = reach + reached(text, gold).credited, possible + len(gold)
    return [
        f"{len(texts):,} solutions.",
        "",
        *rows,
        "",
        f"Milestones reached by the gold solutions: {reach:,} of {possible:,} "
        f"({reach / possible:.1%}).",
    ]


def farm_table() -> list[str]:
    """Return what each scheme pays for each text on one problem, whose gold answer is 72."""
    task = load_words(WordsTaskConfig(kind="words", num_train=1, num_held_out=1))
    example = Example("e", QUESTION, GOLD, SOLUTION)
    rows = ["| text | seed | milestone | grounded |", "|---|---:|---:|---:|"]
    for name, text in TEXTS.items():
        rollout = Rollout(Prompt(example, "q", (1,)), 0, 0, text, (1,), (0.0,), False)
        paid = [
            process(ProcessReward(kind="process", scheme=scheme), task)([rollout])[0]
            for scheme in ("recursive_lm", "milestone", "grounded")
        ]
        rows.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in paid)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gsm8k", type=Path, help="GSM8K's training file, .jsonl or .jsonl.gz")
    print("\n".join([*gold_table(parser.parse_args().gsm8k), "", *farm_table()]))


if __name__ == "__main__":
    main()
