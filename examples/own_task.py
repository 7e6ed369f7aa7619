"""Train on a task of one's own, made in Python: sums in words, and a function that grades them."""

from itertools import product

from operando import Example, Recipe, Task, launch, make_console, verifier


def is_right(example: Example, completion: str) -> tuple[bool, str]:
    """Say whether the last word of a completion is the answer, and why not."""
    words = completion.split()
    if not words:
        return False, "nothing said"
    return words[-1] == example.answer, f"said {words[-1]}"


def sums(names: list[str]) -> list[Example]:
    """Return one question for each name and pair of numbers."""
    return [
        Example(
            id=f"{name}/{a}/{b}",
            question=f"{name} has {a} pens and buys {b} more. How many pens does {name} have?",
            answer=str(a + b),
            columns={"name": name, "carries": a % 10 + b % 10 > 9},
        )
        for name, a, b in product(names, range(4, 20, 2), range(3, 20, 2))
    ]


task = Task(
    "sums", train=sums(["Tom", "Kim", "Leo"]), held_out=sums(["Zoe"]), verify=verifier(is_right)
)
recipe = Recipe.model_validate(
    {
        "name": "own-task",
        "steps": 12,
        "model": {"id": "starter", "lora": {"rank": 32}},
        "task": {"kind": "python"},
        "rollout": {"max_completion_length": 32},
        "rewards": {"correct": {"kind": "correct"}},
        "optim": {"lr": 1e-3},
    }
)
print(launch(make_console(), recipe, task=task))
