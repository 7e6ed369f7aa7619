"""Reading and writing recipes: TOML, one level of `base`, `a.b=value` overrides, clear mistakes."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from operando.errors import UserError, nearest
from operando.files import brief, is_file, parser_said, read_text
from operando.recipe.base import Config
from operando.recipe.deep import DeepPretrainRecipe
from operando.recipe.mixture import MixtureRecipe, SftRecipe
from operando.recipe.pipeline import PipelineRecipe
from operando.recipe.pretrain import PretrainRecipe
from operando.recipe.renamed import with_new_names
from operando.recipe.run import Recipe
from operando.recipe.study import StudyRecipe

C = TypeVar("C", bound=Config)


def recipe_file(name: str) -> Path:
    """Return the file that `name` means: a path, or a recipe that ships with operando."""
    here = Path(name)
    if is_file(here):
        return here
    shipped = shipped_recipes()
    wanted = here.name if here.suffix == ".toml" else f"{here.name}.toml"
    for file in shipped:
        if file.name == wanted:
            return file
    raise UserError(
        f"no recipe {brief(name)}: neither a file nor a shipped recipe."
        f"{nearest(wanted, [f.name for f in shipped])} "
        f"Shipped: {', '.join(f.stem for f in shipped)}"
    )


def shipped_recipes() -> list[Path]:
    """Return the recipes that come with operando (in a checkout: recipes/)."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob("**/*.toml"))
    return []


class Listed(NamedTuple):
    """What the first comments of a recipe say. Example: Listed("demo", "...?", "2 cores")"""

    name: str
    question: str
    hardware: str
    """Hardware and time."""


def listed(file: Path) -> Listed:
    """Return a recipe's name with the question and the hardware that its first comments name."""
    found = {"Question": "", "Hardware and time": ""}
    key = ""
    for line in read_text(file).splitlines():
        if not line.startswith("# "):
            break
        head, colon, rest = line.removeprefix("# ").partition(": ")
        if colon and (head in found or (head.isalpha() and head.istitle())):  # "Expected", "First"
            key, line = head, rest
        if key in found:
            found[key] = f"{found[key]} {line.removeprefix('# ')}".strip()
    return Listed(file.stem, found["Question"], found["Hardware and time"])


def read_toml(file: Path) -> dict[str, object]:
    """Return the tables of a recipe file, merged over its `base` where it names one."""
    tables = _parse_toml(file)
    base = tables.pop("base", None)
    if base is None:
        return tables
    base_file = file.parent / str(base)
    if not is_file(base_file):
        raise UserError(f"{file}: base = {base!r}, but there is no file {base_file}")
    below = _parse_toml(base_file)
    if "base" in below:
        raise UserError(f"{file}: base {base_file} has a base of its own; one level is the limit")
    return merge(below, tables)


def _parse_toml(file: Path) -> dict[str, object]:
    text = read_text(file)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid TOML: {parser_said(error)}") from error


def merge(below: dict[str, object], above: dict[str, object]) -> dict[str, object]:
    """Return `above` over `below`: tables merge, unless `kind` changes; all else replaces."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            same_kind = "kind" not in value or value["kind"] == old.get("kind")
            merged[key] = merge(old, value) if same_kind else value
        else:
            merged[key] = value
    return merged


def apply_override(tables: dict[str, object], override: str) -> dict[str, object]:
    """Return the tables with one `a.b=value` applied; the value is TOML, else a bare string."""
    key, sep, text = override.partition("=")
    if not sep or not key.strip():
        raise UserError(f"override {override!r}: expected a.b=value")
    try:
        value: object = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise UserError(f"override {brief(override)}: {parser_said(error)}") from error
    nested: object = value
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    assert isinstance(nested, dict)
    return merge(tables, nested)


def load_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Return the checked recipe of a file (or shipped name) with overrides applied.

    All mistakes are reported at once, in one UserError with file, key and nearest valid name.

    Example: load_recipe("demo", ("steps=20", "optim.lr=3e-4"))
    """
    return _load(Recipe, name, overrides)


def load_pretrain_recipe(
    name: str, overrides: tuple[str, ...] = ()
) -> PretrainRecipe | MixtureRecipe | DeepPretrainRecipe:
    """Return the checked pre-training recipe of a file (or shipped name): with a [mixture], with
    [habits], or with neither. An override can't turn one into the other."""
    tables = read_toml(recipe_file(name))
    if "habits" in tables:
        return _load(DeepPretrainRecipe, name, overrides)
    return _load(MixtureRecipe if "mixture" in tables else PretrainRecipe, name, overrides)


def load_sft_recipe(name: str, overrides: tuple[str, ...] = ()) -> SftRecipe:
    """Return the checked fine-tuning recipe of a file (or shipped name)."""
    return _load(SftRecipe, name, overrides)


def load_study_recipe(name: str) -> StudyRecipe:
    """Return the checked study of a file (or shipped name)."""
    return _load(StudyRecipe, name, ())


def load_pipeline_recipe(name: str, overrides: tuple[str, ...] = ()) -> PipelineRecipe:
    """Return the checked pipeline of a file (or shipped name)."""
    return _load(PipelineRecipe, name, overrides)


def _load(kind: type[C], name: str, overrides: tuple[str, ...]) -> C:
    file = recipe_file(name)
    tables = read_toml(file)
    if "arms" in tables and kind is not StudyRecipe:
        raise UserError(f"{file} is a study: operando study {name}")
    if "rl" in tables and kind is not PipelineRecipe:
        raise UserError(f"{file} is a pipeline: operando pipeline {name}")
    for override in overrides:
        tables = apply_override(tables, override)
    return check(kind, tables, str(file))


def check(kind: type[C], tables: dict[str, object], where: str) -> C:
    """Return the tables as a config, or raise one UserError that lists every mistake."""
    tables, mistakes = with_new_names(tables)
    try:
        # JSON mode: TOML arrays become tuples, and 1 is a float where a float is expected.
        config = kind.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        config = None
        mistakes += [
            _explain(kind, e["loc"], e["type"], e["msg"], e.get("input"))
            for e in error.errors(include_url=False)
        ]
    if config is None or mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        lines = "\n".join(f"{where}: {mistake}" for mistake in mistakes)
        raise UserError(f"{count} in the recipe\n{lines}")
    return config


def _explain(
    kind: type[Config], loc: tuple[int | str, ...], error: str, message: str, given: object
) -> str:
    path = ".".join(str(p) for p in _without_tags(kind, loc))
    if error == "extra_forbidden":
        known = _keys_at(kind, loc[:-1])
        return f"{path}: unknown key.{nearest(str(loc[-1]), known)} Known: {', '.join(known)}"
    if error == "missing":
        return f"{path}: missing, and it has no default"
    if error == "union_tag_not_found":
        tags = [_tag(model) for model in _models_of(_walk(kind, loc)[-1].annotation)]
        return f"{path}: needs kind = one of {', '.join(map(repr, tags))}"
    if error == "union_tag_invalid":
        tag = given.get("kind") if isinstance(given, dict) else given
        return f"{path}.kind: {message}.{nearest(str(tag), _kinds(message))}"
    if error == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{path}: {text}" if path else text
    return f"{path}: {message}, got {given!r}"


def _kinds(message: str) -> list[str]:
    _, _, tail = message.partition("expected tags: ")
    return [t.strip().strip("'") for t in tail.split(",")] if tail else []


def _without_tags(kind: type[Config], loc: tuple[int | str, ...]) -> list[int | str]:
    """Return the location without the union tags that pydantic puts into it."""
    path: list[int | str] = []
    for part, after in zip(loc, [*_walk(kind, loc)], strict=True):
        if not after.is_tag:
            path.append(part)
    return path


class _Step:
    def __init__(self, annotation: object, is_tag: bool) -> None:
        self.annotation = annotation
        self.is_tag = is_tag


def _walk(kind: type[Config], loc: tuple[int | str, ...]) -> list[_Step]:
    """Return, for each part of a location, the annotation it leads to and whether it is a tag."""
    steps: list[_Step] = []
    here: object = kind
    for part in loc:
        models = _models_of(here)
        tagged = [m for m in models if _tag(m) == part]
        if len(models) > 1 and tagged:
            here = tagged[0]
            steps.append(_Step(here, is_tag=True))
            continue
        here = _child(models, here, part)
        steps.append(_Step(here, is_tag=False))
    return steps


def _child(models: list[type[Config]], here: object, part: int | str) -> object:
    for model in models:
        if part in model.model_fields:
            return model.model_fields[str(part)].annotation
    args = [arg for arg in getattr(here, "__args__", ()) if arg is not ...]
    return args[-1] if args else None


def _tag(model: type[Config]) -> str | None:
    field = model.model_fields.get("kind")
    values = getattr(field.annotation, "__args__", ()) if field is not None else ()
    return values[0] if values else None


def _models_of(annotation: object) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if getattr(annotation, "__origin__", None) in (dict, tuple, list):
        return []
    found: list[type[Config]] = []
    for arg in getattr(annotation, "__args__", ()):
        found += _models_of(arg)
    return found


def _keys_at(kind: type[Config], loc: tuple[int | str, ...]) -> list[str]:
    steps = _walk(kind, loc)
    models = _models_of(steps[-1].annotation if steps else kind)
    return sorted({key for model in models for key in model.model_fields})


def to_toml(config: Config) -> str:
    """Return a config as TOML text that loads back to the same config."""
    lines: list[str] = []
    _write_table(config.model_dump(mode="json", exclude_none=True), "", lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(table: dict[str, object], prefix: str, lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    for key, value in plain.items():
        lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in table.items():
        if isinstance(value, dict):
            path = f"{prefix}{_toml_key(key)}"
            lines += ["", f"[{path}]"]
            _write_table(value, f"{path}.", lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items())
        return "{ " + inner + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)
