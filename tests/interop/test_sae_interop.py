"""SAEs written here are read by sae-lens and sparsify with equal encodings, and the other way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from operando.sae.formats import load_sae, save_sae
from operando.sae.sae import SAE, Origin

pytestmark = pytest.mark.interop

D, M, K = 16, 64, 5
X_ND = torch.randn(300, D, generator=torch.Generator().manual_seed(1))
REASON = "{0} is not installed: .venv-interop/bin/python -m pip install -c constraints.txt {0}"


def random_sae(activation: str, seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    threshold_M = draw(M).abs() if activation in ("jumprelu", "batchtopk") else None
    W_dec_MD = torch.nn.functional.normalize(draw(M, D), dim=1)
    origin = Origin(model="m", site="blocks.12.hook_resid_post", arm="null", resampled=(2, 9))
    return SAE(draw(M, D), draw(M), W_dec_MD, draw(D), draw(D), activation, K, threshold_M, origin)  # pyright: ignore


@pytest.mark.parametrize("activation", ["topk", "topk_relu", "relu", "jumprelu", "batchtopk"])
def test_sae_lens_reads_what_we_write(tmp_path: Path, activation: str) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason=REASON.format("sae-lens==6.54.12"))
    sae = random_sae(activation)
    save_sae(sae, tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    f_NM = theirs.encode(X_ND).detach()
    assert float((f_NM - sae.encode_dense(X_ND)).abs().max()) < 1e-5
    assert float((theirs.decode(f_NM).detach() - sae.reconstruct(X_ND)).abs().max()) < 1e-5
    assert float(f_NM.abs().sum()) > 0
    metadata = theirs.cfg.metadata
    assert metadata.hook_name == "blocks.12.hook_resid_post"
    assert metadata.provenance["arm"] == "null"
    assert metadata.sha256 == sae.sha256()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rescaled", [False, True])
def test_we_read_a_top_k_sae_of_sae_lens(tmp_path: Path, rescaled: bool, centred: bool) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason=REASON.format("sae-lens==6.54.12"))
    config = sae_lens.TopKSAEConfig(
        d_in=D,
        d_sae=M,
        k=K,
        rescale_acts_by_decoder_norm=rescaled,
        apply_b_dec_to_input=centred,
        metadata=sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_pre"),
    )
    theirs = sae_lens.TopKSAE(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    theirs.save_model(tmp_path / "sae")
    ours = load_sae(tmp_path / "sae")
    assert ours.origin.site == "blocks.3.hook_resid_pre"
    assert torch.allclose(ours.reconstruct(X_ND), theirs(X_ND), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["StandardSAE", "JumpReLUSAE"])
def test_we_read_the_other_saes_of_sae_lens(tmp_path: Path, architecture: str) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason=REASON.format("sae-lens==6.54.12"))
    config = getattr(sae_lens, f"{architecture}Config")(d_in=D, d_sae=M)
    theirs = getattr(sae_lens, architecture)(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        if architecture == "JumpReLUSAE":
            theirs.threshold.abs_()
    theirs.save_model(tmp_path / "sae")
    ours = load_sae(tmp_path / "sae")
    assert torch.allclose(ours.encode_dense(X_ND), theirs.encode(X_ND), atol=1e-5)
    assert torch.allclose(ours.reconstruct(X_ND), theirs(X_ND), atol=1e-4, rtol=1e-5)


def test_a_training_sae_of_sae_lens_starts_from_ours(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason=REASON.format("sae-lens==6.54.12"))
    sae = random_sae("topk_relu")
    save_sae(sae, tmp_path / "sae")
    theirs = sae_lens.TrainingSAE.load_from_disk(tmp_path / "sae")
    assert torch.allclose(theirs(X_ND), sae.reconstruct(X_ND), atol=1e-5)


def test_sparsify_there_and_back(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify", reason=REASON.format("eai-sparsify==1.3.3"))
    sae = random_sae("topk_relu")
    save_sae(sae, tmp_path / "layers.12", "sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.12")
    with torch.no_grad():
        out = theirs.encode(X_ND)
        dense_NM = torch.zeros(300, M).scatter_(1, out.top_indices.long(), out.top_acts)
        x_hat_ND = dense_NM @ theirs.W_dec + theirs.b_dec
    assert torch.allclose(dense_NM, sae.encode_dense(X_ND), atol=1e-5)
    assert torch.allclose(x_hat_ND, sae.reconstruct(X_ND), atol=1e-5)
    assert json.loads((tmp_path / "layers.12" / "cfg.json").read_text())["k"] == K
    theirs.save_to_disk(tmp_path / "layers.7")
    back = load_sae(tmp_path / "layers.7")
    assert back.origin.site == "blocks.7.hook_resid_post"
    assert torch.allclose(back.reconstruct(X_ND), x_hat_ND, atol=1e-5)


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "MatryoshkaBatchTopK", "JumpReLU"])
def test_we_read_what_a_training_of_sae_lens_exports(tmp_path: Path, kind: str) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason=REASON.format("sae-lens==6.54.12"))
    own = {"k": K} if "TopK" in kind else {"l0_coefficient": 1.0}
    if kind == "MatryoshkaBatchTopK":
        own |= {"matryoshka_widths": [16, M]}
    training = getattr(sae_lens, f"{kind}TrainingSAE")
    theirs = training(getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=M, **own))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    if "BatchTopK" in kind:
        theirs.topk_threshold.fill_(0.7)
    theirs.save_inference_model(tmp_path / "sae")
    ours, read = load_sae(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert torch.allclose(ours.reconstruct(X_ND), read(X_ND), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["top_k", "batch_top_k", "jumprelu", "standard"])
def test_we_read_what_a_trainer_of_dictionary_learning_saves(tmp_path: Path, kind: str) -> None:
    reason = REASON.format("dictionary-learning==0.1.0")
    pytest.importorskip("dictionary_learning", reason=reason)
    module = pytest.importorskip(f"dictionary_learning.trainers.{kind}", reason=reason)
    common = {
        "steps": 100,
        "activation_dim": D,
        "dict_size": M,
        "layer": 4,
        "lm_name": "m",
        "submodule_name": "resid_post_4",
        "device": "cpu",
        "warmup_steps": 1,
    }
    match kind:
        case "top_k":
            trainer = module.TopKTrainer(k=K, **common)
        case "batch_top_k":
            trainer = module.BatchTopKTrainer(k=K, **common)
            trainer.ae.threshold.fill_(0.7)
        case "jumprelu":
            trainer = module.JumpReluTrainer(sparsity_warmup_steps=1, **common)
        case _:
            trainer = module.StandardTrainer(sparsity_warmup_steps=1, **common)
    with torch.no_grad():
        for parameter in trainer.ae.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    torch.save(trainer.ae.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    ours = load_sae(tmp_path)
    with torch.no_grad():
        expected = trainer.ae(X_ND)
    assert ours.origin.site == "blocks.4.hook_resid_post"
    assert torch.allclose(ours.reconstruct(X_ND), expected, atol=1e-4, rtol=1e-5)
