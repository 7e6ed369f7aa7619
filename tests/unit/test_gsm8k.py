"""GSM8K: verl's scorers bit for bit, a sane one beside them, and files that are wrong."""

from __future__ import annotations

import gzip
import json
import os
import re
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operando.errors import UserError
from operando.recipe.data import Gsm8kTaskConfig
from operando.run import hash_file
from operando.tasks import files
from operando.tasks.base import Task
from operando.tasks.gsm8k import last_number, load_gsm8k, to_example, verl_flexible, verl_strict

DATA = Path(
    os.environ.get("OPERANDO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)
needs_data = pytest.mark.skipif(
    not (DATA / "gsm8k_train.jsonl.gz").is_file(),
    reason=f"no GSM8K files in {DATA}; name their folder in OPERANDO_TEST_DATA",
)

# completion, gold, verl strict, verl flexible, last number
GOLDEN = [
    ("So it is 72.\n#### 72", "72", True, True, True),
    (r"She saves \(\boxed{6}\) dollars by buying 18 flowers.", "6", False, False, True),
    (r"She saves \(\boxed{6}\) dollars by buying 18 flowers.", "18", False, True, False),
    (r"\[ \boxed{575 \text{ miles}} \] after 4 hours", "575", False, False, True),
    (r"\boxed{5} no, \boxed{\$1,000.00}", "1000", False, False, True),
    (r"\boxed{20 - 5 = 15}", "15", False, True, True),
    (r"\boxed{20 - 5}", "5", False, True, False),
    (r"\boxed{12 or 13}", "13", False, True, False),
    (r"\boxed{x} of 72", "72", False, True, False),
    (r"\boxed{71}" + "\n#### 72", "72", True, True, True),
    (r"the answer is \boxed{72", "72", False, True, True),
    ("#### 71", "72", False, False, False),
    ("####72", "72", False, True, True),
    ("####  72", "72", False, True, True),
    ("####\t72", "72", False, True, True),
    ("#### $72", "72", False, True, True),
    ("#### 72$", "72", True, True, True),
    ("#### 72.", "72", False, False, True),
    ("#### 72.00", "72", False, False, True),
    ("#### 072", "72", False, False, True),
    ("#### 72%", "72", True, True, True),
    ("#### 72 dollars", "72", True, True, True),
    ("#### 72 (of 80)", "72", True, False, True),
    ("#### 1,000", "1000", True, False, True),
    ("#### 1,0,0,0", "1000", True, False, False),
    ("#### $1,000.00.", "1000", False, False, True),
    ("#### 1000", "1000", True, True, True),
    ("#### -5", "-5", True, True, True),
    ("#### - 5", "-5", False, False, True),
    ("#### -$5", "-5", False, False, True),
    ("#### $-5", "-5", False, True, True),
    ("#### 5", "-5", False, False, False),
    ("#### 71 #### 72", "72", True, True, True),
    ("#### 72 #### 71", "72", False, False, False),
    ("#### 72 #### none", "72", True, True, False),
    ("#### x", "72", False, False, False),
    ("####", "72", False, False, False),
    ("72 ####", "72", False, True, False),
    ("##### 72", "72", True, True, True),
    ("### 72", "72", False, True, True),
    ("#### .", ".", True, True, None),
    ("#### ,", "", True, False, None),
    ("The answer is 72", "72", False, True, True),
    ("The answer is 72.", "72", False, False, True),
    ("The answer is 72!", "72", False, True, True),
    ("It is 72 dollars, ok.", "72", False, False, True),
    ("It is 72 dollars. Ok.", "72", False, True, True),
    ("80 - 8 is 72 . . .", "72", False, True, True),
    ("80-8=72", "72", False, True, True),
    ("left: 80-72", "72", False, False, False),
    ("left: (80)-72", "72", False, False, False),
    ("It costs $1,000.", "1000", False, False, True),
    ("It costs 1,234,567 dollars", "1234567", False, False, True),
    ("either 3,4", "4", False, False, False),
    ("half, .5", "0.5", False, False, True),
    ("it fell to −5", "-5", False, False, True),
    ("50%", "50", False, True, True),
    ("...", "...", False, True, None),
    (". .", ".", False, True, None),
    ("no number here", "72", False, False, False),
    ("", "72", False, False, False),
    # Only the last 300 characters are searched by verl: "#### 72" has 7, so 293 may follow.
    ("#### 72" + "x" * 293, "72", True, True, True),
    ("#### 72" + "x" * 294, "72", False, True, True),
    ("#### 72" + "x" * 299, "72", False, False, True),
    ("#### 72" + "x" * 300, "72", False, False, True),
]


@pytest.mark.parametrize(("completion", "gold", "strict", "flexible", "number"), GOLDEN)
def test_golden(
    completion: str, gold: str, strict: bool, flexible: bool, number: bool | None
) -> None:
    assert verl_strict(completion, gold).correct is strict
    assert verl_flexible(completion, gold).correct is flexible
    if number is not None:  # None: the gold is no number, which only verl's string compare allows
        assert last_number(completion, gold).correct is number


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("#### 20 - 5 = 15", "15"),
        ("#### 5 x 4 = 20", "20"),
        ("#### x = 72", "72"),
        ("#### 1/2", "0.5"),
        (r"#### $\frac{3}{4}$", "0.75"),
        ("#### 1.5 million", "1500000"),
        ("#### 1 000", "1000"),
        ("#### 12\n\nQ: And 13?", "12"),
        ("####\n12", "12"),
        ("#### 72 clips, altogether.", "72"),
        ("#### 72 (of 80)", "72"),
        ("#### **72**", "72"),
        (r"#### \boxed{72}", "72"),
        ("#### - 4", "-4"),
        ("#### +4", "4"),
        ("#### $1,250.50", "1250.5"),
        ("#### 29.00", "29"),
        ("#### 20%", "20"),
        ("The answer is 1e3", "1000"),
        ("It costs 1 000", "1000"),
        ("Half: 1/2", "0.5"),
        ("Day 1: 5", "5"),
        ("It is 10\n\n12", "12"),
        ("3 + 4 = 7", "7"),
        (r"#### \(18\)", "18"),
        ("#### (18)", "18"),
        ("#### $(18)$", "18"),
        (r"#### \[18\]", "18"),
        ("#### x = (18)", "18"),
        ("#### (20 - 5 = 15)", "15"),
        ("#### **72** (of 80)", "72"),
        ("#### $72$ (of 80).", "72"),
        ("#### 18 (= 9 + 9)", "18"),
        ("#### 20 - 5 = 15 (dollars)", "15"),
        ("#### 540 m^2", "540"),
        ("#### 540 m^{2}.", "540"),
        (r"#### 540\text{ cm}^3", "540"),
        ("#### 20 m2", "20"),
        ("The area is 540 m^2.", "540"),
        ("#### 18 = the total", "18"),
        ("#### 20 - 2 = 18 = the total", "18"),
        ("#### 20 - 2 = the total", None),
        ("#### (12 - 4) / 2", None),
        (r"#### $(20 - 5) \times 2$", None),
        (r"#### \((20 - 5) \times 2\)", None),
        ("#### 72 - (8)", None),
        ("#### 72 - (8 of them)", None),
        (r"#### 3 \times (4 of them)", None),
        ("#### 3 x (4 of them)", None),
        ("#### 3 * (4)", None),
        ("#### 3 (4)", None),
        ("#### 2(3+4)", None),
        ("#### 2(4 apples)", None),
        ("#### 2^(10)", None),
        ("#### 2**10", None),
        ("#### 5x4", None),
        ("#### 5 x^2", None),
        ("#### 5 m^20", None),
        ("#### 72 (of 80) or 73", None),
        ("#### (12) or (13)", None),
        ("On day 2 100 people", "100"),
        ("week 3 450 km", "450"),
        ("he had 5 100 times", "100"),
        ("It costs 1 000 000", "1000000"),
        ("It costs 1\u00a0200", "1200"),
        ("In 2020, 18", "18"),
        ("At day 7, 18.", "18"),
        ("Given x = 5, 18 remain", "18"),
        ("The answer is 5,18", None),
        ("The answer is\n- 18", "18"),
        ("- 17 red\n- $18", "18"),
        ("####\n- 18", "18"),
        ("The answer is\n-18", "-18"),
        ("The answer is - 18", "-18"),
        ("#### 20 - 5", None),
        ("#### 5 x 5", None),
        ("#### 12 or 13", None),
        ("#### 12 (or 13)", None),
        ("#### 12 apples or 13", None),
        ("#### 12, 13", None),
        ("#### 12 13", None),
        ("#### 7:30", None),
        ("#### 7:7", None),
        ("#### 2^10", None),
        ("#### 10–15", None),
        ("#### 10-15", None),
        ("#### 1/0", None),
        ("#### 10/2/5", None),
        ("#### 15 = 20 - 5", None),
        ("The answer is 12 or 13", None),
        ("The answer is 2^10", None),
        ("The answer is 10–15", None),
        ("The answer is 16 - 3", None),
        ("The answer is 16 -3", None),
        ("The answer is 5 x 4", None),
        ("The answer is 7:30", None),
        ("The answer is 1e9999", None),
        (r"The answer is \frac{1.5}{2}", None),
        (r"The answer is 5 \times 4", None),
    ],
)
def test_last_number_reads_one_number_or_none(completion: str, value: str | None) -> None:
    """None: no gold makes it right, whichever number of it the gold is."""
    numbers = re.findall(r"[0-9]+", completion)
    golds = {value, *numbers, *(f"-{n}" for n in numbers)} - {None}
    right = {gold for gold in golds if gold and last_number(completion, gold).correct}
    assert {Decimal(g) for g in right} == ({Decimal(value)} if value else set()), right


