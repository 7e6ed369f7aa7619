"""A feature set: which features (or which direction) pay, for which model, site and prompt.

It is one JSON file, which names the SAE, the model and the prompt by hash, because a feature means
nothing under another encoder, and evidence says nothing about another prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from operando.errors import UserError
from operando.files import read_object
from operando.recipe.data import PromptConfig
from operando.run import write_json
from operando.sae.formats import load_sae
from operando.sae.sae import SAE

VERSION = 1
Arm = Literal["real", "random", "shuffled", "direction"]


@dataclass(frozen=True)
class Feature:
    """One feature of the set; `scale` is its 99 % quantile over tokens of right base answers.

    Example: Feature(id=412, sign=1, scale=2.4, d=0.61, q_value=0.02)
    """

    id: int
    sign: Literal[1, -1]  # 1: helpful, -1: harmful
    scale: float
    d: float
    q_value: float


@dataclass(frozen=True)
class Gate:
    """Whether the evidence allows the feature set to be rewarded, and the reasons why not.

    Example: Gate(passed=False, reasons=("AUC 0.58 is under 0.65",))
    """

    passed: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeatureSet:
    """Features with signs and scales, or one direction; what they belong to; what speaks for them.

    `limit` is the 99 % quantile of the unsaturated score over right base answers: above it, a
    policy shows more of the features than any honest answer did.

    Example: load_feature_set("runs/feature_reward_features/feature_set.json").features[0].id
    """

    arm: Arm
    site: str
    model_id: str
    model_sha256: str
    prompt_sha256: str
    limit: float
    gate: Gate
    sae: str = ""  # path, relative to this file's folder; empty for a direction
    sae_sha256: str = ""
    encoder: str = ""  # such as "topk_relu k=16"
    features: tuple[Feature, ...] = ()
    direction: tuple[float, ...] = ()  # unit vector, for arm "direction"
    center: float = 0.0  # of <h, direction> over base tokens
    scale: float = 1.0  # 99 % quantile of |<h, direction> - center|
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)
    version: int = VERSION


def save_feature_set(feature_set: FeatureSet, file: Path) -> None:
    """Write a feature set atomically."""
    write_json(file, asdict(feature_set))


def load_feature_set(path: str | Path) -> FeatureSet:
    """Return the feature set of a file; a file that is none, or an empty one, is a UserError."""
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"there is no feature set {file}; make one with: operando features discover RECIPE"
        )
    try:
        feature_set = TypeAdapter(FeatureSet).validate_python(read_object(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: no feature set: {where}: {first['msg']}") from error
    if feature_set.version != VERSION:
        raise UserError(
            f"{file}: feature set version {feature_set.version}, this operando reads {VERSION}"
        )
    if not feature_set.features and not feature_set.direction:
        raise UserError(
            f"{file}: the feature set is empty: it has neither features nor a direction"
        )
    if feature_set.features and not feature_set.sae:
        raise UserError(f"{file}: the feature set has features but names no SAE")
    bad = [f.id for f in feature_set.features if not f.scale > 0]
    if bad:
        raise UserError(f"{file}: features {bad} have no positive scale")
    return feature_set


def model_digest(identity: Mapping[str, str]) -> str:
    """Return one hash of a model's files (or its hub commit), whatever folder it lies in."""
    parts = sorted(value for key, value in identity.items() if key not in ("id", "folder"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def prompt_digest(prompt: PromptConfig) -> str:
    """Return a hash of everything that shapes a prompt's text."""
    shape = prompt.model_dump(mode="json", exclude={"max_prompt_length"})
    if not prompt.chat_template_kwargs:
        del shape["chat_template_kwargs"]  # the digest says nothing of a key that gives nothing
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def check_feature_set(
    feature_set: FeatureSet, path: str | Path, identity: Mapping[str, str], prompt: PromptConfig
) -> None:
    """Refuse a feature set of another model or prompt."""
    if feature_set.model_sha256 != model_digest(identity):
        raise UserError(
            f"{path} was made on model {feature_set.model_id!r} ({feature_set.model_sha256[:12]}); "
            f"the recipe's is {identity['id']!r} ({model_digest(identity)[:12]})"
        )
    if feature_set.prompt_sha256 != prompt_digest(prompt):
        raise UserError(
            f"{path} was made with another [prompt] ({feature_set.prompt_sha256[:12]}, the "
            f"recipe's is {prompt_digest(prompt)[:12]}): the evidence does not carry over; "
            "discover again"
        )


def sae_of(feature_set: FeatureSet, path: str | Path) -> SAE:
    """Return the SAE of a feature set, which must be the very one it was made with."""
    sae = load_sae(Path(path).parent / feature_set.sae)
    if sae.sha256() != feature_set.sae_sha256:
        raise UserError(
            f"{path}: the SAE at {feature_set.sae} is another one than it was made with "
            f"({sae.sha256()[:12]}, expected {feature_set.sae_sha256[:12]})"
        )
    outside = [f.id for f in feature_set.features if not 0 <= f.id < sae.d_sae]
    if outside:
        raise UserError(f"{path}: features {outside} are not among the SAE's 0-{sae.d_sae - 1}")
    return sae


def encoder_of(sae: SAE) -> str:
    """Return the words for an SAE's activation function. Example: "topk_relu k=16" """
    return sae.activation if sae.k is None else f"{sae.activation} k={sae.k}"
