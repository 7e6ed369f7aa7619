"""`make gpu` the whole way in tiny shapes, so that what runs on a GPU is known to run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.runs import ROOT, python


def test_every_benchmark_of_make_gpu_runs(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    parts = "roofline,rollout 0.5B,step 0.5B,sae"
    done = python(
        str(ROOT / "benchmarks/gpu.py"), "--tiny", "--only", parts, "--out", str(out), cwd=ROOT
    )
    found = json.loads(out.read_text())
    assert done.returncode == 0, done.stdout[-2000:]
    rollout, step, sae = (found[p]["result"] for p in parts.split(",")[1:])
    assert rollout["mean_length"]["operando"] > 60 and not rollout["failed"]
    assert step["operando"]["parts"]["time/sample"] > 0
    assert sae["loss_gap"] < 1e-5
