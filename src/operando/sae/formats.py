"""Reading and writing SAEs in the formats of other tools, with none of those tools installed.

    saelens              cfg.json + sae_weights.safetensors   (sae-lens, before 6.0 too)
    sparsify             cfg.json + sae.safetensors           (eai-sparsify)
    dictionary_learning  config.json + ae.pt
    sae_rl               one .pt: {"state_dict", "config"}    (OhhMoo/SAE-RL)
    mechreward           sae_final.pt, read only
    Qwen-Scope           layer{n}.sae.pt, read only

The other formats have no b_pre of their own: it is folded into the encoder bias. A folder written
here in SAELens format holds operando.safetensors besides, so that a chain goes on from exactly the
weights it ended with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch

from operando.errors import UserError, nearest
from operando.recipe.renamed import refuse_renamed
from operando.run import atomic_path
from operando.sae.files import read_torch
from operando.sae.other_formats import (
    load_dictionary_learning,
    load_mechreward,
    load_qwen_scope,
    load_sae_rl,
    load_sparsify,
    save_dictionary_learning,
    save_sae_rl,
    save_sparsify,
)
from operando.sae.sae import SAE
from operando.sae.saelens import EXACT, load_saelens, save_saelens

Format = Literal["saelens", "sparsify", "dictionary_learning", "sae_rl"]
KNOWN_FILES = {
    "cfg.json",
    "sae_weights.safetensors",
    EXACT,
    "sae.safetensors",
    "sparsity.safetensors",
    "runner_cfg.json",
    "config.json",
    "ae.pt",
    "README.md",
    "training.json",
}
EXPECTED = (
    "expected cfg.json + sae_weights.safetensors (SAELens), cfg.json + sae.safetensors (sparsify), "
    "config.json + ae.pt (dictionary_learning), a .pt of sae_rl or mechreward, or a Qwen-Scope "
    "layerN.sae.pt"
)


def load_sae(
    path: str | Path, k: int | None = None, device: torch.device | str | None = None
) -> SAE:
    """Return the SAE at `path`, a folder or a file in one of the formats above, on `device`
    (absent: the CPU).

    `k` is needed only for a Qwen-Scope file whose folder's name no longer says L0_k. A key or a
    tensor of the file that is neither read nor known to be bookkeeping is an error.

    The SAE keeps the file's configuration as `sae.config`, and unpacks to itself and that, so that
    the lines of sae_rl's README run as they stand:
        sae, cfg = load_sae("sae_flexible/sae_ppo_step100_layer12.pt", device="cuda")
        x_hat, z = sae(x)

    Example: load_sae("runs/a/saes/step_00100/blocks.3.hook_resid_post")
    """
    sae = _load(Path(path), k)
    return sae if device is None else sae.to(device)


def _load(path: Path, k: int | None) -> SAE:
    if not path.exists():
        beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"no SAE at {path}: nothing is there.{nearest(path.name, beside)}")
    if path.is_file() and path.name in KNOWN_FILES:
        path = path.parent
    if path.is_dir():
        found = {p.name for p in path.iterdir()}
        if {"cfg.json", "sae_weights.safetensors"} <= found:
            return load_saelens(path)
        if {"cfg.json", "sae.safetensors"} <= found:
            return load_sparsify(path)
        if {"config.json", "ae.pt"} <= found:
            return load_dictionary_learning(path)
        listed = ", ".join(sorted(found)[:8]) or "an empty folder"
        raise UserError(f"{path} holds no SAE in a known format: found {listed}; {EXPECTED}")
    if path.suffix != ".pt":
        raise UserError(f"{path} is not an SAE in a known format: {EXPECTED}")
    held = read_torch(path)
    if "state_dict" in held and "config" in held:
        return load_sae_rl(path, held)
    if "d_sae" in held or "d_model" in held:
        return load_mechreward(path, held)
    if "W_enc" in held and "W_dec" in held:
        return load_qwen_scope(path, held, k)
    raise UserError(f"{path}: found keys {', '.join(sorted(map(str, held))[:8])}; {EXPECTED}")


def save_sae(sae: SAE, path: str | Path, format: Format = "saelens") -> None:
    """Write an SAE atomically: a folder, or one file for sae_rl's format.

    Other tools apply max(0, .) after the top k. Where a token's k-th largest value is negative, an
    SAE with the raw signed "topk" therefore encodes otherwise there than here.
    """
    path = Path(path)
    refuse_renamed("sae", "format", format)
    if format not in get_args(Format):
        raise UserError(
            f"unknown SAE format {format!r}: expected one of {', '.join(get_args(Format))}."
            f"{nearest(str(format), get_args(Format))}"
        )
    if path.is_dir() and not {p.name for p in path.iterdir()} <= KNOWN_FILES:
        raise UserError(f"{path} holds other things than an SAE; choose a folder of its own")
    if format != "saelens" and sae.activation not in ("topk", "topk_relu"):
        raise UserError(
            f"the {format} format is written for top-k SAEs only, this one is {sae.activation!r}; "
            "use saelens"
        )
    with atomic_path(path) as temporary:
        match format:
            case "saelens":
                save_saelens(sae, temporary)
            case "sparsify":
                save_sparsify(sae, temporary)
            case "dictionary_learning":
                save_dictionary_learning(sae, temporary)
            case "sae_rl":
                save_sae_rl(sae, temporary)
