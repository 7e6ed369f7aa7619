"""The runs of a study: what is planned, what was promised, and one process for each run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from operando.errors import UserError, nearest
from operando.files import read_object
from operando.recipe.run import Recipe
from operando.recipe.study import StudyRecipe
from operando.recipe_io import load_recipe, load_study_recipe, recipe_file, to_toml
from operando.run import Run, atomic_path, differences, write_json
from operando.run_folder import STARTED
from operando.tasks.base import Task
from operando.tasks.load import recipe_task

ASKED = ("task", "prompt")  # the tables that an evaluation set may change as a whole
ASKED_ROLLOUT = ("max_completion_length", "stop")
OWN_KEYS = ("name", "seed", "runs_dir")  # set by the study
POLL_SECONDS = 0.2
RAY_STOP_SECONDS = 60.0
LOST = -1000  # in the place of an exit code: the machine is gone
LOSSES = 3  # machines that a run may lose before its study gives up
# A process that the kernel ends with SIGTERM when its parent dies (PR_SET_PDEATHSIG, which execv
# keeps), so that the run saves its step. Not by preexec_fn, which may hang in a parent of threads.
ENDING_WITH_PARENT = (
    sys.executable,
    "-c",
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 15)\n"
    "os.execv(sys.argv[1], sys.argv[1:])",
)


@dataclass(frozen=True)
class Study:
    """A study with every arm's recipe resolved and every claim's names checked."""

    recipe: StudyRecipe
    arms: Mapping[str, Recipe]
    asked: Mapping[str, Recipe]  # of each evaluation set: the control arm with its overrides
    tasks: Mapping[str, Task]  # of each evaluation set
    label_names: Mapping[str, tuple[str, ...]]  # of each set's task, beside correct and truncated

    @property
    def folder(self) -> Path:
        return Path(self.recipe.runs_dir) / self.recipe.name


@dataclass(frozen=True)
class Job:
    """One run to train. Example: Job("mine-control-s0", Path("runs/mine/mine-control-s0"), ...)"""

    name: str
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.runs_dir) / self.name

    @property
    def is_done(self) -> bool:
        return (self.folder / "results.json").is_file()

    @property
    def is_started(self) -> bool:
        return (self.folder / "manifest.json").is_file()


@runtime_checkable
class Runner(Protocol):
    """Where runs are trained: `start` gives a handle, `poll` its exit code or None."""

    def start(self, command: Sequence[str], log: Path) -> object: ...

    def poll(self, handle: object) -> int | None: ...

    def stop(self, handle: object) -> None: ...


# --- the plan ------------------------------------------------------------------------------------


def load_study(name: str) -> Study:
    """Return the checked study of a file (or shipped name); nothing is trained or loaded yet."""
    recipe = load_study_recipe(name)
    beside = recipe_file(name).parent
    arms = {arm: _arm_recipe(recipe, arm, beside) for arm in recipe.arms}
    asked, tasks, label_names, problems = {}, {}, {}, []
    for set_name in recipe.evaluation.sets:
        asked[set_name] = _asked(recipe, set_name, beside)
        task = tasks[set_name] = recipe_task(asked[set_name])
        if recipe.evaluation.num > len(task.held_out):
            problems.append(
                f"evaluation.num = {recipe.evaluation.num}: the set {set_name!r} has "
                f"{len(task.held_out)} held-out problems"
            )
        first = task.held_out[0]
        label_names[set_name] = tuple(task.labels(first, "", True)) if task.labels else ()
    for metric_name, metric in recipe.metrics.items():
        known = ("correct", "truncated", *label_names[metric.set])
        if metric.label not in known:
            problems.append(
                f"metrics.{metric_name}.label: the task of the set {metric.set!r} has no label "
                f"{metric.label!r}.{nearest(metric.label, known)} Known: {', '.join(known)}"
            )
    if problems:
        raise UserError("\n".join(f"{name}: {problem}" for problem in problems))
    return Study(recipe, arms, asked, tasks, label_names)


def _arm_recipe(study: StudyRecipe, arm: str, beside: Path) -> Recipe:
    wanted = study.arms[arm]
    for override in wanted.overrides:
        key = override.partition("=")[0].strip()
        if key in OWN_KEYS:
            raise UserError(f"arms.{arm}.overrides: {key} is set by the study")
    return _load_beside(wanted.recipe, wanted.overrides, beside)


def _load_beside(name: str, overrides: tuple[str, ...], beside: Path) -> Recipe:
    file = beside / name
    return load_recipe(str(file) if file.is_file() else name, overrides)


def _asked(study: StudyRecipe, set_name: str, beside: Path) -> Recipe:
    """Return the control arm's recipe as a set asks it; other keys than its questions' may not
    change, since they would change nothing."""
    control = study.arms[study.control]
    extra = study.evaluation.sets[set_name].overrides
    plain = _load_beside(control.recipe, control.overrides, beside)
    asked = _load_beside(control.recipe, (*control.overrides, *extra), beside)
    same = {key: getattr(plain, key) for key in ASKED}
    rollout = {key: getattr(plain.rollout, key) for key in ASKED_ROLLOUT}
    same["rollout"] = asked.rollout.model_copy(update=rollout)
    other = differences(plain.model_dump(), asked.model_copy(update=same).model_dump())
    if other:
        raise UserError(
            f"evaluation.sets.{set_name}.overrides: only task, prompt, "
            f"rollout.max_completion_length and rollout.stop may differ; changed: "
            f"{'; '.join(other)}"
        )
    return asked


def plan(study: Study) -> dict[tuple[str, int], Job]:
    """Return the run of every arm and seed, named STUDY-ARM-sSEED."""
    jobs = {}
    for arm, recipe in study.arms.items():
        for seed in study.recipe.seeds:
            name = f"{study.recipe.name}-{arm}-s{seed}"
            own = {"name": name, "seed": seed, "runs_dir": str(study.folder)}
            jobs[arm, seed] = Job(name, recipe.model_copy(update=own))
    return jobs


# --- what was promised ---------------------------------------------------------------------------


def start_of_study(study: Study) -> datetime:
    """Return when a study was preregistered (UTC): the day that its chat templates print."""
    registered = json.loads(_registered(study).read_text(encoding="utf-8"))
    return datetime.strptime(registered["written"], STARTED).replace(tzinfo=UTC)


def _registered(study: Study) -> Path:
    return study.folder / "preregistration.json"


def preregister(study: Study) -> Path:
    """Write arms, evaluation, metrics and claims before the first run, or check that they are
    those that were written; seeds may have been added, which is recorded."""
    file = _registered(study)
    promised = _promised(study)
    digest = hashlib.sha256(json.dumps(promised, sort_keys=True).encode()).hexdigest()
    seeds, now = list(study.recipe.seeds), time.strftime(STARTED, time.gmtime())
    if not file.is_file():
        if any(job.is_started for job in plan(study).values()):
            raise UserError(f"{study.folder} holds runs, but no preregistration.json")
        registered = {"written": now, "sha256": digest, "seeds": seeds, "amendments": []}
        write_json(file, registered | promised)
        return file
    old = read_object(file, sha256=str, seeds=list, amendments=list)
    if old["sha256"] != digest:
        then = {key: old[key] for key in promised}
        changed = differences(then, json.loads(json.dumps(promised)))
        raise UserError(
            f"{file} was written before the first run and says otherwise; changed: "
            f"{'; '.join(changed)}. Undo the change, or start a new study with another name"
        )
    missing = sorted(set(old["seeds"]) - set(seeds))
    if missing:
        raise UserError(f"{file}: seeds may be added, but {missing} were removed")
    added = sorted(set(seeds) - set(old["seeds"]))
    if added:
        old["amendments"].append({"written": now, "seeds_added": added})
        write_json(file, old | {"seeds": seeds})
    return file


def _promised(study: Study) -> dict[str, object]:
    keys = ("name", "control", "evaluation", "metrics", "claims", "pareto")
    dump: dict[str, object] = study.recipe.model_dump(mode="json")
    arms: dict[str, object] = {
        name: recipe.model_dump(mode="json", exclude=set(OWN_KEYS))
        for name, recipe in study.arms.items()
    }
    return {**{key: dump[key] for key in keys}, "arms": arms}


# --- one process for each run --------------------------------------------------------------------


def train_jobs(
    jobs: Sequence[Job], runner: Runner, at_once: int, on_done: Callable[[Job], None]
) -> None:
    """Train what is not finished, `at_once` runs at a time; a run that fails stops them all.

    What was interrupted goes on from its last checkpoint, so the same call takes up a study. A run
    whose machine is lost goes on on another, LOSSES times at most.
    """
    for job in jobs:
        if job.is_started:
            Run.resume(job.recipe).close()  # the very same recipe, or an error that says what not
    waiting = [job for job in jobs if not job.is_done]
    running: dict[str, tuple[Job, object]] = {}
    lost: Counter[str] = Counter()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job.name] = (job, runner.start(_command(job), _log(job)))
            time.sleep(POLL_SECONDS)
            for name, (job, handle) in list(running.items()):
                code = runner.poll(handle)
                if code is None:
                    continue
                del running[name]
                if code == LOST and lost[name] < LOSSES:
                    lost[name] += 1
                    waiting.append(job)
                    continue
                if code != 0 or not job.is_done:
                    raise UserError(_failure(job, code))
                on_done(job)
    finally:
        for _, handle in running.values():
            runner.stop(handle)


def _log(job: Job) -> Path:
    return job.folder.parent / "logs" / f"{job.name}.log"


def _command(job: Job) -> list[str]:
    """Write the run's whole recipe and return the command that trains it."""
    file = job.folder.parent / "recipes" / f"{job.name}.toml"
    with atomic_path(file) as temporary:
        temporary.write_text(to_toml(job.recipe), encoding="utf-8")
    command = [sys.executable, "-m", "operando", "train", str(file)]
    return [*command, "--resume"] if job.is_started else command


