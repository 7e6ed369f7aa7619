"""Files from outside, damaged at random: a clear error or a load, never a traceback or much memory.

python -m tests.storm.loaders --seconds 180     each of GGUF, safetensors, .pt, parquet, cfg.json
python -m tests.storm.loaders --only parquet --seed 3     one of them, with other damage
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from operando.errors import UserError
from operando.launch import quieten_libraries
from operando.models.gguf import import_gguf
from operando.sae.files import read_safetensors, read_torch
from operando.sae.formats import load_sae, save_sae
from operando.sae.sae import SAE
from operando.tasks.files import read_rows
from tests.unit.test_gguf import tiny_llama, write_gguf

SPARE = 4 << 30  # bytes that a damaged file may make a loader map beyond what is mapped before
NUMBERS = (b"\xff" * 8, b"\x00" * 8, (1 << 62).to_bytes(8, "little"))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, or a number blown up; sometimes a cut."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(len(out), 4096) if rng.random() < 0.7 else len(out)))
        match rng.randrange(5):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                out[at : at + 8] = rng.choice(NUMBERS)
            case 2:
                del out[at : at + rng.randrange(1, 64)]
            case 3:
                out[at:at] = out[at : at + rng.randrange(1, 64)]
            case _:
                out = out[: rng.randrange(len(out) + 1)]
        out = out or bytearray(b"x")
    return bytes(out)


def cases(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """A good file of each kind, and what reads it."""
    weights = folder / "a.gguf"
    write_gguf(weights, tiny_llama(0))
    tensors, pickled, table = folder / "a.safetensors", folder / "a.pt", folder / "a.parquet"
    save_file({"a": torch.randn(8, 8), "b": torch.randn(3)}, tensors)
    torch.save({"a": torch.randn(8, 8), "k": 3}, pickled)
    pq.write_table(pa.table({"question": ["a", "b"] * 50, "answer": ["1", "2"] * 50}), table)
    sae = folder / "sae"
    w_MD, zero_D = torch.randn(16, 8), torch.zeros(8)
    save_sae(SAE(w_MD, torch.zeros(16), w_MD.clone(), zero_D, zero_D.clone(), "topk", 4), sae)
    return {
        "gguf": (weights, lambda file: shutil.rmtree(import_gguf(file, "damaged"))),
        "safetensors": (tensors, read_safetensors),
        "pt": (pickled, read_torch),
        "parquet": (table, lambda file: list(read_rows(file))),
        "cfg.json": (sae / "cfg.json", lambda file: load_sae(file.parent)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name holds this text")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    quieten_libraries()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["OPERANDO_HOME"] = name
        for kind, (file, read) in cases(Path(name)).items():
            if given.only not in kind:
                continue
            good, rng = file.read_bytes(), random.Random(f"{given.seed}/{kind}")
            read(file)  # whole, it is read
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + SPARE, resource.RLIM_INFINITY))
            until, tried, refused, loaded = time.monotonic() + given.seconds, 0, 0, 0
            while time.monotonic() < until:
                tried += 1
                file.write_bytes(damaged(good, rng))
                try:
                    read(file)
                    loaded += 1
                except UserError:
                    refused += 1
                except BaseException as error:  # what a user would see as a traceback
                    faults += 1
                    kept = Path(f"{kind.replace('.', '_')}-{given.seed}-{tried}")
                    shutil.copy(file, kept)
                    say(f"{kind}, try {tried}: {error!r:.200}; kept as {kept}")
                    if faults > 20 or isinstance(error, KeyboardInterrupt):
                        raise
            file.write_bytes(good)
            say(f"{kind:12} {tried:6} tried, {refused} refused, {loaded} read all the same")
    say(f"{faults} faults")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
