"""The commands of the storm at their smallest: what each needs, and how it is taken up."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from operando.discovery.directions import extract
from operando.discovery.features import discover
from operando.launch import launch
from operando.recipe_io import to_toml
from tests.integration.runs import TINY, tiny
from tests.integration.test_feature_reward import DISCOVER
from tests.integration.test_pipeline import RECIPES
from tests.integration.test_study import STUDY
from tests.storm.killing import Case

RUNS = Path("runs")
SMALL = (
    "eval.num=4",
    "rollout.num_prompts=2",
    "rollout.num_generations=2",
    "rollout.max_completion_length=12",
    "task.num_held_out=4",
)


def training(name: str, *overrides: str, lora: bool = True) -> Case:
    """Return `train` of the tiny recipe, six steps and a checkpoint at every second."""

    def prepare() -> None:
        given = ("steps=6", *SMALL, *(o for o in overrides if "PREPARED" not in o))
        prepared = [
            o.replace("PREPARED", p) for o in overrides if "PREPARED" in o for p in (_prepared(o),)
        ]
        Path("recipe.toml").write_text(to_toml(tiny(RUNS, *given, *prepared, lora=lora)))

    def command() -> list[str]:
        begun = (RUNS / "tiny" / "manifest.json").is_file()
        return ["train", "recipe.toml", *(["--resume"] if begun else [])]

    return Case(name, prepare, command, kills=30, seconds=50)


def _prepared(override: str) -> str:
    return _features() if override.startswith("rewards.") else _direction()


def _direction() -> str:
    """Extract the directions that the projected case follows; return the path of the real one."""
    return str(extract(tiny(RUNS, "name=base", *PAIRS)).files["real"])


def _features() -> str:
    return discover(tiny(RUNS, "name=base", *FEW)).feature_set


def chains(name: str, command: list[str], trained: bool) -> Case:
    """Return a command on a finished run's SAE chains; `trained`: the chains are there before."""
    saes = [
        "sae",
        "train",
        "runs/tiny",
        "--layers",
        "4",
        "--expansion",
        "1",
        "--k",
        "4",
        "--epochs",
        "2",
        "--tokens",
        "1000",
        "--seeds",
        "2",
    ]

    def prepare() -> None:
        launch(Console(quiet=True), tiny(RUNS, "checkpoint.every=2"))
        if trained:
            from operando.drift.commands import train_run_saes

            train_run_saes(
                Console(quiet=True), RUNS / "tiny", "4", "both", 1000, 2, expansion=1, k=4, epochs=2
            )

    return Case(name, prepare, lambda: command or saes, kills=25, seconds=60)


def discovering() -> Case:
    def prepare() -> None:
        Path("recipe.toml").write_text(to_toml(tiny(RUNS, "name=base", *FEW)))

    return Case(
        "features discover",
        prepare,
        lambda: ["features", "discover", "recipe.toml"],
        code=3,
        kills=10,
        seconds=80,
    )


def pretraining() -> Case:
    def prepare() -> None:
        text = RECIPES["pretrain.toml"].replace("unused", "base")
        Path("recipe.toml").write_text(f"checkpoint_every = 3\n{text}")

    return Case("pretrain", prepare, lambda: _fit("pretrain", "base"), kills=25, seconds=50)


def finetuning() -> Case:
    def prepare() -> None:
        text = RECIPES["sft.toml"].replace('out = "unused"', 'out = "tuned"')
        text = text.replace('"unused"', '"starter"').replace("num_pairs = 32", "num_pairs = 96")
        Path("recipe.toml").write_text(f"checkpoint_every = 3\nbatch_size = 8\n{text}")

    return Case("sft", prepare, lambda: _fit("sft", "tuned"), kills=25, seconds=60)


def _fit(command: str, out: str) -> list[str]:
    begun = (Path(out) / "training_state.pt").is_file()
    return [command, "recipe.toml", *(["--resume"] if begun else [])]


def piping() -> Case:
    def prepare() -> None:
        for name, text in RECIPES.items():
            Path(name).write_text(text)

    more = [
        "pretrain.checkpoint_every=3",
        "outcome.steps=3",
        "outcome.checkpoint.every=1",
        "go_on=true",
    ]
    return Case(
        "pipeline", prepare, lambda: ["pipeline", "pipeline.toml", *more], kills=25, seconds=90
    )


def studying() -> Case:
    def prepare() -> None:
        Path("study.toml").write_text(STUDY.format(tiny=TINY))

    return Case(
        "study --jobs 2",
        prepare,
        lambda: ["study", "study.toml", "--jobs", "2"],
        code=3,
        kills=15,
        seconds=160,
        leader=True,
    )


FEW = (
    *DISCOVER,
    "discover.num_prompts=24",
    "discover.permutations=20",
    "discover.epochs=2",
    "discover.num_generations=4",
)
PAIRS = ("task.loophole=true", 'direction={position="mean",num_pairs=8,num_held_out=5}')
PPO = ("advantage.kind=gae", "update.epochs=2", "checkpoint={every=2,keep=1}")
PROJECTED = (
    *PAIRS,
    'projection.directions="PREPARED"',
    "projection.stage=momentum",
    "projection.refresh=2",
)
FEATURES = (
    'rewards.features={kind="features",file="PREPARED",ignore_gate=true}',
    "task.num_steps=[2]",
)
CASES = (
    training("train, LoRA"),
    training("train, full", lora=False),
    training("train, PPO", *PPO),
    training("train, projection", *PROJECTED),
    training("train, features", *FEATURES),
    pretraining(),
    finetuning(),
    chains("sae train", [], trained=False),
    chains("drift", ["drift", "runs/tiny"], trained=True),
    discovering(),
    piping(),
    studying(),
)
