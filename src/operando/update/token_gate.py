"""Mode "token" of a projection: the gradient of each token's output, as the backward passes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from operando.recipe.projection import ProjectionConfig
from operando.update import projection as pj
from operando.update.gate import times_removed
from operando.update.sites import Site


@dataclass
class TokenGate:
    """Projects the gradients of LoRA branches' outputs, and counts since the last `metrics`.

    Example: gate = TokenGate(config); gate.attach(site); loss.backward(); gate.metrics()
    """

    config: ProjectionConfig
    fired: float = 0.0
    tokens: int = 0
    removed: float = 0.0
    square: float = 0.0

    def attach(self, site: Site) -> None:
        """Project at this site from now on.

        The hook sees s delta, whose sign is delta's. Checkpointing recomputes the forward for its
        saved tensors only: the gradient still flows through the tensors of the first forward,
        once."""
        one_side = self.config.gate in ("one_sided", "measure")
        kept = self.config.convention if one_side else "both"
        times = times_removed(self.config)

        def backward(delta: Tensor) -> Tensor | None:
            taken_Nk = pj.token_gradient(delta, site.v_kD, kept)
            self.fired += float((taken_Nk != 0).sum())
            self.tokens += taken_Nk.numel()
            self.removed += float(taken_Nk.square().sum()) * times**2
            self.square += float(delta.float().square().sum())
            if not times:
                return None
            return (delta.float() - times * taken_Nk @ site.v_kD).to(delta.dtype)

        def forward(_module: nn.Module, _args: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(backward)

        assert site.module is not None, site.name
        site.module.register_forward_hook(forward)

    def metrics(self) -> dict[str, float]:
        """Return the share that fired and the share removed, and count anew."""
        fired = self.fired / max(1, self.tokens)
        removed = (self.removed / max(self.square, 1e-30)) ** 0.5
        self.fired, self.tokens, self.removed, self.square = 0.0, 0, 0.0, 0.0
        return {"fired": fired, "removed": removed, "boost": 1.0}
