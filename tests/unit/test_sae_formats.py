"""Every format there and back, foreign files as their own tools read them, and damaged ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from operando.errors import UserError
from operando.sae.formats import load_sae, save_sae
from operando.sae.sae import Origin
from tests.unit.test_sae import random_sae

ORIGIN = Origin(
    model="tiny",
    site="blocks.1.hook_resid_post",
    checkpoint="step_00010",
    parent="ab12",
    arm="null",
    resampled=(3, 17),
    data="cd34",
    split_seed=5,
)
X_ND = torch.randn(200, 8, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("activation", ["topk", "topk_relu"])
@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "sae_rl"])
def test_top_k_there_and_back(tmp_path: Path, format: str, activation: str) -> None:
    sae = random_sae(activation=activation, origin=ORIGIN)
    path = tmp_path / ("sae.pt" if format == "sae_rl" else "sae")
    save_sae(sae, path, format)  # pyright: ignore[reportArgumentType]
    back = load_sae(path)
    assert (back.activation, back.k, back.origin) == (activation, 3, ORIGIN)
    assert float((back.reconstruct(X_ND) - sae.reconstruct(X_ND)).abs().max()) < 3e-6
    if format in ("saelens", "sae_rl"):  # a chain goes on from exactly these weights
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
    for format in ("sparsify", "dictionary_learning", "sae_rl"):
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
    tensors = {
        "W_enc": sae.W_enc_MD.T.contiguous(),
        "b_enc": sae.b_enc_M,
        "W_dec": W_dec_MD,
        "b_dec": sae.b_dec_D,
    }
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
        state = {
            "encoder.weight": sae.W_enc_MD,
            "encoder.bias": sae.b_enc_M,
            "decoder.weight": sae.W_dec_MD.T.contiguous(),
            bias: sae.b_dec_D,
        }
        if kind == "BatchTopKSAE":
            state |= {"k": torch.tensor(3), "threshold": torch.tensor(0.6)}
        if kind == "JumpReluAutoEncoder":
            state = {
                "W_enc": sae.W_enc_MD.T.contiguous(),
                "b_enc": sae.b_enc_M,
                "W_dec": sae.W_dec_MD,
                "b_dec": sae.b_dec_D,
                "threshold": torch.full((24,), 0.6),
            }
        torch.save(state, folder / "ae.pt")
        x_ND = X_ND if kind == "JumpReluAutoEncoder" else X_ND - sae.b_dec_D
        z_NM = x_ND @ sae.W_enc_MD.T + sae.b_enc_M
        f_NM = z_NM.relu() * (z_NM > (0 if kind == "AutoEncoder" else 0.6))
        back = load_sae(folder)
        assert back.origin.site == "blocks.4.hook_resid_post"
        expected = f_NM @ sae.W_dec_MD + sae.b_dec_D
        assert torch.allclose(back.reconstruct(X_ND), expected, atol=1e-5), kind


def test_the_published_checkpoint_of_sae_rl(tmp_path: Path) -> None:
    """decode(topk(encoder(x - b_pre))) with nn.Linear, as sae_rl's module computes it."""
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


def sae_rl_file(file: Path, k: int = 3, source: str = "ppo_step100_layer12") -> dict[str, object]:
    """A checkpoint as scripts/topk/05_train_sae.py writes it; returns its config."""
    encoder, decoder = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)
    state = {"b_pre": torch.randn(8)}
    state |= {f"encoder.{key}": v for key, v in encoder.state_dict().items()}
    state |= {f"decoder.{key}": v for key, v in decoder.state_dict().items()}
    config = {
        "d_model": 8,
        "d_sae": 24,
        "k": k,
        "source": source,
        "source_kind": "split",
        "seed": 0,
        "init_from_stage": "ppo_step60",
        "best_epoch": 19,
        "best_train_loss": 0.1,
        "best_val_loss": 0.2,
        "selection_metric": "val",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "config": config}, file)
    return config


