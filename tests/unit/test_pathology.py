"""The pathology audit: hand-worked measures, planted ailments, random models that say nothing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from operando import cli
from operando.errors import UserError
from operando.evals.ask import Question
from operando.models.recursive import RecursiveCausalLM, modeling
from operando.recipe.data import PromptConfig
from operando.recursive import pathology_metrics as measures
from operando.recursive import pathology_tests as loop_verdicts
from operando.recursive.pathology import Pathology, Subject, audit_pathology, run_tests
from operando.recursive.pathology_read import (
    Texts,
    at_depth,
    cache_gap,
    gradients,
    pack_texts,
    random_init,
    read,
    shuffled,
)
from operando.recursive.pathology_tests import depth_meets, verdict
from operando.stats.bootstrap import cluster_bootstrap
from operando.stats.intervals import Interval
from operando.tasks.base import Task
from operando.types import Example, Verdict
from tests.unit.recursive_models import random_recursive
from tests.unit.test_recursive import MeanPooled
from tests.unit.tiny import byte_tokenizer, tiny_model

R = 4


# --- measures, by hand ---------------------------------------------------------------------------


def test_steps_and_bends_by_hand() -> None:
    states = [torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 2.0]])]
    assert measures.step_sizes(states).tolist() == [[1.0, 1.0]]
    (bend,) = measures.bends(states)[0].tolist()  # D: (1, 0) then (0, 2); |(-1, 2)| / |(2, 2)|
    assert bend == pytest.approx((5 / 8) ** 0.5)


def test_shock_by_hand() -> None:
    size_NT = torch.tensor([[0.1, 0.1, 0.7], [0.1, 0.3, 0.1]])  # means 0.1, 0.2, 0.4
    found = measures.shock(
        size_NT, torch.tensor([[0.2, 0.5], [0.2, 0.7]]), torch.tensor([1.0, 2.0])
    )
    assert found.jitter == pytest.approx(np.std([0.1, 0.2, 0.4]))
    assert found.spike == pytest.approx(2.0)
    assert (found.bend, found.drift) == (pytest.approx(0.6), 1.5)
    assert 0.6 < found.p99 <= 0.7


def test_likeness_takes_away_what_all_tokens_share() -> None:
    shared = torch.tensor([100.0, 0.0, 0.0])
    a = shared + torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0, 0, -1.0]])
    b = a.roll(1, 0)  # the states of other tokens
    found = measures.likeness(a, b, torch.tensor([1, 2, 3, 0]))
    assert found.cosine > 0.999 and found.mismatched > 0.999
    assert found.centred < -0.3  # b of the next token is a's own: mismatched fits better
    same = measures.likeness(a, a, torch.tensor([1, 2, 3, 0]))
    assert same.centred == pytest.approx(1 - (-1 + 0 - 1 + 0) / 4)


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    kl_N, same_N = measures.divergence(p, q)
    assert float(kl_N) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert same_N.tolist() == [0.0]  # first of two equal ones against the second


def test_gradient_classes_and_what_fails() -> None:
    assert measures.flow([1.0, None, 0.0, 1e-4]) == ["flows", "detached", "zero", "tiny"]
    assert measures.starvation([0.1, 0.5, 1.0, 1.0])[0] is True
    assert measures.starvation([1.0, 1.0, 0.005, 1.0])[0] is None
    for norms, said in [
        ([1.0, 1.0, 1e-4, 1.0], "1.0e-04 of the largest"),
        ([1.0, 1.0, 0.0, 1.0], "exactly 0 .* loops \\[3\\]"),
        ([None, 1.0, 1.0, 1.0], "no graph leads to loops \\[1\\]"),
        ([2e3, 5.0, 3.0, 1.0, 1.0], "of the largest|explodes"),
        ([1.0, float("nan"), 1.0], "not finite"),
    ]:
        meets, words = measures.starvation(norms)
        assert meets is False
        assert re.search(said, words), words


def test_bootstrap_is_of_the_mean_over_prompts_and_the_same_for_a_seed() -> None:
    value_PK = [[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]]
    spread = lambda x_bK: x_bK[:, 1] - x_bK[:, 0]  # noqa: E731
    found = cluster_bootstrap(value_PK, spread, [0, 1, 2], 0)
    assert found.value == 2.0 and found.low == 1.0 and found.high == 3.0
    assert cluster_bootstrap(value_PK, spread, [0, 1, 2], 0) == found
    copies = cluster_bootstrap(value_PK * 50, spread, [0, 1, 2] * 50, 0)
    assert copies == found  # fifty copies of a problem are one problem
    assert cluster_bootstrap(value_PK * 50, spread, range(150), 0).low > 1.5


def test_a_depth_passes_fails_or_stays_open() -> None:
    same, worse, unsure = (
        Interval(0, 0, 0),
        Interval(-0.5, -0.6, -0.4),
        Interval(-0.01, -0.03, 0.01),
    )
    assert depth_meets(Interval(0.0, -0.01, 0.01), same) is True
    assert depth_meets(Interval(0.05, 0.03, 0.07), same) is False
    assert depth_meets(Interval(0.0, -0.01, 0.01), worse) is False
    assert depth_meets(Interval(0.0, -0.01, 0.01), unsure) is None
    assert depth_meets(Interval(0.01, -0.05, 0.07), same) is None


def test_what_a_random_model_meets_says_nothing() -> None:
    assert verdict(True, [False, False]) == "PASS"
    assert verdict(True, [False, True]) == "UNINFORMATIVE"
    assert verdict(False, [True]) == "FAIL"
    assert verdict(None, [False]) == "WARN"


# --- reading -------------------------------------------------------------------------------------


def texts_of(rows: int = 5, seed: int = 0) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for p in range(rows):
        ids = torch.randint(2, 258, (9 + p,), generator=generator).tolist()
        pairs.append((ids[: 4 + p], [*ids[4 + p :], 1]))
    return pack_texts(pairs, 0)


def test_every_depth_is_the_model_with_that_many_loops() -> None:
    model, texts = random_recursive(num_loops=R, halt_threshold=0.5), texts_of()
    found = read(model, texts, (2, 6), 0)
    for loops in (1, 2, R, 6):
        for p in range(5):
            length, start = int(texts.length_P[p]), int(texts.prompt_P[p])
            ids = texts.ids_PS[p : p + 1, :length]
            with torch.no_grad():
                logits = model(input_ids=ids, num_loops=loops, halt_threshold=torch.inf).logits[0]
            logp = logits.log_softmax(-1)[start - 1 : length - 1]
            want = -logp.gather(1, ids[0, start:, None]).mean()
            assert found.nll[loops][p] == pytest.approx(float(want), abs=2e-5)
    assert len(found.steps) == 5 and len(found.steps[0]) == R
    assert max(found.kl[R]) == 0.0 and min(found.agree[R]) == 1.0
    assert found.kl[2][0] > 0


def test_shuffling_keeps_each_rows_tokens_and_its_padding() -> None:
    texts = texts_of()
    other = shuffled(texts, 1)
    assert not torch.equal(other.ids_PS, texts.ids_PS)
    for p, length in enumerate(texts.length_P.tolist()):
        assert sorted(other.ids_PS[p, :length].tolist()) == sorted(
            texts.ids_PS[p, :length].tolist()
        )
        assert torch.equal(other.ids_PS[p, length:], texts.ids_PS[p, length:])


def test_a_closed_gate_gives_exact_zeros_and_a_cut_graph_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, texts = random_recursive(num_loops=R), texts_of()
    grads, carry = gradients(model, texts)
    assert measures.flow(grads) == ["flows"] * R and min(carry) > 0
    with torch.no_grad():
        model.model.depth_gate.fill_(200.0)
    assert min(gradients(model, texts)[0]) > 0  # the clamp keeps the gate from closing
    monkeypatch.setattr(modeling, "GATE_LIMIT", 1e3)
    grads, carry = gradients(model, texts)
    assert grads == [0.0] * R
    assert min(carry) > 0  # what recursive_lm looked at sees nothing of it
    assert measures.starvation(grads)[0] is False
    gate = modeling.RecursiveModel._gate
    monkeypatch.setattr(modeling.RecursiveModel, "_gate", lambda m, h, u: gate(m, h, u.detach()))
    assert gradients(model, texts)[0] == [None] * R


def test_gradients_are_read_with_frozen_weights_and_exits_off() -> None:
    model, texts = random_recursive(num_loops=R, halt_threshold=0.01), texts_of()
    want = gradients(random_recursive(num_loops=R), texts)
    model.requires_grad_(False)
    for norms, wanted in zip(gradients(model, texts), want, strict=True):
        assert norms == pytest.approx(wanted)


def test_a_leak_through_the_sequence_breaks_the_cached_decode() -> None:
    model, texts = random_recursive(num_loops=R), texts_of()
    sound = cache_gap(model, texts)
    assert sound.largest < 1e-4 and sound.flipped == 0 and 1 < sound.loops < R
    model.model.__class__ = MeanPooled
    assert cache_gap(model, texts).largest > 1e-2


def test_twins_are_of_the_config_and_leave_the_random_state_alone() -> None:
    model = random_recursive(num_loops=R)
    state = torch.get_rng_state()
    one, again, other = random_init(model, 3), random_init(model, 3), random_init(model, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.config.num_loops == R
    assert torch.equal(one.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


# --- verdicts ------------------------------------------------------------------------------------

PROBLEMS = [
    Example(f"e{i}", chr(97 + i % 20) + chr(97 + i // 20), chr(97 + i % 20), solution=str(i))
    for i in range(24)
]


def subject_of(model: RecursiveCausalLM) -> Subject:
    """A task that is learned in a moment: say the first letter again."""
    task = Task("echo", PROBLEMS[:1], PROBLEMS, lambda e, c, _: Verdict(c == e.answer, ""))
    prompt = PromptConfig(template="{question}", answer_template="{answer}")
    question = Question("echo", task, PROBLEMS, prompt)
    return Subject("echo", model, byte_tokenizer(), question, datetime.now(UTC))


def audited(model: RecursiveCausalLM, folder: Path, *depths: int) -> Pathology:
    return run_tests(subject_of(model), depths or (2, 6), (0, 1), folder)


def by_name(result: Pathology) -> dict[str, str]:
    return {test.name: test.verdict for test in result.tests}


@pytest.fixture(scope="module")
def echo() -> RecursiveCausalLM:
    """Trained for a moment, at every depth from 2 to 6; a single loop never was."""
    model = random_recursive(num_loops=R, initializer_range=0.05)
    tokenizer = byte_tokenizer()
    ids = torch.tensor(
        [
            [*tokenizer(e.question)["input_ids"], *tokenizer(e.answer)["input_ids"], 1]
            for e in PROBLEMS
        ]
    )
    labels = ids.clone()
    labels[:, :2] = -100
    with torch.no_grad():
        model.model.depth_gate.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(160):
        loss = model(input_ids=ids, labels=labels, num_loops=2 + step % 5).loss
        if step % 5 == 0:  # and what one loop says is unlearned, so that the others have a use
            loss = loss - model(input_ids=ids, labels=labels, num_loops=1).loss.clamp(max=3.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def test_a_random_model_passes_nothing(tmp_path: Path) -> None:
    for seed in (7, 8):
        result = audited(random_recursive(seed, num_loops=R), tmp_path / str(seed))
        assert set(by_name(result).values()) == {"UNINFORMATIVE"}, by_name(result)
        assert not result.failed
        assert result.without_control.endswith("2 of 2 random models pass all three")


def test_a_trained_model_passes_what_a_random_one_cannot(
    echo: RecursiveCausalLM, tmp_path: Path
) -> None:
    result = audited(echo, tmp_path)
    assert by_name(result) == {
        "loops used": "PASS",
        "2 loops for 4": "PASS",
        "6 loops for 4": "PASS",
        "update shock": "WARN",  # loops that do something move
        "gradient starvation": "UNINFORMATIVE",
        "cached decode": "UNINFORMATIVE",
    }, [(t.name, t.verdict, t.why, t.numbers[:2]) for t in result.tests]
    written = json.loads((tmp_path / "audits" / "pathology.json").read_text())
    assert (
        written["n"] == 24 and written["baseline_seeds"] == [0, 1] and written["depths"] == [2, 6]
    )
    assert [t["name"] for t in written["tests"]] == [t.name for t in result.tests]
    assert sum(written["right"]["4"]) >= 20


def test_a_depth_that_breaks_the_answers_fails_though_the_states_look_alike(
    echo: RecursiveCausalLM, tmp_path: Path
) -> None:
    model = random_init(echo, 0)
    model.load_state_dict(echo.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # loops 5 and 6 get embeddings that training never saw
        model.model.step_embed.weight[4:6] = 25 * torch.randn(2, 8, generator=generator)
    result = audited(model, tmp_path, 6)
    test = next(t for t in result.tests if t.name == "6 loops for 4")
    cosine = next(n for n in test.numbers if n.name.startswith("cosine"))
    assert test.verdict == "FAIL" and result.failed
    assert (
        cosine.value is not None and cosine.value > 0.735
    )  # all that recursive_lm's test asked for


def test_loops_that_do_nothing_are_found(echo: RecursiveCausalLM, tmp_path: Path) -> None:
    model = random_init(echo, 0)
    model.load_state_dict(echo.state_dict())
    with torch.no_grad():  # the core writes nothing, so every depth is as good as the next
        for block in model.model.core:
            for name in ("anchor_attn.o_proj", "mlp.down_proj"):
                linear = block.get_submodule(name)
                linear.weight.zero_()
                linear.basis_out.zero_()
    tokenizer = byte_tokenizer()
    ids = torch.tensor([[*tokenizer(e.question + e.answer)["input_ids"], 1] for e in PROBLEMS])
    labels = ids.clone()
    labels[:, :2] = -100
    rest = [p for n, p in model.named_parameters() if "layers.4" not in n and "layers.5" not in n]
    optimizer = torch.optim.AdamW(rest, lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    found = by_name(audited(model, tmp_path))
    assert found["loops used"] == "FAIL"
    assert found["2 loops for 4"] == found["6 loops for 4"] == "UNINFORMATIVE"


def test_depth_is_put_back(echo: RecursiveCausalLM) -> None:
    with pytest.raises(RuntimeError), at_depth(echo, 6):
        assert echo.config.num_loops == 6
        raise RuntimeError
    assert echo.config.num_loops == R


# --- bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_recursive(num_loops=R, max_loops=10).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a model folder has no task of its own: --task"),
        ({"task": "wrods"}, "--task wrods: its gold answers are no text; expected words"),
        ({"task": "words", "step": 3}, "is a model folder; it has no steps"),
        ({"task": "words", "depths": (4, 11)}, "expected loops from 1 to 10, other than 4"),
        ({"task": "words", "depths": (4,)}, "expected loops from 1 to 10"),
        ({"task": "words", "overrides": ("task.max_nubmer=3",)}, "unknown key.*max_number"),
        ({"overrides": ("task.max_number=3",)}, "keys of a task need --task"),
    ],
)
def test_bad_input_is_one_message(folder: Path, given: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        audit_pathology(folder, num=2, **given)
    assert not (folder / "audits").exists()


def test_a_model_without_loops_and_a_folder_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder"):
        audit_pathology(tmp_path, task="words")
    tiny_model("qwen2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Qwen2ForCausalLM has no loops, halting"):
        audit_pathology(tmp_path, task="words", num=2)


def test_the_command_prints_the_file_and_says_failure_by_its_exit_code(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["operando", "audit", "pathology", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    shutil.copytree(folder, tmp_path / "m")
    asked = (str(tmp_path / "m"), "task.max_number=5", "--task", "words", "--baselines", "1")
    assert run(*asked, "--num", "2", "--depths", "2") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "m" / "audits" / "pathology.json")
    assert "UNINFORMATIVE: loops used" in shown.err and "without a control" in shown.err
    assert run(*asked, "--depths", "2,x") == 2
    assert "--depths 2,x" in capsys.readouterr().err
    failed = loop_verdicts.Test("x", "FAIL", "", [])
    bad = Pathology("m", "t", 2, 2, 4, (2,), (0,), 0.5, [failed], "", tmp_path)
    monkeypatch.setattr("operando.recursive.pathology.audit_pathology", lambda *_, **__: bad)
    assert run(*asked) == 3
