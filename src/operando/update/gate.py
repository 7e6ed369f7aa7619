"""What a projection takes out of a step: its mode on each module, where its gate lets it.

Every gate tests the step (minus the gradient, or the real difference), never the gradient itself,
whose sign is the opposite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from operando.recipe.projection import ProjectionConfig
from operando.update import projection as pj
from operando.update.projection import Factors, Outer
from operando.update.sites import Site, sum_direction


def times_removed(config: ProjectionConfig) -> float:
    """Return how often a step's component is taken out; twice turns it round."""
    return {"reverse": 2.0, "measure": 0.0}.get(config.gate, 1.0)


def project_step(
    config: ProjectionConfig,
    sites: Sequence[Site],
    steps: Mapping[str, Factors],
    at: Mapping[str, Factors],
) -> tuple[dict[str, Factors], float]:
    """Return the steps as the mode and the gate leave them, and the share that fired.

    `steps` and `at` (the weights that they start from) go by the sites' names; a site without a
    step is passed over, and a step that no gate touches is returned as the same object."""
    if config.mode in ("rank1", "svd_gain"):
        return _project_functional(config, sites, steps, at)
    times, after, fired, axes = times_removed(config), dict(steps), 0, 0
    for site in sites:
        if site.name not in steps:
            continue
        step, here = steps[site.name], at[site.name]
        v_kD = site.v_kD
        if config.gate == "one_sided" or (config.gate == "measure" and site.x_i is not None):
            v_kD = site.v_kD[_pushes(config, site, step, here)]
        fired, axes = fired + len(v_kD), axes + len(site.v_kD)
        if times and len(v_kD):
            without = pj.without_output if site.writes else pj.without_input
            after[site.name] = without(step, here, v_kD, times)
    return after, fired / max(1, axes)


def _pushes(config: ProjectionConfig, site: Site, step: Factors, at: Factors) -> Tensor:
    """Return along which of its directions the step pushes the module, by the convention."""
    if not site.writes:
        return torch.ones(len(site.v_kD), dtype=torch.bool, device=site.v_kD.device)
    assert site.x_i is not None, site.name
    push_k = site.v_kD @ pj.output_move(step, at, site.x_i, site.scale)
    return push_k < 0 if config.convention == "literal_grad" else push_k > 0


def _project_functional(
    config: ProjectionConfig,
    sites: Sequence[Site],
    steps: Mapping[str, Factors],
    at: Mapping[str, Factors],
) -> tuple[dict[str, Factors], float]:
    """Take the component along phi's gradient out: of each module's step, or of all as one."""
    gradients = {
        site.name: pj.functional_gradient(at[site.name], _outer(site), site.scale)
        for site in sites
        if site.name in steps
    }
    groups = [list(gradients)] if config.flat else [[name] for name in gradients]
    sign = -1.0 if config.convention == "literal_grad" else 1.0
    times, after, fired = times_removed(config), dict(steps), 0
    for names in groups:
        push = sign * sum(float(steps[n].dot(gradients[n])) for n in names)
        if push <= 0 and config.gate in ("one_sided", "measure"):
            continue
        fired += 1
        if times:
            some = {n: steps[n] for n in names}
            after |= pj.without_functional(some, {n: gradients[n] for n in names}, times)
    return after, fired / max(1, len(groups))


def _outer(site: Site) -> Outer:
    if site.gain is not None:
        return site.gain
    assert site.x_i is not None, site.name
    return Outer(sum_direction(site.v_kD)[:, None], site.x_i[None])