def test_what_a_loop_wrote_is_wrong_and_no_error() -> None:
    for text in ("1" * 6000, "#### " + "1" * 6000, "1/" * 3000, "1e999", "#### 1/" + "9" * 6000):
        assert not last_number(text, "72").correct


def test_reasons_say_what_was_read() -> None:
    assert verl_strict("####72", "72").reason == "no '#### n' in the last 300 characters"
    assert verl_strict("#### 72.", "72").reason == "answered 72., gold is 72"
    assert verl_flexible("72 dollars, ok", "72").reason == "answered ,, gold is 72"
    assert last_number("72 #### none", "72").reason == "no number after '####'"
    assert last_number("none", "72").reason == "no number"
    assert last_number("-$1,071.5", "72").reason == "answered -1071.5, gold is 72"


# --- loading -------------------------------------------------------------------------------------

ROWS = [
    {"question": "How many?", "answer": "2+3 = <<2+3=5>>5 $<<5*2=10>>10\nso 10\n#### 10"},
    {"question": "A line\u2028break?", "answer": "It is big.\n#### 1,250"},
    {"question": "Cold?", "answer": "It fell.\n#### -7"},
]


def write_jsonl(file: Path, rows: list[dict[str, str]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    raw = text.encode()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return file


def write_parquet(file: Path, rows: list[dict[str, str]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "test.jsonl", ROWS[:2])


def load(train: Path | str, test: Path | str, **settings: object) -> Task:
    return load_gsm8k(
        Gsm8kTaskConfig.model_validate(
            {"kind": "gsm8k", "train": str(train), "test": str(test)} | settings
        )
    )


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.parquet"])
def test_every_format_gives_the_same_examples(name: str, tmp_path: Path, test_file: Path) -> None:
    write = write_parquet if name.endswith(".parquet") else write_jsonl
    file = write(tmp_path / name, ROWS)
    task = load(file, test_file)
    first = task.train[0]
    assert (first.id, first.question, first.answer) == ("gsm8k/train/0", "How many?", "10")
    assert first.solution == "2+3 = 5 $10\nso 10"
    assert first.columns == {"answer": "10", "solution": first.solution}
    assert [e.answer for e in task.train] == ["10", "1250", "-7"]
    assert task.train[1].question == "A line\u2028break?"
    assert [e.id for e in task.held_out] == ["gsm8k/test/0", "gsm8k/test/1"]
    assert task.source == {
        "kind": "gsm8k",
        "scorer": "last_number",
        "train": str(file),
        "train_rows": 3,
        "train_sha256": hash_file(file),
        "held_out": str(test_file),
        "held_out_rows": 2,
        "held_out_sha256": hash_file(test_file),
    }


@pytest.mark.parametrize(
    ("scorer", "verdicts"),
    [("strict", (False, True)), ("flexible", (True, False)), ("last_number", (True, True))],
)
def test_task_uses_the_named_scorer(
    scorer: str, verdicts: tuple[bool, bool], tmp_path: Path, test_file: Path
) -> None:
    task = load(write_jsonl(tmp_path / "train.jsonl", ROWS), test_file, scorer=scorer)
    plain = task.verify(task.held_out[0], "it is 10", False).correct
    comma = task.verify(task.held_out[1], "#### 1,250", False).correct
    assert (plain, comma) == verdicts
    # Truncation is logged apart: the verdict goes by the text.
    for truncated in (False, True):
        assert task.verify(task.held_out[0], "#### 10", truncated).correct


def test_held_out_is_the_first_n(tmp_path: Path, test_file: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    task = load(train, test_file, num_held_out=1)
    assert [e.id for e in task.held_out] == ["gsm8k/test/0"]
    with pytest.raises(UserError, match="num_held_out = 3, but .* only 2"):
        load(train, test_file, num_held_out=3)
    assert load(train, test_file, num_train=1).train == load(train, test_file).train[:1]
    with pytest.raises(UserError, match="num_train = 99, but .* only"):
        load(train, test_file, num_train=99)


def test_same_file_for_both_is_an_error(test_file: Path) -> None:
    with pytest.raises(UserError, match="held-out problems would be trained on"):
        load(test_file, test_file)


def test_missing_file_names_the_nearest(tmp_path: Path, test_file: Path) -> None:
    write_jsonl(tmp_path / "gsm8k_train.jsonl.gz", ROWS)
    with pytest.raises(UserError, match=r"task.train = .*Did you mean 'gsm8k_train.jsonl.gz'"):
        load(tmp_path / "gsm8k_trian.jsonl.gz", test_file)
    with pytest.raises(UserError, match=r"Data files in .*: gsm8k_train.jsonl.gz, test.jsonl"):
        load(tmp_path, test_file)


def test_unknown_suffix(tmp_path: Path, test_file: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("question,answer\n")
    with pytest.raises(UserError, match=r"ending in \.jsonl, \.jsonl\.gz, \.parquet"):
        load(file, test_file)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ('{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n', r":2: no `answer`"),
        ('\n{"question": "q", "anwser": "#### 1"}', r":2: no `answer`. Did you mean 'anwser'"),
        ('{"question": "", "answer": "#### 1"}', r":1: `question` must be text, got ''"),
        ('{"question": "q", "answer": 1}', r":1: `answer` must be text, got 1"),
        ('{"question": "q", "answer": "it is 1"}', r":1: the answer has no '####'"),
        ('{"question": "q", "answer": "#### one"}', r":1: expected a number .* got 'one'"),
        ('{"question": "q"', r":1 is damaged"),
        ("[1]", r":1: expected an object"),
    ],
)
def test_broken_rows(text: str, match: str, tmp_path: Path, test_file: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=match):
        load(file, test_file)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.parquet"])
def test_damaged_files(name: str, tmp_path: Path, test_file: Path) -> None:
    whole = write_jsonl(tmp_path / "whole.jsonl.gz", ROWS).read_bytes()
    damaged = {
        "train.jsonl": b"\xff\xfe",
        "train.jsonl.gz": whole[:-9],
        "train.parquet": b"PAR1 but not really",
    }
    file = tmp_path / name
    file.write_bytes(damaged[name])
    said = rf"{name}:? (can't be read|not a readable parquet|is not a text file)"
    with pytest.raises(UserError, match=said):
        load(file, test_file)


def test_parquet_row_without_gold(tmp_path: Path, test_file: Path) -> None:
    rows = [ROWS[0], {"question": "q", "answer": "none"}]
    file = write_parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(UserError, match=r"train.parquet: row 1: the answer has no '####'"):
        load(file, test_file)


def test_hub_files_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str, str]] = []

    def download(repo_id: str, repo_type: str, filename: str) -> str:
        asked.append((repo_id, repo_type, filename))
        rows = ROWS if "train" in filename else ROWS[:1]
        return str(write_parquet(tmp_path / Path(filename).name, rows))

    monkeypatch.setattr(files, "hf_hub_download", download)
    task = load_gsm8k(Gsm8kTaskConfig(kind="gsm8k"))
    assert asked == [
        ("openai/gsm8k", "dataset", "main/test-00000-of-00001.parquet"),
        ("openai/gsm8k", "dataset", "main/train-00000-of-00001.parquet"),
    ]
    assert task.source["train"] == "openai/gsm8k"


def test_unreachable_hub_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**asked: str) -> str:
        raise ConnectionError("no route to host\nmore\nand more")

    monkeypatch.setattr(files, "hf_hub_download", refuse)
    with pytest.raises(UserError) as caught:
        load_gsm8k(Gsm8kTaskConfig(kind="gsm8k"))
    assert str(caught.value) == (
        "task.test = 'openai/gsm8k' can't be downloaded from the Hugging Face hub "
        "(no route to host). With local files (.jsonl, .jsonl.gz or .parquet): "
        "task.train=PATH task.test=PATH"
    )


