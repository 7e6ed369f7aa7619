"""Ask a run's base and its last step the same problems, and compare them.

python examples/compare_checkpoints.py runs/demo
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

from operando import Question, ask, checkpoints, compare, load_recipe, load_task, open_each

folder = Path(sys.argv[1])
recipe = load_recipe(str(folder / "recipe.toml"))
task = load_task(recipe.task)
question = Question("mine", task, task.held_out[:100], recipe.prompt, max_completion_length=64)

base, trained = (
    ask(model, question, datetime.now(UTC)) for model in open_each(checkpoints(folder))
)
change = compare(base, trained)
value, low, high = change.difference
print(f"{value:+.1%} ({low:+.1%} to {high:+.1%}); {change.gained} gained, {change.lost} lost")
for before, after in zip(base, trained, strict=True):
    if before.verdict.correct and not after.verdict.correct:
        print(f"lost: {after.example.question}  {after.text!r}  {after.verdict.reason}")