def _failure(job: Job, code: int) -> str:
    text = _log(job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code == LOST:
        return f"{job.name} lost its machine {LOSSES + 1} times; the same command goes on"
    return (
        f"{job.name} stopped with exit code {code}; what is finished stays, and the same command "
        f"goes on. The end of {_log(job)}:\n" + "\n".join(f"  {line}" for line in text[-8:])
    )


def start_process(
    command: Sequence[str], log: Path, threads: int, ends_with_parent: bool = False
) -> subprocess.Popen[bytes]:
    """Start a run whose output goes to `log`; a run that is still going is an error.

    The log is locked for as long as the process that writes it lives, whoever started it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{log.stem} is still being trained by another process") from error
        stream.truncate(0)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(
            [*(ENDING_WITH_PARENT if ends_with_parent else ()), *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
        )


class LocalRunner:
    """Trains in processes of this machine. Example: LocalRunner(threads=4)"""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def start(self, command: Sequence[str], log: Path) -> object:
        return start_process(command, log, self.threads)

    def poll(self, handle: object) -> int | None:
        assert isinstance(handle, subprocess.Popen)
        return handle.poll()

    def stop(self, handle: object) -> None:
        assert isinstance(handle, subprocess.Popen)
        handle.terminate()
        handle.wait()


class RayRunner:
    """Trains as tasks of a Ray cluster that sees the same files: RAY_ADDRESS, else a local one.

    The cluster's cores and GPUs are shared out over `at_once` runs; a run stays on one node.
    """

    def __init__(self, at_once: int, num_cpus: int | None = None) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise UserError('--ray needs the extra ray: pip install "operando[ray]"') from error
        self.ray = ray
        local = "RAY_ADDRESS" not in os.environ
        ray.init(
            num_cpus=num_cpus if local else None,
            include_dashboard=False if local else None,
            log_to_driver=False,
        )
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = min(
            sum(n.get("CPU", 0) for n in nodes) / at_once, max(n.get("CPU", 0) for n in nodes)
        )
        gpus = min(1.0, sum(n.get("GPU", 0) for n in nodes) / at_once)
        self.threads = max(1, int(cores))
        self.task = ray.remote(num_cpus=self.threads, num_gpus=gpus, max_retries=0)(_train_on_node)

    def start(self, command: Sequence[str], log: Path) -> object:
        return self.task.remote(list(command), str(log.resolve()), self.threads, os.getcwd())

    def poll(self, handle: object) -> int | None:
        ready, _ = self.ray.wait([handle], timeout=0)
        if not ready:
            return None
        gone = self.ray.exceptions
        try:
            return int(self.ray.get(handle))
        except (gone.NodeDiedError, gone.WorkerCrashedError, gone.ObjectLostError):
            return LOST

    def stop(self, handle: object) -> None:
        self.ray.cancel(handle)  # KeyboardInterrupt in the task, which ends its process
        self.ray.wait([handle], timeout=RAY_STOP_SECONDS)

    def close(self) -> None:
        self.ray.shutdown()


def _train_on_node(command: list[str], log: str, threads: int, folder: str) -> int:
    os.chdir(folder)
    process = start_process(command, Path(log), threads, ends_with_parent=True)
    try:
        return process.wait()
    finally:
        process.terminate()
