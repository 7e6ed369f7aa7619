"""Writes docs/parity.md: every comparison with TRL and verl, and the largest difference found.

Run with the interop environment: python tests/interop/parity_table.py
"""

import logging
from importlib.metadata import version
from pathlib import Path

import trl_cases
import verl_cases
from parity import SEEDS, TOLERANCE, max_difference

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
HEAD = f"""# Parity with TRL and verl

Written by `tests/interop/parity_table.py`; `make interop` fails if a row exceeds {TOLERANCE:g}.
Each row: {len(SEEDS)} batches of random float32 tensors (12 rollouts in groups of 4, up to 7
tokens), log-ratios of standard deviation 0.5 so that every clip is reached. "max diff" is the
largest absolute difference of any element, over values and, where named, gradients.

- own function: the peer's function is called.
- own lines: the peer's unchanged statements, cut out of a longer method, are run.
- formula: the peer's expression is written again in the comparison.

torch {version("torch")}, {trl_cases.PEER}, {verl_cases.PEER}.

| quantity | ours | peer | how | max diff |
|---|---|---|---|---|
"""
TAIL = """
## Where we differ on purpose

- Log-ratios are clamped to +-20 (as verl; TRL does not). verl also clamps the value of k3 to 10 and
  the GSPO log-ratio to 10; these tensors reach neither.
- Rows without a real token do not count in any normaliser (as verl). TRL's `dr_grpo` and `grpo`
  divide by all rows; these tensors have no empty row where TRL is compared.
- TRL's `bnpo` normalises within each micro-batch; ours is the same only if there is one.
- A group of one: verl's advantage is the return itself (GRPO); ours is an error.
- GSPO: TRL differentiates through the mean over the sequence, ours is GSPO-token (as verl). Both
  have the same value and gradient if the advantage is constant per rollout, as compared above.
- TRL's bias-corrected KL uses the sequence ratio at sequence level; ours is always per token.
- CISPO: verl has a lower bound too; ours, as the paper's experiments, has none.
"""


def main() -> None:
    lines = []
    for module in (trl_cases, verl_cases):
        for case in module.CASES:
            difference = max_difference(case)
            peer = f"{module.PEER}: `{case.peer}`"
            lines.append(
                f"| {case.quantity} | `{case.ours}` | {peer} | {case.how} | {difference:.1e} |"
            )
            logging.info(lines[-1])
    DOCUMENT.write_text(HEAD + "\n".join(lines) + "\n" + TAIL)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
