"""MMLU: which letter is an answer, and the forms its files come in."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operando.errors import UserError
from operando.recipe.data import MmluTaskConfig
from operando.tasks import files
from operando.tasks.mmlu import find_letter, load_mmlu

DATA = Path(
    os.environ.get("OPERANDO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)
FILE = DATA / "mmlu_csv.tar.gz"
needs_data = pytest.mark.skipif(
    not FILE.is_file(), reason=f"no MMLU files in {DATA}; name their folder in OPERANDO_TEST_DATA"
)
TEST = 'question,choice0,choice1,choice2,choice3,answer\n"1, 2, ?",3,4,5,6,0\nWhy?,w,x,y,z,3\n'
DEV = "Q?,a,b,c,d,B\n"  # as hendrycks wrote them: no header, letters


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        (" B", "B"),
        (" (C) because", "C"),
        ("The answer is **D**.", "D"),
        (r"\boxed{A}", "A"),
        ("A.", "A"),
        ("A is right", "A"),
        ("B or C", None),  # a choice of two is none
        ("A, B", None),
        ("The answer is A or B.", None),
        ("The answer is (A) and (B).", None),
        (r"\boxed{A} or \boxed{B}", "B"),  # the last that is stated
        ("Vitamin C is needed, so the answer is B.", "B"),
        ("<think>Could be A or C.</think>\nC", "C"),
        ("<think>The answer is A.</think> B", "B"),
        ("The answer is A.</think>B", "B"),  # the prompt opened it
        ("<think>The answer is A", None),  # never said
        ("the answer is d", "D"),
        ("Answer: (b)", "B"),
        ("**Answer:** B", "B"),
        ("answer_B", "B"),
        ("The correct answer is option C.", "C"),
        ('Answer: "D"', "D"),
        ("The answer is A. No, the answer is C.", "C"),
        ("'C'", "C"),
        ("b", "B"),
        ("(b)", "B"),
        ("\uff22", "B"),  # full-width
        ("A is wrong; the answer is B", "B"),
        ("A is wrong; B is right", "B"),
        ("A could be, but it is D", "D"),
        ("A Roman emperor, so B", "B"),
        ("B. Because A is no bone", "B"),
        ("B, because A is no bone", "B"),
        ("It is between A and C", None),
        ("The answer is a dog, which is C", "C"),
        ("the answer is not A", None),
        ("A is wrong", None),
        ("It's not B, I'd say. A isn't it. Then C", "C"),
        ("It needs vitamin C", "C"),  # a limit
        ("The bone is D", "D"),
        (" B\n\nQuestion: Why?\nAnswer: C", "B"),  # a next question of its own
        ("Apples and Bananas", None),  # a letter inside a word
        ("A dog bites: C", "C"),  # the article
        ("a b c d", None),
        ("A-level, D2, C++, A's, B_1", None),
        (
            "Let's evaluate each option:\n\nA. x is wrong."
            "\nB. y holds.\n\nSo the correct one is B.",
            "B",
        ),
        ("Let us consider each option:\nA) no\nB) yes\n\nTherefore, B is correct.", "B"),
        ("... consider each option:\nA) no\nB) yes\n\nTherefore, B is correct.", "B"),
        ("Let's find the answer:\n\nA. x is wrong.\nB. y holds.\n\nSo the correct one is B.", "B"),
        ("The answer is:\n\nA. Paris", "A"),
        ("The answer is:\n\nB. Paris\n\nC. is in Spain.", "B"),
        ("The answer is B. The remaining choice is D, which is wrong.", "B"),
        ("The answer is B. A common wrong choice is C.", "B"),
        ("The answer is B. A common wrong answer is C.", "B"),
        ("The answer is B. The other answer is C.", "B"),
        ("The answer is B. The next best option is C.", "B"),
        ("The answer is B. The correct option is C.", "B"),  # "answer" wins
        ("My answer: B. The other option is C, which fails.", "B"),
        ("An incorrect option is A, a wrong choice is D", None),
        ("Option: C", "C"),  # the only letter
        ("The correct option is B. The other option is C.", "B"),
        ("The best choice is **(D)**, not A", "D"),
        ("The correct one is: C. A fails", "C"),
        ("The correct answer choice is B", "B"),
        ("The final answer is option (C).", "C"),
        ("E", None),
        ("", None),
    ],
)
def test_the_letter_that_a_completion_answers_with(completion: str, letter: str | None) -> None:
    assert find_letter(completion) == letter


def test_a_long_row_of_marks_is_read_in_one_pass() -> None:
    n = 300_000  # a second pass for every mark would go on for hours
    for text in ("*" * n, "answer is " + "*" * n, "answer:" * n, "(" * n + "E"):
        assert find_letter(text) is None


def folder(path: Path) -> Path:
    for split, text in (("test", TEST), ("dev", DEV)):
        (path / split).mkdir(parents=True)
        (path / split / f"logic_{split}.csv").write_text(text)
    return path


def test_folder_and_archive_give_the_same_examples(tmp_path: Path) -> None:
    there = folder(tmp_path / "mmlu")
    archive = tmp_path / "mmlu.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(there, "mmlu")
    task = load_mmlu(MmluTaskConfig(kind="mmlu", source=str(there)))
    assert task.held_out == load_mmlu(MmluTaskConfig(kind="mmlu", source=str(archive))).held_out
    by_id = {e.id: e for e in task.held_out}
    assert set(by_id) == {"mmlu/test/logic/0", "mmlu/test/logic/1"}
    first = by_id["mmlu/test/logic/0"]
    assert first.question == "1, 2, ?\nA. 3\nB. 4\nC. 5\nD. 6"
    assert first.answer == "A" and by_id["mmlu/test/logic/1"].answer == "D"
    assert [e.answer for e in task.train] == ["B"]
    assert task.verify(first, " A", False).correct
    assert task.verify(first, " B", False).reason == "answered B, gold is A"


def test_hub_files_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def download(repo_id: str, repo_type: str, filename: str) -> str:
        asked.append(f"{repo_type} {repo_id} {filename}")
        row = {"question": "Q?", "subject": "logic", "choices": list("wxyz"), "answer": 2}
        file = tmp_path / Path(filename).name
        pq.write_table(pa.Table.from_pylist([row]), file)
        return str(file)

    monkeypatch.setattr(files, "hf_hub_download", download)
    task = load_mmlu(MmluTaskConfig(kind="mmlu"))
    assert asked == [
        "dataset cais/mmlu all/test-00000-of-00001.parquet",
        "dataset cais/mmlu all/dev-00000-of-00001.parquet",
    ]
    assert task.held_out[0].question == "Q?\nA. w\nB. x\nC. y\nD. z"
    assert task.held_out[0].answer == "C"


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("Q?,a,b,c,A\n", "row 1: expected question, 4 choices, answer; got 5 fields"),
        ("Q?,a,b,c,d,E\n", "row 1: the answer must be A to D or 0 to 3, got 'E'"),
        ("Q?,a,b,c,d,4\n", "got '4'"),
        ('"Q?,a', "not readable csv"),
        ("", "the test split has no rows"),
    ],
)
def test_broken_files(test: str, said: str, tmp_path: Path) -> None:
    there = folder(tmp_path / "mmlu")
    (there / "test" / "logic_test.csv").write_text(test)
    with pytest.raises(UserError, match=said):
        load_mmlu(MmluTaskConfig(kind="mmlu", source=str(there)))


def test_sources_that_are_none(tmp_path: Path) -> None:
    def load(source: Path) -> None:
        load_mmlu(MmluTaskConfig(kind="mmlu", source=str(source)))

    with pytest.raises(UserError, match="no file like anatomy_test.csv"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.tar.gz")
    (tmp_path / "bad.tar.gz").write_text("no archive")
    with pytest.raises(UserError, match=r"not a readable .tar.gz"):
        load(tmp_path / "bad.tar.gz")
    (tmp_path / "one.parquet").write_text("")
    with pytest.raises(UserError, match="one parquet file holds one split"):
        load(tmp_path / "one.parquet")


@needs_data
def test_the_real_files_have_the_official_counts_and_mixed_subjects() -> None:
    task = load_mmlu(MmluTaskConfig(kind="mmlu", source=str(FILE)))
    assert (len(task.train), len(task.held_out)) == (285, 14_042)
    assert all(task.verify(e, f" {e.answer}", False).correct for e in task.held_out)
    subjects = {e.columns["subject"] for e in task.held_out}
    assert len(subjects) == 57
    # 500 of 14,042 over 57 subjects: a block of the file would hold three of them
    assert len({e.columns["subject"] for e in task.held_out[:500]}) > 50
