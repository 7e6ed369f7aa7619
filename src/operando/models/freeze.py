"""The insulation certificate: what training may change, and proof of what it did change.

lf_grpo froze layers 0-23 and "verified" that frozen parameters have no gradient. That is true of
every frozen parameter by definition and would also hold with adapters in all layers. What is
checked here can fail, and each check is shown a planted leak that it must find.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from operando.models.hooks import ActivationReader
from operando.models.layers import is_apart, is_multimodal
from operando.models.policy import Policy
from operando.parallel import whole
from operando.recipe.data import LoraConfig

PROBE_LENGTH = 24  # tokens of the probe that the residual is read on


@dataclass(frozen=True)
class Check:
    """One check of a certificate. Example: Check("count", True, "640 trained, 640 expected")"""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Certificate:
    """What was checked of one checkpoint.

    `layers` are the blocks that may change; None in `first_hidden_sha256` means that nothing lies
    below them. `weights_sha256` names the checkpoint that it was made for.
    """

    step: int
    model: Mapping[str, str]
    layers: tuple[int, ...]
    num_layers: int
    trained_parameters: int
    frozen_tensors: int
    frozen_sha256: str
    weights_sha256: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, object]:
        return {"format": 1, "passed": self.passed, **asdict(self)}

    def as_text(self) -> str:
        return json.dumps(self.as_json(), indent=1) + "\n"


class Insulation:
    """Remembers the model before training and issues certificates about it afterwards.

    Example:
        insulation = Insulation(policy)          # before the first update
        insulation.watch(policy.trainable())     # at every update, as a gradient transform
        insulation.issue(step, optimizer).passed
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.start = digests(policy.model)
        self.start_hidden = first_hidden(policy)
        self.with_gradient: set[int] = set()

    def frozen(self) -> dict[str, str]:
        """Return the sha256 of every frozen tensor as it was before training."""
        trainable = self.policy.trainable()
        return {name: sha for name, sha in self.start.items() if name not in trainable}

    def watch(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Note which layers got a gradient; changes nothing (a gradient transform)."""
        for name, parameter in parameters.items():
            if parameter.grad is not None and whole(parameter.grad).any():
                layer = layer_of(name, self.policy.blocks_name)
                if layer is not None:
                    self.with_gradient.add(layer)
        return {}

    def issue(
        self, step: int, optimizer: torch.optim.Optimizer | None, weights: Mapping[str, Tensor]
    ) -> Certificate:
        """Return the certificate of the model as it stands; without an optimizer, of files alone.

        `weights` are those of the checkpoint, as Policy.save_weights gives them.
        """
        policy, now = self.policy, digests(self.policy.model)
        trainable, frozen = policy.trainable(), self.frozen()
        checks = [
            check_layers(policy),
            check_count(policy),
            check_frozen(frozen, now),
            check_hidden(self.start_hidden, first_hidden(policy)),
            self._check_changed(now),
            *self._check_sensitivity(frozen, optimizer),
        ]
        if optimizer is not None:
            checks += [check_optimizer(policy, optimizer), self._check_gradient()]
        if policy.config.lora is not None:
            checks.append(self._check_adapter_off())
        return Certificate(
            step=step,
            model=policy.identity,
            layers=policy.layers,
            num_layers=len(policy.blocks),
            trained_parameters=sum(p.numel() for p in trainable.values()),
            frozen_tensors=len(frozen),
            frozen_sha256=joint_digest(frozen),
            weights_sha256=joint_digest({name: digest(t) for name, t in weights.items()}),
            checks=tuple(checks),
        )

    def _check_changed(self, now: Mapping[str, str]) -> Check:
        """Positive control: each layer of the set holds a tensor that is not what it was."""
        policy = self.policy
        moved = {
            layer_of(name, policy.blocks_name)
            for name in policy.trainable()
            if now[name] != self.start[name]
        }
        still = [layer for layer in policy.layers if layer not in moved]
        detail = f"all of {len(policy.layers)} layers changed"
        return Check("changed", not still, f"layers {still} did not change" if still else detail)

    def _check_gradient(self) -> Check:
        """Positive control: each layer of the set got a gradient since the process began."""
        missing = [layer for layer in self.policy.layers if layer not in self.with_gradient]
        detail = f"all of {len(self.policy.layers)} layers got a gradient"
        return Check("gradient", not missing, f"layers {missing} got none" if missing else detail)

    def _check_adapter_off(self) -> Check:
        """The same residual with the adapter on and off, in this very process."""
        with self.policy.as_reference():
            off = first_hidden(self.policy)
        on = first_hidden(self.policy)
        return Check("adapter on and off", *_same_hidden(off, on))

    def _check_sensitivity(
        self, frozen: Mapping[str, str], optimizer: torch.optim.Optimizer | None
    ) -> list[Check]:
        """Negative controls: a leak is planted for each kind of check, which must find it."""
        policy = self.policy
        spots = [
            (name, p)
            for name, p in policy.model.named_parameters()
            if name in frozen and p.is_floating_point()
        ]
        if not spots:
            return [Check("planted leak", True, "nothing is frozen, so nothing can leak")]
        below = [s for s in spots if _is_below(s[0], policy)]
        name, spot = below[0] if below else spots[0]
        spot.requires_grad_(True)
        try:
            found = {"a trainable tensor outside the set": not check_layers(policy).passed}
            found["a wrong count"] = not check_count(policy).passed
            if optimizer is not None:
                group = optimizer.param_groups[0]["params"]
                group.append(spot)
                found["a tensor too many in the optimizer"] = not check_optimizer(
                    policy, optimizer
                ).passed
                group.pop()
        finally:
            spot.requires_grad_(False)
        with altered(spot):
            found["a changed frozen tensor"] = digest(whole(spot.detach())) != frozen[name]
            if below:
                changed = first_hidden(policy)
                found["a changed residual"] = not _same_hidden(self.start_hidden, changed)[0]
        restored = digest(whole(spot.detach())) == frozen[name]
        missed = [what for what, seen in found.items() if not seen]
        detail = f"not found: {missed}" if missed else f"found: {', '.join(found)} (in {name})"
        return [Check("planted leak", not missed and restored, detail)]


def layer_of(name: str, blocks_name: str) -> int | None:
    """Return the decoder block that a parameter belongs to; None outside the blocks."""
    found = re.match(rf"(?:base_model\.model\.)?{re.escape(blocks_name)}\.(\d+)\.", name)
    return int(found[1]) if found else None


def leaks(
    model: nn.Module, blocks_name: str, layers: Sequence[int], whole_model: bool
) -> list[str]:
    """Return the trainable tensors outside the layer set, under every name that they have.

    A tied weight is one tensor with several names, and one name outside the set is a leak. With
    `whole_model` (full training of all layers) norms, embeddings and head belong to the set, but
    not the heads of a recursive model that are trained apart.
    """
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and _is_outside(model, name, blocks_name, layers, whole_model)
    ]


def _is_outside(
    model: nn.Module, name: str, blocks_name: str, layers: Sequence[int], whole_model: bool
) -> bool:
    return is_apart(model, name) if whole_model else layer_of(name, blocks_name) not in layers


def expected_count(
    model: nn.Module, blocks_name: str, layers: Sequence[int], lora: LoraConfig | None
) -> int:
    """Return how many parameters the layer set trains, from the model's shapes alone.

    LoRA: sum over the set's target modules of rank * (inputs + outputs). Full training: all of the
    set's blocks; of the whole model where the set holds every layer and nothing is multimodal, but
    for a recursive model's halting and drafting heads.
    """
    blocks = model.get_submodule(blocks_name)
    assert isinstance(blocks, nn.ModuleList), blocks_name
    if lora is None:
        towers = isinstance(model, PreTrainedModel) and is_multimodal(model.config)
        everything = len(layers) == len(blocks) and not towers
        if everything:
            named = model.named_parameters()
            return sum(p.numel() for name, p in named if not is_apart(model, name))
        return sum(p.numel() for i in layers for p in blocks[i].parameters())
    total = 0
    for layer in layers:
        for name, module in blocks[layer].named_modules():
            if name.rpartition(".")[2] in lora.targets:
                shape = module.in_features, module.out_features
                assert all(isinstance(n, int) for n in shape), name
                total += lora.rank * sum(int(n) for n in shape)  # pyright: ignore[reportArgumentType]
    return total


def check_layers(policy: Policy) -> Check:
    """Every trainable tensor lies in a layer of the set."""
    found = leaks(
        policy.model, policy.blocks_name, policy.layers, whole_model=policy.trains_everything()
    )
    if found:
        return Check("layers", False, f"{len(found)} trainable outside the set: {found[:3]}")
    return Check("layers", True, f"{len(policy.trainable())} trainable tensors, all inside the set")


def check_count(policy: Policy) -> Check:
    """The number of trainable parameters is the one that the shapes give."""
    expected = expected_count(policy.base, policy.blocks_name, policy.layers, policy.config.lora)
    found = sum(p.numel() for p in policy.trainable().values())
    return Check("count", found == expected, f"{found:,} trained, {expected:,} expected")


def check_optimizer(policy: Policy, optimizer: torch.optim.Optimizer) -> Check:
    """The optimizer holds the trainable tensors and the critic's, and nothing else."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p) for p in [*policy.trainable().values(), *policy.value_parameters()]}
    extra, missing = len(held - wanted), len(wanted - held)
    outside = sum(
        id(p) in held
        and _is_outside(
            policy.model, name, policy.blocks_name, policy.layers, policy.trains_everything()
        )
        for name, p in policy.model.named_parameters()
    )
    passed = not extra and not missing and not outside
    detail = f"{len(held)} tensors, {extra} too many, {missing} missing, {outside} outside the set"
    return Check("optimizer", passed, detail)


def check_frozen(before: Mapping[str, str], now: Mapping[str, str]) -> Check:
    """Every frozen tensor has the bytes that it had."""
    changed = [name for name, sha in before.items() if now.get(name) != sha]
    if changed:
        return Check("frozen tensors", False, f"{len(changed)} changed: {changed[:3]}")
    return Check("frozen tensors", True, f"{len(before)} unchanged (sha256)")


def check_hidden(before: Float[Tensor, "S D"] | None, now: Float[Tensor, "S D"] | None) -> Check:
    """The residual that the first trained layer reads is bit-equal to the one before training."""
    return Check("residual below", *_same_hidden(before, now))


def _same_hidden(
    before: Float[Tensor, "S D"] | None, now: Float[Tensor, "S D"] | None
) -> tuple[bool, str]:
    if before is None or now is None:
        return before is now, "the set begins with layer 0: nothing lies below it"
    gap = float((before.float() - now.float()).abs().max())
    return torch.equal(before, now), f"largest difference {gap:g} on {len(before)} probe tokens"


@torch.no_grad()
def first_hidden(policy: Policy) -> Float[Tensor, "S D"] | None:
    """Return the residual at the first trained layer's input on a fixed probe; None at layer 0."""
    if not policy.layers or policy.layers[0] == 0:
        return None
    vocab = policy.base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, PROBE_LENGTH), generator=generator).to(policy.device)
    site = f"blocks.{policy.layers[0]}.hook_resid_pre"
    with ActivationReader(policy.base, [site]).reading() as acts:
        policy.base.get_decoder()(input_ids=ids, use_cache=False)
    return acts[site][0].detach().cpu()


