"""The reward contract: a superset of TRL's, so that any TRL reward function runs unchanged.

A function is called with keywords `prompts, completions, completion_ids`, one list per dataset
column, `trainer_state, log_extra, log_metric`, and returns one float (or None, "not applicable") a
completion. It may also name `trace` (log-probs and activations already computed on exactly these
ids) and may return a list of floats per completion, one for each completion token.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from operando.errors import UserError, nearest
from operando.tasks.user_code import spelled_frames, user_frames
from operando.text import encodable, one_line
from operando.types import Rollout, Trace

ROLLOUT_COLUMNS = frozenset(
    {
        "step",
        "group",
        "sample",
        "prompt",
        "completion",
        "answer",
        "correct",
        "reason",
        "is_truncated",
        "discarded",
        "reward",
        "advantage",
        "prompt_ids",
        "completion_ids",
        "tokens",
        "sampling_logp",
        "old_logp",
        "ref_logp",
        "entropy",
        "advantage_tokens",
        "reward_tokens",
        "shift_touched",
    }
)
"""Columns that records.write_rollouts writes itself; `rewards/NAME`, `data/NAME` beside them."""
RUN_METRICS = frozenset({
    "step", "reward", "reward_std", "train/correct", "kl_coef", "frac_reward_zero_std", "entropy",
    "completions/mean_length", "completions/clipped_ratio", "completions/duplicate_ratio",
    "discarded", "sampler/gap_mean", "sampler/gap_max", "sampler/ess", "loops/mean", "kl", "kl_max",
    "kl/q1", "kl/q2", "kl/q3", "kl/q4", "shift/touched", "shift/score", "shift/z_abs", "loss",
    "policy_loss", "value_loss", "clip_ratio/low", "clip_ratio/high", "ratio_gap", "grad_norm",
    "update_norm", "lr", "updates", "time/sample", "time/score", "time/reward", "time/update",
    "time/step", "tokens_per_second", "eval/correct", "eval/n", "eval/mean_length",
    "eval/clipped_ratio",
})  # fmt: skip
"""Metrics that the run writes itself, and beside them those that begin as RUN_METRIC_GROUPS."""
RUN_METRIC_GROUPS = ("rewards/", "eval/rewards/", "projection/")
RewardValue = float | None | Sequence[float]
RewardFunction = Callable[..., Sequence[RewardValue]]


class TrainerState(NamedTuple):
    """Where training stands, as TRL's trainer_state. Example: TrainerState(12, 150)"""

    global_step: int
    max_steps: int


