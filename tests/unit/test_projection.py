"""Projection: signs on a toy whose answer is known, exact zeros after real steps, and controls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from operando.errors import UserError
from operando.models.directions import DirectionSet, denoise, unit
from operando.models.load import Loaded
from operando.models.policy import Policy, recomputed_blocks
from operando.recipe.data import LoraConfig, ModelConfig
from operando.recipe.projection import ProjectionConfig
from operando.recipe.update import OptimConfig
from operando.run import SeedTree
from operando.update import projection as pj
from operando.update.optim import apply_update
from operando.update.projection import Factors, Outer
from operando.update.projector import Projector
from tests.unit.tiny import byte_tokenizer, tiny_model

WIDTH = 32  # of the tiny models
Refresh = Callable[[], DirectionSet]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_policy(lora: bool = True, targets: tuple[str, ...] = ("o_proj", "down_proj")) -> Policy:
    adapter = LoraConfig(rank=4, alpha=8, targets=targets) if lora else None
    config = ModelConfig(layers="1-2", lora=adapter)
    return Policy(Loaded(tiny_model("llama"), byte_tokenizer(), {}), config, SeedTree(0))


def directions(policy: Policy, seed: int = 1, *, inputs: bool = True) -> DirectionSet:
    """A random direction of layers 1-2 with a random reference input for every module."""
    found = {}
    for number, (name, module) in enumerate(policy.base.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lora" not in name:
            found[name.replace(".base_layer", "")] = unit(rand(module.in_features, seed=number))
    return DirectionSet(
        "real",
        "activation",
        unit(rand(WIDTH, seed=seed)),
        (1, 2),
        "last",
        "tiny",
        "",
        "float32",
        1.0,
        inputs=found if inputs else {},
    )


def make_projector(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    held: DirectionSet | None = None,
    **settings: object,
) -> Projector:
    config = ProjectionConfig.model_validate({"directions": "d.safetensors"} | settings)
    noise = torch.Generator().manual_seed(0)
    return Projector(config, policy, optimizer, held or directions(policy), folder, noise)


def adamw(policy: Policy) -> torch.optim.AdamW:
    group = {"params": list(policy.trainable().values()), "lr": 1e-2, "base_lr": 1e-2}
    return torch.optim.AdamW([group], weight_decay=0.1)


def take_steps(
    policy: Policy, optimizer: torch.optim.AdamW, projector: Projector | None, num: int
) -> dict[str, float]:
    """Train on texts of random ids; the optimum is nothing in particular."""
    metrics: dict[str, float] = {}
    for step in range(num):
        ids = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(step))
        policy.base(ids, labels=ids).loss.backward()
        taken = apply_update(
            optimizer,
            policy.trainable(),
            [],
            OptimConfig(lr=1e-2),
            1.0,
            [projector.on_gradient] if projector else [],
            [projector.on_update] if projector else [],
        )
        metrics = dict(taken.metrics)
    return metrics


def weights(policy: Policy, which: tuple[str, ...]) -> dict[str, Tensor]:
    """The whole weight of each trained module, the adapter in it."""
    found = {}
    for name, module in policy.base.named_modules():
        if name.endswith(which) and name.split(".")[2] in ("1", "2"):
            base = module.get_base_layer() if policy.config.lora else module
            change = module.get_delta_weight("default") if policy.config.lora else 0.0
            found[name] = (base.weight + change).detach().clone()
    assert len(found) == 2 * len(which), found.keys()
    return found


def along_output(policy: Policy, before: dict[str, Tensor], v_D: Tensor) -> float:
    """The largest |v^T dW| of the writers, over |dW|."""
    now = weights(policy, ("o_proj", "down_proj"))
    moves = {n: now[n] - before[n] for n in now}
    assert all(d.norm() > 1e-3 for d in moves.values())
    return max(float((v_D @ d).norm() / d.norm()) for d in moves.values())


# --- the sign -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hack_pays", [True, False])
def test_toy_grpo_pushes_along_v_where_the_hack_is_paid(hack_pays: bool) -> None:
    """One module, two answers: the hack's logit is v^T y. The gradient's sign is the opposite."""
    v_D, x_i = unit(rand(8)), unit(rand(6, seed=1))
    B_or, A_ri = torch.zeros(8, 3, requires_grad=True), rand(3, 6, seed=2).requires_grad_()
    logp_2 = torch.stack([v_D @ (2.0 * B_or @ A_ri @ x_i), torch.zeros(())]).log_softmax(0)
    adv_2 = torch.tensor([1.0, -1.0]) * (1 if hack_pays else -1)
    (-(adv_2 * logp_2).mean()).backward()
    assert B_or.grad is not None and A_ri.grad is not None
    gradient = Factors(B_or.grad, A_ri.grad)
    at = Factors(B_or.detach(), A_ri.detach())
    push = float(v_D @ pj.output_move(gradient.scaled(-1.0), at, x_i, 2.0))
    assert (push > 0) is hack_pays
    phi = pj.functional_gradient(at, Outer(v_D[:, None], x_i[None]), 2.0)
    cosine = float(gradient.dot(phi)) / (pj.norm([gradient]) * pj.norm([phi]))
    assert cosine == pytest.approx(-1.0 if hack_pays else 1.0, abs=1e-5)


@pytest.mark.parametrize("mode", ["writer", "rank1", "svd_gain", "token"])
@pytest.mark.parametrize("towards", [True, False])
@pytest.mark.parametrize("convention", ["hackward", "literal_grad"])
def test_only_the_hack_step_is_removed_and_the_literal_sign_keeps_it(
    tmp_path: Path, mode: str, towards: bool, convention: str
) -> None:
    """A loss that pays, or charges, for a module's output along v at its reference input."""
    policy = make_policy(targets=("down_proj",))
    held = directions(policy)
    optimizer = adamw(policy)
    projector = make_projector(
        policy,
        optimizer,
        tmp_path,
        held,
        mode=mode,
        gate="one_sided",
        stage="gradient",
        convention=convention,
    )
    site = projector.sites[0]
    module = policy.base.get_submodule(site.name)
    x_i = held.inputs[site.name]
    assert isinstance(site.module, torch.nn.Linear) and isinstance(module.lora_A, torch.nn.Module)
    torch.nn.init.normal_(site.module.weight, generator=torch.Generator().manual_seed(0))
    pushed_D = held.vector_D
    if mode == "svd_gain":  # pays for what the gains can do
        assert site.gain is not None
        pushed_D = unit(site.gain.left_oq @ (site.gain.right_qi @ x_i))
    y_D = site.module(module.lora_A["default"](x_i[None]))[0]
    ((-1.0 if towards else 1.0) * (pushed_D @ y_D)).backward()
    projector.on_gradient(policy.trainable())
    parameters = policy.trainable()
    step = site.factors({n: parameters[n].grad for n in site.names()}).scaled(-1.0)
    move = float(pushed_D @ pj.output_move(step, site.factors(parameters), x_i, site.scale))
    removed = projector.on_update(parameters, {n: p.detach() for n, p in parameters.items()})
    if towards is (convention == "hackward"):
        assert removed["projection/fired"] > 0 and removed["projection/removed"] > 0.05
        assert abs(move) < 1e-4 or mode == "svd_gain"
    else:
        assert removed["projection/fired"] == 0 == removed["projection/removed"]
        assert move > 0.1 if towards else move < -0.1


