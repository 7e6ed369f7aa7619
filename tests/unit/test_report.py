"""A synthetic run folder, and what the page and the card say of it."""

import base64
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from operando.errors import UserError
from operando.recipe.run import Recipe
from operando.report.cards import model_card, write_cards
from operando.report.collect import collect
from operando.report.html import embed, hash_of, headline, time_table, write_report
from operando.report.notebook import show_tokens
from operando.report.samples import CHANNELS, choose_samples, quantise
from operando.run import Run, write_json, write_parquet

EVIL = ' 3+2=5 </script><b>bold</b><img src=x onerror="alert(1)"> #### 5'
BEFORE = [True] * 8 + [False] * 12
AFTER = [True] * 7 + [False] * 1 + [True] * 9 + [False] * 3  # 9 gained, 1 lost


def make_run(
    folder: Path, name: str = "words-a", *, finished: bool = True, kl: bool = True
) -> Path:
    tables = {
        "name": name,
        "steps": 20,
        "seed": 3,
        "runs_dir": str(folder),
        "model": {"id": "some/base", "lora": {"rank": 4, "alpha": 8.0}},
        "task": {"kind": "words"},
        "rewards": {"contains": {"kind": "contains_answer"}},
    } | ({"kl": {"coef": 0.02}} if kl else {})
    run = Run.create(Recipe.model_validate_json(json.dumps(tables)))
    run.warn("4-bit <weights> are slow here")
    last = 20 if finished else 13
    for step in range(last + 1):
        run.log_metrics(metrics_row(step, kl=kl))
    write_answers(run.folder, 0, BEFORE)
    write_answers(run.folder, 10, AFTER)
    if finished:
        write_answers(run.folder, 20, AFTER)
        write_json(run.folder / "results.json", {"steps": 20, "seconds": 12.5})
    for step in (1, 10, last):
        write_rollouts(run.folder, step, kl=kl)
    run.close()
    return run.folder


def metrics_row(step: int, *, kl: bool) -> dict[str, float | None]:
    row: dict[str, float | None] = {"step": step}
    if step % 10 == 0:
        right = sum(BEFORE if step == 0 else AFTER) / 20
        row |= {"eval/correct": right, "eval/n": 20.0, "eval/rewards/contains": right}
    if step > 0:
        row |= {
            "reward": 0.4 + 0.02 * step,
            "reward_std": 0.4,
            "rewards/contains/mean": 0.4,
            "entropy": 0.5,
            "grad_norm": 0.3 if step < 5 else 1.4,
            "update_norm": 1e-3,
            "lr": 1e-4 * min(step, 5),
            "frac_reward_zero_std": 0.3,
            "loss": None,
            "time/sample": 1.0,
            "time/score": 0.5,
            "time/update": 2.0,
            "time/step": 4.0,
            "sampler/gap_mean": 1e-6,
            "sampler/ess": 1.0,
            "tokens_per_second": 100.0,
        }
        if kl:
            row["kl"] = 0.001 * step
    return row


def write_answers(folder: Path, step: int, marks: list[bool]) -> None:
    num = len(marks)
    write_parquet(
        folder / "evals" / f"held_out_step_{step:05d}.parquet",
        {
            "example_id": [f"words/held_out/{i}" for i in range(num)],
            "question": [f"Question <{i}>?" for i in range(num)],
            "completion": [EVIL if mark else f" no idea {i}" for i, mark in enumerate(marks)],
            "answer": ["5"] * num,
            "correct": marks,
            "reason": ["right" if mark else "no '####' mark" for mark in marks],
            "is_truncated": [False] * num,
            "length": [5] * num,
        },
    )


def channel(step: int, row: int, seed: int) -> list[float]:
    return np.random.default_rng([step, row, seed]).normal(size=4).tolist()


