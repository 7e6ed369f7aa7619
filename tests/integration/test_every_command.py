"""Every command of the tree, each argument and option, against bad things: never a traceback.

The commands are read from the command line itself, so that a new one is covered from its first day.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from operando import cli
from tests.integration.runs import tiny, trained

LONG = "x" * 300
DEEP = "[" * 5000 + "]" * 5000
HUGE = "9" * 5000


class Command(NamedTuple):
    """A command, what must come with it, and its options that take a text."""

    words: tuple[str, ...]
    has_argument: bool
    required: tuple[str, ...]
    options: tuple[str, ...]
    numbers: tuple[str, ...]


def commands() -> list[Command]:
    found: list[Command] = []

    def walk(node: object, words: tuple[str, ...]) -> None:
        below = getattr(node, "commands", None)
        if below:
            for name, child in below.items():
                walk(child, (*words, name))
            return
        params = node.params  # pyright: ignore[reportAttributeAccessIssue]
        options = [p for p in params if p.param_type_name == "option" and not p.is_flag]
        kinds = {p.opts[0]: p.type_descriptor.annotation for p in options}
        found.append(
            Command(
                words,
                any(p.param_type_name == "argument" for p in params),
                tuple(x for p in options if p.required for x in (p.opts[0], "1")),
                tuple(name for name, kind in kinds.items() if kind not in (int, float)),
                tuple(name for name, kind in kinds.items() if kind in (int, float)),
            )
        )

    walk(typer.main.get_command(cli.app), ())
    return found


COMMANDS = commands()
by_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c.words))

RECIPES: dict[str, bytes] = {
    "empty": b"",
    "no utf-8": b"\xff\xfe\x00name",
    "NUL": b'name = "a"\x00',
    "no TOML": b"{]",
    "deep": f"v = {DEEP}".encode(),
    "huge number": f"steps = {HUGE}".encode(),
    "unknown key": b"stepz = 3\n",
    "twice": b"steps = 3\nsteps = 4\n",
    "a list for a table": b"model = [1]\n",
    "a table for a number": b"[steps]\na = 1\n",
    "a text for a number": b'steps = "three"\n',
    "not finite": b"[optim]\nlr = inf\n",
    "not a number": b"[optim]\nlr = nan\n",
    "no base": b'base = "nowhere.toml"\n',
    "its own base": b'base = "its own base.toml"\n',
    "base of a wrong type": b"base = [1]\n",
    "arms of a wrong type": b"arms = 3\n",
    "rl of a wrong type": b"rl = 3\n",
    "mixture of a wrong type": b"mixture = 3\n",
    "unknown kind": b'[task]\nkind = "nothing"\n',
    "kind of a wrong type": b"[task]\nkind = 3\n",
    "empty lists": b'[task]\nkind = "words"\nnum_steps = []\n',
    "name of dots": b'name = ".."\n',
    "reward of no module": b'[rewards.a]\nkind = "python"\npath = ":f"\n',
}

# What a run folder may hold in place of what was written; the first group no command can pass over.
MANIFESTS: dict[str, bytes] = {
    "manifest empty": b"",
    "manifest no utf-8": b"\xff\xfe\x00",
    "manifest a list": b"[]",
    "manifest null": b"null",
    "manifest a number": b"1",
    "manifest cut": b'{"format": 1, "na',
    "manifest deep": DEEP.encode(),
    "manifest huge number": f'{{"format": {HUGE}}}'.encode(),
    "manifest of another format": b'{"format": 99, "versions": 3}',
    "manifest with nothing but its format": b'{"format": 1}',
    "manifest with texts for lists": (
        b'{"format": 1, "name": "a", "started": "", "versions": {}, "warnings": "no"}'
    ),
}
METRICS: dict[str, bytes] = {
    "metrics empty": b"",
    "metrics no utf-8": b"\xff\xfe\x00\n",
    "metrics NUL": b"\0" * 200,
    "metrics with a list": b"[]\n",
    "metrics without a step": b'{"reward": 1.0}\n',
    "metrics with a text for a step": b'{"step": "one"}\n',
    "metrics with null for a step": b'{"step": null}\n',
    "metrics with a list for a number": b'{"step": 0, "reward": [1]}\n',
    "metrics not finite": b'{"step": 0, "eval/correct": NaN, "eval/n": 1e999}\n',
    "metrics huge": f'{{"step": 0, "eval/n": {HUGE}}}\n'.encode(),
    "metrics deep": f"{DEEP}\n".encode(),
}
OTHERS = (
    "results.json",
    "rollouts/step_00002.parquet",
    "evals/held_out_step_00000.parquet",
    "checkpoints/step_00002/certificate.json",
    "checkpoints/step_00002/adapter_config.json",
    "checkpoints/step_00002/adapter_model.safetensors",
    "checkpoints/step_00002/resume/state.pt",
)
JUNK = (b"", b"\xff\xfe\x00", b"[]", b"null", b"{}")
READERS = (("report",), ("doctor",), ("certify",), ("tags",), ("eval", "--num", "2"))


class Ended(NamedTuple):
    code: int
    said: str


@pytest.fixture
def operando(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Ended]:
    """Run a command here; anything but an exit (a traceback) fails the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPERANDO_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["operando", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        except Exception as error:
            raise AssertionError(f"operando {arguments!r:.300}: {error!r:.300}") from error
        else:
            code = 0
        said = capsys.readouterr().err
        assert code in (0, 2, 3), f"operando {arguments!r:.300}: exit code {code}: {said}"
        if code == 2:
            assert len(said) < 6000, said
        return Ended(code, said)

    return run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny(tmp_path_factory.mktemp("good"), "steps=2"))


