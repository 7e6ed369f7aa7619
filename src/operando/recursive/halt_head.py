"""The halt head of a recursive model: fitted with the policy frozen, and its threshold chosen.

The label is the model's own: t* is the first loop from which the argmax of head(coda(h_t)) stays
what it is at full depth R, and a token is settled at loop t if t >= t*. The head is a logistic
regression of "settled" on the state h_t. All states of the coda's forward are of the same loop, so
the labels leave out that the coda's keys and values of exited tokens differ; what is measured does
not: it is measured with the exits on.

Dims: R loops, N tokens that were read, D d_model; see source.py for texts [N S].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from operando.models.recursive import RecursiveCausalLM
from operando.models.recursive.cache import SlotCache
from operando.models.recursive.configuration import RecursiveConfig, token_cost
from operando.models.recursive.modeling import DecoderOutput
from operando.models.recursive.positions import positions_and_mask
from operando.recursive.data import BATCH, Source, Texts, complete, plain_engine, right
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Sampled
from operando.types import Prompt

TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
BINS = 15
L2 = 1e-4  # on the weights of standardised states; keeps separable states finite
ITERATIONS = 200
PROMPT_WEIGHT = 0.5  # of all prompt tokens together; those that predict the completion have 1

Progress = Callable[[int, int], None]


class States(NamedTuple):
    """What the halt head sees of the tokens that were read, and what it should say.

    `predicts_N` marks the tokens that predict a completion's.
    """

    h_RND: Float[Tensor, "R N D"]
    settled_RN: Bool[Tensor, "R N"]
    predicts_N: Bool[Tensor, " N"]


class Calibration(NamedTuple):
    """How well halt probabilities say what is settled, beside a constant that says the base rate.

    Over the loops before the last, where there is something to decide. `ece` is the expected
    calibration error over 15 equal bins; log losses are in nats.
    """

    ece: float
    ece_base_rate: float
    log_loss: float
    log_loss_base_rate: float
    settled: float
    n: int


class Trial(NamedTuple):
    """A threshold on the prompts of the choice."""

    tau: float
    mean_loops: float
    accuracy: float
    loss: float
    """Accuracy at full depth minus this one."""
    agreement: float


@dataclass(frozen=True)
class Rule:
    """What a threshold must keep. Example: Rule(max_loss=0.01, min_agreement=0.98)"""

    max_loss: float = 0.01
    min_agreement: float = 0.98

    def allows(self, trial: Trial) -> bool:
        return trial.loss <= self.max_loss + 1e-9 and trial.agreement >= self.min_agreement - 1e-9


@dataclass(frozen=True)
class Exits:
    """One way to leave the loops, on the held-out prompts.

    `agreement` has, for each full-depth completion, the share of its tokens that are the argmax
    with these exits, teacher-forced. `loops` counts read tokens by loop, from 1.
    """

    name: str
    correct: Sequence[bool]
    agreement: Sequence[float]
    same_text: int
    loops: Sequence[int]
    completion_loops: Sequence[int]

    def mean_loops(self) -> float:
        return mean_of(self.loops)


def mean_of(counts: Sequence[int]) -> float:
    """Return the mean of loops counted from 1. Example: mean_of([3, 1]) == 1.25"""
    return sum(t * n for t, n in enumerate(counts, start=1)) / sum(counts)


# --- labels --------------------------------------------------------------------------------------


def settled_from(argmax_RN: Int[Tensor, "R *N"]) -> Bool[Tensor, "R *N"]:
    """Return, for loops 1 ... R, whether the argmax is and stays that of full depth."""
    same_RN = argmax_RN == argmax_RN[-1]
    return same_RN.flip(0).long().cumprod(0).flip(0).bool()


@torch.no_grad()
def collect_states(model: RecursiveCausalLM, texts: Texts) -> States:
    """Return the states of every loop and whether they are settled, of all tokens read."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in texts.parts():
        out = model.model(
            input_ids=part.ids_NS, halt_threshold=math.inf, output_loop_states=True, use_cache=False
        )
        assert out.loop_states is not None
        position, mask = positions_and_mask(out.loop_states[0], None, None, None)
        argmax_RN = torch.stack(
            [
                model.lm_head(model.model.read_out(h, position, mask)[part.read_NS]).argmax(-1)
                for h in out.loop_states
            ]
        )
        h_RND = torch.stack([h[part.read_NS] for h in out.loop_states])
        found.append((h_RND, settled_from(argmax_RN), part.predicts_NS[part.read_NS]))
    h, settled, predicts = zip(*found, strict=True)
    return States(torch.cat(h, 1), torch.cat(settled, 1), torch.cat(predicts))


# --- fitting -------------------------------------------------------------------------------------


