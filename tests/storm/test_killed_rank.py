"""Two gloo ranks of which one is killed: the other ends within a minute, and both go on bit-equal.

python -m pytest tests/storm/test_killed_rank.py
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from operando.recipe_io import to_toml
from tests.integration.runs import adapter, metric_rows, tiny

# A reward that kills its own rank where KILL says so: "rank step".
PAYS = """
import os, signal, time

def pay(completion_ids, trainer_state, **_):
    rank, step = map(int, os.environ.get("KILL", "-1 -1").split())
    if trainer_state.global_step == step and int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(sum(ids) % 5) for ids in completion_ids]
"""


def two(folder: Path, *more: str, **env: str) -> list[tuple[int, str, float]]:
    """Start both ranks without an agent, so that nobody but the ranks sees a death; return exit
    code, stderr and seconds of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    } | env
    logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("wb") as stream:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "operando", "train", "recipe.toml", *more],
                    cwd=folder,
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=stream,
                    stderr=stream,
                )
            )
    ended: dict[int, float] = {}
    until = time.monotonic() + 150
    while len(ended) < 2 and time.monotonic() < until:
        for number, process in enumerate(ranks):
            if process.poll() is not None:
                ended.setdefault(number, time.monotonic())
        time.sleep(0.05)
    for process in ranks:
        process.kill()
    first = min(ended.values(), default=until)
    return [
        (process.wait(), log.read_text(), ended.get(number, until) - first)
        for number, (process, log) in enumerate(zip(ranks, logs, strict=True))
    ]


@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_whose_other_is_killed_ends_and_both_go_on_bit_equal(
    tmp_path: Path, killed: int
) -> None:
    (tmp_path / "pays.py").write_text(PAYS)
    pays = f"rewards={{r={{kind='function',path='{tmp_path / 'pays.py'}:pay'}}}}"
    (tmp_path / "recipe.toml").write_text(to_toml(tiny(Path("runs"), pays, "eval.num=4")))
    assert [code for code, *_ in two(tmp_path)] == [0, 0]
    (tmp_path / "runs" / "tiny").rename(tmp_path / "runs" / "whole")
    ranks = two(tmp_path, KILL=f"{killed} 3")
    code, said, seconds = ranks[1 - killed]
    assert ranks[killed][0] == -signal.SIGKILL
    assert code > 0 and seconds < 60, (code, seconds, said)
    sys.stdout.write(f"rank {1 - killed} ended {seconds:.1f} s after the other: {said[-300:]}\n")
    assert [code for code, *_ in two(tmp_path, "--resume")] == [0, 0]
    whole, resumed = tmp_path / "runs" / "whole", tmp_path / "runs" / "tiny"
    assert metric_rows(resumed) == metric_rows(whole)
    left, right = adapter(resumed, 4), adapter(whole, 4)
    assert all(torch.equal(left[name], right[name]) for name in left)
