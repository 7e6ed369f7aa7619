"""SAE chains over the stages of a run, each with its null arm.

A chain is a TopK SAE trained on the base's activations and gone on from at every stage. The null
arm goes on in the same way, with the same seed, order and budget, but on the base's activations
at every stage: what it drifts is the drift of SAE training, not of RL (the "null step" of
OhhMoo/SAE-RL, README at d919128). Chain r of both arms shares its first SAE.

    saes/first_seed0/step_00000/<site>/   saes/real_seed0/step_00010/<site>/   saes/null_seed0/...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from operando.drift.collect import Texts, load_acts, stages_of
from operando.drift.sae_train import SaeTrainConfig, train_sae
from operando.errors import UserError
from operando.internals.sae import SAE, Origin
from operando.internals.sae_formats import load_sae, save_sae
from operando.run import SeedTree

Arm = Literal["real", "null"]
ARMS: tuple[Arm, Arm] = ("real", "null")
VAL_SHARE = 0.1  # of the texts; whole texts, so that no text is on both sides


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
    """Sizes and budget of every SAE. Example: ChainConfig(d_sae=1024, k=16, epochs=10)"""

    d_sae: int
    k: int
    mode: Literal["seed", "default"] = "default"
    epochs: int = 10
    batch_size: int = 512
    lr: float = 1e-3
    select: Literal["float32", "bfloat16"] = "float32"


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
    sites: Sequence[str],
    stages: Sequence[int],
    seeds: Sequence[int],
    config: ChainConfig,
    on_sae: Callable[[int, int], None] = lambda _done, _all: None,
) -> None:
    """Train every SAE that is not there yet; a killed call goes on where it stopped."""
    todo = list(links(sites, stages, seeds))
    on_train = split_texts(texts)
    for number, link in enumerate(todo):
        folder = sae_folder(run, link.arm, link.seed, link.step, link.site)
        if not folder.exists():
            sae = _train_link(run, texts, on_train, link, config)
            save_sae(sae, folder)
        on_sae(number + 1, len(todo))


def _train_link(run: Path, texts: Texts, on_train: Tensor, link: Link, config: ChainConfig) -> SAE:
    source = link.step if link.arm == "real" else 0  # the null arm never sees a later stage
    acts_ND = load_acts(run, texts, source, link.site)
    parent = None
    if link.before is not None:
        parent = load_sae(sae_folder(run, link.arm, link.seed, link.before, link.site))
    # The same stream for both arms: they differ in nothing but the activations.
    seed = SeedTree(link.seed).derive("sae", link.site, link.step)
    settings = SaeTrainConfig(
        d_sae=config.d_sae, k=config.k, mode=config.mode, epochs=config.epochs,
        batch_size=config.batch_size, lr=config.lr, seed=seed, select=config.select,
    )  # fmt: skip
    origin = Origin(
        model=f"{run.name}/step_{source:05d}", site=link.site, checkpoint=f"step_{source:05d}",
        arm=link.arm, data=texts.digest, split_seed=0,
    )  # fmt: skip
    trained = train_sae(acts_ND[on_train], acts_ND[~on_train], settings, parent, origin)
    return trained.sae


def split_texts(texts: Texts) -> Tensor:
    """Return which tokens are trained on [N]; whole texts are held out, the same for all."""
    num = len(texts.completions)
    generator = SeedTree(0).generator("sae", "split")
    held_out = torch.randperm(num, generator=generator)[: max(1, round(VAL_SHARE * num))]
    return ~torch.isin(texts.text_of_token(), held_out)


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
