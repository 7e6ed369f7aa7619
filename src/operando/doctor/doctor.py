"""What is wrong with a run, from its metrics: each finding gives its arithmetic and a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Group
from rich.text import Text

from operando.doctor.findings import Finding, Row, series
from operando.doctor.rules_death import (
    broken,
    entropy_explodes,
    entropy_gone,
    got_worse,
    kl_exploding,
    no_reward,
    no_update,
    not_finite,
    sampler_gap,
)
from operando.doctor.rules_policy import collapse, entropy_eta, positional_kl, truncation
from operando.doctor.rules_reward import fall_of, over_limit, reward_hack, reward_up_eval_flat
from operando.doctor.rules_update import (
    clip_bound,
    kl_strangled,
    no_learning,
    no_signal,
    ratio_clipped,
)
from operando.errors import UserError
from operando.recipe.run import Recipe
from operando.run import write_json
from operando.run_folder import read_recipe, read_rows


class Rule(NamedTuple):
    """A rule's name, what it says where it is silent, and the metrics that it can't do without."""

    name: str
    healthy: str
    needs: tuple[str, ...]


RULES = (
    Rule("not_finite", "every loss, gradient and log-prob is a number", ("grad_norm",)),
    Rule("no_reward", "the reward applies", ("reward",)),
    Rule("no_update", "gradients and steps are not zero", ("grad_norm", "reward_std")),
    Rule("reward_hack", "no reward rises while the truth falls", ("eval/correct",)),
    Rule("got_worse", "the run has not got worse", ("reward",)),
    Rule("collapse", "variety and accuracy do not go together", ("eval/correct", "entropy")),
    Rule("no_signal", "siblings are rewarded differently", ("frac_reward_zero_std",)),
    Rule("no_learning", "the steps are large enough", ("grad_norm", "reward_std")),
    Rule("kl_exploding", "the policy is near its reference", ("kl",)),
    Rule("entropy_explodes", "the policy is no noise", ("entropy",)),
    Rule("entropy_gone", "the policy has a choice of words", ("entropy",)),
    Rule("sampler_gap", "sampling and training are one model", ("sampler/gap_mean", "sampler/ess")),
    Rule("kl_strangled", "the KL term leaves room", ("kl", "completions/mean_length")),
    Rule("clip_bound", "the gradient clip does not set the steps", ("grad_norm",)),
    Rule("ratio_clipped", "few ratios are clipped", ("clip_ratio/low", "clip_ratio/high")),
    Rule("reward_up_eval_flat", "reward and held-out accuracy go together", ("eval/correct",)),
    Rule("over_limit", "features stay in the range of honest answers", ("*/over_limit",)),
    Rule("entropy_eta", "entropy does not run out", ("entropy",)),
    Rule("positional_kl", "the KL is spread over the completions", ("kl/q1", "kl/q4")),
    Rule("truncation", "few completions are cut", ("completions/clipped_ratio",)),
)


EVERY = tuple(rule.name for rule in RULES)
BAD_START = 0.5  # share of the first step's groups or completions


@dataclass(frozen=True)
class Diagnosis:
    """What a run was checked for, what was found, and what its metrics do not allow to check."""

    run: str
    steps: int
    findings: Sequence[Finding]
    checked: Mapping[str, str]
    unchecked: Mapping[str, str]
    file: Path


def diagnose(rows: Sequence[Row], recipe: Recipe) -> list[Finding]:
    """Return what is wrong with a run, worst first; a healthy run has no finding."""
    fall = fall_of(rows)
    hack = reward_hack(rows, recipe, fall)
    collapsed = collapse(rows, recipe, fall, hacked=hack is not None)
    found = [
        not_finite(rows),
        no_reward(rows),
        no_update(rows),
        hack,
        collapsed,
        got_worse(rows, recipe, fall, told=hack is not None or collapsed is not None),
        kl_exploding(rows, recipe),
        entropy_explodes(rows, recipe),
        entropy_gone(rows, recipe),
        sampler_gap(rows),
        no_signal(rows),
        no_learning(rows, recipe),
        kl_strangled(rows, recipe),
        clip_bound(rows, recipe),
        ratio_clipped(rows, recipe),
        reward_up_eval_flat(rows, fall),
        over_limit(rows),
        entropy_eta(rows, recipe),
        positional_kl(rows),
        truncation(rows, recipe),
    ]
    return _roots(rows, [finding for finding in found if finding is not None])


CONSEQUENCES = {
    "not_finite": {*EVERY} - {"no_reward"},
    "no_reward": {*EVERY},
    "no_update": {*EVERY},
    "reward_hack": {"kl_exploding", "entropy_gone", "entropy_eta", "positional_kl", "no_signal"},
    "sampler_gap": {"ratio_clipped"},
    **dict.fromkeys(
        ("collapse", "got_worse", "kl_exploding", "entropy_explodes", "entropy_gone"),
        {
            "no_learning",
            "positional_kl",
            "entropy_eta",
            "clip_bound",
            "ratio_clipped",
            "reward_up_eval_flat",
        },
    ),
}
DEATHS = {
    "reward_hack",
    "collapse",
    "got_worse",
    "kl_exploding",
    "entropy_explodes",
    "entropy_gone",
}


def _roots(rows: Sequence[Row], findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that are not mere consequences of others, whose remedies would mislead.

    Groups rewarded alike and cut completions are consequences of a death that came before them.
    """
    names = {finding.name for finding in findings}
    gone = {name for cause in names for name in CONSEQUENCES.get(cause, ()) if name != cause}
    if "collapse" in names:
        gone |= {"entropy_gone"}
    if any(f.name == "truncation" and f.severity == "error" for f in findings):
        gone |= {"no_signal", "no_learning"}  # what never ends is never right
    if names & DEATHS:
        later = {"no_signal": "frac_reward_zero_std", "truncation": "completions/clipped_ratio"}
        gone |= {name for name, key in later.items() if _began_well(rows, key)}
    return [finding for finding in findings if finding.name not in gone]