def digests(model: nn.Module) -> dict[str, str]:
    """Return the sha256 of every parameter and buffer that a checkpoint would hold, by name."""
    found = {name: digest(whole(p.detach())) for name, p in model.named_parameters()}
    saved = model.state_dict(keep_vars=True)
    buffers = {name for name, _ in model.named_buffers()} & set(saved)
    return found | {name: digest(whole(saved[name].detach())) for name in sorted(buffers)}


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def joint_digest(shas: Mapping[str, str]) -> str:
    """Return one sha256 of many, whatever PEFT calls the tensors and in whatever order."""
    lines = sorted(f"{plain_name(name)} {sha}\n" for name, sha in shas.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def plain_name(name: str) -> str:
    """Return the name that a tensor has in the model without an adapter around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@contextmanager
def altered(parameter: nn.Parameter) -> Iterator[None]:
    """Change a tensor, visibly, for a moment."""
    kept = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.mul_(1.5).add_(0.125)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


def check_merged(policy: Policy, frozen: Mapping[str, str]) -> Check:
    """Merge the adapter: only the set's target modules may differ from the base. Last use."""
    assert isinstance(policy.model, PeftModel) and policy.config.lora is not None
    targets = policy.config.lora.targets
    merged = policy.model.merge_and_unload()
    assert isinstance(merged, nn.Module)
    plain = {plain_name(name): sha for name, sha in frozen.items()}
    changed = [name for name, sha in digests(merged).items() if plain.get(name) != sha]
    outside = [
        name
        for name in changed
        if layer_of(name, policy.blocks_name) not in policy.layers
        or name.split(".")[-2] not in targets
    ]
    passed = bool(changed) and not outside
    detail = f"{len(changed)} weights differ from the base, {len(outside)} outside the set"
    return Check("merged", passed, detail)


def _is_below(name: str, policy: Policy) -> bool:
    layer = layer_of(name, policy.blocks_name)
    return layer is not None and bool(policy.layers) and layer < policy.layers[0]
