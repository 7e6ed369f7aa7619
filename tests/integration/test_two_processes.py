"""Two processes with fsdp and full parameters equal one: the tied head is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from operando.recipe_io import to_toml
from tests.integration.runs import metric_rows, python, tiny, trained

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_fsdp_trains_tied_embeddings_as_one_process_does(tmp_path: Path) -> None:
    one = trained(tiny(tmp_path, "name=one", "model.layers=all", lora=False))
    recipe = tmp_path / "two.toml"
    changed = ("name=two", "model.layers=all", "parallel.kind=fsdp")
    recipe.write_text(to_toml(tiny(tmp_path, *changed, lora=False)))
    done = python(*TORCHRUN, "-m", "operando", "train", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two"
    assert done.stdout.splitlines() == [str(two)]
    for a, b in zip(metric_rows(one), metric_rows(two), strict=True):
        assert a.keys() == b.keys()
        for key in set(a) & {"reward", "train/correct", "eval/correct"}:
            assert a[key] == b[key], (key, a["step"])
        for key in set(a) & {"loss", "grad_norm", "kl", "entropy", "update_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-7), (key, a["step"])
    final = Path("checkpoints") / "step_00004" / "model.safetensors"
    theirs, ours = load_file(two / final), load_file(one / final)
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=2e-5)
