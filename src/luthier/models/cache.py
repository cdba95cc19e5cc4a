"""The user's cache: what is fetched or converted is kept there.

It is made once even if two processes ask at the same time, and whole or not at all, so a kill at any moment leaves
nothing that looks finished.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from luthier.errors import ModelError
from luthier.files import written_whole

__all__ = ["cache_folder", "made_once"]


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """$LUTHIER_CACHE, else $XDG_CACHE_HOME/luthier, else ~/.cache/luthier; it need not exist yet."""
    if own := environment.get("LUTHIER_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "luthier"
    return Path.home() / ".cache" / "luthier"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder; if it is missing, `make` fills it, in one process while the others wait for it."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                with written_whole(folder) as beside:
                    make(beside)
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error.strerror or error}); make room or set LUTHIER_CACHE to another folder"
        ) from error
    return folder
