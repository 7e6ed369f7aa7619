"""Text from outside: whatever it holds, it is kept, shown and sent, and no run ends by it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operando.errors import UserError
from operando.report.html import embed
from operando.rewards.base import RewardLog
from operando.run import write_parquet
from operando.tasks.files import read_rows
from operando.tasks.sandbox import Job, Limits, Request, _Talk, run_python
from operando.text import encodable, lone_surrogate, one_line, shown
from operando.types import Verdict

HOSTILE = (
    "\ud800",
    "\udfff",
    "\x00",
    "\x1b[2J\x1b]0;x\x07",
    "\u202e",
    "\u2066",
    "\x9b31m",
    "\r",
    "\u2028",
    "\x85",
    "x" * 10_000_000,
    "</script>",
    "\ud83d\ude00",
)
texts = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=()), max_size=40),
    st.tuples(st.sampled_from(HOSTILE[:10]), st.text(max_size=5)).map("".join),
)
BAD = set("\x00\x07\x1b\r\x7f\x85\x9b\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(text=texts)
def test_every_door_gives_text_that_every_writer_takes(text: str) -> None:
    for clean in (encodable(text), shown(text), one_line(text), Verdict(True, text).reason):
        assert clean.encode().decode() == clean
    assert not BAD & set(shown(text)) and not BAD & set(one_line(text))
    assert "\n" not in one_line(text) and len(one_line(text)) <= 2_000 * 10
    assert shown(str(UserError(text))) == str(UserError(text))
    assert embed({"a": [text]}).encode()


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60))
def test_text_that_can_be_said_is_graded_as_it_is(text: str) -> None:
    assert encodable(text) == text and lone_surrogate(text) is None


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=texts)
def test_what_a_reward_logs_is_written(tmp_path: Path, text: str) -> None:
    log = RewardLog()
    log.log_extra("said", [text, "a"])
    log.log_extra("nested", [[text], [{"k": text}["k"]]])
    write_parquet(tmp_path / "t.parquet", log.columns)
    assert pq.read_table(tmp_path / "t.parquet")["said"].to_pylist() == [encodable(text), "a"]


def test_a_column_that_no_parquet_holds_or_that_is_the_runs_own_is_refused() -> None:
    log = RewardLog()
    with pytest.raises(UserError, match="of one kind"):
        log.log_extra("mixed", [1, "a"])
    for name in ("correct", "rewards/r", "shift_touched", "a\x1bb", "", "\ud800"):
        with pytest.raises(UserError, match="log_extra"):
            log.log_extra(name, [1.0])
    with pytest.raises(UserError, match="on one line"):
        log.log_metric("a\nb", 1.0)


@pytest.mark.parametrize("raised", ["'\\ud800'", "'\\x00\\x1b[2J'", "chr(0x202e) * 10**6"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_an_answer_raises_is_one_line_of_text(raised: str, inside: bool) -> None:
    line = f"raise ValueError({raised})"
    program = f"def f():\n    {line}" if inside else line
    outcome = run_python(Job(program, (Request("f()"),), Limits(2, 512)))
    reply = outcome.replies[0]
    said = outcome.detail if reply is None else reply.text
    assert said.startswith("ValueError: ") and said == one_line(said) and said.encode()


def test_a_value_that_encode_never_writes_is_no_value() -> None:
    """A program that has taken over the pipe may send any text for a value."""
    for text, is_value in (('"\\ud800"', True), ('"\ud800"', False), ('"\x00"', False)):
        talk = _Talk(Job("", (Request("f()"),)), ())
        for row in ({"state": "ready", "value": ""}, {"key": talk.keys[0], "state": "value"}):
            talk._line(json.dumps({"value": text, **row}).encode())
        (reply,) = talk.outcome().replies
        assert reply is not None and reply.is_value == is_value and reply.text.encode()


def test_a_row_with_a_lone_surrogate_names_its_line_and_controls_are_data(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"q": "a\x00\x1b\u202e"}) + "\n" + '{"q": ["\\ud800"]}\n')
    rows = read_rows(file)
    assert next(rows).values == {"q": "a\x00\x1b\u202e"}
    with pytest.raises(UserError, match=r"rows.jsonl:2: a lone surrogate"):
        next(rows)
    for broken in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        file.write_text(broken)
        with pytest.raises(UserError, match=r"rows.jsonl:1 is damaged"):
            next(read_rows(file))
