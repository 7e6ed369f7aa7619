"""The command line: reads arguments, calls the library, prints. No logic, no torch import here."""

from __future__ import annotations

import signal
import sys

# isort: off
from operando.cli.app import app, held
from operando.cli import (
    runs,
    tasks,
    recipes,
    audits,
    inside,
    calibrate,
)  # in the order of the help page

# isort: on
from operando.errors import GateFailed, UserError
from operando.files import brief
from operando.stopping import Stopped, stop_now

__all__ = ["app", "audits", "calibrate", "inside", "main", "recipes", "runs", "tasks"]


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a diverged run 1, a
    check that failed 3, a signal 128 and its number."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_now)
    try:
        with held:
            app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except GateFailed as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(3)
    except FloatingPointError as error:  # a number that is not finite
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written, a name too long
        if error.filename is None and error.strerror is None:
            raise
        where = f"{brief(str(error.filename))}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        sys.exit(2)
    except Stopped as error:
        text = (
            str(error)
            or "interrupted; run the same command again to continue (train: with --resume)"
        )
        print(text, file=sys.stderr)
        sys.exit(error.exit_code)