def write_rollouts(folder: Path, step: int, *, kl: bool) -> None:
    rows = range(8)
    columns: dict[str, list[object]] = {
        "step": [step] * 8,
        "group": [r // 4 for r in rows],
        "sample": [r % 4 for r in rows],
        "prompt": [f"Q: number {r // 4} & more\nA:" for r in rows],
        "completion": [EVIL] * 8,
        "answer": ["5"] * 8,
        "correct": [r % 2 == 0 for r in rows],
        "reason": ["because"] * 8,
        "is_truncated": [r == 5 for r in rows],
        "discarded": [r == 6 for r in rows],
        "reward": [None if r == 7 else float(r % 2) for r in rows],
        "rewards/contains": [None if r == 7 else float(r % 2) for r in rows],
        "advantage": [0.1 * r for r in rows],
        "prompt_ids": [[1, 2]] * 8,
        "completion_ids": [[1, 2, 3, 4]] * 8,
        "tokens": [[" 3", "</script>", "<b>", "\n"] for _ in rows],
        "sampling_logp": [channel(step, r, 0) for r in rows],
        "old_logp": [channel(step, r, 1) for r in rows],
        "ref_logp": [channel(step, r, 2) if kl else None for r in rows],
        "entropy": [channel(step, r, 3) for r in rows],
        "advantage_tokens": [channel(step, r, 4) for r in rows],
        "reward_tokens": [[0.0, 0.0, 0.0, float("nan") if r == 7 else 1.0] for r in rows],
    }
    write_parquet(folder / "rollouts" / f"step_{step:05d}.parquet", columns)


def page_of(*folders: Path) -> str:
    return write_report(list(folders)).read_text(encoding="utf-8")


def data_of(page: str):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_asks_nothing_of_the_network(tmp_path):
    page = page_of(make_run(tmp_path))
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    outside = re.findall(r'(?:src|href)="([^"#]*)', page)
    assert [o for o in outside if o and not o.startswith("data:")] == []
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_the_page_is_stable_to_the_byte(tmp_path):
    folder = make_run(tmp_path)
    first = write_report([folder]).read_bytes()
    assert write_report([folder], tmp_path / "again.html").read_bytes() == first
    assert len(first) < 1_500_000


def test_the_verdict_is_that_of_hand(tmp_path):
    # 8/20 -> 16/20. Wilson 95 %: 21.88 to 61.34 and 58.40 to 91.93; 9 gained, 1 lost:
    # McNemar 2 (C(10,0) + C(10,1)) / 2^10 = 22 / 1024 = 0.0215
    page = page_of(make_run(tmp_path))
    assert "Held-out accuracy rose from 40.0% (8/20) at step 0 to 80.0% (16/20) at step 20." in page
    assert "8 of 20; 95% interval 21.9% to 61.3%" in page
    assert "16 of 20; 95% interval 58.4% to 91.9%" in page
    assert '9 gained, 1 lost; <span class="nowrap">McNemar exact p = 0.0215</span>' in page
    assert '<div class="big">+40.0 <small>points</small></div>' in page


def test_chance_is_not_called_a_change(tmp_path):
    folder = make_run(tmp_path)
    write_answers(folder, 20, [*BEFORE[:8], True, True, *BEFORE[10:]])  # 2 gained: p = 0.5
    assert "no change that chance would not also give" in headline(collect(folder).held_out)


def test_text_of_a_model_stays_text(tmp_path):
    page = page_of(make_run(tmp_path))
    assert EVIL not in page
    assert html.escape(EVIL, quote=False).replace('"', "&#34;") in page  # held-out, before or after
    assert page.count("</script>") == 2  # the data and the viewer, nothing else ends there
    assert "<img" not in page
    assert "4-bit &lt;weights&gt; are slow here" in page
    sample = data_of(page)["runs"][0]["sets"][0]["groups"][0]["samples"][0]
    assert sample["tokens"] == [" 3", "</script>", "<b>", "\n"]


def test_embedded_json_is_the_same_json():
    value = {"text": "</script><!-- & \u2028 \U0001f600", "x": [1.5, None]}
    assert json.loads(embed(value)) == value
    assert not set("<>&") & set(embed(value))


def test_token_channels_come_back(tmp_path):
    data = data_of(page_of(make_run(tmp_path)))
    keys = [c["key"] for c in data["channels"]]
    assert keys == [c.key for c in CHANNELS]
    scales = [c["scale"] for c in data["channels"]]
    group = data["runs"][0]["sets"][0]["groups"][1]
    assert (group["step"], group["group"]) == (20, 1)
    for sample in group["samples"]:
        row = 4 + sample["sample"]
        q = np.frombuffer(base64.b64decode(sample["data"]), dtype=np.int8).reshape(len(keys), 4)
        change = np.subtract(channel(20, row, 1), channel(20, row, 2))
        truth = [channel(20, row, 4), None, change, channel(20, row, 3), channel(20, row, 0)]
        for i, wanted in enumerate(truth):
            if wanted is not None:
                assert_within_a_step(np.asarray(wanted), restore(q[i], scales[i]), scales[i])
        reward = restore(q[1], scales[1])
        assert reward[:3].tolist() == [0, 0, 0]
        assert np.isnan(reward[3]) if row == 7 else reward[3] == 1


def restore(q: np.ndarray, scale: float) -> np.ndarray:
    """Return what viewer.js shows of signed bytes; -128 is no value."""
    root = q.astype(np.float64) / 127
    return np.where(q == -128, np.nan, np.sign(root) * scale * root * root)


def assert_within_a_step(wanted: np.ndarray, found: np.ndarray, scale: float) -> None:
    """The root of a value is off by half a byte step at most (and by the digits of the scale)."""
    error = np.abs(np.sqrt(np.abs(wanted) / scale) - np.sqrt(np.abs(found) / scale))
    assert (error <= 0.5 / 127 + 1e-3).all(), error
    assert (wanted * found >= 0).all()


def test_quantisation_keeps_signs_zero_and_the_ends():
    values = [-2.0, -0.02, 0.0, 0.02, 2.0]
    assert quantise(values, 2.0).tolist() == [-127, -13, 0, 13, 127]
    assert restore(quantise(values, 2.0), 2.0)[[0, 2, 4]].tolist() == [-2, 0, 2]
    assert quantise([0.0, 0.0], 0.0).tolist() == [0, 0]


def test_samples_are_the_last_the_first_and_the_extremes(tmp_path):
    folder = make_run(tmp_path)
    last, first, extremes = choose_samples(folder)
    assert [g.step for g in last.groups] == [20, 20]
    assert [g.step for g in first.groups] == [1, 1]
    notes = " ".join(g.note for g in extremes.groups)
    for words in ("highest reward judged wrong", "lowest reward judged right", "highest advantage"):
        assert words in notes
    siblings = last.groups[1].samples
    assert [s.is_truncated for s in siblings] == [False, True, False, False]
    assert [s.discarded for s in siblings] == [False, False, True, False]
    assert [s.reward for s in siblings] == [0, 1, 0, None]
    small = choose_samples(folder, budget=20)
    assert [len(s.groups) for s in small] == [1, 1, 1]
    assert small[0].of == 2


def test_a_run_without_a_reference_has_no_such_channel(tmp_path):
    data = data_of(page_of(make_run(tmp_path, kl=False)))
    assert "logp_change" not in [c["key"] for c in data["channels"]]


def test_an_unfinished_run_is_reported_as_far_as_it_got(tmp_path):
    folder = make_run(tmp_path, finished=False)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 14, "rew')  # killed while writing
    page = page_of(folder)
    assert "unfinished at step 13 of 20" in page
    assert "at step 0 to 80.0% (16/20) at step 10." in page


@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_killed_at_once_has_a_page(tmp_path, rows):
    folder = make_run(tmp_path, finished=False)
    for file in folder.glob("*/*.parquet"):
        file.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:rows]))
    page = page_of(folder)
    assert "unfinished at step 0 of 20" in page
    words = ("No held-out evaluation was recorded.", "One held-out evaluation so far: 40.0% (8/20)")
    assert words[rows] in page


