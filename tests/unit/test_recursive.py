"""RecursiveCausalLM: counts, causality, caches, padding, exits, PEFT, save and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from operando.errors import UserError
from operando.models.hooks import ActivationReader
from operando.models.layers import decoder_blocks
from operando.models.policy import recomputed_blocks
from operando.models.recursive import RecursiveCausalLM, count_parameters, preset
from operando.models.recursive.blocks import ModulatedLinear
from operando.models.recursive.cache import SlotCache
from operando.models.recursive.modeling import RecursiveModel

from .recursive_models import random_recursive

HALT = 0.6  # half of the random model's tokens exit early at this threshold


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 258, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["tiny", "200m"])
def test_the_formula_counts_what_is_stored(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = RecursiveCausalLM(config)
    stored = {id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}
    assert sum(stored.values()) == count_parameters(config).stored


def test_the_200m_preset_has_the_stated_numbers_and_a_mistyped_one_is_refused() -> None:
    counted = count_parameters(preset("200m"))
    assert (counted.stored, counted.unrolled) == (124_125_185, 176_293_889)
    with pytest.raises(UserError, match='did you mean "200m"|200m'):
        preset("200mm")


def test_no_token_sees_a_later_one() -> None:
    model, ids = random_recursive(), ids_of(2, 12)
    other = ids.clone()
    other[:, 7:] = ids_of(2, 5, seed=9)
    for threshold in (None, HALT):
        with torch.no_grad():
            here = model(input_ids=ids, halt_threshold=threshold).logits[:, :7]
            there = model(input_ids=other, halt_threshold=threshold).logits[:, :7]
        assert float((here - there).abs().max()) == 0.0


class MeanPooled(RecursiveModel):
    """The published Ouroboros controller: it pools over the sequence."""

    def controller_input(self, h_bTD: Tensor) -> Tensor:
        return self.state_proj(h_bTD.mean(1, keepdim=True).expand_as(h_bTD))


def test_pooling_over_the_sequence_leaks_and_breaks_the_cache() -> None:
    model, ids = random_recursive(), ids_of(1, 12)
    model.model.__class__ = MeanPooled
    other = ids.clone()
    other[:, 7:] = ids_of(1, 5, seed=9)
    with torch.no_grad():
        full, changed = model(input_ids=ids).logits, model(input_ids=other).logits
    assert float((full - changed)[:, :7].abs().max()) > 1e-2
    assert float((decode_cached(model, ids, None).logits - full).abs().max()) > 1e-2


def decode_cached(model: RecursiveCausalLM, ids: Tensor, threshold: float | None):
    """Logits and exits of a prefill of 5 tokens and then one token a call."""
    cache, logits, exits = DynamicCache(), [], []
    with torch.no_grad():
        for part in (slice(0, 5), *(slice(i, i + 1) for i in range(5, ids.shape[1]))):
            out = model(input_ids=ids[:, part], cache=cache, halt_threshold=threshold)
            logits.append(out.logits)
            exits.append(out.exit_loops)
    out.logits, out.exit_loops = torch.cat(logits, 1), torch.cat(exits, 1)
    return out


@pytest.mark.parametrize("threshold", [None, HALT])
def test_cached_decode_equals_the_full_forward_with_and_without_exits(
    threshold: float | None,
) -> None:
    model, ids = random_recursive(), ids_of(3, 14)
    with torch.no_grad():
        full = model(input_ids=ids, halt_threshold=threshold)
    cached = decode_cached(model, ids, threshold)
    assert float((cached.logits - full.logits).abs().max()) < 1e-5
    assert torch.equal(cached.exit_loops, full.exit_loops)
    if threshold is not None:  # exits happen, and not all at once
        assert full.exit_loops.float().mean() < 7 and len(full.exit_loops.unique()) > 2


def test_a_slot_cache_serves_rows_of_different_lengths_and_takes_tokens_back() -> None:
    model, ids = random_recursive(), ids_of(2, 12)
    cache = SlotCache(len(model.model.layers), 16)
    with torch.no_grad():
        full = model(input_ids=ids, halt_threshold=HALT)
        prefill = torch.arange(6).expand(2, -1)
        model(input_ids=ids[:, :6], position_ids=prefill, cache=cache, halt_threshold=HALT)
        wrong = torch.tensor([[6, 7, 8], [4, 5, 6]])  # rows go on from 6 and from 4
        model(input_ids=ids_of(2, 3, seed=5), position_ids=wrong, cache=cache)
        position = torch.tensor([[6, 7, 8], [4, 5, 6]])
        block = torch.stack([ids[0, 6:9], ids[1, 4:7]])
        out = model(input_ids=block, position_ids=position, cache=cache, halt_threshold=HALT)
    want = torch.stack([full.logits[0, 6:9], full.logits[1, 4:7]])
    assert float((out.logits - want).abs().max()) < 1e-5


def test_left_padding_changes_nothing() -> None:
    model, ids = random_recursive(), ids_of(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    with torch.no_grad():
        plain = model(input_ids=ids, halt_threshold=HALT)
        left = model(input_ids=padded, attention_mask=mask, halt_threshold=HALT)
    assert float((left.logits[:, 4:] - plain.logits).abs().max()) < 1e-5


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="a cache with layers that hold nothing can't be cropped before transformers 5.20",
)
def test_crop_takes_back_prelude_anchor_and_coda() -> None:
    model, ids = random_recursive(), ids_of(1, 10)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :6], cache=cache)
        model(input_ids=ids_of(1, 3, seed=4), cache=cache)
        cache.crop(-3)
        again = model(input_ids=ids[:, 6:], cache=cache).logits
        full = model(input_ids=ids).logits[:, 6:]
    assert len(cache.layers) == 10 and cache.get_seq_length() == 10
    assert float((again - full).abs().max()) < 1e-5


def test_generate_with_a_cache_equals_generate_without() -> None:
    model, ids = random_recursive(halt_threshold=HALT), ids_of(2, 6)
    ids[0, :2] = 0
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    run = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with_cache = model.generate(ids, use_cache=True, **run)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **run))


def test_exits_replay_exactly_and_freeze_the_state() -> None:
    model, ids = random_recursive(), ids_of(3, 10)
    with torch.no_grad():
        chosen = model(input_ids=ids, halt_threshold=HALT)
        replayed = model(input_ids=ids, exit_loops=chosen.exit_loops)
        uniform = model(input_ids=ids, exit_loops=torch.full((3, 10), 3))
        three = model(input_ids=ids, num_loops=3)
    assert torch.equal(replayed.logits, chosen.logits)
    assert torch.equal(replayed.exit_loops, chosen.exit_loops)
    assert torch.equal(uniform.logits, three.logits)


def test_compacted_rows_come_back_to_their_places() -> None:
    model, ids = random_recursive(), ids_of(6, 1)
    exits = torch.tensor([[8], [1], [3], [1], [5], [2]])
    with torch.no_grad():
        together = model(input_ids=ids, exit_loops=exits).logits
        for row in range(6):
            alone = model(input_ids=ids[row : row + 1], num_loops=int(exits[row])).logits
            assert float((together[row] - alone[0]).abs().max()) < 1e-5


def test_bases_are_the_leading_singular_directions_and_stay_out_of_training() -> None:
    model = random_recursive()
    linear = model.model.core[0].get_submodule("mlp.up_proj")
    assert isinstance(linear, ModulatedLinear)
    _, values, right = torch.linalg.svd(linear.weight)
    product = linear.basis_out @ linear.basis_in
    best = linear.weight @ right[:4].T @ right[:4]
    assert torch.allclose(product, best, atol=1e-5)
    assert torch.allclose(torch.linalg.norm(linear.basis_out, dim=0), values[:4], atol=1e-5)
    assert not any("basis" in name for name, _ in model.named_parameters())


def test_a_saved_folder_loads_by_auto_class_with_the_same_logits(tmp_path: Path) -> None:
    model, ids = random_recursive(), ids_of(2, 8)
    with torch.no_grad():
        for block in model.model.core:  # what training does: weights leave their bases
            block.get_submodule("mlp.up_proj").get_parameter("weight").mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, RecursiveCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_lora_starts_as_the_model_and_reaches_the_core() -> None:
    model, ids = random_recursive(), ids_of(1, 8)
    before = model(input_ids=ids).logits.detach()
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    assert torch.equal(peft(input_ids=ids).logits, before)
    peft(input_ids=ids).logits.sum().backward()
    core = {n: p for n, p in peft.named_parameters() if "layers.4" in n and "lora_B" in n}
    assert core and all(float(p.grad.abs().sum()) > 0 for p in core.values() if p.grad is not None)


def test_gradients_are_the_same_with_checkpointing() -> None:
    model, ids = random_recursive(), ids_of(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert len(recomputed_blocks(model)) == 10
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name in plain:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, plain[name], atol=1e-6), name


def test_blocks_are_numbered_through_and_a_core_site_reads_its_first_loop() -> None:
    model, ids = random_recursive(), ids_of(1, 6)
    name, blocks = decoder_blocks(model)
    assert name == "model.layers" and len(blocks) == 10
    sites = ["blocks.3.hook_resid_post", "blocks.4.hook_resid_pre", "blocks.5.hook_mlp_out"]
    with torch.no_grad(), ActivationReader(model, sites).reading() as acts:
        model(input_ids=ids)
    assert torch.equal(acts[sites[0]], acts[sites[1]])  # loop 1 begins at the prelude's output
