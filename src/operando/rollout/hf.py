"""HF generate as a sampler, for architectures that operando's engine does not serve."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from operando.models.prefix import Prefix
from operando.models.tokens import check_stop, completion_text
from operando.rollout.decoding import STOP_EVERY
from operando.rollout.kernels import pick
from operando.rollout.sampler import Request, Sampled, finish, first_stop


class _Recorder(LogitsProcessor):
    """Draws each token by inverse CDF, records its log-prob, and leaves generate no choice."""

    def __init__(self, temperature: float, uniforms_BT: Float[Tensor, "B T"] | None) -> None:
        self.temperature = temperature
        self.uniforms_BT = uniforms_BT
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        t = len(self.logps)
        u_B = None if self.uniforms_BT is None else self.uniforms_BT[:, t].to(scores.device)
        token_B, logp_B = pick(scores.float() / self.temperature, u_B)
        self.logps.append(logp_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


class _StopTexts(StoppingCriteria):
    """Ends the rows that hold a stop text, so that nothing more is decoded for them.

    It looks every STOP_EVERY tokens at the last ones, and at the whole completion before it ends a
    row: what it ends, `finish` cuts.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], start: int
    ) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        self.tail = STOP_EVERY + max(len(s.encode()) for s in stop)
        self.ended: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> torch.BoolTensor:
        del scores, kwargs
        if (input_ids.shape[1] - self.start) % STOP_EVERY == 0:
            rows = input_ids[:, self.start :].tolist()
            self.ended |= {
                b
                for b, ids in enumerate(rows)
                if b not in self.ended and self._holds(ids[-self.tail :]) and self._holds(ids)
            }
        ended_B = torch.tensor([b in self.ended for b in range(len(input_ids))])
        return cast("torch.BoolTensor", ended_B.to(input_ids.device))

    def _holds(self, ids: list[int]) -> bool:
        return first_stop(completion_text(self.tokenizer, ids), self.stop) is not None


class HfSampler:
    """`model.generate` behind the Sampler protocol: slower, but it serves any causal LM."""

    name = "hf"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: tuple[int, ...],
        max_batch: int = 512,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.max_batch = max_batch

    @torch.no_grad()
    def sample(self, request: Request, prefix: Prefix | None = None) -> list[Sampled]:
        """Return the completions of each prompt, siblings adjacent."""
        check_stop(self.tokenizer, self.stop_ids, request.sampling.stop)
        del prefix  # generate does not show its hidden states; the scoring pass computes them
        chunks = request.chunks(self.max_batch)
        return [one for _, chunk in chunks for one in self._sample_chunk(chunk)]

    def _sample_chunk(self, request: Request) -> list[Sampled]:
        sampling, device = request.sampling, self.model.device
        rows = [prompt for prompt in request.prompts for _ in range(request.group_size)]
        width = max(len(row) for row in rows)
        ids_BS = torch.full((len(rows), width), self.stop_ids[0], device=device)
        mask_BS = torch.zeros_like(ids_BS)
        for b, row in enumerate(rows):  # generate wants left padding
            ids_BS[b, width - len(row) :] = torch.tensor(row, device=device)
            mask_BS[b, width - len(row) :] = 1
        recorder = _Recorder(sampling.temperature, request.uniforms_BT)
        stops = [_StopTexts(self.tokenizer, sampling.stop, width)] if sampling.stop else []
        out_BS = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids_BS,
            attention_mask=mask_BS,
            max_new_tokens=sampling.max_completion_length,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=list(self.stop_ids),
            pad_token_id=self.stop_ids[0],
            logits_processor=LogitsProcessorList([recorder]),
            stopping_criteria=StoppingCriteriaList(stops),
        )
        assert isinstance(out_BS, Tensor)
        ids = out_BS[:, width:].tolist()
        logps = torch.stack(recorder.logps, dim=1).tolist()
        return [
            finish(self.tokenizer, ids[b], logps[b], self.stop_ids, sampling)
            for b in range(len(rows))
        ]