def test_several_runs_share_one_page(tmp_path):
    one, two = make_run(tmp_path / "1"), make_run(tmp_path / "2", "words-b")
    page = page_of(one, two)
    assert (one / "report.html").is_file()
    assert not (two / "report.html").exists()
    assert [r["name"] for r in data_of(page)["runs"]] == ["words-a", "words-b"]
    assert "words-a: truly right" in page
    assert "words-b: reward: contains" in page
    assert page.count('class="headline"') == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    one, two = make_run(tmp_path / "1"), make_run(tmp_path / "2")
    assert [r["name"] for r in data_of(page_of(one, two))["runs"]] == [str(one), str(two)]


def test_mistakes_are_said(tmp_path):
    folder = make_run(tmp_path)
    with pytest.raises(UserError, match="no run folder was given"):
        write_report([])
    with pytest.raises(UserError, match="given twice"):
        write_report([folder, folder])
    with pytest.raises(UserError, match="Runs there: words-a"):
        write_report([tmp_path / "words-x"])
    with pytest.raises(UserError, match="no checkpoint of step 99"):
        model_card(folder, 99)


def test_cautions_name_what_holds(tmp_path):
    run = collect(make_run(tmp_path))
    assert [c.split()[0] for c in run.cautions] == ["One"]  # clip reached, sampler exact, finished
    folder = make_run(tmp_path, "low")
    text = (folder / "metrics.jsonl").read_text().replace('"grad_norm": 1.4', '"grad_norm": 0.9')
    text = text.replace('"sampler/gap_mean": 1e-06', '"sampler/gap_mean": 0.1')
    (folder / "metrics.jsonl").write_text(text)
    cautions = " ".join(collect(folder).cautions)
    assert "largest norm 0.9, clip 1" in cautions
    assert "0.100 nats per token" in cautions


