"""The Projector: keeps the updates of a run off a direction, and logs what they say along it.

Its transforms plug into update/optim.py: `on_gradient` before the clip, `on_update` after the
optimizer's step. Every gate tests the step (minus the gradient, or the real difference), never the
gradient itself, whose sign is the opposite. What each mode constrains: docs/projection.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from operando.errors import UserError
from operando.models.directions import DirectionSet, load_directions, save_directions
from operando.models.freeze import layer_of
from operando.models.policy import Policy
from operando.recipe.projection import ProjectionConfig
from operando.update import projection as pj
from operando.update.projection import Factors, Outer
from operando.update.sites import Site, find_sites, sum_direction

logger = logging.getLogger(__name__)

NULLS = 8  # random unit vectors in place of v
Parameters = Mapping[str, nn.Parameter]


@dataclass
class TokenCount:
    """What mode "token" did in the backward passes since the last step."""

    fired: float = 0.0
    tokens: int = 0
    removed: float = 0.0
    square: float = 0.0


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
        self.tokens = TokenCount()
        width = policy.base.config.get_text_config().hidden_size
        noise_UD = torch.randn(NULLS, width, generator=generator)
        self.null_UD = noise_UD / noise_UD.norm(dim=1, keepdim=True)
        self.sites = find_sites(config, policy, directions, self.null_UD)
        self._before: dict[str, float] = {}
        if config.mode == "token":
            for site in self.sites:
                assert site.module is not None, site.name
                site.module.register_forward_hook(self._token_hook(site))

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
        metrics = self._measure("grad", steps, at)
        self._before = {"fired": 0.0, "removed": 0.0, "boost": 1.0}
        if self.config.mode == "token":
            self._before = self._token_metrics()
        elif self.config.stage in ("gradient", "momentum"):
            after, fired = self._project(steps, at)
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
            after, done["fired"] = self._project(steps, at)
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
        metrics = self._measure("update", steps, at) | {
            f"projection/{key}": value for key, value in done.items()
        }
        if self.config.refresh is not None:
            metrics["projection/overlap"] = self.overlap
        return metrics

    def _project(
        self, steps: Mapping[str, Factors], at: Mapping[str, Factors]
    ) -> tuple[dict[str, Factors], float]:
        """Return the steps as the mode and the gate leave them, and the share that fired.

        A step that no gate touches is returned as the same object."""
        config = self.config
        times = {"reverse": 2.0, "measure": 0.0}.get(config.gate, 1.0)
        if config.mode in ("rank1", "svd_gain"):
            return self._project_functional(steps, at, times)
        after, fired, axes = dict(steps), 0, 0
        for site in self.sites:
            if site.name not in steps:
                continue
            step, here = steps[site.name], at[site.name]
            v_kD = site.v_kD
            if config.gate == "one_sided" or (config.gate == "measure" and site.x_i is not None):
                v_kD = site.v_kD[self._pushes(site, step, here)]
            fired, axes = fired + len(v_kD), axes + len(site.v_kD)
            if times and len(v_kD):
                without = pj.without_output if site.writes else pj.without_input
                after[site.name] = without(step, here, v_kD, times)
        return after, fired / max(1, axes)

    def _pushes(self, site: Site, step: Factors, at: Factors) -> Tensor:
        """Return along which of its directions the step pushes the module, by the convention."""
        if not site.writes:
            return torch.ones(len(site.v_kD), dtype=torch.bool, device=site.v_kD.device)
        assert site.x_i is not None, site.name
        push_k = site.v_kD @ pj.output_move(step, at, site.x_i, site.scale)
        return push_k < 0 if self.config.convention == "literal_grad" else push_k > 0

    def _project_functional(
        self, steps: Mapping[str, Factors], at: Mapping[str, Factors], times: float
    ) -> tuple[dict[str, Factors], float]:
        """Take the component along phi's gradient out: of each module's step, or of all as one."""
        gradients = {
            site.name: pj.functional_gradient(at[site.name], self._outer(site), site.scale)
            for site in self.sites
            if site.name in steps
        }
        groups = [list(gradients)] if self.config.flat else [[name] for name in gradients]
        sign = -1.0 if self.config.convention == "literal_grad" else 1.0
        after, fired = dict(steps), 0
        for names in groups:
            push = sign * sum(float(steps[n].dot(gradients[n])) for n in names)
            if push <= 0 and self.config.gate in ("one_sided", "measure"):
                continue
            fired += 1
            if times:
                some = {n: steps[n] for n in names}
                after |= pj.without_functional(some, {n: gradients[n] for n in names}, times)
        return after, fired / max(1, len(groups))

    def _outer(self, site: Site) -> Outer:
        if site.gain is not None:
            return site.gain
        assert site.x_i is not None, site.name
        return Outer(sum_direction(site.v_kD)[:, None], site.x_i[None])

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
            pair = zip(site.names(), steps[site.name], after[site.name], strict=False)
            for name, old, new in pair:
                grad = parameters[name].grad
                if grad is None or old is None or new is None:
                    continue
                factor = 1.0
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
            after, _ = self._project(step, {site.name: site.factors(parameters)})
            if after[site.name] is not step[site.name]:
                for name, new in zip(site.names(), after[site.name], strict=False):
                    assert new is not None
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
        for name, tensor in zip(site.names(), value, strict=False):
            assert tensor is not None
            parameters[name].copy_(tensor)

    def _measure(
        self, who: str, steps: Mapping[str, Factors], at: Mapping[str, Factors]
    ) -> dict[str, float]:
        """Return a step's cosine with the hack-ward push and its share along v, with their nulls.

        cos = <d, grad phi> / (||d|| ||grad phi||), phi = sum_modules s v^T B A x.
        share = ||V dB|| / ||dB|| (writers), ||dA V^T|| / ||dA|| (readers).
        Null: the root mean square of the same over random unit vectors."""
        along_U, size_U = torch.zeros(NULLS + 1), torch.zeros(NULLS + 1)
        inside_U, outside, signed = torch.zeros(NULLS + 1), 0.0, True
        for site in self.sites:
            if site.name not in steps:
                continue
            step, here = steps[site.name], at[site.name]
            v_UD = torch.cat([sum_direction(site.v_kD)[None], site.null_UD])
            read = step.left if step.right is None else step.right
            side = step.left if site.writes else read.T
            square_U = (v_UD @ side).square().sum(1) * len(site.v_kD)
            square_U[0] = (site.v_kD @ side).square().sum()
            inside_U += square_U.cpu()
            outside += float(side.square().sum())
            signed = signed and site.writes and site.x_i is not None
            if signed and site.x_i is not None:
                move_o = pj.output_move(step, here, site.x_i, site.scale)
                along_U += (v_UD @ move_o).cpu()
                size_U += _push_square(here, v_UD, site.x_i, site.scale).cpu()
        share_U = (inside_U / max(outside, 1e-30)).sqrt()
        prefix = "projection/" if who == "grad" else "projection/update_"
        metrics = {
            f"projection/{who}_share": float(share_U[0]),
            f"{prefix}null_share": float(share_U[1:].square().mean().sqrt()),
        }
        if signed:
            size = max(pj.norm(list(steps.values())), 1e-30)
            cos_U = along_U / (size_U.sqrt().clamp(min=1e-30) * size)
            metrics[f"projection/{who}_cos"] = float(cos_U[0])
            metrics[f"{prefix}null_cos"] = float(cos_U[1:].square().mean().sqrt())
        return metrics

    def _token_hook(self, site: Site) -> Callable[[nn.Module, object, Tensor], None]:
        """Return a forward hook that projects the LoRA branch's output gradient, token by token.

        It sees s delta, whose sign is delta's. Checkpointing recomputes the forward for its saved
        tensors only: the gradient still flows through the tensors of the first forward, once."""
        gate = self.config.gate
        kept = self.config.convention if gate in ("one_sided", "measure") else "both"
        times = {"reverse": 2.0, "measure": 0.0}.get(gate, 1.0)

        def backward(delta: Tensor) -> Tensor | None:
            taken_Nk = pj.token_gradient(delta, site.v_kD, kept)
            count = self.tokens
            count.fired += float((taken_Nk != 0).sum())
            count.tokens += taken_Nk.numel()
            count.removed += float(taken_Nk.square().sum()) * times**2
            count.square += float(delta.float().square().sum())
            if not times:
                return None
            return (delta.float() - times * taken_Nk @ site.v_kD).to(delta.dtype)

        def forward(_module: nn.Module, _args: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(backward)

        return forward

    def _token_metrics(self) -> dict[str, float]:
        count, self.tokens = self.tokens, TokenCount()
        return {
            "fired": count.fired / max(1, count.tokens),
            "removed": (count.removed / max(count.square, 1e-30)) ** 0.5,
            "boost": 1.0,
        }

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


def _push_square(
    at: Factors, v_UD: Float[Tensor, "U D"], x_i: Float[Tensor, "i"], scale: float
) -> Float[Tensor, "U"]:
    """Return ||grad phi||^2 for each v: s^2 (|v|^2 |A x|^2 + |B^T v|^2 |x|^2), or |v|^2 |x|^2."""
    size_U = v_UD.square().sum(1)
    if at.right is None:
        return size_U * x_i.square().sum()
    inner = (at.right @ x_i).square().sum()
    return scale**2 * (size_U * inner + (v_UD @ at.left).square().sum(1) * x_i.square().sum())


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
