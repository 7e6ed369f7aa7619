"""A sampler whose model is steered while training samples are drawn, and never in evaluation."""

from __future__ import annotations

from operando.models.prefix import Prefix
from operando.models.steering import Switch
from operando.rollout.sampler import Request, Sampled, Sampler


class SteeredSampler:
    """A sampler with the intervention on where it draws at random, off where it is greedy.

    Training draws from streams of uniforms; held-out answers are greedy.

    Example: SteeredSampler(sampler, switch).sample(request)
    """

    def __init__(self, inner: Sampler, switch: Switch) -> None:
        self.inner, self.switch, self.name = inner, switch, inner.name

    def sample(self, request: Request, prefix: Prefix | None = None) -> list[Sampled]:
        """Return the completions of each prompt, siblings adjacent."""
        with self.switch.set(request.uniforms_BT is not None):
            return self.inner.sample(request, prefix)
