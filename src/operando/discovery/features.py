"""Feature discovery: which SAE features of the base go with right answers, judged on other prompts.

Half of the prompts find the features, the other half judges them. Beside the features' AUC stand
what chance gives (random features; features found under shuffled labels), what simpler read-outs
give (difference of means, a probe), and what the length of an answer alone gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.random import Generator
from torch import Tensor

from operando.discovery.answers import Answers, sample_answers
from operando.discovery.judging import Measured, Null, answer_scores, gate_of, measure, null
from operando.discovery.probe import logistic_probe, mean_difference
from operando.errors import UserError
from operando.models.load import Loaded, load_model
from operando.recipe.run import DiscoverConfig, Recipe
from operando.rewards.internal import set_score
from operando.run import SeedTree, write_json, write_parquet
from operando.sae.feature_set import (
    Arm,
    Feature,
    FeatureSet,
    Gate,
    encoder_of,
    model_digest,
    prompt_digest,
    save_feature_set,
)
from operando.sae.formats import load_sae, save_sae
from operando.sae.quality import sink_tokens
from operando.sae.sae import SAE, Origin, check_fits
from operando.sae.selected_features import SelectedFeatures
from operando.sae.train import SaeTrainConfig, train_sae
from operando.stats import contrast as ct

RANDOM_DRAWS = 200
SHUFFLED_DRAWS = 50
HIGH = 0.99  # quantile that scales a feature, and that limits an answer's score


@dataclass(frozen=True)
class Discovery:
    """Everything that was found, and where it was written."""

    name: str
    site: str
    encoder: str
    num_features: int
    find: tuple[int, int]  # right answers, answers
    judge: tuple[int, int]
    mixed_prompts: int
    null_max: float  # 95 % quantile of the largest |d| under shuffled labels
    features: tuple[Feature, ...]
    measured: tuple[Measured, ...]
    nulls: tuple[Null, ...]
    gate: Gate
    feature_set: str  # its file; empty where no feature was found
    file: str


@dataclass(frozen=True)
class Search:
    """What a discovery works on: the two halves, the SAE, the features of the finding half."""

    config: DiscoverConfig
    blank: FeatureSet  # model, prompt, site and encoder, without features
    sae: SAE
    find: Answers
    judge: Answers
    x_RM: Float[Tensor, "R M"]
    group_R: Int[Tensor, "R"]  # answers that are compared with each other
    confounds_RC: Float[Tensor, "R C"] | None  # what is taken out of a feature first
    support: int
    generator: Generator


def discover(recipe: Recipe, progress: Callable[[int, int], None] | None = None) -> Discovery:
    """Find, judge and write the features of a recipe's base, in runs/<name>_features/."""
    config = recipe.discover
    if config is None:
        raise UserError(f"recipe {recipe.name!r} has no [discover] table; add one, with a site")
    loaded = load_model(recipe.model)
    sae = load_sae(config.sae) if config.sae else None
    site = _site(config, sae, loaded)
    num = config.num_prompts
    answers = sample_answers(recipe, loaded, site, num, config.num_generations, progress)
    generator = np.random.default_rng(SeedTree(recipe.seed).derive("discover"))
    finds_P = torch.zeros(num, dtype=torch.bool)
    finds_P[torch.from_numpy(generator.permutation(num)[: num // 2])] = True
    find = answers.chosen(finds_P[answers.prompt_R])
    judge = answers.chosen(~finds_P[answers.prompt_R])
    _check_halves(find, judge)
    sae = sae or _train_sae(config, find, recipe, site)
    blank = FeatureSet(
        arm="real",
        site=site,
        model_id=recipe.model.id,
        model_sha256=model_digest(loaded.identity),
        prompt_sha256=prompt_digest(recipe.prompt),
        limit=0.0,
        gate=Gate(False),
    )
    within = config.contrast == "within"
    search = Search(
        config,
        blank,
        sae,
        find,
        judge,
        mean_features(sae, find),
        group_R=find.prompt_R if within else torch.zeros_like(find.prompt_R),
        confounds_RC=(
            ct.length_confounds(find.length_R, find.truncated_R)
            if config.adjust == "length"
            else None
        ),
        support=max(2, round(config.min_support * len(find.rollouts))),
        generator=generator,
    )
    return find_features(recipe.name, search, Path(recipe.runs_dir) / f"{recipe.name}_features")


def _site(config: DiscoverConfig, sae: SAE | None, loaded: Loaded) -> str:
    width = loaded.model.config.get_text_config().hidden_size
    if sae is not None:
        return check_fits(sae, loaded.model, width, config.site or None)
    if not config.site:
        raise UserError('discover.site is empty: name one, e.g. "blocks.3.hook_resid_post"')
    return config.site


def _check_halves(find: Answers, judge: Answers) -> None:
    for name, half in (("find", find), ("judge", judge)):
        right, num = int(half.correct_R.sum()), len(half.correct_R)
        if right in (0, num):
            raise UserError(
                f"of the {num} answers that {name} the features {right} are right: nothing to tell "
                "apart. Choose easier or harder problems, or more (discover.num_prompts)"
            )


def _train_sae(config: DiscoverConfig, find: Answers, recipe: Recipe, site: str) -> SAE:
    """Return an SAE of the finding half's activations, attention sinks left out; it never sees the
    judging half."""
    prompts = find.prompt_R.unique()
    kept_N = ~sink_tokens(find.acts_ND)
    val_N = torch.isin(find.prompt_R, prompts[-max(1, len(prompts) // 10) :])[find.row_N]
    training = SaeTrainConfig(
        d_sae=config.expansion * find.acts_ND.shape[1],
        k=config.k,
        epochs=config.epochs,
        lr=1e-3,
        seed=recipe.seed,
    )
    origin = Origin(model=recipe.model.id, site=site, checkpoint="base")
    return train_sae(
        find.acts_ND[kept_N & ~val_N], find.acts_ND[kept_N & val_N], training, origin=origin
    ).sae


def mean_features(sae: SAE, answers: Answers) -> Float[Tensor, "R M"]:
    """Return each answer's mean of every feature; dense only in answers, never in tokens."""
    sum_RM = torch.zeros(len(answers.rollouts), sae.d_sae)
    for start in range(0, len(answers.row_N), 8192):
        row_n = answers.row_N[start : start + 8192]
        codes = sae.encode(answers.acts_ND[start : start + 8192])
        cell_nk = row_n[:, None] * sae.d_sae + codes.idx_Nk.long()
        sum_RM.view(-1).index_add_(0, cell_nk.flatten(), codes.value_Nk.flatten())
    return sum_RM / answers.length_R[:, None]


def find_features(name: str, search: Search, folder: Path) -> Discovery:
    """Return and write what the finding half shows and the judging half says of it."""
    find, judge, sae, config = search.find, search.judge, search.sae, search.config
    found = ct.contrast(
        search.x_RM,
        find.correct_R,
        search.group_R,
        min_support=search.support,
        permutations=config.permutations,
        generator=search.generator,
        confounds_RC=search.confounds_RC,
    )
    chosen = select(found, config.top, config.max_q)
    num_of = {s: sum(sign == s for sign in chosen.values()) or config.top for s in (1, -1)}
    randoms = [_random_set(search, found, num_of) for _ in range(RANDOM_DRAWS)]
    shuffled = [_shuffled_set(search, num_of) for _ in range(SHUFFLED_DRAWS)]
    nulls = [
        null("random features", [answer_scores(p, sae, judge) for p in randoms], judge),
        null("shuffled labels", [answer_scores(p, sae, judge) for p in shuffled], judge),
    ]
    measured = _simple_scores(search)
    real, feature_set = None, search.blank
    if chosen:
        feature_set = with_features(search, chosen, found)
        scores_R = answer_scores(feature_set, sae, judge)
        real = measure("features", scores_R, judge, search.generator)
        measured.insert(0, real)
    feature_set = replace(
        feature_set, gate=gate_of(config, real, nulls), evidence=_evidence(real, nulls, judge)
    )
    if chosen:
        direction = _direction_set(search)
        _write(folder, sae, config.sae, [feature_set, randoms[0], shuffled[0], direction])
    result = Discovery(
        name,
        feature_set.site,
        encoder_of(sae),
        sae.d_sae,
        find=(int(find.correct_R.sum()), len(find.correct_R)),
        judge=(int(judge.correct_R.sum()), len(judge.correct_R)),
        mixed_prompts=found.mixed_prompts,
        null_max=found.null_max,
        features=feature_set.features,
        measured=tuple(measured),
        nulls=tuple(nulls),
        gate=feature_set.gate,
        feature_set=str(folder / "feature_set.json") if chosen else "",
        file=str(folder / "discovery.json"),
    )
    write_parquet(
        folder / "all_features.parquet",
        {
            "d": found.d_M.tolist(),
            "q_value": found.q_M.tolist(),
            "support": found.support_M.tolist(),
        },
    )
    write_json(folder / "discovery.json", asdict(result))
    return result


def select(found: ct.Contrast, top: int, max_q: float) -> dict[int, int]:
    """Return the signs of the features with the largest and the smallest d, those with q small."""
    good_M = found.q_M <= max_q  # NaN, too little support, is not
    chosen: dict[int, int] = {}
    for sign in (1, -1):
        strength_M = torch.where(good_M, sign * found.d_M, -torch.inf)
        for index in strength_M.topk(min(top, len(strength_M))).indices.tolist():
            if strength_M[index] > 0:
                chosen[index] = sign
    return chosen


def with_features(search: Search, signs: dict[int, int], found: ct.Contrast) -> FeatureSet:
    """Return the feature set of some features, scaled on the right answers of the finding half.

    scale: 99 % quantile of the feature over their tokens; its largest value where that is 0."""
    ids = tuple(signs)
    right = search.find.chosen(search.find.correct_R)
    value_NF = SelectedFeatures(search.sae, ids)(right.acts_ND)
    high_F = _quantile(value_NF.abs(), HIGH)
    scale_F = torch.where(high_F > 0, high_F, value_NF.abs().amax(0))
    scale_F = torch.where(scale_F > 0, scale_F, 1.0)  # never seen in a right answer
    features = tuple(
        Feature(i, 1 if signs[i] > 0 else -1, s, float(found.d_M[i]), _number(found.q_M[i]))
        for i, s in zip(ids, scale_F.tolist(), strict=True)
    )
    sae = search.sae
    feature_set = replace(
        search.blank, features=features, sae="sae", sae_sha256=sae.sha256(), encoder=encoder_of(sae)
    )
    score_1N = set_score(feature_set, value_NF[None], saturate=False)
    limit = _quantile(right.mean_of(score_1N[0][:, None]), HIGH)
    return replace(feature_set, limit=float(limit))


def _random_set(search: Search, found: ct.Contrast, num_of: dict[int, int]) -> FeatureSet:
    """Return as many features of each sign, drawn among those that fire often enough."""
    fires = torch.nonzero(found.support_M >= search.support)[:, 0].numpy()
    num = min(len(fires), num_of[1] + num_of[-1])
    ids = search.generator.choice(fires, size=num, replace=False).tolist()
    signs = {i: 1 if at < num_of[1] else -1 for at, i in enumerate(ids)}
    return replace(with_features(search, signs, found), arm="random")


def _shuffled_set(search: Search, num_of: dict[int, int]) -> FeatureSet:
    """Return what the same search picks when right and wrong are shuffled within groups."""
    labels_R = ct.shuffle_within(search.find.correct_R, search.group_R, search.generator)
    found = ct.contrast(
        search.x_RM,
        labels_R,
        search.group_R,
        min_support=search.support,
        permutations=0,
        generator=search.generator,
        confounds_RC=search.confounds_RC,
    )
    signs: dict[int, int] = {}
    for sign in (1, -1):
        for index in (sign * found.d_M).topk(num_of[sign]).indices.tolist():
            signs.setdefault(index, sign)
    return replace(with_features(search, signs, found), arm="shuffled")


def _direction_set(search: Search) -> FeatureSet:
    """Return the raw difference of means as a feature set, scaled as the features are."""
    right = search.find.chosen(search.find.correct_R)
    unit_D = mean_difference(search.find.mean_acts(), search.find.correct_R, search.group_R)
    along_N = search.find.acts_ND.float() @ unit_D
    center = float(along_N.mean())
    right_N1 = (right.acts_ND.float() @ unit_D)[:, None]
    scale = float(_quantile((right_N1 - center).abs(), HIGH))
    feature_set = replace(
        search.blank, arm="direction", direction=tuple(unit_D.tolist()), center=center, scale=scale
    )
    score_1N = set_score(feature_set, right_N1[None], saturate=False)
    return replace(feature_set, limit=float(_quantile(right.mean_of(score_1N[0][:, None]), HIGH)))


def _simple_scores(search: Search) -> list[Measured]:
    find, judge, rng = search.find, search.judge, search.generator
    pooled = find.mean_acts()
    direction_D = mean_difference(pooled, find.correct_R, search.group_R)
    probe_D = logistic_probe(pooled, find.correct_R)
    return [
        measure("difference of means", judge.mean_acts() @ direction_D, judge, rng),
        measure("probe", judge.mean_acts() @ probe_D, judge, rng),
        measure("shorter answer", -judge.length_R.float(), judge, rng),
        measure("not truncated", (~judge.truncated_R).float(), judge, rng),
    ]


def _evidence(
    real: Measured | None, nulls: Sequence[Null], judge: Answers
) -> dict[str, float | int | str]:
    if real is None:
        return {}
    found: dict[str, float | int | str] = {
        "n": len(judge.correct_R),
        "right": int(judge.correct_R.sum()),
        "prompts": len(judge.prompt_R.unique()),
    }
    figures = {k: v for k, v in asdict(real).items() if k != "name"}
    figures |= {f"{n.name}, 95 % of the AUC": n.auc_q95 for n in nulls}
    return found | {k: v for k, v in figures.items() if v == v}


def _write(folder: Path, sae: SAE, given: str, sets: Sequence[FeatureSet]) -> None:
    """Write the feature set and its controls; an SAE that was trained here beside them."""
    names: dict[Arm, str] = {
        "real": "feature_set",
        "random": "random",
        "shuffled": "shuffled",
        "direction": "direction",
    }
    where = os.path.relpath(given, folder) if given else "sae"
    if not given:
        save_sae(sae, folder / "sae")
    for feature_set in sets:
        if feature_set.features:
            feature_set = replace(feature_set, sae=where)
        save_feature_set(feature_set, folder / f"{names[feature_set.arm]}.json")


def _quantile(x_NF: Float[Tensor, "N F"], q: float) -> Float[Tensor, "F"]:
    """Return the quantile of each column; torch's own takes at most 16 million numbers."""
    return torch.from_numpy(np.quantile(x_NF.numpy(), q, axis=0)).float().reshape(-1)


def _number(q_value: Tensor) -> float:
    return 1.0 if bool(q_value.isnan()) else float(q_value)