# --- exact zeros, and where they must not be ------------------------------------------------------


def test_no_writer_moves_along_v_after_adamw_steps_with_decay(tmp_path: Path) -> None:
    for lora in (True, False):
        found = {}
        for stage in ("update", "gradient", "none"):
            policy = make_policy(lora)
            optimizer, v_D = adamw(policy), directions(policy).vector_D
            projector = None
            if stage != "none":
                projector = make_projector(policy, optimizer, tmp_path, stage=stage)
            before = weights(policy, ("o_proj", "down_proj"))
            metrics = take_steps(policy, optimizer, projector, 12)
            found[stage] = along_output(policy, before, v_D)
            if stage == "update":
                assert metrics["projection/update_share"] < 1e-4
                assert metrics["projection/removed"] > 0.01
                assert metrics["projection/null_share"] == pytest.approx(WIDTH**-0.5, rel=0.7)
        assert found["update"] < 3e-6 < 1e-3 < found["gradient"]
        assert found["none"] > 1e-2


def test_no_reader_reads_v_after_adamw_steps(tmp_path: Path) -> None:
    targets = ("q_proj", "up_proj")
    for lora in (True, False):
        found = {}
        for stage in ("update", "gradient"):
            policy = make_policy(lora, targets)
            optimizer, v_D = adamw(policy), directions(policy).vector_D
            projector = make_projector(policy, optimizer, tmp_path, mode="reader", stage=stage)
            before = weights(policy, targets)
            take_steps(policy, optimizer, projector, 12)
            moves = [w - before[n] for n, w in weights(policy, targets).items()]
            assert all(d.norm() > 1e-3 for d in moves)
            found[stage] = max(float((d @ v_D).norm() / d.norm()) for d in moves)
        assert found["update"] < 3e-6 < 1e-3 < found["gradient"]


