"""make storm: every command killed many times, and what it leaves compared with a whole run's.

python -m tests.storm.run --seconds 900 --only "train, LoRA" --kills 24
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=700.0, help="in all")
    parser.add_argument("--kills", type=int, help="of each command; default: the command's own")
    parser.add_argument("--only", default="", help="commands whose name holds this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the folders of faults")
    given = parser.parse_args()

    from tests.storm.cases import CASES  # imports the library, for all forks; and what is lazy:
    from tests.storm.killing import storm

    importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    began, faults, total = time.monotonic(), [], 0
    scratch = Path(tempfile.mkdtemp(prefix="storm-"))
    chosen = [case for case in CASES if given.only in case.name]
    weight = sum(case.seconds for case in chosen)
    for number, case in enumerate(chosen):
        left = given.seconds - (time.monotonic() - began)
        share = left * case.seconds / weight
        weight -= case.seconds
        at = time.monotonic()
        tally = storm(case, scratch / str(number), given.kills or case.kills, share, given.seed)
        total += sum(tally.kills.values())
        faults += tally.faults
        kinds = ", ".join(f"{count} {way}" for way, count in sorted(tally.kills.items()))
        say(
            f"{case.name:18} {sum(tally.kills.values()):4} kills ({kinds}), "
            f"{tally.compared} of {tally.rounds} folders equal, "
            f"{time.monotonic() - at:.0f} s"
        )
        for line in tally.faults:
            say(f"  {line}")
    say(f"{total} kills, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    if not given.keep:
        shutil.rmtree(scratch)
    else:
        say(scratch)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
