"""Everything that wants a GPU, in one command: the tests, then the benchmarks on real shapes.

    make gpu                                     # in an installed clone
    python benchmarks/gpu.py --out gpu.json      # where torch is there already
    python benchmarks/gpu.py --tiny              # the whole way on any machine, in tiny shapes

Each part runs in a process of its own under a limit, so that one that fails leaves the others; what
it printed last is kept. Weights are random: no model hub is needed. The exit code is the number of
parts that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def parts(device: str, tiny: bool) -> dict[str, tuple[list[str], int]]:
    """Return the command and the limit in seconds of each part."""
    half, more = ("tiny", "tiny") if tiny else ("qwen2.5-0.5b", "qwen2.5-1.5b")
    size = ["--prompts", "4", "--group", "4", "--new", "70"]
    if not tiny:
        size = ["--prompts", "64", "--group", "8", "--new", "256"]
    common = ["--device", device, "--dtype", "bfloat16"]
    rollout = [*common, *size, "--repeats", "1"]
    step = ["--prompts", "8", "--group", "8", "--new", "128", "--trl-batch", "16"]
    if tiny:
        step = ["--prompts", "2", "--group", "4", "--new", "70"]
    sae = ["--d-in", "64", "--d-sae", "256", "--k", "8", "--batch", "256"] if tiny else []
    peers = "generate" if tiny else "generate,continuous"
    return {
        "tests": (
            [
                "-m",
                "pytest",
                "tests/gpu",
                "-q",
                "-o",
                "addopts=",
                "-p",
                "no:cacheprovider",
                "--tb=short",
            ],
            120,
        ),
        "roofline": ([_script("roofline"), "--device", device], 20),
        "rollout 0.5B": ([_script("rollout"), "--shape", half, *rollout, "--peers", peers], 120),
        "rollout 1.5B": ([_script("rollout"), "--shape", more, *rollout], 90),
        "step 0.5B": ([_script("grpo_step"), "--shape", half, *common, *step, "--steps", "3"], 90),
        "sae": ([_script("sae_device"), "--device", device, *sae], 30),
    }


def _script(name: str) -> str:
    return str(HERE / f"{name}.py")


def run(command: list[str], limit: int) -> dict[str, object]:
    """Return the exit code, the seconds, the result line and the last of what a part printed."""
    started = time.perf_counter()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    part = subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE.parent,
        env=env,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    # With all its children: one of them would hold the pipe open.
    alarm = threading.Timer(limit, os.killpg, (part.pid, signal.SIGKILL))
    alarm.start()
    assert part.stdout is not None
    said = ""
    for line in part.stdout:
        said += line
        if line.startswith("# "):
            print(line, end="", flush=True)
    code = part.wait()
    alarm.cancel()
    lines = [line for line in said.splitlines() if line.startswith("RESULT ")]
    return {
        "code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "result": json.loads(lines[-1].removeprefix("RESULT ")) if lines else None,
        "said": said[-6000:],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU too")
    parser.add_argument("--only", default="", help="parts by name, comma between")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        sys.exit("no CUDA device here; --tiny runs the whole on a CPU in tiny shapes")
    found: dict[str, object] = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    failed = 0
    for name, (command, limit) in parts(device, args.tiny).items():
        if args.only and name not in args.only.split(","):
            continue
        done = run(command, 600 if args.tiny else limit)  # a small machine may be slow
        found[name] = done
        failed += done["code"] != 0
        args.out.write_text(json.dumps(found, indent=1))
        shown = done["result"] if done["code"] == 0 and done["result"] else done["said"]
        print(f"== {name}: exit code {done['code']}, {done['seconds']} s\n{shown}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