def test_what_a_sae_rl_file_says_is_kept(tmp_path: Path) -> None:
    config = sae_rl_file(tmp_path / "a.pt")
    back = load_sae(tmp_path / "a.pt")
    assert (back.origin.site, back.origin.checkpoint) == (
        "blocks.12.hook_resid_post",
        "ppo_step100_layer12",
    )
    save_sae(back, tmp_path / "b.pt", "sae_rl")
    again = torch.load(tmp_path / "b.pt", weights_only=True)["config"]
    assert {key: again[key] for key in config} == config
    assert load_sae(tmp_path / "b.pt").origin == back.origin


def test_the_readme_lines_of_sae_rl_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from operando import load_chain, load_sae

    for name, k in (
        ("sae_flexible/sae_ppo_step100_layer12.pt", 3),
        ("sae_strict/k64/sae_ppo_step116_layer23.pt", 4),
        ("sae_strict/l23_k256/sae_ppo_step116_layer23.pt", 6),
        ("sae_kl0p025/sae_ppo_step30_layer18.pt", 5),
    ):
        sae_rl_file(tmp_path / name, k, Path(name).stem.removeprefix("sae_"))
    monkeypatch.chdir(tmp_path)
    x = torch.randn(5, 8)
    sae, cfg = load_sae("sae_flexible/sae_ppo_step100_layer12.pt", device="cpu")
    assert cfg["best_val_loss"] == 0.2 and sae.k == 3
    x_hat, z = sae(x)
    assert torch.allclose(x_hat, sae.reconstruct(x), atol=1e-6) and z.shape == (5, 24)
    assert torch.equal(z, sae.encode_dense(x)) and int((z != 0).sum()) == 15
    h, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 0, 0]])
    patched = torch.where(mask.unsqueeze(-1).bool(), sae(h)[0], h)
    assert torch.allclose(patched[0, 1], sae.reconstruct(h[0, 1:2])[0], atol=1e-6)
    assert torch.equal(patched[1, 1], h[1, 1])
    one, cfg = load_chain("flexible", "ppo_step100", 12, root=".", device="cpu")
    assert one.sha256() == sae.sha256() and cfg["k"] == 3
    assert load_chain("kl0p025", "ppo_step30", 18, root=".").origin.site[7:9] == "18"
    # the folders' names say k; the files here say otherwise on purpose, so that one sees which
    assert load_chain("strict", "ppo_step116", 23, k=256, root=".").k == 6
    assert load_chain("strict", "ppo_step116", 23, k=64, root=".").k == 4
    for arguments, k, message in (
        (("strict", "ppo_step116", 23), None, "with k = 256, 64"),
        (("strict", "ppo_step116", 23), 32, "given k = 32"),
        (("flexible", "ppo_step100", 12), 64, "has k = 3, not 64"),
        (("flexible", "ppo_step10", 12), None, "Did you mean 'ppo_step100'"),
        (("flexibel", "ppo_step100", 12), None, "Did you mean 'flexible'"),
    ):
        with pytest.raises(UserError, match=message):
            load_chain(*arguments, k=k)


