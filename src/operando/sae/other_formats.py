"""SAEs of sparsify, dictionary_learning, sae_rl, mechreward and Qwen-Scope."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from operando.errors import UserError
from operando.sae.files import (
    Weights,
    centred_bias,
    mapping,
    own_origin,
    read_json,
    read_safetensors,
    read_torch,
    refuse_unread,
    tensors_of,
    topk_kind,
    whole,
    write_json,
)
from operando.sae.sae import SAE, Activation, Origin

# What a file may hold besides what is read, since nothing that the SAE computes depends on it.
SPARSIFY_BOOKKEEPING = {
    "expansion_factor",
    "normalize_decoder",
    "num_latents",
    "multi_topk",
    "d_in",
    "signed",
}
DICTIONARY_BOOKKEEPING = {
    "trainer_class", "lr", "steps", "auxk_alpha", "warmup_steps", "decay_start", "threshold_beta",
    "threshold_start_step", "top_k_aux", "seed", "activation_dim", "dict_size", "k", "device",
    "wandb_name", "submodule_name", "bandwidth", "sparsity_penalty", "sparsity_warmup_steps",
    "target_l0", "l1_penalty", "resample_steps", "decay_end", "log_steps", "sparsity_function",
    "initial_sparsity_penalty", "p_start", "p_end", "anneal_start", "anneal_end",
    "sparsity_queue_length", "n_sparsity_updates", "k_anneal_steps",
}  # fmt: skip
SAE_RL_BOOKKEEPING = {
    "d_model",
    "d_sae",
    "source_kind",
    "seed",
    "init_from_stage",
    "best_epoch",
    "best_train_loss",
    "best_val_loss",
    "selection_metric",
}
MECHREWARD_BOOKKEEPING = {
    "model",
    "layer",
    "tokens_trained",
    "algorithm",
    "training_script",
    "trained_at",
}
DICTIONARY_CLASSES = ("AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder", "AutoEncoder")
SPARSIFY_SITES = {
    "": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "attn": "hook_attn_out",
    "self_attn": "hook_attn_out",
    "attention": "hook_attn_out",
}


def load_sparsify(folder: Path) -> SAE:
    """Return the SAE of a folder with cfg.json and sae.safetensors."""
    cfg = read_json(folder / "cfg.json")
    for kind in ("transcode", "skip_connection"):
        if cfg.get(kind):
            raise UserError(f"{folder}/cfg.json: {kind} is set; transcoders are not SAEs")
    if cfg.get("activation", "topk") != "topk":
        raise UserError(f"{folder}/cfg.json: activation {cfg['activation']!r}, expected 'topk'")
    weights = read_safetensors(folder / "sae.safetensors")
    read = {"activation", "k", "transcode", "skip_connection", "operando"}
    refuse_unread(folder / "cfg.json", cfg, read | SPARSIFY_BOOKKEEPING)
    if cfg.get("signed"):
        raise UserError(f"{folder}/cfg.json: signed is set; only unsigned top-k is read")
    weights.require("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    weights.only("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    W_enc_MD = weights.matrix("encoder.weight")
    M, D = W_enc_MD.shape
    b_dec_D = weights.get("b_dec", D)
    found = re.search(r"layers[._](\d+)(?:[._](\w+))?$", folder.name)
    place = SPARSIFY_SITES.get(found[2] or "", "") if found else ""
    site = f"blocks.{found[1]}.{place}" if found and place else ""
    own = mapping(cfg.get("operando"))
    return SAE(
        W_enc_MD,
        weights.get("encoder.bias", M),
        weights.get("W_dec", M, D),
        b_dec_D.clone(),
        b_dec_D,
        topk_kind(own),
        whole(cfg.get("k"), f"{folder}/cfg.json", "k"),
        None,
        own_origin(own) or Origin(site=site),
        cfg,
    )


def save_sparsify(sae: SAE, folder: Path) -> None:
    """Write a folder that sparsify reads."""
    folder.mkdir()
    tensors = {
        "encoder.weight": sae.W_enc_MD.contiguous().cpu(),
        "encoder.bias": centred_bias(sae).cpu(),
        "W_dec": sae.W_dec_MD.contiguous().cpu(),
        "b_dec": sae.b_dec_D.contiguous().cpu(),
    }
    save_file(tensors, folder / "sae.safetensors")
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        "operando": sae.metadata(),
    }
    write_json(folder / "cfg.json", cfg)


def load_dictionary_learning(folder: Path) -> SAE:
    """Return the SAE of a folder with config.json and ae.pt."""
    config = read_json(folder / "config.json")
    refuse_unread(folder / "config.json", config, {"trainer", "buffer"})
    trainer = mapping(config.get("trainer"))
    weights = Weights(folder / "ae.pt", tensors_of(read_torch(folder / "ae.pt")))
    kind = trainer.get("dict_class")
    own = mapping(trainer.get("operando"))
    layer = trainer.get("layer")
    site = f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else ""
    origin = own_origin(own) or Origin(model=str(trainer.get("lm_name") or ""), site=site)
    read = {"dict_class", "layer", "lm_name", "operando"}
    if kind in DICTIONARY_CLASSES:
        refuse_unread(folder / "config.json", trainer, read | DICTIONARY_BOOKKEEPING)
    if kind == "JumpReluAutoEncoder":
        weights.only("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        W_enc_MD = weights.matrix("W_enc").T.contiguous()
        M, D = W_enc_MD.shape
        return SAE(
            W_enc_MD,
            weights.get("b_enc", M),
            weights.get("W_dec", M, D),
            torch.zeros(D),
            weights.get("b_dec", D),
            "jumprelu",
            None,
            weights.get("threshold", M),
            origin,
            trainer,
        )
    if kind not in DICTIONARY_CLASSES:
        raise UserError(
            f"{folder}/config.json: dict_class {kind!r}; expected AutoEncoderTopK, BatchTopKSAE, "
            "JumpReluAutoEncoder or AutoEncoder"
        )
    bias = "bias" if kind == "AutoEncoder" else "b_dec"
    weights.require("encoder.weight", "encoder.bias", "decoder.weight", bias)
    top = () if kind == "AutoEncoder" else ("k", "threshold")
    weights.only("encoder.weight", "encoder.bias", "decoder.weight", bias, *top)
    W_enc_MD = weights.matrix("encoder.weight")
    M, D = W_enc_MD.shape
    activation: Activation = "relu"
    k, threshold_M = None, None
    if kind != "AutoEncoder":
        k = int(weights.get("k"))
        activation = topk_kind(own)
    if kind == "BatchTopKSAE":
        activation, threshold = "batchtopk", float(weights.get("threshold"))
        if threshold < 0:
            raise UserError(f"{folder}/ae.pt: the threshold was never set ({threshold})")
        threshold_M = torch.full((M,), threshold)
    b_dec_D = weights.get(bias, D)
    W_dec_MD = weights.get("decoder.weight", D, M).T.contiguous()
    return SAE(
        W_enc_MD,
        weights.get("encoder.bias", M),
        W_dec_MD,
        b_dec_D.clone(),
        b_dec_D,
        activation,
        k,
        threshold_M,
        origin,
        trainer,
    )


def save_dictionary_learning(sae: SAE, folder: Path) -> None:
    """Write a folder that dictionary_learning reads."""
    folder.mkdir()
    state = {
        "b_dec": sae.b_dec_D.cpu().clone(),
        "k": torch.tensor(sae.k, dtype=torch.int),
        "threshold": torch.tensor(-1.0),
        "encoder.weight": sae.W_enc_MD.cpu().clone(),
        "encoder.bias": centred_bias(sae).cpu(),
        "decoder.weight": sae.W_dec_MD.T.contiguous().cpu(),
    }
    torch.save(state, folder / "ae.pt")
    layer = re.match(r"blocks\.(\d+)\.", sae.origin.site)
    trainer = {
        "dict_class": "AutoEncoderTopK",
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": sae.k,
        "layer": int(layer[1]) if layer else None,
        "lm_name": sae.origin.model,
        "submodule_name": sae.origin.site,
        "operando": sae.metadata(),
    }
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {}})


def load_sae_rl(file: Path, held: dict[str, object]) -> SAE:
    """Return the SAE of a file of OhhMoo/SAE-RL (scripts/topk/05_train_sae.py at d919128)."""
    config = mapping(held["config"])
    weights = Weights(file, tensors_of(mapping(held["state_dict"])))
    named = ("b_pre", "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    weights.require(*named)
    weights.only(*named)
    refuse_unread(file, held, {"state_dict", "config"})
    refuse_unread(file, config, {"k", "source", "operando"} | SAE_RL_BOOKKEEPING)
    W_enc_MD = weights.matrix("encoder.weight")
    M, D = W_enc_MD.shape
    own = mapping(config.get("operando"))
    source = str(config.get("source") or "")  # as in "ppo_step100_layer12"
    layer = re.search(r"layer(\d+)$", source)
    site = f"blocks.{layer[1]}.hook_resid_post" if layer else ""
    return SAE(
        W_enc_MD,
        weights.get("encoder.bias", M),
        weights.get("decoder.weight", D, M).T.contiguous(),
        weights.get("b_pre", D),
        weights.get("decoder.bias", D),
        topk_kind(own, "topk"),
        whole(config.get("k"), str(file), "config.k"),
        None,
        own_origin(own) or Origin(site=site, checkpoint=source),
        config,
    )


def save_sae_rl(sae: SAE, file: Path) -> None:
    """Write a file of OhhMoo/SAE-RL; what its configuration said besides is kept."""
    state = {
        "b_pre": sae.b_pre_D.cpu().clone(),
        "encoder.weight": sae.W_enc_MD.cpu().clone(),
        "encoder.bias": sae.b_enc_M.cpu().clone(),
        "decoder.weight": sae.W_dec_MD.T.contiguous().cpu(),
        "decoder.bias": sae.b_dec_D.cpu().clone(),
    }
    kept = {key: sae.config[key] for key in SAE_RL_BOOKKEEPING if key in sae.config}
    config = kept | {
        "d_model": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "source": sae.origin.checkpoint,
        "operando": sae.metadata(),
    }
    torch.save({"state_dict": state, "config": config}, file)


def load_qwen_scope(file: Path, held: dict[str, object], k: int | None) -> SAE:
    """x is not centred, and the top k are taken raw, as in the example of the model cards."""
    weights = Weights(file, tensors_of(held))
    weights.require("W_enc", "W_dec", "b_enc", "b_dec")
    refuse_unread(file, held, {"W_enc", "W_dec", "b_enc", "b_dec"})
    W_enc_MD = weights.matrix("W_enc")
    M, D = W_enc_MD.shape
    named = re.search(r"L0_(\d+)", str(file.resolve()))
    if k is None and named is None:
        raise UserError(f"{file}: the path does not say L0_K; pass k, as load_sae(path, k=50)")
    layer = re.search(r"layer(\d+)\.sae\.pt$", file.name)
    site = f"blocks.{layer[1]}.hook_resid_post" if layer else ""
    chosen = k if k is not None else int(named[1]) if named else None
    return SAE(
        W_enc_MD,
        weights.get("b_enc", M),
        weights.get("W_dec", D, M).T.contiguous(),
        torch.zeros(D),
        weights.get("b_dec", D),
        "topk",
        chosen,
        None,
        Origin(site=site),
    )


def load_mechreward(file: Path, held: dict[str, object]) -> SAE:
    """Return the SAE of a file of mechreward (scripts/train_sae_qwen35.py, src/mechreward/sae/
    topk_sae.py): f = relu(top k of (x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec.

    The file does not say its layer; the .json beside it does.
    """
    weights = Weights(file, tensors_of(held))
    weights.require("W_enc", "W_dec", "b_enc", "b_dec")
    sizes = {key: whole(held.get(key), str(file), key) for key in ("d_model", "d_sae", "k")}
    refuse_unread(file, held, {"W_enc", "W_dec", "b_enc", "b_dec", "step", *sizes})
    D, M = sizes["d_model"], sizes["d_sae"]
    about = file.with_suffix(".json")
    config = read_json(about) if about.is_file() else {}
    refuse_unread(about, config, MECHREWARD_BOOKKEEPING | set(sizes))
    layer = config.get("layer")
    origin = Origin(
        model=str(config.get("model") or ""),
        site=f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else "",
        checkpoint=f"step {held['step']}" if "step" in held else "",
    )
    b_dec_D = weights.get("b_dec", D)
    return SAE(
        weights.get("W_enc", D, M).T.contiguous(),
        weights.get("b_enc", M),
        weights.get("W_dec", M, D),
        b_dec_D.clone(),
        b_dec_D,
        "topk_relu",
        sizes["k"],
        None,
        origin,
        config,
    )