def test_strict_reader_begins_blind_to_v_and_changes_no_function(tmp_path: Path) -> None:
    policy = make_policy(targets=("q_proj", "up_proj"))
    projector = make_projector(policy, adamw(policy), tmp_path, preset="strict", mode="reader")
    ids = torch.arange(5, 25)[None]
    before = policy.base(ids).logits
    projector.start()
    assert torch.equal(policy.base(ids).logits, before)
    for site in projector.sites:
        right = site.factors(policy.trainable()).right
        assert right is not None and float((right @ site.v_kD.T).abs().max()) < 1e-6


def test_A_needs_nothing_while_B_has_nothing_along_v() -> None:
    v_kD = torch.linalg.qr(rand(8, 2)).Q.T.contiguous()
    step = Factors(rand(8, 3, seed=1), rand(3, 6, seed=2))
    B_or = rand(8, 3, seed=3)
    clean = Factors(B_or - v_kD.T @ (v_kD @ B_or), rand(3, 6, seed=4))
    for at in (clean, clean._replace(left=torch.zeros(8, 3))):
        out = pj.without_output(step, at, v_kD)
        assert out.right is not None and torch.equal(out.right, step.right)
    dirty = clean._replace(left=B_or)
    for at, project in ((dirty, pj.without_output), (clean, pj.without_output)):
        out = project(step, at, v_kD)
        assert out.right is not None and at.right is not None
        move_oi = (at.left + out.left) @ (at.right + out.right) - at.left @ at.right
        assert float((v_kD @ move_oi).abs().max()) < 1e-5
    assert not torch.equal(pj.without_output(step, dirty, v_kD).right, step.right)


def test_hard_takes_out_what_a_resumed_adapter_already_writes(tmp_path: Path) -> None:
    policy = make_policy()
    fresh = weights(policy, ("o_proj", "down_proj"))
    take_steps(policy, adamw(policy), None, 3)
    v_D = directions(policy).vector_D
    assert along_output(policy, fresh, v_D) > 1e-2
    optimizer = adamw(policy)
    take_steps(policy, optimizer, make_projector(policy, optimizer, tmp_path, preset="hard"), 3)
    assert along_output(policy, fresh, v_D) < 1e-6
    for name, p in policy.trainable().items():
        if "lora_B" in name:
            average = optimizer.state[p]["exp_avg"]
            assert float((v_D @ average).norm() / average.norm()) < 0.5


def test_functional_gradient_is_that_of_autograd() -> None:
    B_or, A_ri = rand(5, 2).requires_grad_(), rand(2, 4, seed=1).requires_grad_()
    D = Outer(rand(5, 3, seed=2), rand(3, 4, seed=3))
    ((D.left_oq @ D.right_qi) * (1.5 * B_or @ A_ri)).sum().backward()
    ours = pj.functional_gradient(Factors(B_or.detach(), A_ri.detach()), D, 1.5)
    torch.testing.assert_close(ours.left, B_or.grad)
    torch.testing.assert_close(ours.right, A_ri.grad)


def test_a_flat_functional_leaves_the_modules_their_cancelling_parts() -> None:
    """Two modules push +2 and -1: as one scalar the push is 1, and only that is taken out."""
    gradients = {name: Factors(torch.tensor([[1.0, 0.0]])) for name in "ab"}
    steps = {"a": Factors(torch.tensor([[2.0, 7.0]])), "b": Factors(torch.tensor([[-1.0, 5.0]]))}
    after = pj.without_functional(steps, gradients)
    assert after["a"].left.tolist() == [[1.5, 7.0]] and after["b"].left.tolist() == [[-1.5, 5.0]]
    twice = pj.without_functional(steps, gradients, 2.0)
    assert twice["a"].left.tolist() == [[1.0, 7.0]]  # the whole push is now -1


def test_token_gradients_lose_only_the_pull_towards_v() -> None:
    """A slow loop as second opinion; v is the first axis."""
    v_kD, delta_ND = torch.eye(4)[:1], rand(5, 4)
    taken_Nk = pj.token_gradient(delta_ND, v_kD, "hackward")
    for delta_D, taken in zip(delta_ND, taken_Nk[:, 0], strict=True):
        assert float(taken) == min(0.0, float(delta_D[0]))
    literal = pj.token_gradient(delta_ND, v_kD, "literal_grad")
    torch.testing.assert_close(taken_Nk + literal, pj.token_gradient(delta_ND, v_kD, "both"))


