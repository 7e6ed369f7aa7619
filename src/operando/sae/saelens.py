"""SAEs in SAELens folders, those before 6.0 too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from operando.errors import UserError
from operando.sae.files import (
    Weights,
    hf_name,
    mapping,
    origin_of,
    read_json,
    read_safetensors,
    refuse_unread,
    refuse_values,
    whole,
    write_json,
)
from operando.sae.sae import SAE, Activation

SAELENS_VERSION = "6.54.12"  # without a version >= 6 in the metadata sae-lens drops the metadata
EXACT = "operando.safetensors"

READ = {
    "architecture",
    "d_in",
    "d_sae",
    "k",
    "activation_fn",
    "activation_fn_str",
    "activation_fn_kwargs",
    "apply_b_dec_to_input",
    "rescale_acts_by_decoder_norm",
    "metadata",
    "hook_name",
    "hook_point",
    "model_name",
    "finetuning_scaling_factor",
}
SCALES = ("scaling_factor", "finetuning_scaling_factor")
# Keys that are inert with these values and refused with any other.
INERT: dict[str, tuple[object, ...]] = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "hook_head_index": (None,),
    "hook_point_head_index": (None,),
    "use_error_term": (False, None),
    "seqpos_slice": (None, [None], [None, None], [None, None, None]),
    "noise_scale": (0, None),
    "lp_norm": (1, 1.0, None),
}
# Where and how it was trained: nothing that a trained SAE computes depends on these.
BOOKKEEPING = {
    # 6.0 and later, training configurations included
    "dtype", "device", "decoder_init_norm", "l1_coefficient", "l1_warm_up_steps",
    "aux_loss_coefficient", "use_sparse_activations", "jumprelu_bandwidth",
    "jumprelu_init_threshold", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale",
    "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "target_l0",
    "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss", "jumprelu_ste_to_input",
    # before 6.0
    "prepend_bos", "dataset_path", "dataset_trust_remote_code", "context_size", "neuronpedia_id",
    "sae_lens_version", "sae_lens_training_version", "model_from_pretrained_kwargs",
    "model_kwargs", "model_class_name", "hook_layer", "hook_point_layer", "is_dataset_tokenized",
    "streaming", "use_cached_activations", "cached_activations_path", "expansion_factor",
    "from_pretrained_path", "b_dec_init_method", "normalize_sae_decoder", "decoder_orthogonal_init",
    "decoder_heuristic_init", "init_encoder_as_decoder_transpose", "n_batches_in_buffer",
    "training_tokens", "finetuning_tokens", "finetuning_method", "store_batch_size",
    "store_batch_size_prompts", "train_batch_size", "train_batch_size_tokens", "autocast",
    "autocast_lm", "compile_llm", "llm_compilation_mode", "compile_sae", "sae_compilation_mode",
    "adam_beta1", "adam_beta2", "mse_loss_normalization", "scale_sparsity_penalty_by_decoder_norm",
    "lr", "lr_scheduler_name", "lr_warm_up_steps", "lr_end", "lr_decay_steps", "n_restart_cycles",
    "use_ghost_grads", "feature_sampling_window", "dead_feature_window", "dead_feature_threshold",
    "n_eval_batches", "eval_batch_size_prompts", "log_to_wandb", "log_activations_store_to_wandb",
    "log_optimizer_state_to_wandb", "wandb_project", "wandb_id", "run_name", "wandb_entity",
    "wandb_log_frequency", "eval_every_n_wandb_logs", "resume", "n_checkpoints",
    "checkpoint_path", "verbose", "seed", "act_store_device", "exclude_special_tokens",
    "tokens_per_buffer", "llm_batch_size", "streaming_dataset", "jumprelu_sparsity_loss",
    "total_training_tokens", "feature_sampling_method", "feature_reinit_scale", "resample_batches",
    "dead_feature_estimation_method", "begin_batch_token", "begin_sequence_token",
    "sequence_separator_token", "disable_concat_sequences", "hook_eval", "model_batch_size",
    "n_batches_for_norm_estimate", "activations_mixing_fraction", "log_weights_to_wandb", "logger",
    "n_batches_for_norm", "resume_from_checkpoint", "save_final_checkpoint", "output_path",
    "train_batch_size_samples", "total_training_samples", "llm_device", "prefetch_llm_batches",
    "use_chat_formatting", "store_size", "log_wandb", "d_head", "is_tokenized",
}  # fmt: skip


def load_saelens(folder: Path) -> SAE:
    """Return the SAE of a folder with cfg.json and sae_weights.safetensors."""
    file = folder / "cfg.json"
    cfg = read_json(file)
    weights = read_safetensors(folder / "sae_weights.safetensors")
    metadata = mapping(cfg.get("metadata"))
    site = str(metadata.get("hook_name") or cfg.get("hook_name") or cfg.get("hook_point") or "")
    if "hook_z" in site:
        raise UserError(f"{file}: {site} is the input of attention's output, which is not read")
    activation, k = _activation(file, cfg, metadata)
    refuse_values(file, cfg, INERT)
    refuse_unread(file, cfg, READ | set(INERT) | BOOKKEEPING)
    weights.require("W_enc", "b_enc", "W_dec", "b_dec")
    thresholded = {"threshold"} if activation in ("jumprelu", "batchtopk") else set()
    weights.only("W_enc", "b_enc", "W_dec", "b_dec", *thresholded, *SCALES)
    W_enc_MD = weights.matrix("W_enc").T.contiguous()
    M, D = W_enc_MD.shape
    W_dec_MD = weights.get("W_dec", M, D)
    b_enc_M, b_dec_D = weights.get("b_enc", M), weights.get("b_dec", D)
    threshold_M = weights.get("threshold", M) if thresholded else None
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norm_M1 = W_dec_MD.norm(dim=1, keepdim=True)
        W_enc_MD, b_enc_M = W_enc_MD * norm_M1, b_enc_M * norm_M1[:, 0]
        W_dec_MD = W_dec_MD / norm_M1
    W_dec_MD = W_dec_MD * _scale(file, cfg, weights, M)[:, None]
    subtracts = bool(cfg.get("apply_b_dec_to_input", True))  # sae-lens's own default
    b_pre_D = b_dec_D.clone() if subtracts else torch.zeros(D)
    model = str(metadata.get("model_name") or cfg.get("model_name") or "")
    origin = origin_of(model, site, mapping(metadata.get("provenance")))
    sae = SAE(
        W_enc_MD, b_enc_M, W_dec_MD, b_pre_D, b_dec_D, activation, k, threshold_M, origin, cfg
    )
    return _unfold(sae, folder) if (folder / EXACT).is_file() else sae


def _scale(file: Path, cfg: dict[str, object], weights: Weights, M: int) -> Tensor:
    """Return what each feature is multiplied by between its activation and the decoder.

    SAELens before 6.0, finetuning_scaling_factor: x_hat = (s * f) W_dec + b_dec. sae-lens 6 refuses
    it; here s is folded into the decoder's rows, and f stays as it is.
    """
    keys = [key for key in SCALES if key in weights.tensors]
    wanted = bool(cfg.get("finetuning_scaling_factor", False))
    if len(keys) > 1 or (wanted and not keys):
        raise UserError(
            f"{file}: finetuning_scaling_factor={wanted}, and sae_weights.safetensors holds "
            f"{' and '.join(keys) or 'no such tensor'}; expected one of {', '.join(SCALES)}"
        )
    if not keys:
        return torch.ones(M)
    scale_M = weights.get(keys[0], M)
    if not wanted and bool((scale_M != 1).any()):
        raise UserError(
            f"{file}: finetuning_scaling_factor is off, but {keys[0]!r} in the weights is not 1: "
            "one of them is wrong"
        )
    return scale_M


def _activation(
    file: Path, cfg: dict[str, object], metadata: dict[str, object]
) -> tuple[Activation, int | None]:
    architecture = cfg.get("architecture", "standard")
    own = metadata.get("activation")
    function = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    kwargs = mapping(cfg.get("activation_fn_kwargs"))
    if function == "topk" and architecture == "standard":  # before 6.0
        refuse_unread(file, kwargs, {"k"}, "activation_fn_kwargs key")
        return "topk_relu", whole(kwargs.get("k"), str(file), "activation_fn_kwargs.k")
    if architecture in ("topk", "jumprelu", "standard") and kwargs:
        refuse_unread(file, kwargs, {"k"} if architecture == "topk" else set(), "kwarg")
    if architecture == "topk":
        k = whole(cfg.get("k", kwargs.get("k")), str(file), "k")
        return ("topk" if own == "topk" else "topk_relu"), k
    if architecture == "jumprelu":
        k = metadata.get("k")
        if own == "batchtopk":
            return "batchtopk", k if isinstance(k, int) else None
        return "jumprelu", None
    if architecture == "standard" and function == "relu":
        return "relu", None
    raise UserError(
        f"{file}: architecture {architecture!r} with activation {function!r} is not supported; "
        "expected topk, jumprelu or standard with relu"
    )


def _unfold(sae: SAE, folder: Path) -> SAE:
    """Return the SAE with its own b_pre; if other weights were put beside it, that is an error."""
    M, D = sae.W_enc_MD.shape
    exact = read_safetensors(folder / EXACT)
    exact.only("b_pre", "b_enc")
    b_pre_D, b_enc_M = exact.get("b_pre", D), exact.get("b_enc", M)
    gap = float((b_enc_M - sae.W_enc_MD @ b_pre_D - sae.b_enc_M).abs().max())
    if not gap <= 1e-4 * max(1.0, float(sae.b_enc_M.abs().max())):
        raise UserError(
            f"{folder}: {EXACT} is not of the same SAE as sae_weights.safetensors "
            f"(biases differ by {gap:.2g}); delete {EXACT} if the weights were edited"
        )
    return replace(sae, b_enc_M=b_enc_M, b_pre_D=b_pre_D)


def save_saelens(sae: SAE, folder: Path) -> None:
    """Write a folder that sae-lens reads, and beside it the exact b_pre and b_enc."""
    folder.mkdir()
    tensors = {
        "W_enc": sae.W_enc_MD.T.contiguous(),
        "b_enc": sae.b_enc_M - sae.W_enc_MD @ sae.b_pre_D,
        "W_dec": sae.W_dec_MD.contiguous(),
        "b_dec": sae.b_dec_D.contiguous(),
    }
    architecture = {"relu": "standard", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
    cfg: dict[str, object] = {
        "architecture": architecture.get(sae.activation, "topk"),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if sae.activation in ("topk", "topk_relu"):
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.threshold_M is not None:
        tensors["threshold"] = sae.threshold_M.contiguous()
    cfg["metadata"] = {
        "sae_lens_version": SAELENS_VERSION,
        "prepend_bos": False,
        "hf_hook_name": hf_name(sae.origin.site),
        **sae.metadata(),
    }
    save_file({k: v.cpu() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    exact = {"b_pre": sae.b_pre_D.contiguous().cpu(), "b_enc": sae.b_enc_M.contiguous().cpu()}
    save_file(exact, folder / EXACT)
    write_json(folder / "cfg.json", cfg)