# --- the real files ------------------------------------------------------------------------------


@needs_data
def test_every_gold_solution_is_right() -> None:
    task = load(DATA / "gsm8k_train.jsonl.gz", DATA / "gsm8k_test.jsonl")
    assert (len(task.train), len(task.held_out)) == (7473, 1319)
    for example in [*task.train, *task.held_out]:
        text = f" {example.solution} #### {example.answer}"
        for scorer in (verl_strict, verl_flexible, last_number):
            verdict = scorer(text, example.answer)
            assert verdict.correct, (scorer.__name__, example.id, verdict.reason)
        assert "<<" not in example.solution
        assert ">>" not in example.solution


@needs_data
def test_original_answers_with_commas_fail_only_in_verl_flexible() -> None:
    """93 of the 8792 golds have a comma; verl's flexible scorer calls those answers wrong."""
    raw = gzip.decompress((DATA / "gsm8k_train.jsonl.gz").read_bytes()).decode()
    raw += (DATA / "gsm8k_test.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["answer"] for line in raw.split("\n") if line]
    wrong = 0
    for i, answer in enumerate(answers):
        gold = to_example(files.Row({"question": "q", "answer": answer}, "here"), "train", i).answer
        # verl's own way to the gold answer
        found = re.search("#### (\\-?[0-9\\.\\,]+)", answer)
        assert found is not None
        assert found.group(1).replace(",", "") == gold
        assert verl_strict(answer, gold).correct
        assert last_number(answer, gold).correct
        wrong += not verl_flexible(answer, gold).correct
    assert (len(answers), wrong) == (8792, 93)
