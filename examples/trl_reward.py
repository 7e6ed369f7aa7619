"""Train the starter model with a reward function written for TRL, unchanged."""

from operando import Recipe, launch, make_console


def ends_with_gold(completions, answer, **kwargs):
    """Give 1 for a completion that ends with the gold answer; `answer` is a dataset column."""
    pairs = zip(completions, answer, strict=True)
    return [1.0 if text.rstrip().endswith(f"#### {gold}") else 0.0 for text, gold in pairs]


recipe = Recipe.model_validate(
    {
        "name": "trl-reward",
        "steps": 4,
        "model": {"id": "starter", "lora": {"rank": 8}},
        "task": {"kind": "words", "num_train": 200, "num_held_out": 32},
        "rewards": {"mine": {"kind": "function"}},
    }
)
folder = launch(make_console(), recipe, functions={"mine": ends_with_gold})
print(folder)
