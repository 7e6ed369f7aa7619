"""Calibration: labels and errors by hand, planted truths, exactness, what is frozen and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from operando.cli import app
from operando.errors import UserError
from operando.models.freeze import digests
from operando.models.load import STARTER, Loaded, load_model
from operando.models.policy import Policy
from operando.models.recursive import RecursiveCausalLM
from operando.recipe.data import ModelConfig
from operando.recipe.run import Recipe
from operando.recursive import draft_heads, drafting, halt_head, halting
from operando.recursive.data import (
    Race,
    SourceConfig,
    Texts,
    only_changing,
    open_source,
    write_folder,
)
from operando.recursive.drafting import DraftingConfig, calibrate_drafting
from operando.recursive.halt_head import Rule, States, Trial
from operando.recursive.halting import HaltingConfig, calibrate_halting
from operando.rollout.recursive import RecursiveEngine
from operando.rollout.sampler import Request, Sampling
from operando.run import Run, SeedTree

from .recursive_models import random_recursive
from .tiny import byte_tokenizer

OVERRIDES = (
    "task.num_steps=[1]",
    "task.max_number=5",
    "task.num_train=200",
    "prompt.template={question}",
)
SMALL = SourceConfig(
    "words", OVERRIDES, num_fit=6, num_choose=4, num_held_out=4, max_completion_length=6
)
PROMPTS = [(5, 9, 40), (77, 8), (30, 31, 32, 33, 34, 35)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a random model with a byte tokenizer."""
    out = tmp_path_factory.mktemp("model") / "random"
    random_recursive().save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def chain(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The model calibrated for halting, and that one for drafting."""
    out = tmp_path_factory.mktemp("out")
    config = HaltingConfig(SMALL, Rule(1.0, 0.0), min_loops=2, repeats=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halt_head, "TAUS", (0.5, 0.9))
        patch.setattr(halting, "RACE", {1: 1, 64: 4})
        patch.setattr(drafting, "RACE", {1: 1, 64: 4})
        halts = calibrate_halting(folder, out / "halting", config)
        drafts = calibrate_drafting(
            out / "halting", out / "both", DraftingConfig(SMALL, epochs=3, repeats=1)
        )
    return halts, drafts


# --- labels, errors, choices ---------------------------------------------------------------------


def test_a_token_is_settled_from_the_loop_whose_argmax_stays() -> None:
    argmax_RN = torch.tensor([[5, 3, 5, 1], [5, 5, 3, 2], [5, 3, 5, 3], [5, 5, 5, 4]])
    settled = halt_head.settled_from(argmax_RN)
    assert settled.long().T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_settled_states_are_those_of_shallower_models() -> None:
    """The slow second opinion: t* from R forwards of 1 ... R loops."""
    model = random_recursive()
    ids = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(0))
    read = torch.ones(2, 9, dtype=torch.bool)
    states = halt_head.collect_states(model, Texts(ids, read, read))
    with torch.no_grad():
        by_depth = [model(input_ids=ids, num_loops=t).logits.argmax(-1) for t in range(1, 9)]
    first_N = len(states.settled_RN) - states.settled_RN.long().sum(0) + 1
    for n, t_star in enumerate(first_N.tolist()):
        path = [int(a.flatten()[n]) for a in by_depth]
        assert t_star == max([0, *(t for t in range(1, 9) if path[t - 1] != path[-1])]) + 1


def test_calibration_error_by_hand() -> None:
    p, label = torch.tensor([0.1, 0.1, 0.9, 0.9]), torch.tensor([False, True, True, True])
    # Bin of 0.1: half are true, 0.4 off; bin of 0.9: all are true, 0.1 off; two of four each.
    assert halt_head.expected_calibration_error(p, label) == pytest.approx(0.25)
    assert halt_head.expected_calibration_error(torch.full((4,), 0.75), label) == pytest.approx(0.0)
    assert halt_head.expected_calibration_error(torch.ones(4), label) == pytest.approx(0.25)


def test_the_rule_takes_the_fewest_loops_that_it_allows() -> None:
    trials = [
        Trial(0.5, 2.0, 0.50, 0.02, 0.99),
        Trial(0.7, 3.0, 0.52, 0.00, 0.97),
        Trial(0.9, 4.0, 0.51, 0.01, 0.99),
        Trial(0.99, 4.0, 0.52, 0.0, 0.99),
    ]
    assert halt_head.choose(trials, Rule(0.01, 0.98)) == trials[3]
    assert halt_head.choose(trials, Rule(0.02, 0.98)) == trials[0]
    assert halt_head.choose(trials, Rule(0.0, 1.0)) is None


def test_gain_is_the_median_of_the_rounds() -> None:
    race = Race({"a": [1.0, 4.0, 2.0], "b": [1.0, 2.0, 1.0]}, {"a": 100, "b": 50})
    assert race.rate("a") == 50 and race.rate("b") == 50
    assert race.gain("b", "a") == pytest.approx(1.0)  # 0.5 x (1, 2, 2)


def test_saved_passes_and_multiply_adds() -> None:
    saved = halt_head.saved_at(random_recursive(), 2.0)
    assert saved.passes == 0.75
    assert 0 < saved.whole < 0.75


# --- the halt head -------------------------------------------------------------------------------


def planted_states(noise: int) -> States:
    """States whose fourth entry says whether the token is settled; the rest is noise."""
    generator = torch.Generator().manual_seed(noise)
    t_star = torch.randint(1, 9, (400,), generator=generator)
    settled = torch.arange(1, 9)[:, None] >= t_star
    h = torch.randn(8, 400, 32, generator=generator)
    h[..., 3] = torch.where(settled, 2.0, -2.0) + 0.1 * h[..., 3]
    return States(h, settled, torch.rand(400, generator=generator) < 0.4)


def test_the_head_finds_a_planted_truth_and_touches_nothing_else() -> None:
    model = random_recursive()
    before = digests(model)
    with only_changing(model, "model.halt_head"):
        halt_head.fit_halt_head(model, planted_states(0))
    changed = {name for name, sha in digests(model).items() if sha != before[name]}
    assert changed == {"model.halt_head.weight", "model.halt_head.bias"}
    other = planted_states(1)
    with torch.no_grad():
        says = model.model.halt_head(other.h_RND)[..., 0] > 0
    assert torch.equal(says, other.settled_RN)
    found = halt_head.calibration_of(model, other, halt_head.base_rate_of(planted_states(0)))
    assert found.log_loss < 0.02 < found.log_loss_base_rate
    assert found.n == 7 * 400
    weight = model.model.halt_head.weight.detach()[0].abs()
    assert int(weight.argmax()) == 3 and float(weight[3]) > 10 * float(weight[4:].max())


def test_states_that_say_nothing_get_the_base_rate() -> None:
    model, states = random_recursive(), planted_states(0)
    blind = states._replace(h_RND=torch.ones_like(states.h_RND))
    halt_head.fit_halt_head(model, blind)
    share = (halt_head.token_weights(states.predicts_N) * states.settled_RN).sum()
    share /= 8 * halt_head.token_weights(states.predicts_N).sum()
    with torch.no_grad():
        p = model.model.halt_head(blind.h_RND[0, :1]).sigmoid()
    assert float(p) == pytest.approx(float(share), abs=1e-3)


def test_another_changed_tensor_is_noticed() -> None:
    model = random_recursive()
    with (
        pytest.raises(AssertionError, match=r"outside model\.halt_head changed"),
        only_changing(model, "model.halt_head"),
    ):
        model.model.depth_gate.data[0] += 1e-3


def test_controls_take_the_loops_that_they_are_given() -> None:
    model = random_recursive()
    shallow = halt_head.FixedDepth(model, byte_tokenizer(), (1,), draft_tokens=0)
    shallow.loops = 3
    sampled = shallow.sample(Request(PROMPTS, 1, Sampling(5), None))
    assert {t for one in sampled for t in one.exit_loops} == {3}
    model.config.num_loops = 3
    plain = RecursiveEngine(model, byte_tokenizer(), (1,), halt_threshold=math.inf)
    assert [o.ids for o in plain.sample(Request(PROMPTS, 1, Sampling(5), None))] == [
        o.ids for o in sampled
    ]
    drawn = halt_head.draw_loops([0, 3, 0, 1], (4000,), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {2, 4}
    assert float((drawn == 2).float().mean()) == pytest.approx(0.75, abs=0.03)


def test_agreement_with_full_depth_is_whole_at_full_depth_and_less_below() -> None:
    model = random_recursive()
    ids = torch.randint(2, 258, (3, 12), generator=torch.Generator().manual_seed(0))
    predicts = (torch.arange(12) >= 4).expand(3, -1)
    texts = Texts(ids, torch.ones(3, 12, dtype=torch.bool), predicts)
    assert halt_head.agreement(model, texts, lambda _: {"num_loops": 8}) == [1.0] * 3
    with torch.no_grad():
        same = model(input_ids=ids, num_loops=1).logits.argmax(-1)
        same = same == model(input_ids=ids).logits.argmax(-1)
    shallow = halt_head.agreement(model, texts, lambda _: {"num_loops": 1})
    assert shallow == pytest.approx(same[:, 4:].float().mean(1).tolist())
    assert sum(shallow) < 3


# --- the drafting heads --------------------------------------------------------------------------


def test_head_i_learns_the_token_i_after_the_next() -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]])
    read = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    texts = Texts(ids, read, read & (torch.arange(5) >= 1))
    none = draft_heads.NONE
    assert draft_heads.targets_of(texts, 1).tolist() == [
        [12, 13, 14, none, none],
        [22, none, none, none, none],
    ]
    assert draft_heads.targets_of(texts, 2)[0].tolist() == [13, 14, none, none, none]


def test_the_table_says_the_commonest_target() -> None:
    token, target = torch.tensor([1, 1, 1, 2, 2]), torch.tensor([7, 8, 8, 9, draft_heads.NONE])
    none = draft_heads.NONE
    assert draft_heads.commonest(token, target, 4).tolist() == [none, 8, 9, none]


def test_heads_learn_a_planted_future_and_touch_nothing_else() -> None:
    """Each of 6 states has its own future; untrained heads propose the next token instead."""
    model = random_recursive()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 32, generator=generator)
    which = torch.randint(0, 6, (900,), generator=generator)
    target = torch.stack([50 + 6 * i + which for i in range(4)], 1)
    target[:200, 3] = draft_heads.NONE
    places = draft_heads.Places(states[which], target, which)
    before = digests(model)
    draft_heads.forget_heads(model)
    untrained = draft_heads.score_heads(model, places, places)
    with only_changing(model, "speculative_projs"):
        draft_heads.fit_heads(model, places, epochs=200, lr=1e-2, seed=0)
    trained = draft_heads.score_heads(model, places, places)
    assert [head.top1 for head in trained] == [1.0] * 4
    assert all(head.loss < 0.5 for head in trained)
    assert [head.n for head in trained] == [900, 900, 900, 700]
    assert all(head.top1 < 0.2 and head.loss > 2 for head in untrained)
    changed = {name for name, sha in digests(model).items() if sha != before[name]}
    assert all(name.startswith("speculative_projs") for name in changed) and len(changed) == 8
    assert not any(p.requires_grad for p in model.speculative_projs.parameters())


# --- the commands --------------------------------------------------------------------------------


def test_the_written_folder_halts_and_drafts_by_itself(chain) -> None:
    halts, drafts = chain
    assert halts.chosen is not None and drafts.is_exact() and drafts.num_equal == 4
    both, tokenizer, _ = load_model(ModelConfig(id=str(drafts.file.parent)))
    assert isinstance(both, RecursiveCausalLM)
    assert both.config.halt_threshold == halts.chosen.tau == drafts.halt_threshold
    assert both.config.min_loops == 2 and both.config.draft_tokens == drafts.written
    both.config.draft_tokens = 3  # whether drafts are faster is the machine's to say
    by_itself = RecursiveEngine(both, tokenizer, (1,))
    sampled = by_itself.sample(Request(PROMPTS, 1, Sampling(8), None))
    assert by_itself.stats.tried[0] > 0
    told = RecursiveEngine(both, tokenizer, (1,), draft_tokens=0, halt_threshold=halts.chosen.tau)
    plain = told.sample(Request(PROMPTS, 1, Sampling(8), None))
    assert [o.exit_loops for o in sampled] == [o.exit_loops for o in plain]
    assert [o.ids for o in sampled] == [o.ids for o in plain]
    assert min(t for one in sampled for t in one.exit_loops) >= 2


def test_only_the_two_heads_differ_from_the_source(folder: Path, chain) -> None:
    source = load_file(folder / "model.safetensors")
    both = load_file(chain[1].file.parent / "model.safetensors")
    changed = {name for name, tensor in source.items() if not torch.equal(tensor, both[name])}
    assert set(source) == set(both)
    assert {name.partition(".weight")[0].partition(".bias")[0] for name in changed} == {
        "model.halt_head",
        *(f"speculative_projs.{i}" for i in range(4)),
    }


def test_the_manifests_hold_every_figure_with_its_control(chain) -> None:
    halts, drafts = chain
    one = json.loads(halts.file.read_text())
    assert (drafts.file.parent / "halting.json").read_text() == halts.file.read_text()
    assert one["threshold"] == halts.chosen.tau and one["n"]["held_out"] == 4
    exits, fixed, random = one["ways"].values()
    assert [*one["ways"]] == ["exits", f"fixed depth {round(exits['mean_loops'])}", "random exits"]
    assert fixed["mean_loops"] == round(exits["mean_loops"])
    assert exits["mean_core_passes"] == 2 * exits["mean_loops"]
    assert exits["saved_core"] == pytest.approx(1 - exits["mean_loops"] / 8)
    assert sum(random["tokens_by_loops"]) > 0 and one["model"]["sha256 model.safetensors"]
    assert [*one["timings"]["64"]] == ["full depth", "exits", [*one["ways"]][1]]
    assert one["timings"]["1"]["full depth"]["gain"] == 1.0
    two = json.loads(drafts.file.read_text())
    assert two["equal_completions"]["count"] == 4 and two["halt_threshold"] == one["threshold"]
    assert len(two["heads"]) == 4 and two["untrained"]["heads"][0]["tried"] > 0


def test_without_an_allowed_threshold_there_is_no_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halt_head, "TAUS", (1e-9,))  # every token leaves at once
    out = tmp_path / "out"
    arguments = ["calibrate", "halting", str(folder), *OVERRIDES, "--task", "words", "--out", out]
    counts = ["--num-fit", 4, "--num-choose", 8, "--num", 2, "--max-completion-length", 12]
    done = CliRunner().invoke(app, [str(a) for a in [*arguments, *counts, "--min-agreement", 1.0]])
    assert done.exit_code == 3, done.output
    assert [file.name for file in out.iterdir()] == ["halting.json"]
    assert json.loads((out / "halting.json").read_text())["threshold"] is None


def test_a_draft_that_changes_a_token_is_no_model_either(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = draft_heads.draft

    def broken(source, prompts, drafts):
        sampled, drafted = honest(source, prompts, drafts)
        if drafts:
            sampled[0] = sampled[0]._replace(ids=(9, *sampled[0].ids[1:]))
        return sampled, drafted

    monkeypatch.setattr(draft_heads, "draft", broken)
    monkeypatch.setattr(drafting, "RACE", {1: 1})
    config = DraftingConfig(SMALL, epochs=1, repeats=1)
    result = calibrate_drafting(folder, tmp_path / "out", config)
    assert not result.is_exact() and result.num_equal == 3
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["drafting.json"]


def test_lora_is_merged(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json(
        json.dumps(
            {
                "name": "lora",
                "steps": 1,
                "runs_dir": str(tmp_path),
                "rewards": {"correct": {"kind": "correct"}},
                "model": {"id": str(folder), "lora": {"rank": 2, "targets": ["q_proj", "up_proj"]}},
                "task": {"kind": "words", "max_number": 5, "num_train": 200},
                "rollout": {"max_completion_length": 6},
            }
        )
    )
    run = Run.create(recipe)
    run.close()
    policy = Policy(load_model(recipe.model), recipe.model, SeedTree(0))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    step = run.folder / "checkpoints" / "step_00001"
    step.mkdir(parents=True)
    policy.save_pretrained(step, policy.save_weights())
    source = open_source(run.folder, SourceConfig(num_fit=2, num_choose=1, num_held_out=1))
    assert source.identity["step"] == 1 and source.max_completion_length == 6
    write_folder(tmp_path / "out", source, "halting.json", {})
    written = load_model(ModelConfig(id=str(tmp_path / "out"))).model
    assert "lora" not in "".join(load_file(tmp_path / "out" / "model.safetensors"))
    ids = torch.tensor([[5, 9, 40, 77]])
    with torch.no_grad():
        trained, merged = policy.model(input_ids=ids).logits, written(input_ids=ids).logits
        base = load_model(ModelConfig(id=str(folder))).model(input_ids=ids).logits
    assert float((merged - trained).abs().max()) < 1e-4 < float((base - trained).abs().max())


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "model folder and has no task of its own: --task words"),
        ({"task": "wrods"}, "Did you mean 'words'"),
        ({"overrides": ("task.steps=[1]",)}, r"task\.steps: unknown key"),
        ({"num_held_out": 401}, "--num 401: words has 400 held-out problems"),
        ({"num_fit": 201}, "200 training problems"),
        ({"step": 3}, "it has no steps"),
        ({"max_completion_length": 2048}, "leaves no room for a prompt"),
    ],
)
def test_a_mistake_is_one_message(folder: Path, change: dict[str, object], message: str) -> None:
    given = {"task": "words", "overrides": OVERRIDES, "num_fit": 5, "num_choose": 5} | change
    config = SourceConfig(**given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=message):
        open_source(folder, config)


def test_the_source_must_be_recursive_and_the_target_new(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Qwen2ForCausalLM has no loops, halting or"):
        open_source(STARTER, SourceConfig("words"))
    with pytest.raises(UserError, match="neither a run folder"):
        open_source(tmp_path, SourceConfig("words"))
    with pytest.raises(UserError, match="exists and is kept as it is"):
        calibrate_halting(folder, tmp_path, HaltingConfig(SMALL))
    with pytest.raises(UserError, match="exists and is kept as it is"):
        calibrate_drafting(folder, tmp_path, DraftingConfig(SMALL))
    with pytest.raises(UserError, match="--min-loops 9: the model has 1 to 8"):
        calibrate_halting(folder, tmp_path / "new", HaltingConfig(SMALL, min_loops=9))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"model\.depth_gate is missing, expected with shape \(32,\)"),
        ("unexpected", r"model\.gate_of_old of shape \(3,\) is in the file"),
        ("shape", r"model\.depth_gate has shape \(16,\), expected \(32,\)"),
        ("cut", "truncated or not a safetensors file"),
    ],
)
def test_a_checkpoint_of_another_layout_is_one_message(
    folder: Path, tmp_path: Path, change: str, message: str
) -> None:
    random_recursive().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    match change:
        case "missing":
            del tensors["model.depth_gate"]
        case "unexpected":
            tensors["model.gate_of_old"] = torch.zeros(3)
        case "shape":
            tensors["model.depth_gate"] = torch.zeros(16)
    save_file(tensors, file, {"format": "pt"})
    if change == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(id=str(tmp_path)))
    assert isinstance(load_model(ModelConfig(id=str(folder))), Loaded)
