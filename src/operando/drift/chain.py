"""SAE chains over the stages of a run, each with its null arm.

A chain is a TopK SAE trained on the base's activations and gone on from at every stage. The null
arm goes on in the same way, with the same seed, order and budget, but on the base's activations
at every stage: what it drifts is the drift of SAE training, not of RL (the "null step" of
OhhMoo/SAE-RL, README at d919128). Chain r of both arms shares its first SAE.

    saes/first_seed0/step_00000/<site>/   saes/real_seed0/step_00010/<site>/   saes/null_seed0/...

Beside its weights each folder keeps training.json: the settings, and how the training went.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from operando.drift.collect import Texts, load_acts, stages_of
from operando.errors import UserError
from operando.files import read_object
from operando.recipe.renamed import RENAMED
from operando.run import SeedTree, atomic_path, write_json
from operando.sae.formats import load_sae, save_sae
from operando.sae.quality import mean_activation, sink_tokens
from operando.sae.sae import SAE, Origin
from operando.sae.train import EpochStats, SaeTrainConfig, train_sae
from operando.tables import TextTable, table

Arm = Literal["real", "null"]
Mode = Literal["default", "sae_rl"]
ARMS: tuple[Arm, Arm] = ("real", "null")
RECORD = "training.json"


class Link(NamedTuple):
    """One SAE to be trained. Example: Link("null", seed=0, site="blocks.3.hook_resid_post",
    step=10, before=0)"""

    arm: Arm
    seed: int
    site: str
    step: int
    before: int | None  # the stage that it goes on from; None: the first


@dataclass(frozen=True)
class ChainConfig:
    """Sizes, budget and data of the SAEs of one site's chains.

    split      texts: whole texts are held out, so that no text is on both sides. tokens: rows are,
               whatever text they are of (as sae_rl)
    val_share  the part that is held out
    sinks      drop: tokens whose norm at the base is over 10 times the median are neither trained
               on nor validated on, at no stage. keep: as sae_rl

    Example: chain_config("default", d_sae=1024, k=32)
    """

    d_sae: int
    k: int
    mode: Mode = "default"
    epochs: int = 10
    batch_size: int = 512
    lr: float = 1e-3
    select: Literal["float32", "bfloat16"] = "float32"
    split: Literal["texts", "tokens"] = "texts"
    val_share: float = 0.1
    sinks: Literal["drop", "keep"] = "drop"


@dataclass(frozen=True)
class Training:
    """How one SAE was trained.

    `val_error` is the squared error on the held-out tokens over their variance, `dead` the share of
    dead features, both of the best epoch (counted from 1); `history` has a line an epoch.

    Example: training_of(sae_folder(run, "real", 0, 10, site)).val_error
    """

    settings: ChainConfig
    tokens: int
    best_epoch: int
    val_error: float
    dead: float
    resampled: int
    seconds: float
    history: tuple[EpochStats, ...]


def chain_config(
    mode: Mode, d_sae: int, is_last_layer: bool = False, **given: object
) -> ChainConfig:
    """Return the settings of a mode with those given beside it.

    sae_rl is the published protocol (model card of OhhMoo/sae-rl-qwen05b-layers): k 64, and 256
    after the last layer, 20 epochs at 1e-4, batches of 512, 20 % of the rows held out, sinks kept.
    Its texts are not a setting: here they are the run's completions.
    """
    config = ChainConfig(d_sae, k=16)
    if mode == "sae_rl":
        config = ChainConfig(
            d_sae,
            k=256 if is_last_layer else 64,
            mode="sae_rl",
            epochs=20,
            lr=1e-4,
            split="tokens",
            val_share=0.2,
            sinks="keep",
        )
    config = replace(config, **{key: value for key, value in given.items() if value is not None})
    if config.k > d_sae:
        raise UserError(
            f"k = {config.k} active features of {d_sae}: give a smaller --k or a larger --expansion"
        )
    return config


def sae_folder(run: Path, arm: Arm, seed: int, step: int, site: str) -> Path:
    """Return where an SAE of a chain lies; the first one is shared by both arms."""
    name = "first" if step == 0 else arm
    return run / "saes" / f"{name}_seed{seed}" / f"step_{step:05d}" / site


def links(sites: Sequence[str], stages: Sequence[int], seeds: Sequence[int]) -> Iterator[Link]:
    """Give every SAE of all chains, parents before children."""
    for site in sites:
        for seed in seeds:
            yield Link("real", seed, site, stages[0], None)
            for before, step in zip(stages, stages[1:], strict=False):
                for arm in ARMS:
                    yield Link(arm, seed, site, step, before)


def train_chains(
    run: Path,
    texts: Texts,
    configs: Mapping[str, ChainConfig],
    stages: Sequence[int],
    seeds: Sequence[int],
    on_sae: Callable[[int, int], None] = lambda _done, _all: None,
) -> None:
    """Train every SAE that is not there yet, each site with its settings; a killed call goes on
    where it stopped. SAEs of other settings are an error, found by `check_settings`."""
    todo = list(links(list(configs), stages, seeds))
    site, kept_N, on_train_N = "", torch.empty(0), torch.empty(0)
    for number, link in enumerate(todo):
        folder = sae_folder(run, link.arm, link.seed, link.step, link.site)
        if not folder.exists():
            config = configs[link.site]
            if link.site != site:
                site, on_train_N = link.site, split_tokens(texts, config)
                kept_N = kept_tokens(run, texts, site, config)
            rows = (kept_N & on_train_N, kept_N & ~on_train_N)
            sae, training = _train_link(run, texts, rows, link, config)
            with atomic_path(folder) as part:
                save_sae(sae, part)
                curve = [epoch._asdict() for epoch in training.history]
                write_json(part / RECORD, asdict(training) | {"history": curve})
        on_sae(number + 1, len(todo))


def check_settings(
    run: Path, configs: Mapping[str, ChainConfig], stages: Sequence[int], seeds: Sequence[int]
) -> None:
    """Raise a UserError that names the settings in which an SAE that is there differs."""
    for link in links(list(configs), stages, seeds):
        folder = sae_folder(run, link.arm, link.seed, link.step, link.site)
        if not folder.exists():
            continue
        there, asked = asdict(training_of(folder).settings), asdict(configs[link.site])
        differ = [
            f"{key} {there[key]} there, {asked[key]} asked"
            for key in asked
            if there[key] != asked[key]
        ]
        if differ:
            raise UserError(
                f"{folder} was trained with other settings: {'; '.join(differ)}. A chain has one "
                f"setting: give those, or remove the site's folders under {run}/saes"
            )


def training_of(folder: Path) -> Training:
    """Return how the SAE of a chain was trained."""
    file = folder / RECORD
    if not file.is_file():
        raise UserError(
            f"{folder} holds no {RECORD}, so nobody knows how it was trained; remove it to train "
            "it again"
        )
    value = read_object(file, history=list, settings=dict)
    history = tuple(EpochStats(**line) for line in value.pop("history"))
    settings = value.pop("settings")
    mode = str(settings["mode"])
    settings["mode"] = RENAMED.get(("sae train", "--mode", mode), mode)
    return Training(ChainConfig(**settings), history=history, **value)


def _train_link(
    run: Path, texts: Texts, rows: tuple[Tensor, Tensor], link: Link, config: ChainConfig
) -> tuple[SAE, Training]:
    source = link.step if link.arm == "real" else 0  # the null arm never sees a later stage
    acts_ND = load_acts(run, texts, source, link.site)
    train_TD, val_TD = (acts_ND[rows_N] for rows_N in rows)
    del acts_ND
    parent = None
    if link.before is not None:
        parent = load_sae(sae_folder(run, link.arm, link.seed, link.before, link.site))
    # The same stream for both arms: they differ in nothing but the activations.
    seed = SeedTree(link.seed).derive("sae", link.site, link.step)
    settings = SaeTrainConfig(
        d_sae=config.d_sae,
        k=config.k,
        mode=config.mode,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=seed,
        select=config.select,
    )
    origin = Origin(
        model=f"{run.name}/step_{source:05d}",
        site=link.site,
        checkpoint=f"step_{source:05d}",
        arm=link.arm,
        data=texts.digest,
        split_seed=0,
    )
    began = time.monotonic()
    trained = train_sae(train_TD, val_TD, settings, parent, origin)
    best = trained.history[trained.best_epoch]
    spread = float((val_TD - mean_activation(val_TD)).double().square().mean())
    return trained.sae, Training(
        config,
        len(train_TD),
        trained.best_epoch + 1,
        best.val_mse / max(spread, 1e-30),
        best.dead,
        int(trained.resampled_M.sum()),
        round(time.monotonic() - began, 2),
        trained.history,
    )


def split_tokens(texts: Texts, config: ChainConfig) -> Bool[Tensor, "N"]:
    """Return which tokens are trained on, the same for all stages and seeds."""
    generator = SeedTree(0).generator("sae", "split")
    num = len(texts.completions) if config.split == "texts" else texts.num_tokens
    held_out = torch.randperm(num, generator=generator)[: max(1, round(config.val_share * num))]
    if config.split == "texts":
        return ~torch.isin(texts.text_of_token(), held_out)
    on_train_N = torch.ones(num, dtype=torch.bool)
    on_train_N[held_out] = False
    return on_train_N


def kept_tokens(run: Path, texts: Texts, site: str, config: ChainConfig) -> Bool[Tensor, "N"]:
    """Return which tokens are read at all. The base decides which are sinks, for every stage."""
    if config.sinks == "keep":
        return torch.ones(texts.num_tokens, dtype=torch.bool)
    return ~sink_tokens(load_acts(run, texts, 0, site))


def load_chain(run: str | Path, site: str, arm: Arm = "real", seed: int = 0) -> dict[int, SAE]:
    """Return the SAEs of one chain by step, the first one at 0.

    Example: load_chain("runs/ppo_flexible", "blocks.3.hook_resid_post")[10].W_dec_MD
    """
    folder, steps = Path(run) / "saes", stages_of(Path(run))
    missing = [s for s in steps if not sae_folder(Path(run), arm, seed, s, site).is_dir()]
    if missing:
        chains = sorted(p.name for p in folder.glob("*_seed*"))
        raise UserError(
            f"{run} has no whole chain of {site}, arm {arm!r}, seed {seed}: missing steps "
            f"{', '.join(map(str, missing))}. Chains there: {', '.join(chains) or 'none'}. "
            f"Run: operando sae train {run}"
        )
    return {step: load_sae(sae_folder(Path(run), arm, seed, step, site)) for step in steps}


def trained_sites(run: Path) -> list[str]:
    """Return the sites that have a first SAE."""
    return sorted({f.name for f in (run / "saes").glob("first_seed*/step_00000/*") if f.is_dir()})


def trained_seeds(run: Path) -> list[int]:
    """Return the seeds that have a first SAE."""
    found = {f.name.removeprefix("first_seed") for f in (run / "saes").glob("first_seed*")}
    return sorted(int(seed) for seed in found)


def decoders(chain: dict[int, SAE]) -> Float[Tensor, "S M D"]:
    """Return the decoder rows of every stage."""
    return torch.stack([sae.W_dec_MD for sae in chain.values()])


# --- the terminal --------------------------------------------------------------------------------


def training_table(
    run: Path, configs: Mapping[str, ChainConfig], stages: Sequence[int], seeds: Sequence[int]
) -> TextTable:
    """Return how the training of the chains went: one row per site, stage and arm, mean over seeds.

    The curve of every SAE, an entry an epoch, is in its folder's training.json.
    """
    rows = []
    for site in configs:
        for step in stages:
            for arm in ("first",) if step == stages[0] else ARMS:
                own: Arm = "real" if arm == "first" else arm
                of_seed = [training_of(sae_folder(run, own, s, step, site)) for s in seeds]
                config, num = of_seed[0].settings, len(of_seed)
                rows.append(
                    (
                        site.removesuffix(".hook_resid_post"),
                        str(step),
                        arm,
                        str(config.k),
                        f"{config.lr:g}",
                        f"{sum(t.best_epoch for t in of_seed) / num:.1f} of {config.epochs}",
                        f"{sum(t.val_error for t in of_seed) / num:.4f}",
                        f"{sum(t.dead for t in of_seed) / num:.1%}",
                    )
                )
    title = f"{run.name}: SAE training, {len(seeds)} seeds per arm, error on held-out tokens"
    heads = ("site", "step", "arm", "k", "lr", "best epoch", "error / variance", "dead")
    return table(title, heads, rows, words=("site", "arm"))
