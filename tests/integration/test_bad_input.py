"""A full or read-only disk, odd tokenizers, prompts too long, empty data: one message each."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operando import cli
from tests.integration.runs import metric_rows, rollout_rows
from tests.unit.tiny import byte_tokenizer, tiny_model


def operando(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """The exit code and what stood on stderr."""
    capsys.readouterr()  # what preparing the test wrote
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["operando", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


def refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *overrides: str,
) -> str:
    """What is said against a run that must not begin."""
    runs = tmp_path / "runs"
    code, said = operando(monkeypatch, capsys, "train", "tiny", f"runs_dir={runs}", *overrides)
    assert code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert not list(runs.glob("*")), "a failed start must not block the next"
    return said


# --- no space left, no right to write ------------------------------------------------------------

# Called by the loop at every step; at step 3 it takes the room away, or the right to write.
FILLS = """
import errno, os, resource, subprocess

def lock(*_):
    runs = os.path.dirname(os.environ["FILLER"])  # mounted over itself: open files stay writable
    for how in (["--bind", runs], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *how, runs], check=True)

def before(module, name):
    real = getattr(module, name)
    setattr(module, name, lambda *given: (lock(), real(*given)))

def fill(completions, completion_ids, trainer_state, **_):
    if trainer_state.global_step == 3 and os.environ.get("HOW") == "read-only":
        import torch
        from operando.models import policy
        match os.environ["LEFT"]:
            case "rollouts":
                lock()
            case "adapter":
                before(policy, "save_file")
            case "state":
                before(torch, "save")
    if trainer_state.global_step == 3 and os.environ.get("HOW") == "limit":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LEFT"]), hard))
    if trainer_state.global_step == 3 and os.environ.get("HOW") == "space":
        with open(os.environ["FILLER"], "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
            filler.truncate(filler.tell() - int(os.environ["LEFT"]))
    return [float(sum(ids) % 5) for ids in completion_ids]
"""
# (how, bytes left): where the writing breaks
FULL = [
    ("space", 4096),  # the rollouts of step 3, a parquet file
    ("space", 80_000),  # the adapter of step 4's checkpoint
    ("space", 300_000),  # its resume state, after the adapter was written
    ("limit", 150_000),  # the same by a limit on the size of a file
    ("read-only", "rollouts"),  # of step 3
    ("read-only", "adapter"),  # of step 4's checkpoint
    ("read-only", "state"),
]


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "operando",
        "train",
        "tiny",
        f"runs_dir={folder}",
        f"rewards={{r={{kind='function',path='{folder.parent / 'fills.py'}:fill'}}}}",
        *more,
    ]


def run(line: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        line, env=os.environ | fixed | env, capture_output=True, text=True, timeout=180, check=False
    )


@cache
def can_mount() -> bool:
    """Whether this process may have a small disk of its own."""
    try:
        return run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module", params=FULL, ids=lambda p: f"{p[0]}-{p[1]}")
def broken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The run folder, and the ended process, of a run whose disk was full from step 3 on."""
    how, left = request.param
    tmp_path = tmp_path_factory.mktemp("full")
    (tmp_path / "fills.py").write_text(FILLS)
    runs = tmp_path / "runs"
    runs.mkdir()
    line = command(runs)
    if how in ("space", "read-only"):
        if not can_mount():
            pytest.skip("no user namespaces here, so no small disk")
        small = f"mount -t tmpfs -o size=16m none {runs}; " if how == "space" else ""
        script = f"{small}{shlex.join(line)}; code=$?; cp -r {runs} {tmp_path}/kept; exit $code"
        line = ["unshare", "-rm", "sh", "-c", script]
    done = run(line, HOW=how, LEFT=str(left), FILLER=str(runs / ".filler"))
    if how == "space":
        (tmp_path / "kept" / "tiny").rename(runs / "tiny")
    return runs / "tiny", done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with room enough."""
    tmp_path = tmp_path_factory.mktemp("whole")
    (tmp_path / "fills.py").write_text(FILLS)
    done = run(command(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs" / "tiny"


def weights(folder: Path, step: int) -> bytes:
    return (folder / f"checkpoints/step_{step:05d}/adapter_model.safetensors").read_bytes()


Broken = tuple[Path, subprocess.CompletedProcess[str]]


def test_a_full_or_read_only_disk_is_one_message(broken: Broken) -> None:
    _, done = broken
    assert "Traceback" not in done.stderr, done.stderr[-600:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1
    why = (
        "no space left",
        "too large",
        "can't write .*(rollouts|checkpoints)/step_.*ead-only file",
    )
    assert re.search("|".join(why), errors[0])


def test_a_full_or_read_only_disk_leaves_no_half_file_and_resume_goes_on(
    broken: Broken, whole: Path
) -> None:
    folder, done = broken
    assert done.returncode not in (0, None), "the disk was not full"
    left = [f.relative_to(folder) for f in folder.rglob("*")]
    if "ead-only file" not in done.stderr:  # there nothing can be removed either
        assert not [f for f in left if f.name.endswith(".part")], left
    assert [f.name for f in (folder / "checkpoints").glob("step_*")] == ["step_00002"]
    assert weights(folder, 2) == weights(whole, 2)
    for file in folder.rglob("*.parquet"):
        assert pq.read_table(file).num_rows > 0, file
    json.loads((folder / "manifest.json").read_text())

    resumed = run(command(folder.parent, "--resume"))
    assert resumed.returncode == 0, resumed.stderr[-600:]
    assert not list(folder.rglob("*.part"))
    assert weights(folder, 4) == weights(whole, 4)
    assert metric_rows(folder) == metric_rows(whole)


# --- tokenizers ----------------------------------------------------------------------------------


def saved_model(folder: Path, pad_token: str | None) -> Path:
    """A folder with a tiny random Llama and a tokenizer with this pad token."""
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config | ({"pad_token": pad_token} if pad_token else {})))
    return folder


def test_chat_without_a_chat_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved_model(tmp_path / "model", "<pad>")
    said = refused(tmp_path, monkeypatch, capsys, f"model.id={model}", "prompt.format=chat")
    assert "no chat template" in said and '"raw"' in said


def test_without_a_pad_token_training_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fills.py").write_text(FILLS)
    folders = []
    for name, pad_token in (("with", "<pad>"), ("without", None)):
        model = saved_model(tmp_path / f"model_{name}", pad_token)
        code, said = operando(
            monkeypatch,
            capsys,
            "train",
            "tiny",
            f"runs_dir={tmp_path / name}",
            f"model={{id='{model}',layers='all'}}",
            "steps=2",
            "task.num_train=8",
            "rollout.max_completion_length=24",
            f"rewards={{r={{kind='function',path='{tmp_path / 'fills.py'}:fill'}}}}",
        )
        assert code == 0, said
        folders.append(tmp_path / name / "tiny")
    padded, bare = folders
    lengths = {len(str(row["completion"])) for row in rollout_rows(bare, 1)}
    assert len(lengths) > 1, "rows of one length would need no padding"
    assert metric_rows(bare) == metric_rows(padded)
    assert weights(bare, 2) == weights(padded, 2)


def test_a_tokenizer_without_end_of_sequence_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved_model(tmp_path / "model", "<pad>")
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    said = refused(tmp_path, monkeypatch, capsys, f"model.id={model}")
    assert "no end-of-sequence token" in said and "tokenizer_config.json" in said


# --- prompts over the limit ----------------------------------------------------------------------


def test_a_prompt_over_the_limit_is_refused_and_one_at_the_limit_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(tmp_path, monkeypatch, capsys, "prompt.max_prompt_length=5")
    assert "64 of 64 prompts are over the limit of 5 tokens" in said
    found = re.search(r"the longest \((words/train/\d+)\) has (\d+)", said)
    assert found is not None, said
    longest = int(found[2])
    said = refused(tmp_path, monkeypatch, capsys, f"prompt.max_prompt_length={longest - 1}")
    assert f"over the limit of {longest - 1} tokens" in said and found[1] in said
    code, said = operando(
        monkeypatch,
        capsys,
        "train",
        "tiny",
        f"runs_dir={tmp_path / 'runs'}",
        "--dry-run",
        f"prompt.max_prompt_length={longest}",
    )
    assert code == 0, said


@pytest.mark.parametrize("override", ["rollout.max_completion_length=505", "prompt.few_shot=32"])
def test_prompt_and_completion_must_fit_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
) -> None:
    said = refused(tmp_path, monkeypatch, capsys, override)
    room = 7 if "505" in override else 480  # the starter reads 512 tokens, a completion has 32
    assert f"over the limit of {room} tokens" in said and "a model with more context" in said


# --- data ----------------------------------------------------------------------------------------

GOOD = json.dumps({"question": "How many?", "answer": "1+1=2 #### 2"}) + "\n"


def write_data(folder: Path, kind: str) -> Path:
    name = {"gz": "data.jsonl.gz", "cut gz": "data.jsonl.gz"}.get(kind, "data.jsonl")
    file = folder / ("data.parquet" if "parquet" in kind else name)
    match kind:
        case "gz":
            file.write_bytes(gzip.compress(b""))
        case "cut gz":
            file.write_bytes(gzip.compress(GOOD.encode() * 50)[:-12])
        case "no bytes in parquet":
            file.write_bytes(b"")
        case "no rows in parquet":
            pq.write_table(pa.table({"question": [""], "answer": [""]}).slice(0, 0), file)
        case "blank lines":
            file.write_text("\n \n\n")
        case _:
            file.write_bytes(b"")
    return file


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("no bytes", "has no rows"),
        ("blank lines", "has no rows"),
        ("gz", "has no rows"),
        ("no rows in parquet", "has no rows"),
        ("no bytes in parquet", "not a readable parquet file"),
        ("cut gz", "can't be read"),
    ],
)
def test_an_empty_data_file_is_refused_by_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    split: str,
    kind: str,
    cause: str,
) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text(GOOD)
    files = {"train": good, "test": good} | {split: write_data(tmp_path, kind)}
    task = f"task={{kind='gsm8k',train='{files['train']}',test='{files['test']}'}}"
    said = refused(tmp_path, monkeypatch, capsys, task)
    assert cause in said and str(files[split]) in said
