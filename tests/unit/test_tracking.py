"""Trackers get every metric, and a missing package is named with its extra."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.integrations import tracking
from operando.integrations.tracking import open_tracker
from operando.recipe.run import TrackingConfig

SETTINGS: dict[str, object] = {"optim": {"lr": 1e-4}, "seed": 7}


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def test_none_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker(TrackingConfig(), "run", SETTINGS)
    tracker.log(1, {"reward": 0.5})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["trackio", "wandb", "tensorboard"])
def test_missing_package_names_the_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf'kind = "{kind}" needs: pip install "operando\[{kind}\]'):
        open_tracker(TrackingConfig.model_validate({"kind": kind}), "run", SETTINGS)


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_run_trackers_get_project_name_settings_and_metrics(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the interface that trackio and wandb share records what it is given."""
    calls: list[object] = []

    class Package:
        def init(self, project: str, name: str, config: dict[str, object]) -> Package:
            calls.append((project, name, config))
            return self

        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finish")

    asked: list[str] = []

    def need(kind: str, package: str) -> Package:
        asked.append(package)
        return Package()

    monkeypatch.setattr(tracking, "_need", need)
    config = TrackingConfig.model_validate({"kind": kind, "project": "p"})
    tracker = open_tracker(config, "run", SETTINGS)
    tracker.log(1, {"reward": 0.5})
    tracker.log(2, {"reward": 0.75})
    tracker.finish()
    assert asked == [kind]
    expected = [("p", "run", SETTINGS), (1, {"reward": 0.5}), (2, {"reward": 0.75}), "finish"]
    assert calls == expected


@pytest.mark.skipif(not has("tensorboard"), reason='the extra "operando[tensorboard]" is absent')
def test_tensorboard_file_holds_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker(TrackingConfig(kind="tensorboard", project="p"), "run", SETTINGS)
    tracker.log(1, {"reward": 0.5})
    tracker.log(2, {"reward": 0.75})
    tracker.finish()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]

    events = EventAccumulator(str(tmp_path / "tensorboard" / "p" / "run"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 0.75)]


@pytest.mark.skipif(not has("trackio"), reason='the extra "operando[trackio]" is absent')
def test_trackio_database_holds_the_numbers(tmp_path: Path) -> None:
    # A process of its own: trackio reads TRACKIO_DIR at import and leaves threads behind.
    code = (
        "from operando.recipe.run import TrackingConfig\n"
        "from operando.integrations.tracking import open_tracker\n"
        "t = open_tracker(TrackingConfig(kind='trackio', project='p'), 'run', {'seed': 7})\n"
        "t.log(1, {'reward': 0.5}); t.log(2, {'reward': 0.75}); t.finish()\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with closing(sqlite3.connect(tmp_path / "p.db")) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    found = [(step, json.loads(text)["reward"]) for step, text in rows]
    assert found == [(1, 0.5), (2, 0.75)]
