"""The public `load_chain`: chains of a run, or SAEs in the layout of sae_rl's repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import overload

import torch

from operando.drift import chain
from operando.drift.chain import Arm
from operando.errors import UserError, nearest
from operando.sae.formats import load_sae
from operando.sae.sae import SAE


@overload
def load_chain(
    run: str | Path, site: str, arm: Arm = "real", seed: int = 0, /
) -> dict[int, SAE]: ...
@overload
def load_chain(
    name: str,
    stage: str,
    layer: int,
    /,
    *,
    k: int | None = None,
    root: str | Path = ".",
    device: torch.device | str | None = None,
) -> SAE: ...
def load_chain(
    where: str | Path,
    what: str,
    which: Arm | int = "real",
    seed: int = 0,
    /,
    *,
    k: int | None = None,
    root: str | Path = ".",
    device: torch.device | str | None = None,
) -> dict[int, SAE] | SAE:
    """Return one chain of a run by step, or with a layer as third argument one published SAE.

    load_chain(run, site, arm="real", seed=0)   the SAEs of a chain trained here, the first at 0
    load_chain(name, stage, layer, k=, root=, device=)   one SAE of a folder laid out as
        OhhMoo/sae-rl-qwen05b-layers: root/sae_{name}/[k64/ or l23_k256/]sae_{stage}_layer{N}.pt.
        It unpacks as its README has it: sae, cfg = load_chain("flexible", "ppo_step100", 12)

    Example: load_chain("runs/ppo_flexible", "blocks.3.hook_resid_post")[10].W_dec_MD
    """
    if isinstance(which, str):
        return chain.load_chain(where, what, which, seed)
    return load_sae(_published(Path(root), str(where), what, which, k), device=device)


def _published(root: Path, name: str, stage: str, layer: int, k: int | None) -> Path:
    folder = root / f"sae_{name}"
    if not folder.is_dir():
        there = [f.name.removeprefix("sae_") for f in root.glob("sae_*") if f.is_dir()]
        raise UserError(
            f"no chain {name!r}: {folder} is not a folder. Chains there: "
            f"{', '.join(sorted(there))}.{nearest(name, there)}"
        )
    file = f"sae_{stage}_layer{layer}.pt"
    by_k = {_k_of(f.parent): f for f in folder.glob(f"*/{file}") if _k_of(f.parent) is not None}
    if (folder / file).is_file():
        own = load_sae(folder / file).k
        if k not in (None, own):
            raise UserError(f"{folder / file} has k = {own}, not {k}")
        return folder / file
    if not by_k:
        there = sorted(f.name for f in folder.rglob(f"sae_*_layer{layer}.pt"))
        stages = [re.sub(r"^sae_|_layer\d+\.pt$", "", one) for one in there]
        raise UserError(
            f"{folder} holds no {file}. Stages of layer {layer} there: "
            f"{', '.join(dict.fromkeys(stages)) or 'none'}.{nearest(stage, stages)}"
        )
    if k is None and len(by_k) == 1:
        return next(iter(by_k.values()))
    if k not in by_k:
        known = ", ".join(str(one) for one in sorted(by_k, key=str))
        raise UserError(f"{folder} holds {file} with k = {known}; given k = {k}")
    return by_k[k]


def _k_of(folder: Path) -> int | None:
    """Return the k of a folder named k64 or l23_k256."""
    found = re.fullmatch(r"(?:l\d+_)?k(\d+)", folder.name)
    return int(found[1]) if found else None
