"""The Projector: keeps the updates of a run off a direction, and logs what they say along it.

Its transforms plug into update/optim.py: `on_gradient` before the clip, `on_update` after the
optimizer's step. What is taken out of a step: update/gate.py. What each mode constrains:
docs/projection.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from operando.errors import UserError
from operando.models.directions import DirectionSet, load_directions, save_directions
from operando.models.freeze import layer_of
from operando.models.policy import Policy
from operando.recipe.projection import ProjectionConfig
from operando.update import projection as pj
from operando.update.gate import project_step
from operando.update.projection import Factors
from operando.update.projection_metrics import projection_metrics
from operando.update.sites import Site, find_sites
from operando.update.token_gate import TokenGate

logger = logging.getLogger(__name__)

NULLS = 8  # random unit vectors in place of v
Parameters = Mapping[str, nn.Parameter]


class Projector:
    """Directions at work on one policy's updates.

    `refresh` extracts the directions again from the policy as it stands.

    Example:
        projector = Projector(config, policy, optimizer, directions, folder, generator)
        apply_update(..., [projector.on_gradient], [projector.on_update])
    """

    def __init__(
        self,
        config: ProjectionConfig,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        directions: DirectionSet,
        folder: Path,
        generator: torch.Generator,
        refresh: Callable[[], DirectionSet] | None = None,
    ) -> None:
        if config.refresh is not None and refresh is None:
            raise UserError(
                "projection.refresh needs a way to extract directions from the policy, and this "
                "run has none"
            )
        self.config, self.policy, self.optimizer = config, policy, optimizer
        self.directions, self.folder, self._refresh = directions, folder, refresh
        self.overlap = 1.0
        self.token_gate = TokenGate(config)
        width = policy.base.config.get_text_config().hidden_size
        noise_UD = torch.randn(NULLS, width, generator=generator)
        self.null_UD = noise_UD / noise_UD.norm(dim=1, keepdim=True)
        self.sites = find_sites(config, policy, directions, self.null_UD)
        self._before: dict[str, float] = {}
        if config.mode == "token":
            for site in self.sites:
                self.token_gate.attach(site)

    def layers(self) -> list[int]:
        """Return the blocks whose modules are constrained."""
        found = {layer_of(site.left, self.policy.blocks_name) for site in self.sites}
        return sorted(layer for layer in found if layer is not None)

    def start(self) -> None:
        """Prepare a fresh adapter: the strict reader's A begins with A v = 0 (B is 0 still)."""
        strict = self.config.preset in ("strict", "hard") and self.config.gate != "measure"
        if self.config.mode == "reader" and strict:
            self._purge(self.policy.trainable())

    def begin_step(self, step: int, *, save: bool) -> None:
        """Extract the directions again where the schedule says so, and keep them."""
        every = self.config.refresh
        if every is None or step == 1 or (step - 1) % every:
            return
        assert self._refresh is not None
        found = self._refresh()
        self.overlap = _overlap(found, self.directions)
        self._use(found)
        if save:
            save_directions(found, self.folder / f"step_{step - 1:05d}.safetensors")
        if self.overlap < 0.2:
            logger.warning("step %d: refreshed direction has overlap %.2f", step, self.overlap)

    def resume(self, done: int) -> None:
        """Go on with the directions that were in use in step `done`."""
        steps = {
            int(f.stem.removeprefix("step_")): f for f in self.folder.glob("step_*.safetensors")
        }
        used = sorted(step for step in steps if step < done)
        before = [load_directions(steps[step]) for step in used[-2:]]
        if before:
            former = before[0] if len(before) == 2 else self.directions
            self.overlap = _overlap(before[-1], former)
            self._use(before[-1])

    def on_gradient(self, parameters: Parameters) -> dict[str, float]:
        """Project the gradient where the stage says so (a gradient transform)."""
        steps, at = {}, {}
        for site in self.sites:
            grads = [parameters[name].grad for name in site.names()]
            if any(g is not None for g in grads):
                held = {
                    n: torch.zeros_like(parameters[n]) if g is None else g
                    for n, g in zip(site.names(), grads, strict=True)
                }
                steps[site.name] = site.factors(held).scaled(-1.0)
                at[site.name] = site.factors(parameters)
        metrics = projection_metrics(self.sites, "grad", steps, at)
        self._before = {"fired": 0.0, "removed": 0.0, "boost": 1.0}
        if self.config.mode == "token":
            self._before = self.token_gate.metrics()
        elif self.config.stage in ("gradient", "momentum"):
            after, fired = project_step(self.config, self.sites, steps, at)
            size = pj.norm(list(steps.values()))
            self._before["fired"] = fired
            if self.config.gate != "measure":
                removed = pj.removed_norm(steps, after)
                self._before["removed"] = removed / max(size, 1e-12)
                self._before["boost"] = self._write_gradients(parameters, steps, after)
        if self.config.gate != "measure" and (self.config.stage == "momentum" or self.config.purge):
            self._project_momentum(parameters)
        return metrics

    def on_update(self, parameters: Parameters, before: Mapping[str, Tensor]) -> dict[str, float]:
        """Project the optimizer's difference where the stage says so (an update transform)."""
        at = {site.name: site.factors(before) for site in self.sites}
        steps = {
            site.name: site.factors(parameters).plus(at[site.name], -1.0) for site in self.sites
        }
        done = dict(self._before)
        if self.config.stage == "update":
            after, done["fired"] = project_step(self.config, self.sites, steps, at)
            if self.config.gate != "measure":
                removed = pj.removed_norm(steps, after)
                done["removed"] = removed / max(pj.norm(list(steps.values())), 1e-12)
                for site in self.sites:
                    if after[site.name] is not steps[site.name]:
                        self._write(site, parameters, at[site.name].plus(after[site.name]))
        if self.config.purge:
            self._purge(parameters)
        steps = {
            site.name: site.factors(parameters).plus(at[site.name], -1.0) for site in self.sites
        }
        metrics = projection_metrics(self.sites, "update", steps, at) | {
            f"projection/{key}": value for key, value in done.items()
        }
        if self.config.refresh is not None:
            metrics["projection/overlap"] = self.overlap
        return metrics

    def _write_gradients(
        self, parameters: Parameters, steps: Mapping[str, Factors], after: Mapping[str, Factors]
    ) -> float:
        """Write the projected steps back as gradients, restoring norms; return the largest boost"""
        boosts = [1.0]
        total = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        whole_before = sum(float(g.float().square().sum()) for g in total.values()) ** 0.5
        for site in self.sites:
            if site.name not in steps or after[site.name] is steps[site.name]:
                continue
            former = site.named(steps[site.name])
            for name, new in site.named(after[site.name]).items():
                grad, old, factor = parameters[name].grad, former[name], 1.0
                if grad is None:
                    continue
                if self.config.magnitude == "per_parameter":
                    factor = pj.boost(float(old.norm()), float(new.norm()))
                    boosts.append(factor)
                grad.copy_(new * -factor)
        if self.config.magnitude == "global":
            left = sum(float(g.float().square().sum()) for g in total.values()) ** 0.5
            boosts.append(pj.boost(whole_before, left))
            for grad in total.values():
                grad.mul_(boosts[-1])
        return max(boosts)

    def _project_momentum(self, parameters: Parameters) -> None:
        """Project AdamW's running average as a step of its own; none is there before step 1."""
        state = self.optimizer.state
        for site in self.sites:
            held = {n: state[parameters[n]] for n in site.names() if parameters[n] in state}
            if len(held) < len(site.names()) or any("exp_avg" not in s for s in held.values()):
                continue
            average = {n: s["exp_avg"] for n, s in held.items()}
            step = {site.name: site.factors(average).scaled(-1.0)}
            at = {site.name: site.factors(parameters)}
            after, _ = project_step(self.config, [site], step, at)
            if after[site.name] is not step[site.name]:
                for name, new in site.named(after[site.name]).items():
                    average[name].copy_(-new)

    @torch.no_grad()
    def _purge(self, parameters: Parameters) -> None:
        """Take out what an adapter holds along v: B <- P B (writer), A <- A P (reader)."""
        for site in self.sites:
            here = site.factors(parameters)
            if site.writes:
                left = here.left - site.v_kD.T @ (site.v_kD @ here.left)
                self._write(site, parameters, here._replace(left=left))
            elif here.right is not None:
                right = here.right - (here.right @ site.v_kD.T) @ site.v_kD
                self._write(site, parameters, here._replace(right=right))

    @torch.no_grad()
    def _write(self, site: Site, parameters: Parameters, value: Factors) -> None:
        for name, tensor in site.named(value).items():
            parameters[name].copy_(tensor)

    def _use(self, directions: DirectionSet) -> None:
        """Put other directions in place of those in use; hooks keep their sites."""
        found = find_sites(self.config, self.policy, directions, self.null_UD)
        for site, new in zip(self.sites, found, strict=True):
            site.v_kD, site.x_i, site.gain = new.v_kD, new.x_i, new.gain
        self.directions = directions


def _overlap(one: DirectionSet, other: DirectionSet) -> float:
    """Return the cosine of two bands' vectors, rounded so that a file's alignment can't show."""
    cosine = (one.vector_D.cpu().double() * other.vector_D.cpu().double()).sum()
    return round(float(cosine), 9)


def literal_warning(config: ProjectionConfig) -> Sequence[str]:
    """Return what the manifest says about the sign of a one-sided gate."""
    if config.gate != "one_sided":
        return ()
    if config.convention == "literal_grad":
        return (
            "projection: sign literal_grad: the gate fires where the gradient points along v. With "
            "directions from activations those are the steps that lead away from hacking",
        )
    if config.preset == "projected_grpo":
        return ("projection: sign hackward: the gate fires where the update pushes along v",)
    return ()