def fit_halt_head(model: RecursiveCausalLM, states: States) -> None:
    """Fit halt_head to the labels by logistic regression, the whole set at once (L-BFGS).

    min over w, b of mean_{t,n} c_n BCE(sigmoid(w h_tn + b), 1[t >= t*_n]) + L2 |w|^2; convex, and
    it starts from 0, so that there is nothing random in it.
    """
    R, _, D = states.h_RND.shape
    x_MD = states.h_RND.float().flatten(0, 1)
    y_M = states.settled_RN.float().flatten()
    c_M = token_weights(states.predicts_N).repeat(R)
    mean_D, scale_D = x_MD.mean(0), x_MD.std(0).clamp(min=1e-6)
    x_MD = (x_MD - mean_D) / scale_D
    w_D = torch.zeros(D, device=x_MD.device, requires_grad=True)
    b = torch.zeros((), device=x_MD.device, requires_grad=True)
    search = torch.optim.LBFGS([w_D, b], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        bce_M = F.binary_cross_entropy_with_logits(x_MD @ w_D + b, y_M, reduction="none")
        # The bias is held too, or labels that are all 1 would send it to infinity.
        total = (c_M * bce_M).sum() / c_M.sum() + L2 * (w_D.square().sum() + 1e-2 * b.square())
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    with torch.no_grad():
        weight_D = w_D / scale_D
        head = model.model.halt_head
        head.weight.copy_(weight_D[None])
        head.bias.copy_(b - weight_D @ mean_D)


def token_weights(predicts_N: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return 1 for tokens that predict a completion's; the others together half of those."""
    others = int((~predicts_N).sum())
    light = PROMPT_WEIGHT * int(predicts_N.sum()) / max(1, others)
    return torch.where(predicts_N, 1.0, min(1.0, light))


# --- how well it says it -------------------------------------------------------------------------


def expected_calibration_error(
    p_N: Float[Tensor, " N"], label_N: Bool[Tensor, " N"], bins: int = BINS
) -> float:
    """Return sum over bins of n_b/n |mean label - mean p|, equal widths (Guo 2017, 1706.04599)."""
    bin_N = (p_N * bins).long().clamp(max=bins - 1)
    gap_K = torch.zeros(bins, dtype=torch.float64)
    gap_K.index_add_(0, bin_N.cpu(), (label_N.double() - p_N.double()).cpu())
    return float(gap_K.abs().sum() / len(p_N))


@torch.no_grad()
def calibration_of(model: RecursiveCausalLM, states: States, base_rate: float) -> Calibration:
    """Return how well the head says what is settled before the last loop, on other texts."""
    logit_N = model.model.halt_head(states.h_RND[:-1])[..., 0].float().flatten()
    label_N = states.settled_RN[:-1].flatten()
    constant_N = torch.full_like(logit_N, base_rate)
    p_N, y_N = logit_N.sigmoid(), label_N.float()
    return Calibration(
        expected_calibration_error(p_N, label_N),
        expected_calibration_error(constant_N, label_N),
        float(F.binary_cross_entropy_with_logits(logit_N, y_N)),
        float(F.binary_cross_entropy(constant_N.clamp(1e-6, 1 - 1e-6), y_N)),
        float(y_N.mean()),
        len(y_N),
    )


def predicting(states: States) -> States:
    """Return those tokens that predict a completion's."""
    at = states.predicts_N
    return States(states.h_RND[:, at], states.settled_RN[:, at], at[at])


def base_rate_of(states: States) -> float:
    """Return the share of settled states before the last loop."""
    return float(states.settled_RN[:-1].float().mean())


# --- ways to leave the loops ---------------------------------------------------------------------


class FixedDepth(RecursiveEngine):
    """Every token takes `loops` loops."""

    loops = 1

    def _decoder(self, ids_BT: Tensor, position_BT: Tensor, cache: SlotCache) -> DecoderOutput:
        return self.model.model(
            input_ids=ids_BT,
            position_ids=position_BT,
            cache=cache,
            num_loops=self.loops,
            halt_threshold=math.inf,
        )


class RandomExits(RecursiveEngine):
    """Every token leaves after loops drawn from `counts`, whatever its state."""

    counts: Sequence[int] = (1,)
    draws: torch.Generator

    def _decoder(self, ids_BT: Tensor, position_BT: Tensor, cache: SlotCache) -> DecoderOutput:
        exits_BT = draw_loops(self.counts, ids_BT.shape, self.draws).to(ids_BT.device)
        return self.model.model(
            input_ids=ids_BT, position_ids=position_BT, cache=cache, exit_loops=exits_BT
        )


def draw_loops(
    counts: Sequence[int], shape: Sequence[int], draws: torch.Generator
) -> Int[Tensor, "..."]:
    """Return loops drawn with the frequencies of `counts`, which begin with loop 1."""
    weights = torch.tensor(counts, dtype=torch.float64)
    drawn = torch.multinomial(weights, math.prod(shape), replacement=True, generator=draws)
    return drawn.reshape(*shape) + 1


def fixed_depth(source: Source, loops: int, batch: int = BATCH) -> FixedDepth:
    """Return an engine in which every token takes `loops` loops."""
    engine = FixedDepth(source.model, source.tokenizer, source.stops, batch, draft_tokens=0)
    engine.loops = loops
    return engine


def random_exits(source: Source, counts: Sequence[int], draws: torch.Generator) -> RandomExits:
    """Return an engine whose tokens exit at random, as often at each loop as `counts` says."""
    engine = RandomExits(source.model, source.tokenizer, source.stops, BATCH, draft_tokens=0)
    engine.counts, engine.draws = counts, draws
    return engine


@torch.no_grad()
def agreement(
    model: RecursiveCausalLM, texts: Texts, settings: Callable[[Texts], Mapping[str, Any]]
) -> list[float]:
    """Return, for each text, the share of completion tokens whose argmax is full depth's.

    `settings` gives the decoder's arguments for a part of the texts, such as a threshold.
    """
    shares: list[float] = []
    for part in texts.parts():
        full = _argmax(model, part, {"halt_threshold": math.inf})
        same_NS = (_argmax(model, part, settings(part)) == full) & part.predicts_NS
        shares += (same_NS.sum(1) / part.predicts_NS.sum(1)).tolist()
    return shares


def _argmax(model: RecursiveCausalLM, texts: Texts, settings: Mapping[str, Any]) -> Tensor:
    return model(input_ids=texts.ids_NS, use_cache=False, **settings).logits.argmax(-1)


def count_loops(sampled: Sequence[Sampled], prompts: Sequence[Prompt], loops: int):
    """Return how many tokens took 1, 2, ... loops: of all that were read, and of completions'."""
    every, completion = [0] * loops, [0] * loops
    for one, prompt in zip(sampled, prompts, strict=True):
        for at, taken in enumerate(one.exit_loops):
            every[taken - 1] += 1
            completion[taken - 1] += at >= len(prompt.ids) - 1
    return every, completion


def measure(
    name: str,
    source: Source,
    prompts: Sequence[Prompt],
    engine: RecursiveEngine,
    full: Sequence[Sampled],
    shares: Sequence[float],
    on_progress: Progress = lambda _done, _of: None,
) -> Exits:
    """Return what an engine writes to the prompts, beside the full-depth completions `full`."""
    sampled = complete(source, prompts, engine, on_progress=on_progress)
    every, completion = count_loops(sampled, prompts, source.model.config.num_loops)
    same = sum(a.ids == b.ids for a, b in zip(sampled, full, strict=True))
    return Exits(name, right(source, prompts, sampled), list(shares), same, every, completion)


# --- choosing ------------------------------------------------------------------------------------


def try_thresholds(
    source: Source, texts: Texts, accuracy: float, on_progress: Progress = lambda _done, _of: None
) -> list[Trial]:
    """Return what each threshold costs on the prompts of the choice; `texts` are full depth's."""
    prompts = source.prompts.choose
    trials = []
    for number, tau in enumerate(TAUS, start=1):
        engine = plain_engine(source, halt_threshold=tau)
        sampled = complete(source, prompts, engine)
        every, _ = count_loops(sampled, prompts, source.model.config.num_loops)
        correct = right(source, prompts, sampled)
        share = sum(correct) / len(correct)
        shares = agreement(source.model, texts, lambda _, tau=tau: {"halt_threshold": tau})
        mean = sum(shares) / len(shares)
        trials.append(Trial(tau, mean_of(every), share, accuracy - share, mean))
        on_progress(number, len(TAUS))
    return trials


def choose(trials: Sequence[Trial], rule: Rule) -> Trial | None:
    """Return the trial of fewest mean loops that the rule allows (a tie: the higher threshold)."""
    allowed = [trial for trial in trials if rule.allows(trial)]
    return min(allowed, key=lambda trial: (trial.mean_loops, -trial.tau), default=None)


# --- what is saved -------------------------------------------------------------------------------


class Saved(NamedTuple):
    """Shares saved of the core's passes (and so of its multiply-adds) and of the whole model's.

    Example: Saved(passes=0.37, whole=0.15)
    """

    passes: float
    whole: float


def saved_at(model: RecursiveCausalLM, mean_loops: float) -> Saved:
    """Return what a mean of loops saves; multiply-adds without attention's growth with length."""
    config = model.config
    assert isinstance(config, RecursiveConfig), type(config)
    passes = 1 - mean_loops / config.num_loops
    cost = token_cost(config)
    return Saved(passes, passes * cost.core / (cost.core + cost.rest))
