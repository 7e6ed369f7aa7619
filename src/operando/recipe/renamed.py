"""Renamed values and keys: a mistake in a recipe, read as the new name in a stored file."""

from __future__ import annotations

from operando.errors import UserError

# (kind or table, key or option, old value): the name
RENAMED = {
    ("features", "mode", "seed"): "mechreward",
    ("process", "scheme", "seed"): "recursive_lm",
    ("rewards", "scheme", "seed"): "lf_grpo",
    ("projection", "preset", "seed"): "projected_grpo",
    ("sae train", "--mode", "seed"): "sae_rl",
    ("sae", "format", "seed"): "sae_rl",
    ("canary", "--classifier", "seed"): "mechreward",
}
KEYS = {("features", "pack"): "file"}  # (kind, old key): the name


def refuse_renamed(owner: str, option: str, value: str) -> None:
    """Raise a UserError that says what a renamed value of an option is called."""
    if new := RENAMED.get((owner, option, value)):
        raise UserError(f'{option} {value}: "{value}" was renamed to "{new}"')


def with_new_names(tables: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """Return a recipe's tables with every renamed value and key by its name, and a line for each.

    Example: with_new_names({"projection": {"preset": "seed"}})[1]
    """
    said: list[str] = []

    def walk(table: dict[str, object], path: tuple[str, ...]) -> dict[str, object]:
        new: dict[str, object] = {}
        for key, value in table.items():
            if isinstance(value, dict):
                new[key] = walk(value, (*path, key))
                continue
            owners = (table.get("kind"), *reversed(path))
            names = [RENAMED.get((str(o), key, str(value))) for o in owners]
            name = next((n for n in names if n), value)
            if name != value:
                said.append(f'{".".join((*path, key))}: "{value}" was renamed to "{name}"')
            called = KEYS.get((str(table.get("kind")), key), key)
            if called != key:
                said.append(f'{".".join((*path, key))}: this key was renamed to "{called}"')
            new[called] = name
        return new

    return walk(tables, ()), said