def test_token_mode_is_the_same_in_parts_and_under_checkpointing(tmp_path: Path) -> None:
    grads = []
    for split, checkpointing in ((False, False), (True, False), (False, True)):
        policy = make_policy(targets=("down_proj",))
        settings = {"mode": "token", "gate": "one_sided", "stage": "gradient"}
        projector = make_projector(policy, adamw(policy), tmp_path, **settings)
        for site in projector.sites:
            assert isinstance(site.module, torch.nn.Linear)
            torch.nn.init.normal_(site.module.weight, generator=torch.Generator().manual_seed(0))
        if checkpointing:
            recomputed_blocks(policy.base)
            policy.base.train()
        ids = torch.randint(2, 258, (4, 12), generator=torch.Generator().manual_seed(1))
        for part in ids.split(2 if split else 4):
            logits = policy.base(part, use_cache=False).logits
            logits.logsumexp(-1).sum().backward()
        metrics = projector.on_gradient(policy.trainable())
        metrics |= projector.on_update(policy.trainable(), policy.trainable())
        assert 0.2 < metrics["projection/fired"] < 0.8
        grads.append([p.grad.clone() for p in policy.trainable().values() if p.grad is not None])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-3)


# --- gates, magnitude, refresh --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["writer", "rank1", "svd_gain", "token"])
def test_measure_leaves_every_bit(tmp_path: Path, mode: str) -> None:
    ends = []
    for measured in (True, False):
        policy = make_policy()
        optimizer = adamw(policy)
        stage = "gradient" if mode == "token" else "update"
        settings = {"mode": mode, "gate": "measure", "stage": stage}
        projector = make_projector(policy, optimizer, tmp_path, **settings) if measured else None
        metrics = take_steps(policy, optimizer, projector, 4)
        if measured:
            assert metrics["projection/removed"] == 0.0
            assert 0 <= metrics["projection/fired"] <= 1
            assert abs(metrics["projection/update_cos"]) < 1
        ends.append({n: p.detach().clone() for n, p in policy.trainable().items()})
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_reverse_turns_the_component_round(tmp_path: Path) -> None:
    moves = {}
    for gate in ("measure", "reverse"):
        policy = make_policy(lora=False)
        optimizer, v_D = adamw(policy), directions(policy).vector_D
        before = weights(policy, ("o_proj",))
        take_steps(policy, optimizer, make_projector(policy, optimizer, tmp_path, gate=gate), 1)
        moves[gate] = {n: v_D @ (w - before[n]) for n, w in weights(policy, ("o_proj",)).items()}
    for name, moved in moves["measure"].items():
        torch.testing.assert_close(moves["reverse"][name], -moved, rtol=1e-3, atol=1e-6)


def test_a_norm_is_restored_at_most_twofold(tmp_path: Path) -> None:
    assert pj.boost(5.0, 4.0) == 1.25 and pj.boost(5.0, 0.5) == 2.0 and pj.boost(5.0, 0.0) == 1.0
    for magnitude in ("per_parameter", "global"):
        policy = make_policy()
        optimizer = adamw(policy)
        projector = make_projector(
            policy, optimizer, tmp_path, stage="gradient", magnitude=magnitude
        )
        ids = torch.arange(5, 25)[None]
        policy.base(ids, labels=ids).loss.backward()
        grads = {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}
        before = {n: float(g.norm()) for n, g in grads.items()}
        projector.on_gradient(policy.trainable())
        whole = torch.stack([g.norm() for g in grads.values()]).norm()
        assert float(whole) == pytest.approx(sum(b**2 for b in before.values()) ** 0.5, rel=1e-4)
        for name, grad in grads.items():
            if "lora_B" in name:
                v_D = projector.directions.vector_D
                assert float((v_D @ grad).abs().max()) < 1e-6
                if magnitude == "per_parameter":
                    assert float(grad.norm()) == pytest.approx(before[name], rel=1e-4)


