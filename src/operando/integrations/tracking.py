"""Sending metrics to an experiment tracker as well; metrics.jsonl is written in any case."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

from operando.errors import UserError
from operando.recipe.run import TrackingConfig

logger = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Takes the metrics of each step.

    Example: tracker = open_tracker(TrackingConfig(kind="trackio"), "my-run", {"optim.lr": 1e-4})
             tracker.log(1, {"reward": 0.4}); tracker.finish()
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


def open_tracker(config: TrackingConfig, run_name: str, settings: dict[str, object]) -> Tracker:
    """Return an open tracker; `settings` are shown beside the run.

    trackio and wandb keep their files where they always do; tensorboard writes to
    tensorboard/<project>/<run_name>.
    """
    match config.kind:
        case "none":
            return _Nothing()
        case "trackio" | "wandb":
            package = _need(config.kind, config.kind)
            run = package.init(project=config.project, name=run_name, config=settings)
            return _Run(run.log, run.finish)
        case "tensorboard":
            # torch's own module raises a bare ImportError without this package.
            _need("tensorboard", "tensorboard")
            return _TensorBoard(Path("tensorboard") / config.project / run_name, settings)


def _need(kind: str, package: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f'tracking.kind = "{kind}" needs: pip install "operando[{kind}]" ({error})'
        ) from error


class _Nothing:
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        del step, metrics

    def finish(self) -> None:
        pass


class _Run:
    """trackio and wandb, which share their interface."""

    def __init__(self, log: Callable[..., object], finish: Callable[[], object]) -> None:
        self._log = log
        self._finish = finish

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(dict(metrics), step=step)

    def finish(self) -> None:
        self._finish()


class _TensorBoard:
    def __init__(self, folder: Path, settings: dict[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        text = json.dumps(settings, indent=1, default=str)
        self._writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()
