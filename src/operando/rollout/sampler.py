"""What every sampler takes and gives, and how the trainer and the evaluation call one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from operando.models.prefix import Prefix
from operando.models.tokens import completion_text
from operando.run import SeedTree
from operando.types import Prompt, Rollout


class Sampling(NamedTuple):
    """How to sample. Example: Sampling(64, temperature=1.0, stop=("Q:",))"""

    max_completion_length: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()


class Request(NamedTuple):
    """What to sample: `group_size` completions of each prompt (token ids).

    uniforms_BT holds one number in [0, 1) for each token of each completion, siblings adjacent, and
    decides everything, so that a completion does not depend on its neighbours. None means greedy.

    Example: Request([(5, 6, 7)], 8, Sampling(64), uniforms_BT)
    """

    prompts: Sequence[Sequence[int]]
    group_size: int
    sampling: Sampling
    uniforms_BT: Float[Tensor, "B T"] | None = None

    def chunks(self, max_batch: int) -> Iterator[tuple[int, Request]]:
        """Yield the prompts in parts of at most `max_batch` completions, or of one prompt, each
        with the place of its first."""
        num = max(1, max_batch // self.group_size)
        for at in range(0, len(self.prompts), num):
            rows = slice(at * self.group_size, (at + num) * self.group_size)
            uniforms_BT = None if self.uniforms_BT is None else self.uniforms_BT[rows]
            yield at, self._replace(prompts=self.prompts[at : at + num], uniforms_BT=uniforms_BT)


class Sampled(NamedTuple):
    """One completion: ids (with the end token), their log-probs, text, whether it was cut.

    `exit_loops`, of a recursive model only: the loops of every token that was read, so of the
    prompt and of the completion but its last token.
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    text: str
    is_truncated: bool
    exit_loops: tuple[int, ...] = ()


@runtime_checkable
class Sampler(Protocol):
    """Samples completions, siblings adjacent in the answer.

    A sampler that can fills `prefix` with the hidden states below the first trained block.
    """

    name: str

    def sample(self, request: Request, prefix: Prefix | None = None) -> list[Sampled]: ...


def uniform_streams(
    seeds: SeedTree, step: int, prompts: Sequence[int], group_size: int, length: int
) -> Float[Tensor, "B T"]:
    """Return the uniforms of each completion from its own (step, prompt, sample) stream."""
    rows = [
        torch.rand(length, generator=seeds.generator("rollout", step, prompt, sample))
        for prompt in prompts
        for sample in range(group_size)
    ]
    return torch.stack(rows)


def as_rollouts(
    prompts: Sequence[Prompt], groups: Sequence[int], group_size: int, sampled: Sequence[Sampled]
) -> list[Rollout]:
    """Return sampled completions as rollouts; `groups` numbers the prompts within the step."""
    return [
        Rollout(
            prompt=prompts[row // group_size],
            group=groups[row // group_size],
            sample=row % group_size,
            completion=one.text,
            completion_ids=one.ids,
            sampling_logp=one.logp,
            is_truncated=one.is_truncated,
            exit_loops=one.exit_loops,
        )
        for row, one in enumerate(sampled)
    ]


def finish(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    logp: list[float],
    stop_ids: tuple[int, ...],
    sampling: Sampling,
) -> Sampled:
    """Return one completion cut after its end token or its first stop text.

    Its text is `completion_text`'s, without the end token.
    """
    for at, token in enumerate(ids):
        if token in stop_ids:
            ids, logp = ids[: at + 1], logp[: at + 1]
            break
    ended = bool(ids) and ids[-1] in stop_ids
    text = completion_text(tokenizer, ids[:-1] if ended else ids)
    cut = first_stop(text, sampling.stop)
    if cut is not None:
        keep = _tokens_until(tokenizer, ids, sampling.stop)
        ids, logp, text, ended = ids[:keep], logp[:keep], text[:cut], True
    return Sampled(tuple(ids), tuple(logp), text, is_truncated=not ended)


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Return where the earliest stop text begins, or None."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(found) if found else None


def _tokens_until(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: tuple[str, ...]
) -> int:
    """Return the smallest number of tokens whose text holds a stop text."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if first_stop(completion_text(tokenizer, ids[:middle]), stop) is not None:
            high = middle
        else:
            low = middle + 1
    return low