def test_refresh_follows_its_schedule_and_is_found_again(tmp_path: Path) -> None:
    policy = make_policy()
    optimizer, made = adamw(policy), [directions(policy, seed) for seed in (2, 3)]
    queue = list(made)
    config = ProjectionConfig(directions="d", preset="strict", refresh=2)

    def projector_of(refresh: Refresh | None) -> Projector:
        noise = torch.Generator().manual_seed(0)
        return Projector(config, policy, optimizer, directions(policy), tmp_path, noise, refresh)

    projector = projector_of(lambda: queue.pop(0))
    for step in range(1, 6):
        projector.begin_step(step, save=True)
    assert queue == [] and projector.directions is made[1]
    assert projector.overlap == pytest.approx(float(made[0].vector_D @ made[1].vector_D), abs=1e-6)
    assert torch.equal(projector.sites[0].v_kD[0], made[1].vector_D)
    again = projector_of(lambda: made[1])
    again.resume(4)  # the directions of step 4 were made before step 3
    assert torch.equal(again.directions.vector_D, made[0].vector_D)
    again.resume(5)
    assert again.overlap == projector.overlap
    assert torch.equal(again.directions.vector_D, made[1].vector_D)
    with pytest.raises(UserError, match="refresh needs a way"):
        projector_of(None)


# --- SVD, on both sides ---------------------------------------------------------------------------


def test_denoising_uses_the_side_on_which_v_lies() -> None:
    """W = 3 e0 f1 + 1 e2 f0: one singular vector keeps e0 of an output, f1 of an input."""
    W_oi = torch.zeros(3, 2)
    W_oi[0, 1], W_oi[2, 0] = 3.0, 1.0
    left = denoise(torch.tensor([0.6, 0.0, 0.8]), W_oi, 1, "left")
    right = denoise(torch.tensor([0.8, 0.6]), W_oi, 1, "right")
    assert left.vector_D.abs().tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    assert right.vector_D.abs().tolist() == pytest.approx([0, 1], abs=1e-6)
    assert left.retained == pytest.approx(0.36) and right.retained == pytest.approx(0.36)
    assert left.null == pytest.approx(1 / 3) and right.null == pytest.approx(1 / 2)
    with pytest.raises(UserError, match="not on the left side"):
        denoise(torch.tensor([0.8, 0.6]), W_oi, 1, "left")


def test_a_gain_direction_moves_only_singular_values() -> None:
    W_oi, v_D, x_i = rand(5, 4), unit(rand(5, seed=1)), unit(rand(4, seed=2))
    D = pj.gain_direction(W_oi, v_D, x_i)
    U_oq, _, V_qi = torch.linalg.svd(W_oi, full_matrices=False)
    inner_qq = U_oq.T @ D.left_oq @ D.right_qi @ V_qi.T
    torch.testing.assert_close(inner_qq, inner_qq.diag().diag(), atol=1e-5, rtol=0)
    assert float(inner_qq.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float(v_D @ D.left_oq @ D.right_qi @ x_i) > 0


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"magnitude": "global"}, "magnitude restores a gradient"),
        ({"mode": "reader", "gate": "one_sided"}, "no hack-ward sign"),
        ({"mode": "token"}, "acts in the backward pass"),
        ({"convention": "literal_grad"}, "no effect"),
        ({"flat": True}, "flat is about"),
        ({"preset": "hard", "gate": "one_sided"}, "purge needs"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProjectionConfig.model_validate({"directions": "d"} | settings)


def test_presets_fill_what_the_table_leaves_open() -> None:
    seed = ProjectionConfig(directions="d", preset="projected_grpo", convention="hackward")
    assert (seed.mode, seed.gate, seed.stage, seed.flat) == ("rank1", "one_sided", "gradient", True)
    assert seed.magnitude == "per_parameter" and seed.convention == "hackward"
    assert ProjectionConfig(directions="d", preset="projected_grpo").convention == "literal_grad"
    assert ProjectionConfig(directions="d", preset="spec").mode == "svd_gain"
    strict = ProjectionConfig(directions="d", preset="strict")
    assert ProjectionConfig.model_validate(strict.model_dump()) == strict


def test_a_missing_reference_input_names_the_module(tmp_path: Path) -> None:
    policy = make_policy()
    bare = directions(policy, inputs=False)
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.o_proj has no reference"):
        make_projector(policy, adamw(policy), tmp_path, bare, gate="one_sided")
    make_projector(policy, adamw(policy), tmp_path, bare)  # two-sided needs none


def test_nothing_to_constrain_is_an_error(tmp_path: Path) -> None:
    policy = make_policy(targets=("q_proj",))
    with pytest.raises(UserError, match="no writer is trained in layers 1,2"):
        make_projector(policy, adamw(policy), tmp_path)
    policy = make_policy()
    with pytest.raises(UserError, match="no writer is trained in layers 0"):
        make_projector(policy, adamw(policy), tmp_path, layers="0")