def test_mechreward(tmp_path: Path) -> None:
    """TopKSAEBackend.encode and decode of src/mechreward/sae/topk_sae.py, from the file alone."""
    sae = random_sae()
    held = {
        "W_enc": sae.W_enc_MD.T.contiguous(),
        "W_dec": sae.W_dec_MD,
        "b_enc": sae.b_enc_M,
        "b_dec": sae.b_dec_D,
        "d_model": 8,
        "d_sae": 24,
        "k": 20,
        "step": 900,
    }
    torch.save(held, tmp_path / "sae_final.pt")
    z_NM = (X_ND - held["b_dec"]) @ held["W_enc"] + held["b_enc"]
    value, idx = z_NM.topk(20)  # of 24: the k-th is often below 0, and relu then counts
    assert (value < 0).any()
    f_NM = torch.zeros(200, 24).scatter_(1, idx, value).relu()
    back = load_sae(tmp_path / "sae_final.pt")
    assert (back.k, back.origin.site) == (20, "")
    assert torch.allclose(back.encode_dense(X_ND), f_NM, atol=1e-5)
    expected = f_NM @ held["W_dec"] + held["b_dec"]
    assert torch.allclose(back.reconstruct(X_ND), expected, atol=1e-5)
    about = {
        "d_model": 8,
        "d_sae": 24,
        "k": 20,
        "model": "Qwen/Qwen3.5-4B",
        "layer": 18,
        "tokens_trained": 5,
        "algorithm": "topk",
        "training_script": "s",
        "trained_at": "t",
    }
    (tmp_path / "sae_final.json").write_text(json.dumps(about))
    origin = load_sae(tmp_path / "sae_final.pt").origin
    assert (origin.site, origin.model) == ("blocks.18.hook_resid_post", "Qwen/Qwen3.5-4B")
    torch.save(held | {"d_sae": 25}, tmp_path / "sae_final.pt")
    with pytest.raises(UserError, match=r"'W_enc' has shape \(8, 24\), expected \(8, 25\)"):
        load_sae(tmp_path / "sae_final.pt")


def test_old_saelens_scaling_is_folded_or_refused(tmp_path: Path) -> None:
    """x_hat = (s f) W_dec + b_dec, as SAELens before 6.0 decodes with finetuning_scaling_factor."""
    sae = random_sae()
    s_M = torch.linspace(0.3, 3, 24)
    tensors = {
        "W_enc": sae.W_enc_MD.T.contiguous(),
        "b_enc": sae.b_enc_M,
        "W_dec": sae.W_dec_MD,
        "b_dec": sae.b_dec_D,
    }
    old = {
        "d_in": 8,
        "d_sae": 24,
        "hook_point": "blocks.2.hook_resid_pre",
        "lr": 3e-4,
        "hook_point_head_index": None,
        "activation_fn_str": "relu",
    }
    f_NM = ((X_ND - sae.b_dec_D) @ sae.W_enc_MD.T + sae.b_enc_M).relu()
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        write_saelens(tmp_path / key, tensors | {key: s_M}, **old, finetuning_scaling_factor=True)
        back = load_sae(tmp_path / key)
        assert torch.allclose(back.encode_dense(X_ND), f_NM, atol=1e-5)
        expected = (f_NM * s_M) @ sae.W_dec_MD + sae.b_dec_D
        assert torch.allclose(back.reconstruct(X_ND), expected, atol=1e-4)
        assert back.origin.site == "blocks.2.hook_resid_pre"
    write_saelens(tmp_path / "off", tensors | {"scaling_factor": s_M}, **old)
    with pytest.raises(UserError, match="is off, but 'scaling_factor' in the weights is not 1"):
        load_sae(tmp_path / "off")
    write_saelens(tmp_path / "gone", tensors, **old, finetuning_scaling_factor=True)
    with pytest.raises(UserError, match="and sae_weights.safetensors holds no such tensor"):
        load_sae(tmp_path / "gone")
    write_saelens(tmp_path / "ones", tensors | {"scaling_factor": torch.ones(24)}, **old)
    assert torch.allclose(load_sae(tmp_path / "ones").encode_dense(X_ND), f_NM, atol=1e-5)
    kwargs = {**old, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    write_saelens(tmp_path / "topk", tensors, **kwargs)
    assert (load_sae(tmp_path / "topk").activation, load_sae(tmp_path / "topk").k) == (
        "topk_relu",
        3,
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hook_head_index": 3}, "hook_head_index=3 is not supported"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' is not supported"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"hook_name": "blocks.1.attn.hook_z"}, "hook_z is the input"),
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"input_gain": 2.0}, "the keys input_gain are not read here"),
    ],
)
def test_what_changes_a_saelens_sae_and_is_not_read_is_refused(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    sae = random_sae()
    tensors = {
        "W_enc": sae.W_enc_MD.T.contiguous(),
        "b_enc": sae.b_enc_M,
        "W_dec": sae.W_dec_MD,
        "b_dec": sae.b_dec_D,
    }
    cfg = {"architecture": "topk", "k": 3, "apply_b_dec_to_input": True} | changed
    if cfg["architecture"] == "gated":
        del tensors["b_enc"]
    write_saelens(tmp_path / "sae", tensors, **cfg)
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path / "sae")