def places(folder: Path) -> Iterator[str]:
    """What is no run, no recipe and no model, by its path."""
    yield from ("", ".", "..", "nowhere", LONG, "x" * 5000, "a\nb", "\x1b[2J", "/dev/null", "ﬁ/✓")
    for name, content in RECIPES.items():
        file = folder / f"{name}.toml"
        file.write_bytes(content)
        yield str(file)
    (folder / "loop").symlink_to(folder / "loop")
    yield str(folder / "loop")
    (folder / "folder.toml").mkdir()
    yield str(folder / "folder.toml")
    for name, content in MANIFESTS.items():
        run = folder / name
        run.mkdir()
        (run / "manifest.json").write_bytes(content)
        yield str(run)
    for name, content in (("model a list", b"[]"), ("model no utf-8", b"\xff"), ("model", b"{}")):
        model = folder / name
        model.mkdir()
        (model / "config.json").write_bytes(content)
        yield str(model)


@by_command
def test_a_command_refuses_what_is_nothing(
    command: Command, operando: Callable[..., Ended], tmp_path: Path
) -> None:
    if not command.has_argument:
        return
    folder = tmp_path / "bad"
    folder.mkdir()
    for place in places(folder):
        ended = operando(*command.words, place, *command.required)
        assert ended.code == 2, (command.words, place, ended)
    assert not [f for f in (tmp_path / "here").rglob("*") if f.name != "runs"], "left behind"


@by_command
def test_a_number_that_is_none_is_refused(command: Command, operando: Callable[..., Ended]) -> None:
    first = ("nowhere",) if command.has_argument else ()
    for option in command.numbers:
        for value in ("x", "", "-1e", "1,5", "٣x"):
            assert operando(*command.words, *first, *command.required, option, value).code == 2


@by_command
def test_an_option_of_nonsense_is_no_traceback(
    command: Command, operando: Callable[..., Ended], run_folder: Path
) -> None:
    if command.words[0] in ("demo", "train", "study", "pipeline", "import") or not (
        command.has_argument and command.options
    ):
        return
    for option in command.options:
        for value in ("", "nonsense", LONG, "a,b", "\x1b[2J", "0.5", "nowhere.py:f", ":f", "="):
            asked = [x for x in command.required if x != option]
            if option in command.required:
                asked = []
            ended = operando(*command.words, str(run_folder), *asked, option, value)
            assert ended.code == 2 or option in ("--out", "--name"), (command.words, option, value)


@pytest.mark.parametrize("damage", METRICS)
def test_damaged_metrics_are_one_line(
    damage: str, operando: Callable[..., Ended], run_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    (run / "metrics.jsonl").write_bytes(METRICS[damage])
    for reader in (("report",), ("doctor",)):
        operando(reader[0], str(run))


@pytest.mark.parametrize("file", OTHERS)
def test_a_damaged_file_of_a_run_is_one_line(
    file: str, operando: Callable[..., Ended], run_folder: Path, tmp_path: Path
) -> None:
    whole = (run_folder / file).read_bytes()
    for number, junk in enumerate((*JUNK, whole[: len(whole) // 2], whole + b"\xff")):
        run = tmp_path / f"run-{number}"
        shutil.copytree(run_folder, run)
        (run / file).write_bytes(junk)
        for name, *options in READERS:
            operando(name, str(run), *options)
        kept = tmp_path / "kept"
        shutil.copytree(run_folder, kept)
        (run_folder / file).write_bytes(junk)
        ended = operando("train", str(kept / "recipe.toml"), "--resume")
        assert "started with another recipe" not in ended.said, "the damage must be met"
        for folder in (run_folder, run):
            shutil.rmtree(folder)
        kept.rename(run_folder)


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=inf",
        "optim.lr=nan",
        "optim.lr=1e308",
        "name=.",
        "name=..",
        "name=-x",
        "name=",
        "runs_dir=",
        "model.lora.rank=100000000",
        "rollout.num_prompts=100000000",
        "steps=0",
        f"steps={HUGE}",
        f"v={DEEP}",
        "=",
        "steps",
        "steps.a=1",
        "task.num_steps=[]",
        "model.id=",
        "seed=-1",
        "rollout.stop=[]x",
        "eval.num=0",
        "task.kind=nothing",
        "stages=[]x",
    ],
)
def test_a_wrong_value_is_refused_before_a_model_is_loaded(
    override: str, operando: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load_model(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("operando.setup.load_model", load_model)
    ended = operando("train", "tiny", f"runs_dir={tmp_path / 'runs'}", override)
    assert ended.code == 2 and ended.said.startswith("error: "), ended
    assert not list((tmp_path / "runs").glob("*"))
