"""Reading and writing SAEs in the formats of other tools, with none of those tools installed.

    saelens              cfg.json + sae_weights.safetensors   (sae-lens >= 6)
    sparsify             cfg.json + sae.safetensors           (eai-sparsify)
    dictionary_learning  config.json + ae.pt
    seed                 one .pt: {"state_dict", "config"}    (OhhMoo/SAE-RL)
    Qwen-Scope           layer{n}.sae.pt, read only

The other formats have no b_pre of their own: it is folded into the encoder bias. A folder written
here in SAELens format holds operando.safetensors besides, so that a chain goes on from exactly the
weights it ended with.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from operando.errors import UserError, nearest
from operando.internals.sae import SAE, Activation, Origin
from operando.run import atomic_path

Format = Literal["saelens", "sparsify", "dictionary_learning", "seed"]
SAELENS_VERSION = "6.54.12"  # without a version >= 6 in the metadata sae-lens drops the metadata
EXACT = "operando.safetensors"
KNOWN_FILES = {
    "cfg.json", "sae_weights.safetensors", EXACT, "sae.safetensors", "sparsity.safetensors",
    "runner_cfg.json", "config.json", "ae.pt", "README.md", "training.json",
}  # fmt: skip
EXPECTED = (
    "expected cfg.json + sae_weights.safetensors (SAELens), cfg.json + sae.safetensors (sparsify), "
    "config.json + ae.pt (dictionary_learning), a seed .pt or a Qwen-Scope layerN.sae.pt"
)


@dataclass(frozen=True)
class _Weights:
    """The tensors of one file; a missing or misshapen one is an error that names the file."""

    file: Path
    tensors: Mapping[str, Tensor]

    def get(self, key: str, *shape: int) -> Tensor:
        self.require(key)
        tensor = self.tensors[key]
        if shape and tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.file}: {key!r} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor.detach().float().contiguous()

    def matrix(self, key: str) -> Tensor:
        tensor = self.get(key)
        if tensor.dim() != 2:
            raise UserError(
                f"{self.file}: {key!r} has shape {tuple(tensor.shape)}, expected 2 dims"
            )
        return tensor

    def require(self, *keys: str) -> None:
        missing = [key for key in keys if key not in self.tensors]
        if missing:
            found = ", ".join(sorted(self.tensors))
            raise UserError(f"{self.file}: missing {', '.join(missing)}; found {found}")


def load_sae(path: str | Path, k: int | None = None) -> SAE:
    """Return the SAE at `path`, a folder or a file in one of the formats above.

    `k` is needed only for a Qwen-Scope file whose folder's name no longer says L0_k.

    Example: load_sae("runs/a/saes/step_00100/blocks.3.hook_resid_post")
    """
    path = Path(path)
    if not path.exists():
        beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"no SAE at {path}: nothing is there.{nearest(path.name, beside)}")
    if path.is_file() and path.name in KNOWN_FILES:
        path = path.parent
    if path.is_dir():
        found = {p.name for p in path.iterdir()}
        if {"cfg.json", "sae_weights.safetensors"} <= found:
            return _load_saelens(path)
        if {"cfg.json", "sae.safetensors"} <= found:
            return _load_sparsify(path)
        if {"config.json", "ae.pt"} <= found:
            return _load_dictionary_learning(path)
        listed = ", ".join(sorted(found)[:8]) or "an empty folder"
        raise UserError(f"{path} holds no SAE in a known format: found {listed}; {EXPECTED}")
    if path.suffix != ".pt":
        raise UserError(f"{path} is no SAE in a known format: {EXPECTED}")
    held = _read_torch(path)
    if "state_dict" in held and "config" in held:
        return _load_seed(path, held)
    if "W_enc" in held and "W_dec" in held:
        return _load_qwen_scope(path, held, k)
    raise UserError(f"{path}: found keys {', '.join(sorted(map(str, held))[:8])}; {EXPECTED}")


def save_sae(sae: SAE, path: str | Path, format: Format = "saelens") -> None:
    """Write an SAE atomically: a folder, or one file for the seed's format.

    Other tools apply max(0, .) after the top k. Where a token's k-th largest value is negative, an
    SAE with the raw signed "topk" therefore encodes otherwise there than here.
    """
    path = Path(path)
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
                _save_saelens(sae, temporary)
            case "sparsify":
                _save_sparsify(sae, temporary)
            case "dictionary_learning":
                _save_dictionary_learning(sae, temporary)
            case "seed":
                _save_seed(sae, temporary)


# SAELens


def _load_saelens(folder: Path) -> SAE:
    cfg = _read_json(folder / "cfg.json")
    weights = _read_safetensors(folder / "sae_weights.safetensors")
    weights.require("W_enc", "b_enc", "W_dec", "b_dec")
    W_enc_MD = weights.matrix("W_enc").T.contiguous()
    M, D = W_enc_MD.shape
    W_dec_MD = weights.get("W_dec", M, D)
    b_enc_M, b_dec_D = weights.get("b_enc", M), weights.get("b_dec", D)
    normalize = cfg.get("normalize_activations", "none")
    if normalize not in ("none", None, False):
        raise UserError(f"{folder}/cfg.json: normalize_activations={normalize!r} is not supported")
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norm_M1 = W_dec_MD.norm(dim=1, keepdim=True)
        W_enc_MD, b_enc_M = W_enc_MD * norm_M1, b_enc_M * norm_M1[:, 0]
        W_dec_MD = W_dec_MD / norm_M1
    metadata = _mapping(cfg.get("metadata"))
    activation, k, threshold_M = _saelens_activation(folder, cfg, metadata, weights, M)
    subtracts = bool(cfg.get("apply_b_dec_to_input", True))  # sae-lens's own default
    b_pre_D = b_dec_D.clone() if subtracts else torch.zeros(D)
    site = str(metadata.get("hook_name") or cfg.get("hook_name") or "")
    model = str(metadata.get("model_name") or cfg.get("model_name") or "")
    origin = _origin(model, site, _mapping(metadata.get("provenance")))
    sae = SAE(
        W_enc_MD, b_enc_M, W_dec_MD, b_pre_D, b_dec_D, activation, k, threshold_M, origin
    )  # fmt: skip
    return _unfold(sae, folder) if (folder / EXACT).is_file() else sae


def _saelens_activation(
    folder: Path, cfg: dict[str, object], metadata: dict[str, object], weights: _Weights, M: int
) -> tuple[Activation, int | None, Tensor | None]:
    architecture = cfg.get("architecture", "standard")
    own = metadata.get("activation")
    function = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if architecture == "topk":
        k = _whole(cfg.get("k"), f"{folder}/cfg.json", "k")
        return ("topk" if own == "topk" else "topk_relu"), k, None
    if architecture == "jumprelu":
        threshold_M = weights.get("threshold", M)
        k = metadata.get("k")
        if own == "batchtopk":
            return "batchtopk", k if isinstance(k, int) else None, threshold_M
        return "jumprelu", None, threshold_M
    if architecture == "standard" and function == "relu":
        return "relu", None, None
    raise UserError(
        f"{folder}/cfg.json: architecture {architecture!r} with activation {function!r} is not "
        "supported; expected topk, jumprelu or standard with relu"
    )


def _unfold(sae: SAE, folder: Path) -> SAE:
    """Return the SAE with its own b_pre; if other weights were put beside it, that is an error."""
    M, D = sae.W_enc_MD.shape
    exact = _read_safetensors(folder / EXACT)
    b_pre_D, b_enc_M = exact.get("b_pre", D), exact.get("b_enc", M)
    gap = float((b_enc_M - sae.W_enc_MD @ b_pre_D - sae.b_enc_M).abs().max())
    if not gap <= 1e-4 * max(1.0, float(sae.b_enc_M.abs().max())):
        raise UserError(
            f"{folder}: {EXACT} is not of the same SAE as sae_weights.safetensors "
            f"(biases differ by {gap:.2g}); delete {EXACT} if the weights were edited"
        )
    return replace(sae, b_enc_M=b_enc_M, b_pre_D=b_pre_D)


def _save_saelens(sae: SAE, folder: Path) -> None:
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
        "hf_hook_name": _hf_name(sae.origin.site),
        **sae.metadata(),
    }
    save_file({k: v.cpu() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    exact = {"b_pre": sae.b_pre_D.contiguous().cpu(), "b_enc": sae.b_enc_M.contiguous().cpu()}
    save_file(exact, folder / EXACT)
    _write_json(folder / "cfg.json", cfg)


# sparsify


def _load_sparsify(folder: Path) -> SAE:
    cfg = _read_json(folder / "cfg.json")
    for kind in ("transcode", "skip_connection"):
        if cfg.get(kind):
            raise UserError(f"{folder}/cfg.json: {kind} is set; transcoders are not SAEs")
    if cfg.get("activation", "topk") != "topk":
        raise UserError(f"{folder}/cfg.json: activation {cfg['activation']!r}, expected 'topk'")
    weights = _read_safetensors(folder / "sae.safetensors")
    weights.require("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    W_enc_MD = weights.matrix("encoder.weight")
    M, D = W_enc_MD.shape
    b_dec_D = weights.get("b_dec", D)
    found = re.search(r"layers[._](\d+)$", folder.name)
    site = f"blocks.{found[1]}.hook_resid_post" if found else ""
    own = _mapping(cfg.get("operando"))
    return SAE(
        W_enc_MD, weights.get("encoder.bias", M), weights.get("W_dec", M, D), b_dec_D.clone(),
        b_dec_D, _topk_kind(own), _whole(cfg.get("k"), f"{folder}/cfg.json", "k"), None,
        _own_origin(own) or Origin(site=site),
    )  # fmt: skip


def _save_sparsify(sae: SAE, folder: Path) -> None:
    folder.mkdir()
    tensors = {
        "encoder.weight": sae.W_enc_MD.contiguous().cpu(),
        "encoder.bias": _centred_bias(sae).cpu(),
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
    _write_json(folder / "cfg.json", cfg)


def _centred_bias(sae: SAE) -> Tensor:
    """Return b with W (x - b_dec) + b = W_enc (x - b_pre) + b_enc."""
    return sae.b_enc_M + sae.W_enc_MD @ (sae.b_dec_D - sae.b_pre_D)


# dictionary_learning


def _load_dictionary_learning(folder: Path) -> SAE:
    trainer = _mapping(_read_json(folder / "config.json").get("trainer"))
    weights = _Weights(folder / "ae.pt", _tensors(_read_torch(folder / "ae.pt")))
    kind = trainer.get("dict_class")
    own = _mapping(trainer.get("operando"))
    layer = trainer.get("layer")
    site = f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else ""
    origin = _own_origin(own) or Origin(model=str(trainer.get("lm_name") or ""), site=site)
    if kind == "JumpReluAutoEncoder":
        W_enc_MD = weights.matrix("W_enc").T.contiguous()
        M, D = W_enc_MD.shape
        return SAE(
            W_enc_MD, weights.get("b_enc", M), weights.get("W_dec", M, D), torch.zeros(D),
            weights.get("b_dec", D), "jumprelu", None, weights.get("threshold", M), origin,
        )  # fmt: skip
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE", "AutoEncoder"):
        raise UserError(
            f"{folder}/config.json: dict_class {kind!r}; expected AutoEncoderTopK, BatchTopKSAE, "
            "JumpReluAutoEncoder or AutoEncoder"
        )
    bias = "bias" if kind == "AutoEncoder" else "b_dec"
    weights.require("encoder.weight", "encoder.bias", "decoder.weight", bias)
    W_enc_MD = weights.matrix("encoder.weight")
    M, D = W_enc_MD.shape
    activation: Activation = "relu"
    k, threshold_M = None, None
    if kind != "AutoEncoder":
        k = int(weights.get("k"))
        activation = _topk_kind(own)
    if kind == "BatchTopKSAE":
        activation, threshold = "batchtopk", float(weights.get("threshold"))
        if threshold < 0:
            raise UserError(f"{folder}/ae.pt: the threshold was never set ({threshold})")
        threshold_M = torch.full((M,), threshold)
    b_dec_D = weights.get(bias, D)
    W_dec_MD = weights.get("decoder.weight", D, M).T.contiguous()
    return SAE(
        W_enc_MD, weights.get("encoder.bias", M), W_dec_MD, b_dec_D.clone(), b_dec_D,
        activation, k, threshold_M, origin,
    )  # fmt: skip


def _save_dictionary_learning(sae: SAE, folder: Path) -> None:
    folder.mkdir()
    state = {
        "b_dec": sae.b_dec_D.cpu().clone(),
        "k": torch.tensor(sae.k, dtype=torch.int),
        "threshold": torch.tensor(-1.0),
        "encoder.weight": sae.W_enc_MD.cpu().clone(),
        "encoder.bias": _centred_bias(sae).cpu(),
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
    _write_json(folder / "config.json", {"trainer": trainer, "buffer": {}})


# the seed and Qwen-Scope


def _load_seed(file: Path, held: dict[str, object]) -> SAE:
    config = _mapping(held["config"])
    weights = _Weights(file, _tensors(_mapping(held["state_dict"])))
    weights.require("b_pre", "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    W_enc_MD = weights.matrix("encoder.weight")
    M, D = W_enc_MD.shape
    own = _mapping(config.get("operando"))
    return SAE(
        W_enc_MD, weights.get("encoder.bias", M),
        weights.get("decoder.weight", D, M).T.contiguous(), weights.get("b_pre", D),
        weights.get("decoder.bias", D), _topk_kind(own, "topk"),
        _whole(config.get("k"), str(file), "config.k"), None,
        _own_origin(own) or Origin(checkpoint=str(config.get("source") or "")),
    )  # fmt: skip


def _save_seed(sae: SAE, file: Path) -> None:
    state = {
        "b_pre": sae.b_pre_D.cpu().clone(),
        "encoder.weight": sae.W_enc_MD.cpu().clone(),
        "encoder.bias": sae.b_enc_M.cpu().clone(),
        "decoder.weight": sae.W_dec_MD.T.contiguous().cpu(),
        "decoder.bias": sae.b_dec_D.cpu().clone(),
    }
    config = {
        "d_model": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "source": sae.origin.checkpoint,
        "operando": sae.metadata(),
    }
    torch.save({"state_dict": state, "config": config}, file)


def _load_qwen_scope(file: Path, held: dict[str, object], k: int | None) -> SAE:
    """x is not centred, and the top k are taken raw, as in the example of the model cards."""
    weights = _Weights(file, _tensors(held))
    weights.require("W_enc", "W_dec", "b_enc", "b_dec")
    W_enc_MD = weights.matrix("W_enc")
    M, D = W_enc_MD.shape
    named = re.search(r"L0_(\d+)", str(file.resolve()))
    if k is None and named is None:
        raise UserError(f"{file}: the path does not say L0_K; pass k, as load_sae(path, k=50)")
    layer = re.search(r"layer(\d+)\.sae\.pt$", file.name)
    site = f"blocks.{layer[1]}.hook_resid_post" if layer else ""
    chosen = k if k is not None else int(named[1]) if named else None
    return SAE(
        W_enc_MD, weights.get("b_enc", M), weights.get("W_dec", D, M).T.contiguous(),
        torch.zeros(D), weights.get("b_dec", D), "topk", chosen, None, Origin(site=site),
    )  # fmt: skip


# what the formats share


def _topk_kind(own: dict[str, object], default: Activation = "topk_relu") -> Activation:
    """Return which top-k it was when operando wrote it; else what the format's own tool does."""
    kind = own.get("activation")
    return kind if kind in ("topk", "topk_relu") else default


