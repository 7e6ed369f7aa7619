"""No dropout acts in RL, also where blocks are recomputed in the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from operando.errors import UserError
from operando.models.load import Loaded
from operando.models.policy import Policy
from operando.recipe.data import ModelConfig
from operando.run import SeedTree
from tests.unit.tiny import byte_tokenizer, random_batch, tiny_model


def with_dropout(family: str) -> PreTrainedModel:
    """A tiny model in which every kind of dropout that its architecture has is at one half."""
    model = tiny_model(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.5
    return model


def make_policy(model: PreTrainedModel, recomputed: bool) -> Policy:
    config = ModelConfig(gradient_checkpointing=recomputed)
    return Policy(Loaded(model, byte_tokenizer(), {}), config, SeedTree(0))


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_recomputed_blocks_give_the_scores_and_gradients_of_plain_ones(family: str) -> None:
    batch = random_batch(groups=2, group_size=2)
    found = []
    for recomputed in (False, True):
        policy = make_policy(with_dropout(family), recomputed)
        packs = policy.micro_batches(batch, None, 10**6)[0]
        torch.manual_seed(7)
        logp_BT = policy.scored(batch, packs).logp_BT
        logp_BT.sum().backward()
        grads = {name: p.grad for name, p in policy.trainable().items()}
        found.append((logp_BT.detach(), grads))
    (plain, plain_grads), (again, again_grads) = found
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-5)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(again_grads[name], grad, atol=1e-4, rtol=1e-4)


def test_blocks_are_recomputed() -> None:
    """The control: with checkpointing a block's forward runs twice for one backward."""
    batch = random_batch(groups=1, group_size=2)
    policy = make_policy(tiny_model("qwen2"), recomputed=True)
    calls = []
    policy.blocks[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    policy.scored(batch, [[0], [1]]).logp_BT.sum().backward()
    assert len(calls) == 2


def test_a_block_that_drops_out_by_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: this dropout follows the flag of the block that is recomputed."""
    plain = Qwen2DecoderLayer.forward

    def forward(self, *args, **kwargs):
        return F.dropout(plain(self, *args, **kwargs), 0.3, training=self.training)

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", forward)
    make_policy(tiny_model("qwen2"), recomputed=False)
    with pytest.raises(UserError, match="draws random numbers in the training forward"):
        make_policy(tiny_model("qwen2"), recomputed=True)