def test_the_time_table_adds_up(tmp_path):
    ((name, table),) = time_table([collect(make_run(tmp_path))])
    assert name == "words-a"
    assert table.rows == [
        ["sample", "1.000", "25%"],
        ["score", "0.500", "12%"],
        ["update", "2.000", "50%"],
        ["everything else", "0.500", "12%"],
        ["whole step", "4.000", "100%"],
    ]
    assert "20 steps, 80 s in all; 100 completion tokens per second" in table.note


def test_every_chart_has_its_table(tmp_path):
    page = page_of(make_run(tmp_path))
    charts = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(charts) >= 8
    for chart in charts:
        assert "<svg viewBox" in chart
        assert '<table class="numbers">' in chart
        assert "#010" not in chart  # every stand-in colour has become a variable
    assert "<td>80.0%</td><td>58.4% to 91.9%</td>" in charts[0]


def test_the_card_holds_result_and_limits(tmp_path):
    folder = make_run(tmp_path)
    for step in (10, 20):
        (folder / "checkpoints" / f"step_{step:05d}").mkdir(parents=True)
    assert [f.name for f in write_cards(folder)] == ["README.md", "README.md"]
    card = model_card(folder, 20)
    front = card.split("---")[1]
    assert "base_model: some/base\nlibrary_name: peft\ntags:\n- operando" in front
    assert "| step 20 | 16 | 20 | 80.0% | 58.4% to 91.9% |" in card
    assert "9 gained, 1 lost, McNemar exact p = 0.0215" in card
    assert "| learning rate | 0.0001 to 0.0005 over these steps" in card
    assert "| steps | 20 with an update" in card
    assert 'AutoModelForCausalLM.from_pretrained("some/base")' in card
    assert "It was not rewarded for right answers" in card
    assert "4-bit <weights> are slow here" in card
    assert "| steps | 10 with an update" in model_card(folder, 10)


def test_the_card_prefers_the_evaluation_made_for_it(tmp_path):
    folder = make_run(tmp_path)
    (folder / "checkpoints" / "step_00020").mkdir(parents=True)
    write_parquet(
        folder / "evals" / "answers_step_00020_words_raw_greedy.parquet",
        {"model": ["base"] * 40 + ["step 20"] * 40, "correct": [False] * 30 + [True] * 50},
    )
    assert "| step 20 | 40 | 40 | 100.0% |" in model_card(folder, 20)


def test_tokens_in_a_notebook():
    shown = show_tokens([" 3", "<b>"], [[1.0, -0.25], [0.0, 0.0]], ["advantage", "kl"])
    text = shown._repr_html_()
    assert "rgba(202,0,32,0.700)" in text
    assert "rgba(5,113,176,0.353)" in text  # round(127 sqrt(0.25)) = 64; 0.7 * 64 / 127
    assert "<b>" not in text.replace("<b>advantage</b>", "").replace("<b>kl</b>", "")
    with pytest.raises(AssertionError, match="kl: 1 values for 2 tokens"):
        show_tokens([" 3", "+"], [[1.0]], ["kl"])


def test_the_page_runs_its_own_script_and_no_other(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = re.findall(r"script-src '(sha256-[^']*)'", html.unescape(page))
    assert [hash_of(script) for script in scripts] == allowed
    assert "default-src 'none'" in page and "unsafe-eval" not in page
