"""The command line: reads arguments, calls the library, prints. No logic, no torch import here."""

from __future__ import annotations

import sys

# isort: off
from operando.cli.app import app
from operando.cli import runs, audits, inside, calibrate  # in the order of the help page

# isort: on
from operando.errors import GateFailed, UserError

__all__ = ["app", "audits", "calibrate", "inside", "main", "runs"]


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a diverged run 1, a
    check that failed 3."""
    try:
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
    except KeyboardInterrupt:
        print("interrupted; go on with the same command (train: and --resume)", file=sys.stderr)
        sys.exit(130)
