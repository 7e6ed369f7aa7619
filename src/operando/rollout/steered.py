"""A sampler whose model is steered while training samples are drawn, and never in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from operando.models.prefix import Prefix
from operando.models.steering import Switch
from operando.rollout.sampler import Sampled, Sampler, Sampling


class SteeredSampler:
    """A sampler with the intervention on where it draws at random, off where it is greedy.

    Training draws from streams of uniforms; held-out answers are greedy.

    Example: SteeredSampler(sampler, switch).sample(prompts, 8, sampling, uniforms_BT)
    """

    def __init__(self, inner: Sampler, switch: Switch) -> None:
        self.inner, self.switch, self.name = inner, switch, inner.name

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        uniforms_BT: Float[Tensor, "B T"] | None,
        prefix: Prefix | None = None,
    ) -> list[Sampled]:
        """Return `group_size` completions of each prompt, siblings adjacent."""
        with self.switch.set(uniforms_BT is not None):
            return self.inner.sample(prompts, group_size, sampling, uniforms_BT, prefix)
