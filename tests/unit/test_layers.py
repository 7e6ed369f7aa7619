"""Layer sets in every form, where the decoder blocks of a model are, and hooks that come off."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from operando.errors import UserError
from operando.models.hooks import ActivationReader
from operando.models.layers import decoder_blocks, parse_layer_set
from tests.unit.tiny import tiny_model

# --- layer sets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "num_layers", "layers"),
    [
        ("all", 4, (0, 1, 2, 3)),
        (" all ", 2, (0, 1)),
        ("24-27", 28, (24, 25, 26, 27)),
        ("3-3", 4, (3,)),
        ("24,25", 28, (24, 25)),
        ("7", 8, (7,)),
        ("5, 1", 8, (1, 5)),
        ("0-1,4,6-7", 8, (0, 1, 4, 6, 7)),
        ("-1", 8, (7,)),
        ("-8,-1", 8, (0, 7)),
        ("last:4", 28, (24, 25, 26, 27)),
        ("last:3", 3, (0, 1, 2)),
        ("first:2", 28, (0, 1)),
        # of 20 layers, layer i begins at 5i %: 12 begins at 60 %, 15 at 75 % is out
        ("60%:75%", 20, (12, 13, 14)),
        ("0%:100%", 3, (0, 1, 2)),
        ("0%:50%", 3, (0, 1)),
        ("12.5%:25%", 8, (1,)),
    ],
)
def test_a_layer_set_names_these_layers(text: str, num_layers: int, layers: tuple) -> None:
    assert parse_layer_set(text, num_layers) == layers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "can't read"),
        ("  ", "can't read"),
        (",", "can't read"),
        ("1,", "can't read"),
        ("al", "can't read"),
        ("ALL", "can't read"),
        ("all,1", "can't read"),
        ("*", "can't read"),
        ("1:3", "can't read"),
        ("1.5", "can't read"),
        ("--1", "can't read"),
        ("last:", "can't read"),
        ("last:-1", "can't read"),
        ("last4", "can't read"),
        ("60:75%", "can't read"),
        ("60%", "can't read"),
        ("27-24", "reversed"),
        ("8", "layer 8 is out of range, the model has layers 0-7"),
        ("6-8", "layer 8 is out of range"),
        ("-9", "out of range"),
        ("1,99", "layer 99 is out of range"),
        ("last:0", "has 8 layers"),
        ("first:0", "has 8 layers"),
        ("last:9", "has 8 layers"),
        ("75%:60%", "from < to"),
        ("50%:50%", "from < to"),
        ("50%:101%", "from < to"),
        ("1%:2%", "no layer of 8"),
        ("3,3", "named twice"),
        ("7,-1", "named twice"),
        ("1-3,2", "named twice"),
    ],
)
def test_a_mistyped_layer_set_is_an_error_and_never_all_layers(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_layer_set(text, 8)
    assert said in str(error.value) and repr(text.strip()) in str(error.value)


def test_thirds_in_percent_part_the_layers() -> None:
    for num_layers in (3, 7, 26, 48):
        parts = [
            parse_layer_set(text, num_layers) for text in ("0%:33%", "33%:66.5%", "66.5%:100%")
        ]
        assert sum(parts, ()) == tuple(range(num_layers))


# --- decoder blocks ------------------------------------------------------------------------------


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=5,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).eval()


def image_and_text(text_layers: int, image_layers: int) -> nn.Module:
    """A LLaVA whose image tower has more blocks than its text stack, to tempt the search."""
    text = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=text_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    image = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=image_layers,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(text_config=text, vision_config=image, image_token_index=49)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("family", "name", "kind"),
    [
        ("llama", "model.layers", "LlamaDecoderLayer"),
        ("qwen3", "model.layers", "Qwen3DecoderLayer"),
        ("gpt2", "transformer.h", "GPT2Block"),
    ],
)
def test_the_blocks_of_a_text_model_are_its_own(family: str, name: str, kind: str) -> None:
    model = tiny_model(family)
    found, blocks = decoder_blocks(model)
    assert found == name and model.get_submodule(name) is blocks
    assert [type(block).__name__ for block in blocks] == [kind] * 3


def test_the_blocks_of_neox() -> None:
    found, blocks = decoder_blocks(neox())
    assert found == "gpt_neox.layers" and len(blocks) == 5


def test_the_blocks_of_a_multimodal_model_are_the_text_stack() -> None:
    found, blocks = decoder_blocks(image_and_text(text_layers=2, image_layers=6))
    assert len(blocks) == 2 and "vision" not in found
    assert {type(block).__name__ for block in blocks} == {"LlamaDecoderLayer"}


def test_a_model_without_attention_blocks_is_refused() -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Conv1d(2, 2, 1)) for _ in range(4)])

    with pytest.raises(UserError, match="decoder blocks of Convolutions"):
        decoder_blocks(Convolutions())


# --- reading activations -------------------------------------------------------------------------

IDS = torch.arange(2, 10)[None]
SITES = [
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_post",
    "blocks.2.hook_resid_pre",
]


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_sites_add_up_and_are_those_of_hidden_states(family: str) -> None:
    model = tiny_model(family)
    with ActivationReader(model, SITES).reading() as acts, torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert set(acts) == set(SITES)
    pre, attn, mlp, post, next_pre = (acts[site] for site in SITES)
    assert torch.equal(pre, states[1]) and torch.equal(post, states[2])
    assert torch.equal(post, next_pre)
    torch.testing.assert_close(pre + attn + mlp, post)
    assert mlp.abs().max() > 0 and attn.abs().max() > 0


def test_hooks_come_off_after_a_reading() -> None:
    model = tiny_model("llama")
    before = hooks_on(model)
    reader = ActivationReader(model, SITES)
    assert hooks_on(model) == before, "only inside reading()"
    with reader.reading() as acts, torch.no_grad():
        assert hooks_on(model) == before + len(SITES)
        model(input_ids=IDS)
    assert hooks_on(model) == before
    kept = acts["blocks.1.hook_resid_post"].clone()
    with torch.no_grad():
        model(input_ids=IDS.flip(1))
    assert torch.equal(acts["blocks.1.hook_resid_post"], kept), "a later forward adds nothing"


def test_hooks_come_off_after_an_exception() -> None:
    model = tiny_model("llama")
    before = hooks_on(model)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        ActivationReader(model, SITES).reading(),
    ):
        raise RuntimeError("in the middle")
    assert hooks_on(model) == before


def test_hooks_come_off_when_one_can_not_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = hooks_on(model)

    def broken(*_: object) -> None:
        raise RuntimeError("no hook here")

    _, blocks = decoder_blocks(model)
    monkeypatch.setattr(blocks[2], "register_forward_hook", broken)
    reader = ActivationReader(model, [*SITES, "blocks.2.hook_resid_post"])
    with pytest.raises(RuntimeError, match="no hook here"), reader.reading():
        pass
    assert hooks_on(model) == before


def test_only_the_first_forward_of_a_reading_counts() -> None:
    model = tiny_model("llama")
    site = "blocks.0.hook_resid_post"
    with ActivationReader(model, [site]).reading() as acts, torch.no_grad():
        model(input_ids=IDS)
        first = acts[site].clone()
        model(input_ids=IDS.flip(1))
    assert torch.equal(acts[site], first)


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("blocks.3.hook_resid_post", "blocks 0-2"),
        ("blocks.1.hook_resid_pots", "Did you mean 'hook_resid_post'"),
        ("block.1.hook_resid_post", "expected blocks.N.KIND"),
        ("blocks.-1.hook_resid_post", "expected blocks.N.KIND"),
    ],
)
def test_an_unknown_site_is_refused(site: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        ActivationReader(tiny_model("llama"), [site])
    assert said in str(error.value) and site in str(error.value)
