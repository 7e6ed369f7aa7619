"""`operando demo --hack`, shortened: both runs, what is said of them, and what counts as a hack."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from operando import demo
from operando.recipe_io import load_recipe
from operando.run_folder import read_recipe

SHORT = (
    "steps=1",
    "optim.warmup_steps=0",
    "rollout.num_prompts=2",
    "rollout.num_generations=2",
    "eval.num=12",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """What is printed, and the run folders of both halves."""
    runs, out = tmp_path_factory.mktemp("runs"), StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_recipe", lambda name, more=(): load_recipe(name, (*more, *SHORT)))
        report = demo.hack_demo(Console(file=out, width=120), 3, str(runs))
    hacked, held = runs / "deep_hack", runs / "deep-strict"
    assert report.is_file() and {p.name for p in runs.iterdir()} >= {hacked.name, held.name}
    return out.getvalue(), hacked, held


def test_the_two_runs_differ_in_what_is_paid_and_in_nothing_else(
    folders: tuple[str, Path, Path],
) -> None:
    _, hacked, held = folders
    one, two = (read_recipe(folder).model_dump() for folder in (hacked, held))
    assert {key for key in one if one[key] != two[key]} == {"name", "rewards"}
    assert one["task"]["loophole"] and one["seed"] == 3
    assert two["rewards"]["correct"]["kind"] == "correct" and len(two["rewards"]) == 1


def test_one_step_is_no_hack_and_says_so(folders: tuple[str, Path, Path]) -> None:
    said, _, _ = folders
    assert said.count("No hack was learned") == 2 and "A hack was learned" not in said


@pytest.mark.parametrize(("hacks", "said"), [(6, "A hack"), (5, "No hack")])
def test_half_of_the_answers_make_a_hack(
    folders: tuple[str, Path, Path], tmp_path: Path, hacks: int, said: str
) -> None:
    """Answers written in the place of the last: `hacks` of 12 with the gold among two, 2 right, the
    others two wrong ones. The same answers before training: nothing was learned."""
    copy = tmp_path / "run"
    shutil.copytree(folders[1], copy)
    files = sorted((copy / "evals").glob("held_out_step_*.parquet"))
    rows = pq.read_table(files[-1]).to_pylist()
    for number, row in enumerate(rows):
        gold = row["answer"]
        other = f"1000 or {gold}" if number < hacks else "1000 or 1001"
        row["correct"], row["is_truncated"] = number >= 10, False
        row["completion"] = f" #### {gold if number >= 10 else other}"
    pq.write_table(pa.Table.from_pylist(rows), files[-1])

    def printed() -> str:
        out = StringIO()
        demo.show_hack(Console(file=out, width=120), copy)
        return out.getvalue()

    after = printed()
    assert f"{said} was learned: {hacks / 12:.0%} of the answers" in after
    assert "16.7%" in after, "two of twelve are right"
    shutil.copy(files[-1], files[0])
    assert "No hack was learned" in printed()
