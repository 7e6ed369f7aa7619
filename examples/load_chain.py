"""Compare a chain of SAEs with its null arm: how far the features turned, with RL and without.

operando train demo name=first
operando sae train runs/first --layers 4
python examples/load_chain.py runs/first blocks.4.hook_resid_post
"""

import sys

import torch

from operando import load_chain

run, site = sys.argv[1:]
real, null = load_chain(run, site, "real"), load_chain(run, site, "null")
first = real[0].W_dec_MD


def turned(now_MD: torch.Tensor) -> float:
    """Return 1 - the mean cosine of each feature's decoder row with where it began."""
    return 1 - float(torch.cosine_similarity(first, now_MD, dim=1).mean())


for step in real:
    print(f"step {step}  with RL {turned(real[step].W_dec_MD):.4f}  ", end="")
    print(f"without {turned(null[step].W_dec_MD):.4f}")
