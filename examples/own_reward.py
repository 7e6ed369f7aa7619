"""Train with two rewards of one's own: one number a completion, and one number a token."""

from operando import Recipe, Trace, launch, make_console


def is_short(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Give 1 for a completion of at most 24 tokens."""
    return [1.0 if len(ids) <= 24 else 0.0 for ids in completion_ids]


def sure_tokens(completion_ids: list[list[int]], trace: Trace, **_: object) -> list[list[float]]:
    """Give every token minus its entropy in nats, as the policy had it when it was scored."""
    entropy_BT = -trace.entropy_BT
    return [entropy_BT[b, : len(ids)].tolist() for b, ids in enumerate(completion_ids)]


recipe = Recipe.model_validate(
    {
        "name": "own-reward",
        "steps": 2,
        "model": {"id": "starter", "lora": {"rank": 8}},
        "task": {"kind": "words", "num_train": 200, "num_held_out": 32},
        "rewards": {
            "correct": {"kind": "correct"},
            "short": {"kind": "function", "weight": 0.1},
            "sure": {"kind": "function", "weight": 0.001},
        },
    }
)
functions = {"short": is_short, "sure": sure_tokens}
print(launch(make_console(), recipe, functions=functions))
