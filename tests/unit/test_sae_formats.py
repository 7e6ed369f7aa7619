"""Every format there and back, foreign files as their own tools read them, and damaged ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from operando.errors import UserError
from operando.internals.sae import Origin
from operando.internals.sae_formats import load_sae, save_sae
from tests.unit.test_sae import random_sae

ORIGIN = Origin(
    model="tiny", site="blocks.1.hook_resid_post", checkpoint="step_00010", parent="ab12",
    arm="null", resampled=(3, 17), data="cd34", split_seed=5,
)  # fmt: skip
X_ND = torch.randn(200, 8, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("activation", ["topk", "topk_relu"])
@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "seed"])
def test_top_k_there_and_back(tmp_path: Path, format: str, activation: str) -> None:
    sae = random_sae(activation=activation, origin=ORIGIN)
    path = tmp_path / ("sae.pt" if format == "seed" else "sae")
    save_sae(sae, path, format)  # pyright: ignore[reportArgumentType]
    back = load_sae(path)
    assert (back.activation, back.k, back.origin) == (activation, 3, ORIGIN)
    assert float((back.reconstruct(X_ND) - sae.reconstruct(X_ND)).abs().max()) < 3e-6
    if format in ("saelens", "seed"):  # a chain goes on from exactly these weights
        assert back.sha256() == sae.sha256()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("activation", ["batchtopk", "relu", "jumprelu"])
def test_the_other_activations_there_and_back(tmp_path: Path, activation: str) -> None:
    threshold_M = None if activation == "relu" else torch.linspace(0.1, 1, 24)
    sae = random_sae(activation=activation, threshold_M=threshold_M)
    save_sae(sae, tmp_path / "sae")
    back = load_sae(tmp_path / "sae")
    assert back.activation == activation
    assert float((back.reconstruct(X_ND) - sae.reconstruct(X_ND)).abs().max()) < 3e-6
    for format in ("sparsify", "dictionary_learning", "seed"):
        with pytest.raises(UserError, match="for top-k SAEs only"):
            save_sae(sae, tmp_path / "other", format)


def test_the_saelens_folder_encodes_by_saelens_own_formula(tmp_path: Path) -> None:
    """relu(topk(x @ W_enc + b_enc)) @ W_dec + b_dec, from the file alone."""
    sae = random_sae(activation="topk_relu", origin=ORIGIN)
    save_sae(sae, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    w = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert set(w) == {"W_enc", "b_enc", "W_dec", "b_dec"} and w["W_enc"].shape == (8, 24)
    value, idx = (X_ND @ w["W_enc"] + w["b_enc"]).topk(cfg["k"])
    f_NM = torch.zeros(200, 24).scatter_(1, idx, value.relu())
    assert torch.allclose(f_NM @ w["W_dec"] + w["b_dec"], sae.reconstruct(X_ND), atol=3e-6)
    assert cfg["metadata"]["sae_lens_version"] >= "6"
    assert cfg["metadata"]["hf_hook_name"] == "model.layers.1"
    assert cfg["metadata"]["provenance"]["arm"] == "null"
    assert cfg["metadata"]["sha256"] == sae.sha256()


def write_saelens(folder: Path, tensors: dict[str, torch.Tensor], **cfg: object) -> None:
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))


def test_a_saelens_sae_that_ranks_by_decoder_norm_is_folded(tmp_path: Path) -> None:
    sae = random_sae()
    W_dec_MD = sae.W_dec_MD * torch.linspace(0.2, 5, 24)[:, None]
    tensors = {"W_enc": sae.W_enc_MD.T.contiguous(), "b_enc": sae.b_enc_M, "W_dec": W_dec_MD,
               "b_dec": sae.b_dec_D}  # fmt: skip
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.2.hook_resid_pre"}
    common = {"architecture": "topk", "k": 3, "apply_b_dec_to_input": True, "metadata": metadata}
    write_saelens(tmp_path / "a", tensors, **common, rescale_acts_by_decoder_norm=True)
    write_saelens(tmp_path / "b", tensors, **common, rescale_acts_by_decoder_norm=False)
    z_NM = (X_ND - sae.b_dec_D) @ sae.W_enc_MD.T + sae.b_enc_M
    for name, norm_M in (("a", W_dec_MD.norm(dim=1)), ("b", torch.ones(24))):
        value, idx = (z_NM * norm_M).topk(3)
        f_NM = torch.zeros(200, 24).scatter_(1, idx, value.relu()) / norm_M
        back = load_sae(tmp_path / name)
        assert back.origin.site == "blocks.2.hook_resid_pre"
        assert torch.allclose(back.reconstruct(X_ND), f_NM @ W_dec_MD + sae.b_dec_D, atol=1e-5)


def test_sparsify_and_dictionary_learning_files_by_their_own_formula(tmp_path: Path) -> None:
    """topk(relu(W (x - b_dec) + b)), decoded, plus b_dec; b_pre and b_dec differ in the source."""
    sae = random_sae(activation="topk_relu")
    save_sae(sae, tmp_path / "layers.5", "sparsify")
    save_sae(sae, tmp_path / "trainer_0", "dictionary_learning")
    sparsify = load_file(tmp_path / "layers.5" / "sae.safetensors")
    theirs = torch.load(tmp_path / "trainer_0" / "ae.pt", weights_only=True)
    assert theirs["threshold"] == -1 and theirs["k"].dtype == torch.int32
    for w, W_dec_MD in ((sparsify, sparsify["W_dec"]), (theirs, theirs["decoder.weight"].T)):
        z_NM = F.linear(X_ND - w["b_dec"], w["encoder.weight"], w["encoder.bias"]).relu()
        value, idx = z_NM.topk(3)
        f_NM = torch.zeros(200, 24).scatter_(1, idx, value)
        assert torch.allclose(f_NM @ W_dec_MD + w["b_dec"], sae.reconstruct(X_ND), atol=3e-6)


def test_foreign_dictionary_learning_classes(tmp_path: Path) -> None:
    sae = random_sae()
    for kind in ("BatchTopKSAE", "JumpReluAutoEncoder", "AutoEncoder"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"trainer": {"dict_class": kind, "layer": 4, "lm_name": "m"}})
        )
        bias = "bias" if kind == "AutoEncoder" else "b_dec"
        state = {"encoder.weight": sae.W_enc_MD, "encoder.bias": sae.b_enc_M,
                 "decoder.weight": sae.W_dec_MD.T.contiguous(), bias: sae.b_dec_D,
                 "k": torch.tensor(3), "threshold": torch.tensor(0.6)}  # fmt: skip
        if kind == "JumpReluAutoEncoder":
            state = {"W_enc": sae.W_enc_MD.T.contiguous(), "b_enc": sae.b_enc_M,
                     "W_dec": sae.W_dec_MD, "b_dec": sae.b_dec_D,
                     "threshold": torch.full((24,), 0.6)}  # fmt: skip
        torch.save(state, folder / "ae.pt")
        x_ND = X_ND if kind == "JumpReluAutoEncoder" else X_ND - sae.b_dec_D
        z_NM = x_ND @ sae.W_enc_MD.T + sae.b_enc_M
        f_NM = z_NM.relu() * (z_NM > (0 if kind == "AutoEncoder" else 0.6))
        back = load_sae(folder)
        assert back.origin.site == "blocks.4.hook_resid_post"
        expected = f_NM @ sae.W_dec_MD + sae.b_dec_D
        assert torch.allclose(back.reconstruct(X_ND), expected, atol=1e-5), kind


def test_the_seeds_own_checkpoint(tmp_path: Path) -> None:
    """decode(topk(encoder(x - b_pre))) with nn.Linear, as the seed's module computes it."""
    encoder, decoder = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)
    b_pre_D = torch.randn(8)
    state = {"b_pre": b_pre_D}
    state |= {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    config = {"d_model": 8, "d_sae": 24, "k": 3, "source": "ppo/step_10", "best_val_loss": 0.1}
    torch.save({"state_dict": state, "config": config}, tmp_path / "l6.pt")
    with torch.no_grad():
        value, idx = encoder(X_ND - b_pre_D).topk(3)
        expected = decoder(torch.zeros(200, 24).scatter_(1, idx, value))
    back = load_sae(tmp_path / "l6.pt")
    assert (back.activation, back.origin.checkpoint) == ("topk", "ppo/step_10")
    assert torch.allclose(back.reconstruct(X_ND), expected, atol=3e-6)


def test_qwen_scope(tmp_path: Path) -> None:
    sae = replace(random_sae(), b_pre_D=torch.zeros(8))
    held = {"W_enc": sae.W_enc_MD, "W_dec": sae.W_dec_MD.T.contiguous(), "b_enc": sae.b_enc_M,
            "b_dec": sae.b_dec_D}  # fmt: skip
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    folder.mkdir()
    for file in (folder / "layer7.sae.pt", tmp_path / "layer7.sae.pt"):
        torch.save(held, file)
    back = load_sae(folder / "layer7.sae.pt")
    assert (back.k, back.origin.site) == (3, "blocks.7.hook_resid_post")
    assert torch.allclose(back.reconstruct(X_ND), sae.reconstruct(X_ND), atol=3e-6)
    assert load_sae(tmp_path / "layer7.sae.pt", k=5).k == 5
    with pytest.raises(UserError, match="does not say L0_K"):
        load_sae(tmp_path / "layer7.sae.pt")


def test_what_is_no_sae_is_named(tmp_path: Path) -> None:
    save_sae(random_sae(), tmp_path / "good")
    with pytest.raises(UserError, match="Did you mean 'good'"):
        load_sae(tmp_path / "god")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found an empty folder; expected cfg.json"):
        load_sae(tmp_path / "empty")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="found keys weight"):
        load_sae(tmp_path / "other.pt")


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "seed"])
def test_a_truncated_file_is_named(tmp_path: Path, format: str) -> None:
    path = tmp_path / ("sae.pt" if format == "seed" else "sae")
    save_sae(random_sae(), path, format)  # pyright: ignore[reportArgumentType]
    names = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors",
             "dictionary_learning": "ae.pt"}  # fmt: skip
    file = path / names[format] if format in names else path
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(UserError, match=f"{file.name} is damaged"):
        load_sae(path)


