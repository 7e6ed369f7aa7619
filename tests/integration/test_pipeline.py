"""A whole pipeline at a very small size: every stage is made once, and asked the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from operando.cli import main
from operando.errors import GateFailed, UserError
from operando.recipe.pipeline import PipelineRecipe
from operando.recursive.pipeline import Chain, load_pipeline, run_chain, stage_cells
from operando.run_folder import read_recipe

RECIPES = {
    "pretrain.toml": """
name = "p"
out = "unused"
batch_size = 8
[model]
recursive = "tiny"
min_loops = 1
vocab_size = 400
[mixture]
tokens = 8000
length = 64
[mixture.sources.graphs]
kind = "clrs"
weight = 0.5
sizes = [3]
[mixture.sources.search]
kind = "graph_search"
weight = 0.5
sizes = [3]
""",
    "sft.toml": """
name = "s"
out = "unused"
model = "unused"
num_pairs = 32
[sources.search]
kind = "graph_search"
weight = 1.0
sizes = [3]
""",
    "outcome.toml": """
name = "o"
steps = 1
[task]
kind = "graph_search"
sizes = [3]
num_train = 8
num_held_out = 4
[rollout]
num_prompts = 2
num_generations = 2
max_completion_length = 8
[rewards.correct]
kind = "correct"
[eval]
num = 4
""",
    "pipeline.toml": """
out = "chain"
pretrain = "pretrain.toml"
sft = "sft.toml"
[rl]
outcome = "outcome.toml"
[[tasks]]
kind = "graph_search"
sizes = [3]
num_held_out = 8
[[tasks]]
kind = "clrs"
sizes = [3]
num_held_out = 6
""",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in RECIPES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*overrides: str) -> tuple[PipelineRecipe, list[Chain]]:
    recipe, chains = load_pipeline("pipeline.toml", overrides)
    for chain in chains:
        run_chain(Console(quiet=True), recipe, chain)
    return recipe, chains


def test_a_pipeline_makes_every_stage_once_and_asks_all_the_same(here: Path) -> None:
    recipe, chains = run("seeds=[0,3]")
    cells = stage_cells(recipe, chains)
    assert [(c.task, c.stage, c.n) for c in cells] == [
        (task, stage, n)
        for task, n in (("graph_search", 8), ("clrs", 6))
        for stage in ("base", "sft", "outcome")
    ]
    rows = json.loads((here / "chain" / "stages.json").read_text())
    assert [row["seeds"] for row in rows] == [2] * 6
    assert rows[0]["since_last"] is None and rows[1]["since_last"] is not None
    model = read_recipe(here / "chain/seed_3/outcome").model
    assert model.id == "chain/seed_3/sft" and model.lora is None
    weights = [chain.folder / "base" / "model.safetensors" for chain in chains]
    assert weights[0].read_bytes() != weights[1].read_bytes(), "seeds differ"
    before = {file: file.stat().st_mtime_ns for file in here.rglob("*.safetensors")}
    left = here / "chain/seed_0/base/training_state.pt"
    left.write_bytes(b"what a kill after the last write left")
    run("seeds=[0,3]")
    assert not left.exists()
    assert {file: file.stat().st_mtime_ns for file in before} == before, "nothing is made twice"
    with pytest.raises(UserError, match=r"seed_0/sft was made by another recipe; changed: lr"):
        run("sft.lr=1e-3")


NEVER = 'outcome.rewards={never={kind="format",pattern="a text that no model writes"}}'


def test_a_stage_without_a_signal_stops_the_pipeline_unless_it_says_to_go_on(here: Path) -> None:
    still = (NEVER, "outcome.steps=3")
    with pytest.raises(
        GateFailed, match=r"(?s)stage outcome.*(truncation|no_signal).*100%.*remedy: .*go_on"
    ):
        run(*still)
    assert (here / "chain/seed_0/outcome/results.json").is_file()
    assert not (here / "chain/seed_0/answers.parquet").exists()
    with pytest.raises(GateFailed):
        run(*still)  # nor does the same command step over it
    run(*still, "go_on=true")
    assert (here / "chain/seed_0/answers.parquet").is_file()


def test_the_exit_code_of_a_stage_that_failed_is_3(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del here
    command = ["operando", "pipeline", "pipeline.toml", NEVER, "outcome.steps=3"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 3 and "stopped: stage outcome" in capsys.readouterr().err


def test_a_missing_source_of_a_later_stage_is_an_error_before_the_first(here: Path) -> None:
    texts = 'sft.sources.search={kind="instructions",weight=1.0,path="nowhere.jsonl"}'
    with pytest.raises(UserError, match=r"sources.search.path = 'nowhere.jsonl': no such file"):
        run(texts)
    assert not (here / "chain").exists()


def test_heads_and_audit_are_of_the_last_model(here: Path) -> None:
    heads = ("heads=graph_search", "num_fit=6", "num_choose=2", "repeats=1")
    tasks = 'tasks=[{kind="graph_search",sizes=[3],num_held_out=2}]'
    _, (chain,) = run(*heads, tasks)
    drafted = json.loads((chain.folder / "fast" / "drafting.json").read_text())
    halted = (chain.folder / "halting" / "config.json").is_file()
    assert drafted["model"]["id"].endswith("halting" if halted else "sft")
    audit = json.loads((chain.folder / "outcome" / "audits" / "pathology.json").read_text())
    assert audit["n"] == 2 and audit["task"] == "graph_search"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("oucome.steps=2", r"no stage 'oucome'\. Did you mean 'outcome'\? .*sft, outcome"),
        ("sft.seed=2", r"seed of a stage is set by the pipeline"),
        ("outcome.model.lora.rank=4", r"rl.outcome: .* trains an adapter"),
        ('heads="words"', r"heads = 'words': none of the tasks: graph_search, clrs"),
        ("seeds=[1,1]", r"seeds: one is named twice"),
        ("pretrain.mixture.sources.graphs.weight=0.6", r"must sum to 1"),
    ],
)
def test_a_pipeline_that_cannot_be_is_one_error(here: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pipeline("pipeline.toml", (override,))
    assert not (here / "chain").exists()