def _began_well(rows: Sequence[Row], key: str) -> bool:
    values = [p.value for p in series(rows, key)]
    return bool(values) and values[0] < BAD_START


def shown_live(rows: Sequence[Row], recipe: Recipe) -> set[str]:
    """Return the names of what was found at any evaluation so far: what training has shown."""
    evals = [at for at, row in enumerate(rows) if "eval/correct" in row]
    return {f.name for at in evals for f in diagnose(rows[: at + 1], recipe)}


def examine(folder: Path) -> Diagnosis:
    """Diagnose a run folder, finished or not, and write audits/doctor.json."""
    recipe, rows = read_recipe(folder), read_rows(folder)
    stop = broken_step(folder, rows)
    if not rows and stop is None:
        raise UserError(f"{folder} has no metrics yet: its first step is not finished")
    keys = {key for row in rows for key in row}
    last = last_step(rows)
    missing = {
        rule.name: ", ".join(lacking)
        for rule in RULES
        if (lacking := [need for need in rule.needs if not _measured(need, keys)])
    }
    diagnosis = Diagnosis(
        run=folder.name,
        steps=last,
        findings=diagnose_folder(folder, rows, recipe),
        checked={rule.name: rule.healthy for rule in RULES if rule.name not in missing},
        unchecked=missing,
        file=folder / "audits" / "doctor.json",
    )
    write_json(diagnosis.file, {"format": 1, **asdict(diagnosis), "file": str(diagnosis.file)})
    return diagnosis


def last_step(rows: Sequence[Row]) -> int:
    """Return the last step that was measured; 0 of no rows."""
    return int(rows[-1]["step"] or 0) if rows else 0


def diagnose_folder(folder: Path, rows: Sequence[Row], recipe: Recipe) -> list[Finding]:
    """Return what is wrong with the run of a folder: a step at which it broke comes first."""
    stop = broken_step(folder, rows)
    found = diagnose(rows, recipe)
    return found if stop is None else [stop, *(f for f in found if f.name != stop.name)]


def broken_step(folder: Path, rows: Sequence[Row]) -> Finding | None:
    """Return the finding of a run that stopped before a step that was not finite, or None.

    A batch that was dumped before steps that have been trained since is history.
    """
    files = {int(f.stem.rpartition("_")[2]): f for f in folder.glob("broken_step_*.pt")}
    step = max(files, default=0)
    return broken(step, files[step].name) if step > last_step(rows) else None


def _measured(need: str, keys: set[str]) -> bool:
    return any(key.endswith(need[1:]) for key in keys) if need[0] == "*" else need in keys


def show_diagnosis(diagnosis: Diagnosis) -> Group:
    """Return the findings, or what was checked and found well, as the terminal shows them."""
    lines = [line for finding in diagnosis.findings for line in show_finding(finding)]
    if not lines:
        lines.append(Text(f"nothing found in {diagnosis.steps} steps of {diagnosis.run}. Checked:"))
        lines += [Text(f"  {name}: {words}") for name, words in diagnosis.checked.items()]
    lines += [
        Text(f"  not checked: {name} (no {what} in metrics.jsonl)", style="dim")
        for name, what in diagnosis.unchecked.items()
    ]
    return Group(*lines)


def show_finding(finding: Finding) -> list[Text]:
    """Return a finding in two lines: what is wrong, and what to do."""
    return [
        Text(f"{finding.severity}: {finding.name}: {finding.sentence}", style="bold"),
        Text(f"  remedy: {finding.remedy}"),
    ]