def test_missing_keys_wrong_shapes_and_mixed_folders_are_named(tmp_path: Path) -> None:
    sae = random_sae()
    save_sae(sae, tmp_path / "sae")
    file = tmp_path / "sae" / "sae_weights.safetensors"
    good = load_file(file)
    save_file({k: v for k, v in good.items() if k != "b_dec"}, file)
    with pytest.raises(UserError, match="missing b_dec; found W_dec, W_enc, b_enc"):
        load_sae(tmp_path / "sae")
    save_file(good | {"b_dec": torch.zeros(9)}, file)
    with pytest.raises(UserError, match=r"'b_dec' has shape \(9,\), expected \(8,\)"):
        load_sae(tmp_path / "sae")
    save_file(good | {"b_enc": good["b_enc"] + 1}, file)
    with pytest.raises(UserError, match="is not of the same SAE"):
        load_sae(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text('{"architecture": "to')
    with pytest.raises(UserError, match="cfg.json is damaged"):
        load_sae(tmp_path / "sae")


def test_a_folder_that_holds_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds other things"):
        save_sae(random_sae(), tmp_path)
    assert (tmp_path / "manifest.json").exists()
    save_sae(random_sae(), tmp_path / "sae")
    save_sae(random_sae(seed=1), tmp_path / "sae")
    assert load_sae(tmp_path / "sae").sha256() == random_sae(seed=1).sha256()


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sae(random_sae(), tmp_path / "sae")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("operando.internals.sae_formats.save_file", fail)
    with pytest.raises(UserError, match="no space left"):
        save_sae(random_sae(seed=1), tmp_path / "sae")
    assert load_sae(tmp_path / "sae").sha256() == random_sae().sha256()
    assert list(tmp_path.iterdir()) == [tmp_path / "sae"]


def test_import_operando_is_light_and_has_load_sae() -> None:
    code = (
        "import sys, operando; assert 'torch' not in sys.modules; "
        "from operando import load_sae; assert load_sae.__name__ == 'load_sae'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
