"""Credit for every loop of a RecursiveCausalLM, where the last alone would have it.

The state of a loop is read out as the last one's is, by coda and head, and so gives log-probs of
its own. What the update's ratio is made of is then their weighted sum (RLTT, 2602.10520):

    credit(y) = sum_t w_t log P^(t)(y),   w_t >= 0,   sum_t w_t = 1

P^(t) is what the model with t loops says; a token that exited keeps its state, so every loop after
its exit says again what the one of the exit said. credit is no log-prob of any distribution: KL,
entropy, the gap to the sampler and what a reward sees are those of the last loop, which samples.

Deviations: the paper has no ratio (its objective is -A credit, on-policy); here credit takes the
place of the log-prob in the clipped loss, whose gradient is the paper's where the ratio is 1. Its
weights from the exit distribution are left out: the halt head of this model is trained on another
question than Ouro's gate. Ouro reads a state with its head; here the coda stands between.

Dims: b packs, S pack length, N completion tokens, D d_model, R loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from operando.models.packing import Packed
from operando.models.recursive.modeling import RecursiveCausalLM
from operando.models.recursive.positions import positions_and_mask

LoopCredit = Literal["last", "uniform", "progressive"]


def loop_weights(kind: LoopCredit, num_loops: int) -> Float[Tensor, " R"]:
    """Return w_1 ... w_R: all on the last loop, 1/R each, or t / (1 + 2 + ... + R)."""
    match kind:
        case "last":
            return torch.tensor([0.0] * (num_loops - 1) + [1.0])
        case "uniform":
            return torch.full((num_loops,), 1.0 / num_loops)
        case "progressive":
            loop_R = torch.arange(1.0, num_loops + 1)
            return loop_R / loop_R.sum()


def composite(
    logps: Sequence[Float[Tensor, " N"]], weight_R: Float[Tensor, " R"]
) -> Float[Tensor, " N"]:
    """Return sum_t w_t log P^(t) of each token."""
    assert len(logps) == len(weight_R), f"{len(logps)} loops, {len(weight_R)} weights"
    return sum(
        (w * logp_N for w, logp_N in zip(weight_R.tolist(), logps, strict=True)),
        start=torch.zeros_like(logps[0]),
    )


def hidden_by_loop(model: RecursiveCausalLM, packed: Packed) -> list[Float[Tensor, "N D"]]:
    """Return the final hidden state before each completion token, read out after every loop.

    One forward of the core; the coda runs once for every loop. The last loop's comes first inside
    the forward, so that a reader's sites in the coda hold what the policy says.
    """
    decoder = model.model
    out = decoder(
        input_ids=packed.ids_bS,
        position_ids=packed.position_bS,
        attention_mask=packed.mask_b1SS,
        exit_loops=packed.exit_bS,
        use_cache=False,
        output_loop_states=True,
    )
    assert out.loop_states is not None and out.last_hidden_state is not None
    position_bS, mask = positions_and_mask(
        out.last_hidden_state, packed.mask_b1SS, packed.position_bS, None
    )
    earlier = [decoder.read_out(h, position_bS, mask) for h in out.loop_states[:-1]]
    where = (packed.pack_N, packed.before_N)
    return [hidden[where] for hidden in (*earlier, out.last_hidden_state)]
