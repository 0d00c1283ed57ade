"""Where the real models and data lie: never in the repository."""

from __future__ import annotations

import os
from pathlib import Path


def shared() -> Path:
    """The folder with ``models`` and ``data``: $HPR_SHARED, else ``../shared`` beside the repository.

    Raises ``FileNotFoundError``, saying where it looked, where there is none.
    """
    given = os.environ.get("HPR_SHARED")
    folder = Path(given) if given else Path(__file__).resolve().parents[3] / "shared"
    if not (folder / "models").is_dir() and not (folder / "data").is_dir():
        raise FileNotFoundError(f"no models and data at {folder}: set HPR_SHARED to the folder that holds both")
    return folder