def _own_origin(own: dict[str, object]) -> Origin | None:
    if not own:
        return None
    model, site = str(own.get("model_name", "")), str(own.get("hook_name", ""))
    return _origin(model, site, _mapping(own.get("provenance")))


def _origin(model: str, site: str, provenance: dict[str, object]) -> Origin:
    arm, seed, resampled = (provenance.get(key) for key in ("arm", "split_seed", "resampled"))
    texts = {key: str(provenance.get(key) or "") for key in ("checkpoint", "parent", "data")}
    return Origin(
        model, site, texts["checkpoint"], texts["parent"],
        arm if arm in ("real", "null") else "",
        tuple(int(i) for i in resampled) if isinstance(resampled, list) else (),
        texts["data"], seed if isinstance(seed, int) else None,
    )  # fmt: skip


def _hf_name(site: str) -> str | None:
    """Return "model.layers.12" for the residual stream after block 12, the one HF names."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", site)
    return f"model.layers.{found[1]}" if found else None


def _mapping(value: object) -> dict[str, object]:
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def _tensors(held: dict[str, object]) -> dict[str, Tensor]:
    return {key: value for key, value in held.items() if isinstance(value, Tensor)}


def _whole(value: object, where: str, key: str) -> int:
    if not isinstance(value, int):
        raise UserError(f"{where}: {key} is {value!r}, expected a whole number")
    return value


def _read_json(file: Path) -> dict[str, object]:
    try:
        return _mapping(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged or cut short: {error}") from error


def _write_json(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_safetensors(file: Path) -> _Weights:
    try:
        return _Weights(file, load_file(file))
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut short: {error}") from error


def _read_torch(file: Path) -> dict[str, object]:
    """Return what a .pt holds; only tensors and plain values are ever unpickled."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{file} is damaged, cut short or no weights file: {first}") from error
    if not isinstance(held, Mapping):
        raise UserError(f"{file} holds a {type(held).__name__}, expected a dict of tensors")
    return _mapping(held)
