"""The nouns of operando.

Shape legend, used in every file: P prompts, G group size, B = P*G rollouts, T completion tokens,
S full sequence (prompt then completion), V vocabulary, L layers, D d_model.

Two rules hold everywhere. Completions are right-padded. Masks are bool and True means "counts".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from operando.text import one_line


@dataclass(frozen=True)
class Example:
    """One question of a task.

    Example: Example(id="words/held_out/3", question="Tom has 3 pens and buys 2 more. ...",
                     answer="5", solution="3+2=5")
    """

    id: str
    question: str
    answer: str
    solution: str = ""
    columns: Mapping[str, object] = field(default_factory=dict)
    """What reward functions, labels and the rollouts' parquet get beside it."""
    system: str = ""
    """A system message of its own; chat prompts only."""


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of one completion, and why, on one line: it may quote the completion.

    Example: Verdict(False, "two '####' marks")
    """

    correct: bool
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", one_line(self.reason))


@dataclass(frozen=True)
class Prompt:
    """An example as the model reads it.

    Example: Prompt(example, text="Q: Tom has ...\\nA:", ids=(17, 4, ...))
    """

    example: Example
    text: str
    ids: tuple[int, ...]
    messages: tuple[Mapping[str, str], ...] = ()  # empty for a raw prompt
    prefill: str = ""  # what the text's end already holds of the answer, e.g. "<think>"


@dataclass(frozen=True)
class Rollout:
    """One sampled completion with the exact ids and the log-probs it was sampled with.

    Example: Rollout(prompt, group=0, sample=3, completion=" 3+2=5 #### 5",
                     completion_ids=(9, 12, ..., 1), sampling_logp=(-0.1, ...), is_truncated=False)
    """

    prompt: Prompt
    group: int
    sample: int
    completion: str
    completion_ids: tuple[int, ...]
    sampling_logp: tuple[float, ...]
    is_truncated: bool
    exit_loops: tuple[int, ...] = ()  # loops of each token but the last; recursive models only


@dataclass(frozen=True)
class Batch:
    """Rollouts as tensors; siblings are adjacent: row b belongs to group b // group_size."""

    rollouts: Sequence[Rollout]
    group_size: int
    ids_BS: Int[Tensor, "B S"]
    prompt_len_B: Int[Tensor, " B"]
    completion_BT: Int[Tensor, "B T"]
    mask_BT: Bool[Tensor, "B T"]
    sampling_logp_BT: Float[Tensor, "B T"]

    def __len__(self) -> int:
        return len(self.rollouts)


@dataclass(frozen=True)
class Trace:
    """What the scoring pass saw on exactly the ids of a batch, before any update.

    `acts` maps what was asked for, such as the site "blocks.3.hook_resid_post" or a reward's name,
    to its values at the completion tokens: what the model holds after it has read token t stands at
    position t. `base_acts` are the same in the frozen base on the same ids.
    """

    logp_BT: Float[Tensor, "B T"]
    entropy_BT: Float[Tensor, "B T"]
    ref_logp_BT: Float[Tensor, "B T"] | None  # None: the recipe has no use for a reference
    value_BT: Float[Tensor, "B T"] | None  # None: no value head
    acts: Mapping[str, Float[Tensor, "B T F"]]
    base_acts: Mapping[str, Float[Tensor, "B T F"]]
    credit_BT: Float[Tensor, "B T"] | None = None  # the old ratio's side; None: logp_BT itself

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Trace:
        """Return the trace with `change` applied to every tensor."""
        return Trace(
            logp_BT=change(self.logp_BT),
            entropy_BT=change(self.entropy_BT),
            ref_logp_BT=None if self.ref_logp_BT is None else change(self.ref_logp_BT),
            value_BT=None if self.value_BT is None else change(self.value_BT),
            acts={name: change(acts) for name, acts in self.acts.items()},
            base_acts={name: change(acts) for name, acts in self.base_acts.items()},
            credit_BT=None if self.credit_BT is None else change(self.credit_BT),
        )


class Dense(NamedTuple):
    """Which tokens are credited for a per-token reward.

    own: the token that it stands on. to_go: that token and all before it, discounted by gamma.
    mechreward: its G3, the mean in the return and a z-score on top (see update/advantages.py).

    Example: Dense("to_go", gamma=0.95)
    """

    credit: Literal["own", "to_go", "mechreward"]
    gamma: float = 1.0


@dataclass(frozen=True)
class Rewards:
    """What is rewarded. `parts` are unweighted; a row of NaN means "not applicable" for that part.

    total[b,t] = sum_c weight_c * part_c[b,t]; a scalar reward stands on the last real token. The
    parts in `dense` reward every token, and their advantages are computed apart from the others'.
    """

    parts: Mapping[str, Float[Tensor, "B T"]]
    weights: Mapping[str, float]
    total_BT: Float[Tensor, "B T"]
    dense: Mapping[str, Dense] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)


def make_batch(rollouts: Sequence[Rollout], group_size: int, pad_id: int) -> Batch:
    """Return the rollouts as right-padded tensors."""
    assert len(rollouts) % group_size == 0, f"{len(rollouts)} rollouts, groups of {group_size}"
    lengths = [len(r.completion_ids) for r in rollouts]
    prompt_lens = [len(r.prompt.ids) for r in rollouts]
    width_T = max(lengths)
    width_S = max(p + n for p, n in zip(prompt_lens, lengths, strict=True))
    ids_BS = torch.full((len(rollouts), width_S), pad_id, dtype=torch.long)
    completion_BT = torch.full((len(rollouts), width_T), pad_id, dtype=torch.long)
    sampling_logp_BT = torch.zeros(len(rollouts), width_T)
    for b, rollout in enumerate(rollouts):
        row = torch.tensor(rollout.prompt.ids + rollout.completion_ids, dtype=torch.long)
        ids_BS[b, : len(row)] = row
        completion_BT[b, : lengths[b]] = row[prompt_lens[b] :]
        sampling_logp_BT[b, : lengths[b]] = torch.tensor(rollout.sampling_logp)
    mask_BT = torch.arange(width_T)[None, :] < torch.tensor(lengths)[:, None]
    return Batch(
        rollouts=rollouts,
        group_size=group_size,
        ids_BS=ids_BS,
        prompt_len_B=torch.tensor(prompt_lens),
        completion_BT=completion_BT,
        mask_BT=mask_BT,
        sampling_logp_BT=sampling_logp_BT,
    )
