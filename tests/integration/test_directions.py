"""Directions of the starter on its hackable word problems: extracted, judged, added."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from operando.discovery.directions import Workbench, adding, extract, mean_nll, steer, validate
from operando.errors import UserError
from operando.models.directions import load_directions
from operando.recipe.run import Recipe
from tests.integration.runs import metric_rows, tiny, trained


def hackable(folder: Path, *overrides: str) -> Recipe:
    table = ("task.loophole=true", 'direction.position="mean"', "direction.num_pairs=24")
    return tiny(folder, *table, "direction.num_held_out=10", "eval.num=12", *overrides)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = hackable(tmp_path_factory.mktemp("directions"))
    extract(made)
    return made


def test_the_real_direction_orders_unseen_pairs_and_chance_does_not(recipe: Recipe) -> None:
    accuracy = validate(recipe)
    assert accuracy["real"].value == 1.0
    assert accuracy["random"].value < 1.0
    folder = Path(recipe.runs_dir) / f"{recipe.name}_directions"
    real = load_directions(folder / "real.safetensors")
    assert real.layers == (4,)
    writers = [name for name in real.inputs if name.endswith(("o_proj", "down_proj"))]
    assert len(writers) == 2 and all(float(x.norm()) > 0.999 for x in real.inputs.values())


def test_mean_inputs_are_those_of_a_plain_forward(recipe: Recipe) -> None:
    bench = Workbench(recipe)
    texts = bench.side(bench.prompts[:3], hack=True).texts
    found = bench.mean_inputs(texts)
    name = next(n for n in found if n.endswith("down_proj"))
    seen: list[torch.Tensor] = []
    module = bench.modules()[name]
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    total = torch.zeros(module.in_features)
    with torch.no_grad():
        for prompt, completion in zip(texts.prompts, texts.completions, strict=True):
            bench.policy.base(torch.tensor([[*prompt, *completion]]))
            total += seen[-1][0, len(prompt) :].sum(0)
    handle.remove()
    assert torch.allclose(found[name], total / total.norm(), atol=1e-5)


def test_adding_moves_the_residual_by_the_vector_and_goes_away(recipe: Recipe) -> None:
    bench = Workbench(recipe)
    texts = bench.side(bench.prompts[:4], hack=False).texts
    before = bench.read(texts)
    folder = Path(recipe.runs_dir) / f"{recipe.name}_directions"
    real = load_directions(folder / "real.safetensors")
    with adding(bench.policy, real, 2.0):
        moved = bench.read(texts)
    size = 2.0 * float(real.evidence["norm_4"])
    assert torch.allclose((moved - before)[:, 0], (size * real.vector_D).expand(4, -1), atol=1e-3)
    assert torch.equal(bench.read(texts), before)


def test_steering_counts_every_arm(recipe: Recipe) -> None:
    rows = steer(recipe, [1.0], 6)
    assert [row.arm for row in rows] == ["base", "real", "random", "shuffled", "off_topic"]
    assert all(row.n == 6 and set(row.labels) == {"hack", "attempted", "loose"} for row in rows)


def test_bad_recipes_are_one_clear_error_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \[direction\] table"):
        extract(tiny(tmp_path, "task.loophole=true"))
    with pytest.raises(UserError, match="has no contrastive pairs"):
        extract(tiny(tmp_path, "direction.num_pairs=24"))
    with pytest.raises(UserError, match="the training split has 50"):
        extract(hackable(tmp_path, "task.num_train=50", "direction.num_pairs=60"))
    with pytest.raises(UserError, match="there are no directions"):
        validate(hackable(tmp_path))


def test_a_gradient_direction_points_hackward(tmp_path: Path) -> None:
    made = hackable(tmp_path, "direction.source=gradient")
    extract(made)
    real = load_directions(tmp_path / f"{made.name}_directions" / "real.safetensors")
    bench = Workbench(made)
    hack, clean = (bench.side(bench.prompts[:24], hack=h).texts for h in (True, False))

    def margin() -> float:
        with torch.no_grad():
            return float(mean_nll(bench, hack) - mean_nll(bench, clean))

    before = margin()
    for name in (n for n in real.modules if n.endswith(("o_proj", "down_proj"))):
        weight = bench.modules()[name].weight
        push = 0.5 * real.modules[name][0][:, None] @ real.inputs[name][None]
        with torch.no_grad():
            weight.add_(push)
            assert margin() < before, name  # the hack side has become likelier
            weight.sub_(push)


def test_a_projected_run_extracts_its_direction_again(tmp_path: Path, recipe: Recipe) -> None:
    real = Path(recipe.runs_dir) / f"{recipe.name}_directions" / "real.safetensors"
    projected = hackable(
        tmp_path,
        "name=projected",
        f'projection.directions="{real}"',
        "projection.preset=strict",
        "projection.refresh=2",
        "steps=4",
        "optim.lr=1e-2",
        "rewards.correct.kind=loophole",
    )
    run = trained(projected)
    files = sorted(file.name for file in (run / "directions").iterdir())
    assert len(files) >= 1 and all(name.endswith(".safetensors") for name in files)
    overlaps = [row["projection/overlap"] for row in metric_rows(run)[1:]]
    assert 0.2 < min(overlaps) < 1.0 - 1e-6
    newest = load_directions(run / "directions" / files[-1])
    assert newest.model_sha256 == load_directions(real).model_sha256
    assert not torch.equal(newest.vector_D, load_directions(real).vector_D)
