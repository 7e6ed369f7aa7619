"""Feature rewards: values, modes, dual read, sets that do not fit, defects of mechreward."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from operando.errors import UserError
from operando.models.load import Loaded
from operando.models.policy import Policy
from operando.recipe.data import LoraConfig, ModelConfig, PromptConfig
from operando.recipe.rewards import FeatureReward
from operando.recipe.run import Recipe
from operando.rewards.base import RewardLog
from operando.rewards.internal import InternalReward, open_reward, set_score, shaped
from operando.run import SeedTree
from operando.sae.feature_set import (
    Feature,
    FeatureSet,
    Gate,
    encoder_of,
    load_feature_set,
    model_digest,
    prompt_digest,
    save_feature_set,
)
from operando.sae.formats import save_sae
from operando.sae.sae import SAE
from operando.sae.selected_features import SelectedFeatures, relu_columns
from operando.types import Batch, Dense, Rewards, make_batch
from operando.update import advantages as adv
from operando.update.checks import check_range
from operando.update.objective import compute_advantages
from tests.unit.tiny import byte_tokenizer, random_batch, tiny_model

SITE = "blocks.1.hook_resid_post"
IDENTITY = {"id": "tiny", "folder": "x", "sha256 model.safetensors": "ab"}


def make_sae(activation: str = "topk_relu", M: int = 40) -> SAE:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    k = 6 if activation.startswith("topk") else None
    threshold_M = random(M).abs() if activation in ("jumprelu", "batchtopk") else None
    return SAE(
        random(M, 32),
        random(M),
        random(M, 32),
        random(32),
        random(32),
        activation,
        k=k,
        threshold_M=threshold_M,  # pyright: ignore[reportArgumentType]
    )


def make_set(folder: Path, **changes: object) -> Path:
    sae = make_sae()
    save_sae(sae, folder / "sae")
    features = (
        Feature(3, 1, 2.0, 0.5, 0.01),
        Feature(8, 1, 1.0, 0.4, 0.02),
        Feature(20, -1, 4.0, -0.5, 0.01),
    )
    feature_set = FeatureSet(
        arm="real",
        site=SITE,
        model_id="tiny",
        model_sha256=model_digest(IDENTITY),
        prompt_sha256=prompt_digest(PromptConfig()),
        limit=0.5,
        gate=Gate(True),
        sae="sae",
        sae_sha256=sae.sha256(),
        encoder=encoder_of(sae),
        features=features,
        evidence={"auc": 0.7},
    )
    save_feature_set(replace(feature_set, **changes), folder / "feature_set.json")  # pyright: ignore[reportArgumentType]
    return folder / "feature_set.json"


def make_policy(lora: bool = True, reference: bool = True) -> Policy:
    config = ModelConfig(lora=LoraConfig(rank=4) if lora else None)
    loaded = Loaded(tiny_model("llama"), byte_tokenizer(), IDENTITY)
    return Policy(loaded, config, SeedTree(0), reference=reference)


def disturb(policy: Policy) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def paid(batch: Batch, policy: Policy, reward: InternalReward, micro_tokens: int = 4096):
    tap = reward.tap(policy, IDENTITY, PromptConfig())
    trace = policy.score(
        batch, reference=reward.config.dual, taps={"features": tap}, micro_tokens=micro_tokens
    ).trace
    log = RewardLog()
    return reward(batch.rollouts, trace, log), log, trace


def config(path: Path, **options: object) -> FeatureReward:
    return FeatureReward.model_validate({"kind": "features", "file": str(path), **options})


def test_scores_worked_by_hand(tmp_path: Path) -> None:
    feature_set = load_feature_set(make_set(tmp_path))
    acts_BTF = torch.tensor([[[1.0, 0.5, 0.0], [6.0, 0.0, 2.0]]])
    # (1/2 + .5/1) / 2 - 0/4;  (min(6/2, 1) + 0) / 2 - 2/4
    assert set_score(feature_set, acts_BTF, saturate=True).tolist() == [[0.5, 0.0]]
    assert set_score(feature_set, acts_BTF, saturate=False).tolist() == [[0.5, 1.0]]
    assert set_score(feature_set, acts_BTF, saturate=False, raw=True).tolist() == [[1.5, 4.0]]


@pytest.mark.parametrize("activation", ["topk", "topk_relu", "relu", "jumprelu", "batchtopk"])
def test_chosen_features_are_those_of_the_dense_encoding(activation: str) -> None:
    sae = make_sae(activation)
    x_ND = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    ids = (20, 3, 39)
    dense_NF = sae.encode_dense(x_ND)[:, list(ids)]
    assert torch.allclose(SelectedFeatures(sae, ids)(x_ND), dense_NF, atol=1e-5)
    if activation == "topk_relu":  # mechreward validated with top-k and trained with this
        assert not torch.allclose(relu_columns(sae, x_ND, ids), dense_NF, atol=1e-2)


@pytest.mark.parametrize("activation", ["topk", "topk_relu"])
def test_a_bfloat16_pass_decides_as_float32_does(activation: str) -> None:
    generator = torch.Generator().manual_seed(1)
    D, M = 24, 5000
    rows = [torch.randn(M, D, generator=generator) for _ in range(2)]
    zeros = [torch.zeros(n) for n in (M, D, D)]
    sae = SAE(rows[0], zeros[0], rows[1], zeros[1], zeros[2], activation, k=64)  # pyright: ignore[reportArgumentType]
    x_ND = torch.randn(400, D, generator=generator)
    ids = tuple(range(0, M, 50))  # a hundred: some lie next to the 64th largest
    read = SelectedFeatures(sae, ids)
    assert read.W_low_MD is not None
    exact_NF = sae.encode_dense(x_ND)[:, list(ids)]
    assert torch.allclose(read(x_ND), exact_NF, atol=1e-5)
    low_NM = (x_ND.bfloat16() @ read.W_low_MD.T).float()
    last_N1 = low_NM.topk(64, dim=1).values[:, -1:]
    rough_NF = exact_NF.new_zeros(exact_NF.shape).masked_fill(low_NM[:, list(ids)] >= last_N1, 1.0)
    assert not torch.equal(rough_NF > 0, exact_NF > 0)  # bfloat16 alone would not do


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_large_biases_do_not_move_a_feature_into_the_top_k(size: float) -> None:
    """Biases of like size and small differences: rounded to bfloat16 they would decide wrongly."""
    generator = torch.Generator().manual_seed(3)
    D, M, k = 24, 4096, 32
    W_MD = torch.randn(M, D, generator=generator)
    # some at the top at `size`, a few hundred thousandths apart
    b_M = torch.randn(M, generator=generator)
    b_M[:200] = size + 0.02 * torch.randn(200, generator=generator)
    zero_D = torch.zeros(D)
    sae = SAE(0.02 * W_MD, b_M, W_MD, zero_D, zero_D, "topk_relu", k=k)
    x_ND = torch.randn(600, D, generator=generator)
    ids = tuple(range(0, 400, 2))
    exact_NF = sae.encode_dense(x_ND)[:, list(ids)]
    wrong = int(((SelectedFeatures(sae, ids)(x_ND) > 0) != (exact_NF > 0)).sum())
    assert wrong == 0, f"{wrong} of {exact_NF.numel()} memberships"


def test_neither_padding_nor_micro_batches_nor_an_adapter_move_a_reward(tmp_path: Path) -> None:
    reward = open_reward("features", config(make_set(tmp_path), read="policy", mode="immediate"))
    batch = random_batch(4, 4)
    bare, with_lora = make_policy(lora=False, reference=True), make_policy()
    whole, _, _ = paid(batch, with_lora, reward)
    for values in (
        paid(batch, with_lora, reward, micro_tokens=40)[0],
        paid(batch, bare, reward)[0],
        [paid(make_batch([r], 1, pad_id=0), with_lora, reward)[0][0] for r in batch.rollouts],
        [paid(make_batch([r], 1, pad_id=1), with_lora, reward)[0][0] for r in batch.rollouts],
    ):
        for a, b in zip(whole, values, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_the_end_token_counts_where_pad_is_eos(tmp_path: Path) -> None:
    reward = open_reward("features", config(make_set(tmp_path), read="policy", mode="immediate"))
    batch = random_batch(4, 4)
    ended = replace(batch.rollouts[0], completion_ids=(*batch.rollouts[0].completion_ids, 1))
    ended = replace(ended, sampling_logp=(*ended.sampling_logp, -1.0))
    values, _, _ = paid(make_batch([ended], 1, pad_id=1), make_policy(), reward)
    assert len(values[0]) == len(ended.completion_ids)


def test_the_base_is_read_on_the_same_ids_and_does_not_move(tmp_path: Path) -> None:
    policy, batch = make_policy(), random_batch(4, 4)
    reward = open_reward("features", config(make_set(tmp_path), mode="immediate"))
    before, log, _ = paid(batch, policy, reward)
    assert log.metrics["features/gap"] == [pytest.approx(0.0, abs=1e-6)]
    disturb(policy)
    after, log, trace = paid(batch, policy, reward)
    assert log.metrics["features/gap_abs"][0] > 1e-3
    for a, b in zip(before, after, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    score_BT = {
        who: set_score(reward.feature_set, acts, saturate=True)
        for who, acts in (("p", trace.acts["features"]), ("b", trace.base_acts["features"]))
    }
    lower = config(make_set(tmp_path), read="min", mode="immediate")
    least = InternalReward("features", lower, reward.feature_set)
    values = least(batch.rollouts, trace, RewardLog())
    for b, row in enumerate(values):
        both = torch.minimum(score_BT["p"][b], score_BT["b"][b])[: len(row)]
        assert row == pytest.approx(both.tolist())


def test_modes(tmp_path: Path) -> None:
    path, policy, batch = make_set(tmp_path), make_policy(), random_batch(4, 4)
    own, _, trace = paid(batch, policy, open_reward("features", config(path, mode="immediate")))
    feature_set = load_feature_set(path)

    def values(**options: object):
        return InternalReward("features", config(path, **options), feature_set)

    once = values(mode="trajectory")(batch.rollouts, trace, RewardLog())
    assert once == pytest.approx([sum(row) / len(row) for row in own])
    change = values(mode="potential", gamma=0.9)(batch.rollouts, trace, RewardLog())
    for row in change:
        assert sum(0.9**t * f for t, f in enumerate(row)) == pytest.approx(0, abs=1e-5)
    assert values(mode="trajectory").dense() is None
    assert values(mode="to_go", gamma=0.8).dense() == Dense("to_go", 0.8)


def test_shaping_worked_by_hand() -> None:
    assert shaped([1.0, 3.0, 5.0], 0.5) == [0.5 - 0, 1.5 - 1, 0 - 3]


def make_rewards(batch: Batch, part_BT: torch.Tensor, dense: Dense, weight: float) -> Rewards:
    outcome_BT = torch.zeros_like(part_BT)
    last_B = batch.mask_BT.sum(1) - 1
    outcome_BT[torch.arange(len(batch)), last_B] = torch.tensor([1.0, 0.0] * (len(batch) // 2))
    parts = {"correct": outcome_BT, "features": part_BT}
    total_BT = outcome_BT + weight * part_BT
    return Rewards(parts, {"correct": 1.0, "features": weight}, total_BT, {"features": dense})


def recipe(**tables: object) -> Recipe:
    held = {
        "name": "x",
        "steps": 1,
        "task": {"kind": "words"},
        "rewards": {"correct": {"kind": "correct"}},
        **tables,
    }
    return Recipe.model_validate_json(json.dumps(held))


def test_lambda_acts_once_and_outside_the_outcome(tmp_path: Path) -> None:
    batch, policy = random_batch(4, 4), make_policy()
    trace = policy.score(batch).trace
    part_BT = (
        torch.randn(batch.mask_BT.shape, generator=torch.Generator().manual_seed(2)) * batch.mask_BT
    )
    outcome_BT = compute_advantages(
        recipe(), batch, make_rewards(batch, part_BT, Dense("own"), 0.0), trace
    ).adv_BT
    z_BT = adv.token_advantages(part_BT, batch.mask_BT, batch.group_size)
    for weight in (0.1, 0.4):
        both_BT = compute_advantages(
            recipe(), batch, make_rewards(batch, part_BT, Dense("own"), weight), trace
        ).adv_BT
        assert torch.allclose(both_BT, outcome_BT + weight * z_BT, atol=1e-6)
        # any scale of the features gives the same advantages
        scaled = make_rewards(batch, 50 * part_BT, Dense("own"), weight)
        assert torch.allclose(
            compute_advantages(recipe(), batch, scaled, trace).adv_BT, both_BT, atol=1e-3
        )


def test_the_published_lambda_acts_twice() -> None:
    batch, policy = random_batch(4, 4), make_policy()
    trace = policy.score(batch).trace
    part_BT = (
        torch.rand(batch.mask_BT.shape, generator=torch.Generator().manual_seed(2)) * batch.mask_BT
    )
    adv_BT = compute_advantages(
        recipe(), batch, make_rewards(batch, part_BT, Dense("mechreward"), 0.5), trace
    ).adv_BT
    G = batch.group_size
    for group in range(len(batch) // G):
        rows = range(group * G, (group + 1) * G)
        length = {b: int(batch.mask_BT[b].sum()) for b in rows}
        returns = [
            float(make_rewards(batch, part_BT, Dense("mechreward"), 0.5).parts["correct"][b].sum())
            + 0.5 * float(part_BT[b].sum()) / length[b]
            for b in rows
        ]
        width = max(int(batch.prompt_len_B[b]) + length[b] for b in rows) - 1
        padded = torch.zeros(G, width)
        for i, b in enumerate(rows):
            padded[i, : length[b]] = part_BT[b, : length[b]]
        z = (padded - padded.mean()) / (padded.std() + 1e-8)
        tensor = torch.tensor(returns)
        a = (tensor - tensor.mean()) / (tensor.std() + 1e-4)
        for i, b in enumerate(rows):
            expected = a[i] + 0.5 * z[i, : length[b]]
            assert torch.allclose(adv_BT[b, : length[b]], expected, atol=1e-4)


def test_length_is_paid_by_the_published_score_and_not_by_ours() -> None:
    # every token scores the same; one completion is four times as long
    mask_BT = torch.arange(40)[None] < torch.tensor([[10], [40]])
    part_BT = 0.58 * mask_BT.float()
    seed_BT = adv.padded_z_scores(part_BT, mask_BT, torch.tensor([30, 30]), 2)
    assert seed_BT.sum(1)[1] > 3.9 * seed_BT.sum(1)[0] > 0
    ours_BT = adv.token_advantages(part_BT, mask_BT, 2)
    assert ours_BT.abs().max() < 1e-2


def test_token_advantages_sum_to_zero_over_a_group_and_ignore_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.arange(12)[None] < torch.tensor([[3], [12], [7], [5]])
    value_BT = torch.randn(4, 12, generator=generator)
    z_BT = adv.token_advantages(value_BT, mask_BT, 2)
    dirty_BT = torch.where(mask_BT, value_BT, torch.nan)
    assert torch.equal(adv.token_advantages(dirty_BT, mask_BT, 2), z_BT)
    for group in (slice(0, 2), slice(2, 4)):
        values = value_BT[group][mask_BT[group]]
        expected = (values - values.mean()) / (values.std() + 1e-4)
        assert torch.allclose(z_BT[group][mask_BT[group]], expected, atol=1e-5)


def test_a_policy_that_games_the_features_raises_the_alarm(tmp_path: Path) -> None:
    path, batch = make_set(tmp_path), random_batch(4, 4)
    policy = make_policy(lora=False)  # the reference is a frozen copy
    reward = open_reward("features", config(path, mode="immediate"))
    _, _, trace = paid(batch, policy, reward)
    score_BT = set_score(reward.feature_set, trace.acts["features"], saturate=False) * batch.mask_BT
    mean_B = score_BT.sum(1) / batch.mask_BT.sum(1)
    honest = replace(reward.feature_set, limit=float(mean_B.quantile(0.99)))
    reward = InternalReward("features", reward.config, honest)
    before, log, _ = paid(batch, policy, reward)
    quiet = Rewards({"features": trace.logp_BT}, {}, trace.logp_BT, metrics=means(log))
    assert check_range(quiet) == []

    extra_D = 5 * make_sae().W_enc_MD[[3, 8]].sum(0)  # what both helpful features look for
    hook = policy.blocks[1].register_forward_hook(lambda _m, _a, out: out + extra_D)
    after, log, _ = paid(batch, policy, reward)
    hook.remove()
    gamed = Rewards({"features": trace.logp_BT}, {}, trace.logp_BT, metrics=means(log))
    assert "more strongly than 99 %" in check_range(gamed)[0]
    assert log.metrics["features/gap"][0] > 0.3  # the policy's read rises, the base's does not
    assert after == before  # and the base's is what is rewarded


def means(log: RewardLog) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in log.metrics.items()}


def test_a_feature_set_round_trips_bit_for_bit(tmp_path: Path) -> None:
    path = make_set(tmp_path)
    feature_set = load_feature_set(path)
    save_feature_set(feature_set, tmp_path / "again.json")
    assert load_feature_set(tmp_path / "again.json") == feature_set
    assert (tmp_path / "again.json").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ()}, "the feature set is empty"),
        ({"features": (Feature(99, 1, 1.0, 0.1, 0.1),)}, r"features \[99\] are not among .* 0-39"),
        ({"features": (Feature(3, 1, 0.0, 0.1, 0.1),)}, r"features \[3\] have no positive scale"),
        ({"sae_sha256": "f" * 64}, "is another one than it was made with"),
        ({"model_sha256": "f" * 64}, "was made on model 'tiny'"),
        ({"prompt_sha256": "f" * 64}, r"another \[prompt\]"),
        ({"site": "blocks.9.hook_resid_post"}, "the model has blocks 0-2"),
        ({"gate": Gate(False, ("AUC 0.51 is under 0.6",))}, "gate of .* is closed: AUC 0.51"),
        ({"version": 9}, "feature set version 9"),
    ],
)
def test_a_feature_set_that_does_not_fit_is_one_clear_error(
    tmp_path: Path, changes, message: str
) -> None:
    path = make_set(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        open_reward("features", config(path)).tap(make_policy(), IDENTITY, PromptConfig())


def test_a_file_that_is_no_feature_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="operando features discover"):
        load_feature_set(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"helpful_features": [1, 2]}')  # mechreward's own keys
    with pytest.raises(UserError, match="no feature set"):
        load_feature_set(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load_feature_set(tmp_path / "bad.json")


def test_a_closed_gate_can_be_opened_by_name_and_a_control_needs_no_gate(tmp_path: Path) -> None:
    closed = Gate(False, ("AUC 0.51 is under 0.6",))
    path = make_set(tmp_path, gate=closed)
    open_reward("features", config(path, ignore_gate=True)).tap(
        make_policy(), IDENTITY, PromptConfig()
    )
    path = make_set(tmp_path, gate=closed, arm="random")
    open_reward("features", config(path)).tap(make_policy(), IDENTITY, PromptConfig())


def test_recipes_that_contradict_themselves() -> None:
    with pytest.raises(ValueError, match="dual = false reads the policy alone"):
        FeatureReward(kind="features", file="x", dual=False)
    with pytest.raises(ValueError, match=r"needs advantage\.kind"):
        recipe(
            rewards={"f": {"kind": "features", "file": "x", "mode": "mechreward"}},
            advantage={"kind": "rloo"},
        )
