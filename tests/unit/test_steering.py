"""Interventions along a direction: values by hand, and hooks that come and go."""

from __future__ import annotations

import torch

from operando.models.layers import decoder_blocks
from operando.models.steering import ablate, change_for, hook_blocks, suppress
from tests.unit.tiny import tiny_model


def test_suppression_is_one_sided_and_ablation_is_not() -> None:
    v_kD = torch.tensor([[0.6, 0.8]])
    h_ND = torch.stack([torch.tensor([0.6, 0.8]) * 2, torch.tensor([-0.6, -0.8]), torch.ones(2)])
    h_ND[2] = torch.tensor([0.8, -0.6])  # at right angles
    torch.testing.assert_close(suppress(h_ND, v_kD), torch.stack([h_ND[0] * 0, h_ND[1], h_ND[2]]))
    torch.testing.assert_close(ablate(h_ND, v_kD), torch.stack([h_ND[0] * 0, h_ND[1] * 0, h_ND[2]]))
    assert suppress(h_ND.bfloat16(), v_kD).dtype == torch.bfloat16


@torch.no_grad()
def test_hooks_act_where_the_switch_is_on_and_leave_no_trace() -> None:
    model = tiny_model("llama")
    ids = torch.arange(5, 25)[None]
    _, blocks = decoder_blocks(model)
    plain = model(ids).logits
    v_kD = torch.nn.functional.normalize(torch.arange(32.0)[None], dim=1)
    switch = hook_blocks(blocks, [1], change_for("ablate", v_kD))
    out = model(ids, output_hidden_states=True)
    assert float((out.hidden_states[2] @ v_kD.T).abs().max()) < 1e-5
    with switch.set(False):
        assert torch.equal(model(ids).logits, plain)
    assert not torch.allclose(model(ids).logits, plain)
    switch.remove()
    assert torch.equal(model(ids).logits, plain)