@dataclass
class RewardLog:
    """What reward functions log: metrics for metrics.jsonl, columns for the rollouts' parquet."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[object]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        if not name or one_line(name) != name:
            raise UserError(f"log_metric: expected a name on one line, got {name[:200]!r}")
        refuse_run_metric(name, "log_metric")
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[object]) -> None:
        """Keep a column for the rollouts' parquet; its texts are made encodable (text.py).

        A column that no parquet can hold, or that would stand in the place of one of the run's own
        (`correct`, `reward`, ...), is an error.
        """
        own = column in ROLLOUT_COLUMNS or column.startswith(("rewards/", "data/"))
        if not column or one_line(column) != column or own:
            raise UserError(
                f"log_extra: expected a column name on one line that is none of the run's own, got "
                f"{column[:200]!r}"
            )
        self.columns[column] = [_encodable(value) for value in values]
        try:
            pa.array(self.columns[column])
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(
                f"log_extra: column {column!r}: expected numbers, texts or lists, all of one kind: "
                f"{error}"
            ) from error


def refuse_run_metric(name: str, by: str) -> None:
    """Refuse a metric of the user's that would stand in the place of one of the run's own.

    Example: refuse_run_metric("kl", "log_metric")
    """
    if name in RUN_METRICS or name.startswith(RUN_METRIC_GROUPS):
        raise UserError(
            f"{by}: {name!r} is a metric that the run writes itself: choose another name, such as "
            f"{'user/' + name!r}"
        )


def _encodable(value: object) -> object:
    match value:
        case str():
            return encodable(value)
        case list() | tuple():
            return [_encodable(one) for one in value]
        case dict():
            return {_encodable(k): _encodable(v) for k, v in value.items()}
        case _:
            return value


def wants_trace(function: RewardFunction) -> bool:
    """Return whether the function names `trace` among its parameters."""
    return "trace" in inspect.signature(function).parameters


def call_reward(
    name: str,
    function: RewardFunction,
    rollouts: Sequence[Rollout],
    trace: Trace | None,
    state: TrainerState,
    log: RewardLog,
) -> Sequence[RewardValue]:
    """Return what the function returns for these rollouts; any failure names function and cause."""
    keywords: dict[str, object] = {
        **_columns(rollouts),
        "prompts": [list(r.prompt.messages) or r.prompt.text for r in rollouts],
        "completions": [_completion(r) for r in rollouts],
        "completion_ids": [list(r.completion_ids) for r in rollouts],
        "trainer_state": state,
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    if wants_trace(function):
        keywords["trace"] = trace
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in keywords]
        if missing:
            raise UserError(
                f"reward {name!r} asks for {missing[0]!r}, which is none of "
                f"{', '.join(sorted(keywords))}.{nearest(missing[0], keywords)}"
            )
        keywords = {p.name: keywords[p.name] for p in parameters if p.name in keywords}
    try:
        values = function(**keywords)
        if inspect.iscoroutine(values):
            values = asyncio.run(values)
    except Exception as error:  # rewritten, never swallowed: a broken reward is not a reward of 0
        raise UserError(_raised(name, error, rollouts)) from error
    for column, held in log.columns.items():
        if len(held) != len(rollouts):
            raise UserError(
                f"reward {name!r}, log_extra: column {column!r} has {len(held)} values for "
                f"{len(rollouts)} completions"
            )
    return _check_length(name, values, rollouts)


def _raised(name: str, error: Exception, rollouts: Sequence[Rollout]) -> str:
    """Return what a user's reward raised, with the frames of the user's and the completion.

    The completion is the one that a frame holds in a variable; else the first of the call is shown.
    """
    frames = user_frames(error)
    texts = [r.completion for r in rollouts]
    held = [
        value
        for frame, _ in reversed(frames)
        for value in frame.f_locals.values()
        if isinstance(value, str) and value in texts
    ]
    which = "The completion" if held else f"The first of {len(texts)} completions"
    text = (held or texts)[0][:300]
    where = spelled_frames(frames)
    return f"reward {name!r} raised {type(error).__name__}: {error}{where}\n{which}: {text!r}"


def _check_length(name: str, values: object, rollouts: Sequence[Rollout]) -> Sequence[RewardValue]:
    if not isinstance(values, list | tuple):
        raise UserError(
            f"reward {name!r} returned {type(values).__name__}, expected a list of "
            f"{len(rollouts)} values"
        )
    if len(values) != len(rollouts):
        raise UserError(
            f"reward {name!r} returned {len(values)} values for {len(rollouts)} completions"
        )
    return values


def _columns(rollouts: Sequence[Rollout]) -> dict[str, list[object]]:
    names = rollouts[0].prompt.example.columns
    return {name: [r.prompt.example.columns[name] for r in rollouts] for name in names}


def _completion(rollout: Rollout) -> str | list[dict[str, str]]:
    if rollout.prompt.messages:
        return [{"role": "assistant", "content": rollout.completion}]
    return rollout.completion


def as_tokens(
    name: str, values: Sequence[RewardValue], rollouts: Sequence[Rollout], width_T: int
) -> Float[Tensor, "B T"]:
    """Return values as a per-token channel: a scalar stands on the last real token, None is NaN."""
    reward_BT = torch.zeros(len(rollouts), width_T)
    for b, (value, rollout) in enumerate(zip(values, rollouts, strict=True)):
        length = len(rollout.completion_ids)
        if value is None:
            reward_BT[b, :length] = torch.nan
            continue
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != length:
                raise UserError(
                    f"reward {name!r}, completion {b}: {len(value)} per-token values for {length} "
                    "completion tokens"
                )
            row = [_number(name, b, v) for v in value]
        else:
            row = [0.0] * (length - 1) + [_number(name, b, value)]
        if not all(math.isfinite(v) for v in row):
            raise UserError(
                f"reward {name!r}, completion {b}: not finite ({value!r}). Return None where the "
                "reward does not apply. The completion begins: "
                f"{rollout.completion[:120]!r}"
            )
        reward_BT[b, :length] = torch.tensor(row)
    return reward_BT


def _number(name: str, completion: int, value: object) -> float:
    if not hasattr(value, "__float__"):
        raise UserError(
            f"reward {name!r}, completion {completion}: expected a number, got {value!r}"
        )
    return float(value)  # pyright: ignore[reportArgumentType]
