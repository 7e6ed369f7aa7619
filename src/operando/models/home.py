"""Where imported models live."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where imported models live: $OPERANDO_HOME, else ~/.cache/operando."""
    return Path(os.environ.get("OPERANDO_HOME", Path.home() / ".cache" / "operando"))


def imported_models() -> list[str]:
    """Return the names that `operando import` has made."""
    return sorted(f.parent.name for f in (cache_folder() / "models").glob("[!.]*/config.json"))
