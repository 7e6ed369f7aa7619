"""A task of one's own: files of every kind, verifiers by hand, splits that share no question."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operando.errors import UserError
from operando.models.load import load_model
from operando.recipe.data import FileTaskConfig, ModelConfig, PromptConfig, WordsTaskConfig
from operando.recipe.run import Recipe
from operando.recipe_io import check
from operando.rewards.base import RewardLog, TrainerState, call_reward
from operando.run import hash_file
from operando.tasks.base import Task
from operando.tasks.file_task import load_file_task, question_key, split_by_hash
from operando.tasks.load import given_task, load_task
from operando.tasks.prompts import make_prompts
from operando.tasks.verifiers import verifier
from operando.types import Example, Prompt, Rollout, Verdict

DAY = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = [
    {"ask": "Capital of Peru?", "gold": "Lima", "level": 1},
    {"ask": "Capital of Mali?", "gold": "Bamako", "level": 2},
    {"ask": 'Say "a, b"?', "gold": "a, b", "level": 3},
]
CSV = (
    'ask,gold,level\nCapital of Peru?,Lima,1\nCapital of Mali?,Bamako,2\n"Say ""a, b""?","a, b",3\n'
)


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match "".join(file.suffixes):
        case ".jsonl":
            file.write_text(lines)
        case ".jsonl.gz":
            file.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            file.write_text(json.dumps(rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        case _:
            raise AssertionError(file)
    return file


def config(train: Path | str, **keys: object) -> FileTaskConfig:
    given = {"question": "ask", "answer": "gold", "verify": "exact", "held_out_share": 0.34}
    if "template" in keys:
        del given["question"]
    return FileTaskConfig.model_validate({"kind": "file", "train": str(train)} | given | keys)


def load(train: Path | str, **keys: object) -> Task:
    return load_file_task(config(train, **keys))


def load_rows(tmp_path: Path, rows: list[dict[str, object]], **keys: object) -> Task:
    return load(write(tmp_path / "rows.jsonl", rows), **keys)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv"])
def test_every_kind_of_file_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "a.csv":
        file.write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode())  # as Excel does
    else:
        write(file, list(ROWS))
    task = load(file)
    both = sorted([*task.train, *task.held_out], key=lambda e: e.id)
    assert [(e.id, e.question, e.answer) for e in both] == [
        (f"file/train/{i}", row["ask"], row["gold"]) for i, row in enumerate(ROWS)
    ]
    for example, row in zip(both, ROWS, strict=True):
        level = str(row["level"]) if name == "a.csv" else row["level"]
        assert example.columns == {**row, "level": level}
    assert (len(task.train), len(task.held_out)) == (2, 1)
    assert task.source == {
        "kind": "file",
        "grader": "exact",
        "train": str(file),
        "train_sha256": hash_file(file),
        "held_out": "0.34 of train by seed 0",
        "train_rows": 2,
        "held_out_rows": 1,
    }


def test_all_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", list(ROWS[:1]))
    (tmp_path / "a.csv").write_text("ask,gold\nFirst?,yes\n")
    (tmp_path / "notes.txt").write_text("no data")
    task = load(tmp_path)
    both = sorted([*task.train, *task.held_out], key=lambda e: e.id)
    assert [e.question for e in both] == ["First?", "Capital of Peru?"]
    assert [e.columns for e in both] == [
        {"ask": "First?", "gold": "yes", "level": None},
        {"ask": "Capital of Peru?", "gold": "Lima", "level": 1},
    ]


def test_a_hub_id_needs_datasets_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"someone/things'.*pip install datasets.*local file"):
        load("someone/things")
    asked: list[tuple[str, str | None, str]] = []
    module = ModuleType("datasets")

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, object]]:
        asked.append((name, config, split))
        if split == "nope":
            raise ValueError("Unknown split 'nope'.\nmore")
        return list(ROWS[:2]) if split != "test" else list(ROWS[2:])

    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    task = load("someone/things/main:validation", test="someone/things")
    assert asked == [("someone/things", "main", "validation"), ("someone/things", None, "test")]
    assert [e.answer for e in task.train] == ["Lima", "Bamako"]
    assert [e.id for e in task.held_out] == ["file/test/0"]
    with pytest.raises(UserError, match=r"can't be downloaded .* hub: Unknown split 'nope'\.$"):
        load("someone/things:nope")


# --- columns -------------------------------------------------------------------------------------


def test_a_template_puts_columns_together(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"p": "It is {hot}.", "q": f"Why {i}?", "gold": i} for i in (1, 2)
    ]
    task = load_rows(tmp_path, rows, template="{{{p}}}\n{q}\nA. {gold}", held_out_share=0.5)
    assert {e.question for e in [*task.train, *task.held_out]} == {
        "{It is {hot}.}\nWhy 1?\nA. 1",
        "{It is {hot}.}\nWhy 2?\nA. 2",
    }


def test_every_column_reaches_rewards_verifier_and_labels(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def verify(example, completion):\n"
        "    return completion == example.answer * example.columns['level']\n"
        "def labels(example, completion):\n"
        "    return {'high': example.columns['level'] > 1}\n"
    )
    task = load_rows(tmp_path, list(ROWS), verify=f"{mine}:verify", labels=f"{mine}:labels")
    by_gold = {e.answer: e for e in [*task.train, *task.held_out]}
    assert task.verify(by_gold["Bamako"], "BamakoBamako", False) == Verdict(True, "right")
    assert task.verify(by_gold["Bamako"], "Bamako", True) == Verdict(False, "wrong")
    assert task.labels is not None
    assert task.labels(by_gold["Lima"], "", False) == {"high": False}
    assert task.labels(by_gold["Bamako"], "", False) == {"high": True}
    assert task.source["verify_sha256"] == task.source["labels_sha256"] == hash_file(mine)

    def pay(completions: list[str], level: list[int], ask: list[str], **_: object) -> list[float]:
        return [n + ("Peru" in q) / 2 for n, q in zip(level, ask, strict=True)]

    rollouts = [
        Rollout(Prompt(by_gold[gold], "p", (1,)), 0, i, "said", (1,), (0.0,), False)
        for i, gold in enumerate(("Bamako", "Lima"))
    ]
    paid = call_reward("mine", pay, rollouts, None, TrainerState(1, 2), RewardLog())
    assert paid == [2.0, 1.5]


def test_a_system_message_is_a_rows_own(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"ask": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"}]},
        {"ask": [{"role": "user", "content": "B?"}]},
    ]
    task = load_rows(tmp_path, [row | {"gold": "x"} for row in rows], held_out_share=0.5)
    asked = {e.question: e for e in [*task.train, *task.held_out]}
    assert {q: e.system for q, e in asked.items()} == {"A?": "Be brief.", "B?": ""}
    tokenizer = load_model(ModelConfig()).tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = PromptConfig(format="chat")
    texts = [p.text for p in make_prompts(list(asked.values()), [], chat, tokenizer, 999, DAY)]
    assert sorted(texts) == ["[system]Be brief.[user]A?[assistant]", "[user]B?[assistant]"]
    with pytest.raises(UserError, match='prompt.format = "chat"'):
        make_prompts([asked["A?"]], [], PromptConfig(), tokenizer, 999, DAY)
    with pytest.raises(UserError, match="leave one out"):
        both = PromptConfig(format="chat", system="Sing.")
        make_prompts([asked["A?"]], [], both, tokenizer, 999, DAY)


USER = {"role": "user", "content": "A?"}
SAID = {"role": "assistant", "content": "B."}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"ask": [USER, SAID, USER]}, "messages of user, assistant, user; .* Several turns"),
        ({"ask": [USER, {"role": "tool", "content": "3"}]}, "messages of user, tool; "),
        ({"ask": [{"role": "user", "content": [{"type": "image"}]}]}, "images are not read"),
        ({"ask": ["A?"]}, "expected one user message"),
        ({"ask": "A?", "tools": [{"name": "search"}]}, "has no calls of tools"),
        ({"ask": "  "}, "rows.jsonl:1: task.question: the column 'ask' is empty there"),
        ({"ask": None}, "the column 'ask' is empty there"),
        ({"ask": "A?", "gold": ""}, "task.answer: the column 'gold' is empty there"),
        ({"ask": "A?", "gold": ["x"]}, "task.answer: .* must be a text or a number"),
        ({"ask": "A?", "completions": "x"}, "'completions' has the name of what every reward"),
        ({"quest": "A?"}, r"no column 'ask'\. Columns there: gold, quest"),
        ({"ask": "A?", "pic": {"bytes": "..", "path": "a.png"}}, "'pic' holds bytes"),
    ],
)
def test_a_row_that_can_not_be_trained_on_is_one_sentence(
    row: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        load_rows(tmp_path, [{"gold": "x"} | row] * 2)


def test_a_column_of_mixed_kinds_is_refused_before_the_first_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"ask": str(i), "gold": "x", "n": n} for i, n in enumerate((1, "b"))
    ]
    with pytest.raises(UserError, match="column 'n' must hold values of one kind"):
        load_rows(tmp_path, rows)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"question": "aks"},
            r"task.question = 'aks': .*:1 has no column 'aks'\. Did you mean 'ask'",
        ),
        ({"template": "{ask} {golf}"}, r"no column 'golf'\. Did you mean 'gold'"),
        ({"template": "{ask"}, "expected '}'"),
        ({"system": "no"}, "task.system = 'no'"),
        ({"num_held_out": 9}, "task.num_held_out = 9, but there are only 1"),
        ({"verify": "regex", "pattern": "("}, "task.pattern = '\\(' is not a regular expression"),
        ({"verify": "regex", "pattern": "x"}, "has no group"),
        ({"verify": "number"}, "verify = 'number' needs a number, got 'Lima'"),
        ({"verify": "choice"}, "verify = 'choice' needs a letter A to D, got 'Lima'"),
        ({"verify": "gone.py:verify"}, "task.verify 'gone.py:verify': there is no file"),
    ],
)
def test_a_setting_that_does_not_fit_the_data_is_one_sentence(
    keys: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        load_rows(tmp_path, list(ROWS), **keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"verify": "code"}, 'Use kind = "code"'),
        ({"verify": "exakt"}, "Did you mean 'exact'"),
        ({"question": ""}, "either question = COLUMN or template"),
        ({"template": "{ask}"}, "either question = COLUMN or template"),
        ({"answer": ""}, "verify = 'exact' needs answer = COLUMN"),
        ({"verify": "regex"}, "go together"),
        ({"pattern": "(.)"}, "go together"),
    ],
)
def test_settings_that_exclude_each_other_are_told_at_once(
    keys: dict[str, object], said: str
) -> None:
    table = {"kind": "file", "train": "a.csv", "question": "q", "answer": "a", "verify": "exact"}
    with pytest.raises(UserError, match=said):
        check(Recipe, recipe_tables(table | keys), "own.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ask,gold\nA?,x,y\n", "a.csv:2: 3 fields, but the first line names 2 columns: ask, gold"),
        ("ask,ask\nA?,x\n", "a column is named twice"),
        ('ask,gold\n"A?,x\n', "not readable csv"),
        ("ask,gold\n", "task.train has no rows"),
        ("", "task.train has no rows"),
    ],
)
def test_a_csv_that_is_amiss_names_its_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        load(tmp_path / "a.csv")


def test_what_is_no_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", list(ROWS))
    with pytest.raises(
        UserError, match=r"task.train = .* no such file.* Did you mean 'train.jsonl'"
    ):
        load(tmp_path / "trian.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in it ends in .jsonl"):
        load(tmp_path / "empty")
    (tmp_path / "a.json").write_text('{"ask": 1}')
    with pytest.raises(UserError, match="expected a list of objects.* is .jsonl"):
        load(tmp_path / "a.json")


# --- verifiers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verify", "gold", "completion", "right"),
    [
        ("exact", "New  York", " New York\n", True),
        ("exact", "New York", "<think>Rome? No.</think>\nNew York", True),
        ("exact", "New York", "New York.", False),
        ("exact", "New York", "new york", False),
        ("exact", "New York", "It is New York", False),
        ("exact", "New York", "", False),
        ("number", "$1,250", "so 1250.0", True),
        ("number", "1250", "1250 or 1251", False),
        ("number", "-3", "it fell to -3", True),
        ("choice", "(b)", "The answer is B.", True),
        ("choice", "B", "A or B", False),
        ("math", r"\frac{1}{2}", r"so \boxed{\frac12}", True),
        ("math", r"\frac{1}{2}", r"so \boxed{2}", False),
        ("regex", "Lima", "answer: Rome. answer: Lima.", True),
        ("regex", "Rome", "answer: Rome. answer: Lima.", False),
        ("regex", "Lima", "Lima", False),
    ],
)
def test_verifiers_by_hand(
    verify: str, gold: str, completion: str, right: bool, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [{"ask": f"{i}?", "gold": gold} for i in range(2)]
    extra = {"pattern": r"answer: (\w+)"} if verify == "regex" else {}
    task = load_rows(tmp_path, rows, verify=verify, held_out_share=0.5, **extra)
    for truncated in (False, True):
        assert task.verify(task.train[0], completion, truncated).correct is right


ONE = Example("file/train/0", "Q?", "x")


def always(said: object) -> Callable[[Example, str], object]:
    def verify(example: Example, completion: str) -> object:
        return said

    return verify


def test_a_verifier_of_ones_own_says_yes_no_or_why() -> None:
    assert verifier(always((False, "no\ncity")))(ONE, "", False).reason == "no\\ncity"
    assert verifier(always((True, "named")))(ONE, "", False) == Verdict(True, "named")
    for wrong in (0.5, 1, None, "yes", (True,), (0.5, "half"), (True, 1)):
        with pytest.raises(UserError, match="expected True, False, or either with a reason"):
            verifier(always(wrong))(ONE, "", False)
    with pytest.raises(UserError, match=r"verify takes \(said.*; expected verify\(example, com"):
        verifier(always)  # pyright: ignore[reportArgumentType]


def test_what_a_verifier_raises_names_its_line_and_the_completion(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def verify(example, completion):\n    return 1 / 0\n")
    task = load_rows(tmp_path, list(ROWS), verify=f"{tmp_path}/bad.py:verify")
    with pytest.raises(UserError) as caught:
        task.verify(task.train[0], "Lima\x1b", False)
    said = str(caught.value)
    assert "ZeroDivisionError" in said and f"{tmp_path}/bad.py:2 in verify" in said
    assert "verifiers.py" not in said and "completion 'Lima\\x1b'" in said


# --- splits --------------------------------------------------------------------------------------


def many(num: int) -> list[Example]:
    return [Example(str(i), f"Question {i % 80}?" + " " * (i > 99), str(i)) for i in range(num)]


def test_a_share_is_held_out_and_no_question_is_on_both_sides() -> None:
    train, held_out = split_by_hash(many(120), 0.25, seed=3)
    sides = [{question_key(e) for e in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[1]) == 20 and len(sides[0]) == 60
    assert len(train) + len(held_out) == 120
    again = split_by_hash(many(120)[::-1], 0.25, seed=3)
    assert {e.id for e in again[1]} == {e.id for e in held_out}
    other = {e.id for e in split_by_hash(many(120), 0.25, seed=4)[1]}
    assert other != {e.id for e in held_out}
    assert [e.id for e in held_out] != sorted((e.id for e in held_out), key=int), "a sample"


def test_case_does_not_put_one_question_on_both_sides() -> None:
    pairs = [
        Example(f"{i}{u}", f"{'Q' if u else 'q'} {i}?", "x") for i in range(40) for u in (0, 1)
    ]
    _, held_out = split_by_hash(pairs, 0.5, seed=0)
    ids = {e.id for e in held_out}
    assert len(ids) == 40 and all((f"{i}0" in ids) == (f"{i}1" in ids) for i in range(40))


def test_a_question_in_both_files_is_an_error_that_counts_or_is_dropped(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*ROWS, {"ask": "New?", "gold": "y", "level": 4}])
    other = [{"ask": "  Capital   of Peru?", "gold": "Lima", "level": 1}, dict(ROWS[1])]
    test = write(tmp_path / "test.jsonl", other)
    with pytest.raises(UserError, match=r"^2 of 4 questions of task.train.*drop_train"):
        load(train, test=str(test))
    task = load(train, test=str(test), overlap="drop_train")
    assert [e.question for e in task.train] == ['Say "a, b"?', "New?"] and len(task.held_out) == 2
    assert task.source["train_rows"] == 2


# --- in a recipe and in Python -------------------------------------------------------------------


def recipe_tables(task: dict[str, object], **more: object) -> dict[str, object]:
    return {
        "name": "own",
        "steps": 2,
        "task": task,
        "rewards": {"correct": {"kind": "correct"}},
    } | more


def test_a_worked_answer_of_a_file_is_the_answer_unless_the_recipe_says_otherwise() -> None:
    table: dict[str, object] = config("a.csv").model_dump(mode="json", exclude_none=True)

    def template(**more: object) -> str:
        return check(Recipe, recipe_tables(table, **more), "own").prompt.answer_template

    assert template() == template(prompt={"few_shot": 2}) == " {answer}"
    assert template(prompt={"answer_template": " is {answer}"}) == " is {answer}"
    words = check(Recipe, recipe_tables({"kind": "words"}), "own")
    assert words.prompt.answer_template == " {solution} #### {answer}"


def test_a_task_of_python_is_checked_and_never_taken_for_another() -> None:
    recipe = check(Recipe, recipe_tables({"kind": "python", "name": "mine"}), "own")
    train = [Example("a", "A?", "x", columns={"n": 1})]
    held_out = [Example("b", "B?", "y", columns={"n": 2})]
    said_yes = verifier(always(True))
    task = Task("mine", train, held_out, said_yes)
    assert given_task(recipe.task, task) is task
    with pytest.raises(UserError, match="the task 'mine' is a Task object of a Python program"):
        load_task(recipe.task)
    with pytest.raises(UserError, match="set kind = 'python'"):
        given_task(WordsTaskConfig(kind="words"), task)
    with pytest.raises(UserError, match="held-out split is empty"):
        given_task(recipe.task, Task("mine", train, [], said_yes))
    with pytest.raises(UserError, match="'b' has columns \\[\\], the first example \\['n'\\]"):
        given_task(recipe.task, Task("mine", train, [Example("b", "B?", "y")], said_yes))
    with pytest.raises(UserError, match="1 of 1 training questions are held out too"):
        given_task(recipe.task, Task("mine", train, train, said_yes))