def test_published_configurations_are_read(tmp_path: Path) -> None:
    """The keys of gpt2-small-res-jb, by SAELens' own test, and of a P-annealed autoencoder."""
    sae = random_sae()
    tensors = {
        "W_enc": sae.W_enc_MD.T.contiguous(),
        "b_enc": sae.b_enc_M,
        "W_dec": sae.W_dec_MD,
        "b_dec": sae.b_dec_D,
    }
    jb = {
        "model_name": "gpt2-small", "hook_point": "blocks.0.hook_resid_pre", "hook_point_layer": 0,
        "hook_point_head_index": None, "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False, "context_size": 128, "use_cached_activations": False,
        "cached_activations_path": "x", "d_in": 8, "n_batches_in_buffer": 128,
        "total_training_tokens": 300000000, "store_batch_size": 32, "device": "mps", "seed": 42,
        "dtype": "torch.float32", "b_dec_init_method": "geometric_median", "expansion_factor": 32,
        "from_pretrained_path": None, "l1_coefficient": 8e-05, "lr": 0.0004,
        "lr_scheduler_name": None, "lr_warm_up_steps": 5000,
        "model_from_pretrained_kwargs": {"center_writing_weights": True}, "train_batch_size": 4096,
        "use_ghost_grads": False, "feature_sampling_window": 1000,
        "finetuning_scaling_factor": False, "feature_sampling_method": None,
        "resample_batches": 1028, "feature_reinit_scale": 0.2, "dead_feature_window": 5000,
        "dead_feature_estimation_method": "no_fire", "dead_feature_threshold": 1e-08,
        "log_to_wandb": True, "wandb_project": "x", "wandb_entity": None,
        "wandb_log_frequency": 100, "n_checkpoints": 10, "checkpoint_path": "x", "d_sae": 24,
        "tokens_per_buffer": 67108864, "run_name": "x", "neuronpedia_id": "gpt2-small/0-res-jb",
        "normalize_activations": "none", "prepend_bos": True, "sae_lens_training_version": None,
    }  # fmt: skip
    write_saelens(tmp_path / "jb", tensors, **jb)
    read = load_sae(tmp_path / "jb")
    assert (read.activation, read.origin.site) == ("relu", "blocks.0.hook_resid_pre")
    folder = tmp_path / "dictionary"
    folder.mkdir()
    state = {
        "encoder.weight": sae.W_enc_MD,
        "encoder.bias": sae.b_enc_M,
        "decoder.weight": sae.W_dec_MD.T.contiguous(),
        "bias": sae.b_dec_D,
    }
    torch.save(state, folder / "ae.pt")
    trainer = {
        "dict_class": "AutoEncoder",
        "trainer_class": "PAnnealTrainer",
        "activation_dim": 8,
        "dict_size": 24,
        "lr": 3e-4,
        "sparsity_function": "Lp^p",
        "sparsity_penalty": 0.1,
        "p_start": 1,
        "p_end": 0.2,
        "anneal_start": 10000,
        "anneal_end": None,
        "sparsity_queue_length": 10,
        "n_sparsity_updates": 10,
        "warmup_steps": 1000,
        "decay_start": 24000,
        "resample_steps": None,
        "steps": 100,
        "seed": 0,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m",
        "device": "cuda",
        "wandb_name": "x",
        "submodule_name": "resid_post_layer_3",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    assert load_sae(folder).activation == "relu"


def test_a_key_or_a_tensor_that_nobody_reads_is_an_error_in_every_format(tmp_path: Path) -> None:
    extra = {"input_scale": torch.ones(8)}
    for format, weights, config in (
        ("saelens", "sae_weights.safetensors", "cfg.json"),
        ("sparsify", "sae.safetensors", "cfg.json"),
        ("dictionary_learning", "ae.pt", "config.json"),
    ):
        folder = tmp_path / format
        save_sae(random_sae(), folder, format)  # pyright: ignore[reportArgumentType]
        file = folder / weights
        if weights.endswith(".pt"):
            torch.save(torch.load(file, weights_only=True) | extra, file)
        else:
            save_file(load_file(file) | extra, file)
        with pytest.raises(UserError, match=f"{weights}: the tensors input_scale are not read"):
            load_sae(folder)
        save_sae(random_sae(), folder, format)  # pyright: ignore[reportArgumentType]
        held = json.loads((folder / config).read_text())
        held.get("trainer", held)["gain"] = 2
        (folder / config).write_text(json.dumps(held))
        with pytest.raises(UserError, match=f"{config}: the keys gain are not read"):
            load_sae(folder)
    sae_rl_file(tmp_path / "rl.pt")
    held = torch.load(tmp_path / "rl.pt", weights_only=True)
    qwen = {
        "W_enc": torch.zeros(24, 8),
        "W_dec": torch.zeros(8, 24),
        "b_enc": torch.zeros(24),
        "b_dec": torch.zeros(8),
    }
    mech = {
        "W_enc": torch.zeros(8, 24),
        "W_dec": torch.zeros(24, 8),
        "b_enc": torch.zeros(24),
        "b_dec": torch.zeros(8),
        "d_model": 8,
        "d_sae": 24,
        "k": 3,
    }
    for changed in (
        held | {"ema": 1},
        {"state_dict": held["state_dict"] | extra, "config": held["config"]},
        {"state_dict": held["state_dict"], "config": held["config"] | {"gain": 2}},
        qwen | extra,
        mech | extra,
        mech | {"gain": 2},
    ):
        torch.save(changed, tmp_path / "L0_3.pt")
        with pytest.raises(UserError, match=r"the (keys|tensors) (ema|gain|input_scale) are not"):
            load_sae(tmp_path / "L0_3.pt")


def test_a_sparsify_folder_says_its_site(tmp_path: Path) -> None:
    for name, site in (
        ("layers.5", "blocks.5.hook_resid_post"),
        ("layers.20.mlp", "blocks.20.hook_mlp_out"),
        ("layers.7.self_attn", "blocks.7.hook_attn_out"),
        ("layers.7.rotary", ""),
    ):
        save_sae(random_sae(), tmp_path / name, "sparsify")
        cfg = json.loads((tmp_path / name / "cfg.json").read_text())
        del cfg["operando"]
        (tmp_path / name / "cfg.json").write_text(json.dumps(cfg))
        assert load_sae(tmp_path / name).origin.site == site


def test_qwen_scope(tmp_path: Path) -> None:
    sae = replace(random_sae(), b_pre_D=torch.zeros(8))
    held = {
        "W_enc": sae.W_enc_MD,
        "W_dec": sae.W_dec_MD.T.contiguous(),
        "b_enc": sae.b_enc_M,
        "b_dec": sae.b_dec_D,
    }
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


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "sae_rl"])
def test_a_truncated_file_is_named(tmp_path: Path, format: str) -> None:
    path = tmp_path / ("sae.pt" if format == "sae_rl" else "sae")
    save_sae(random_sae(), path, format)  # pyright: ignore[reportArgumentType]
    names = {
        "saelens": "sae_weights.safetensors",
        "sparsify": "sae.safetensors",
        "dictionary_learning": "ae.pt",
    }
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

    monkeypatch.setattr("operando.sae.saelens.save_file", fail)
    with pytest.raises(UserError, match="no space left"):
        save_sae(random_sae(seed=1), tmp_path / "sae")
    assert load_sae(tmp_path / "sae").sha256() == random_sae().sha256()
    assert list(tmp_path.iterdir()) == [tmp_path / "sae"]
