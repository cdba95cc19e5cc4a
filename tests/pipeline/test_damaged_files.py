"""A byte that turns in any file of a run is noticed where it matters, in one sentence that names the file.

Never a traceback, never another model: the run ends with the bytes that it would have had, or it is refused.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.errors import LuthierError
from luthier.models.adapted import load_adapted
from luthier.models.load import load
from luthier.models.merge import merge_into
from luthier.models.sources import resolve
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import Recipe, parse_recipe
from luthier.training.callbacks import Callback

RECIPE = """\
model: {model}
output: run
dtype: fp32
stages:
  - sft: {{data: {folder}/rows.jsonl, batch_size: 8, epochs: 1, learning_rate: 0.01, save_every: 1, adapter: {{r: 2}}}}
  - dpo: {{data: {folder}/pairs.jsonl, batch_size: 4, max_steps: 4, learning_rate: 0.01, save_every: 1, beta: 0.1,
      eval_fraction: 0.2, adapter: {{r: 2}}}}
"""

READ_BY_NOBODY = "00-sft/model/model.safetensors", "01-dpo/reference.safetensors"  # once all stages are done
TOLD = (
    "metrics.jsonl",
    "report.html",
    "summary.json",
    "plan.json",
    "manifest.json",
)  # people read them, or times are in

Runs = tuple[Recipe, Path]


def left(run: Path) -> dict[str, bytes]:
    """What a run leaves that decides anything."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in TOLD)
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def runs(chat_model: Path, tmp_path_factory: pytest.TempPathFactory, stop_at: Callable[[int], Callback]) -> Runs:
    """A recipe, and a folder with its run finished (`whole`) and interrupted in its second stage (`half`)."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [json.dumps({"question": f"{i}?", "answer": f"{i}{i}."}) for i in range(24)]
    pairs = [json.dumps({"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "no"}) for i in range(20)]
    for name, lines in {"rows.jsonl": rows, "pairs.jsonl": pairs}.items():
        (folder / name).write_text("\n".join(lines))
    recipe = parse_recipe(RECIPE.format(model=chat_model, folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, listeners=lambda index, stage: [stop_at(3)] if index else [])
        shutil.copytree("run", "half", symlinks=True)
        run_recipe(recipe)
        Path("run").rename("whole")
    return recipe, folder


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def folder_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {"flip": flip, "cut": cut, "empty": empty, "folder": folder_instead}


def goes_on_or_is_refused(runs: Runs, start: str, name: str, how: str, seed: int, place: Path) -> str:
    """Runs again on a damaged copy; returns how that ended. Fails for another model, and what names no file."""
    recipe, folder = runs
    shutil.copytree(folder / start, place / "run", symlinks=True)
    DAMAGES[how](place / "run" / name, random.Random(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        sentence = refusal(lambda: run_recipe(recipe))
    if sentence:
        assert Path(name).name in sentence or "holds a run of another recipe" in sentence, sentence
        assert "\n" not in sentence
        return "refused"
    expected, found = left(folder / "whole"), left(place / "run")
    differing = {file for file in expected | found if expected.get(file) != found.get(file)}
    assert differing <= {name}, "what is left is not what would have been left"
    read_by_nobody = "checkpoints" in name or (start == "whole" and name in READ_BY_NOBODY)
    assert Path(name).suffix != ".safetensors" or read_by_nobody or not differing
    return "goes on"


def refusal(act: Callable[[], object]) -> str:
    """The sentence by which something is refused, nothing where it is not. One of the system's is told as such."""
    try:
        act()
    except (LuthierError, OSError) as error:
        return str(error)
    return ""


def files_of(runs: Runs, start: str) -> list[str]:
    place = runs[1] / start
    return sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file() and not p.parent.is_symlink())


@pytest.mark.parametrize(
    ("start", "name", "ends"),
    [
        ("half", "01-dpo/checkpoints/step-00000002/state.safetensors", "goes on"),
        ("half", "01-dpo/checkpoints/step-00000002/progress.json", "goes on"),
        ("half", "01-dpo/reference.safetensors", "refused"),
        ("half", "01-dpo/plan.json", "refused"),
        ("half", "00-sft/model/model.safetensors", "refused"),
        ("half", "00-sft/model/tokenizer.json", "refused"),
        ("whole", "00-sft/adapter/adapter_model.safetensors", "refused"),
        ("whole", "model/model.safetensors", "refused"),
        ("whole", "01-dpo/done.json", "refused"),
        ("whole", "01-dpo/summary.json", "refused"),
        ("whole", "manifest.json", "goes on"),
    ],
)
def test_a_turned_byte_is_healed_or_refused(runs: Runs, start: str, name: str, ends: str, tmp_path: Path) -> None:
    assert goes_on_or_is_refused(runs, start, name, "flip", 7, tmp_path) == ends


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("start", ["half", "whole"])
def test_no_damage_to_any_file_ends_in_a_traceback_or_another_model(
    runs: Runs, start: str, how: str, tmp_path: Path
) -> None:
    for name in files_of(runs, start):
        for seed in range(4 if how == "flip" else 1):
            place = tmp_path / f"{seed}-{name.replace('/', '-')}"
            place.mkdir()
            try:
                goes_on_or_is_refused(runs, start, name, how, seed, place)
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"{start}, {name}, {how}, {seed}: {type(error).__name__} {error}") from error
            shutil.rmtree(place)


def test_a_stage_whose_model_is_damaged_is_made_anew_as_the_sentence_says(runs: Runs, tmp_path: Path) -> None:
    recipe, folder = runs
    shutil.copytree(folder / "half", tmp_path / "run", symlinks=True)
    flip(tmp_path / "run" / "00-sft" / "model" / "model.safetensors", random.Random(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(LuthierError, match=r"delete run/00-sft/done\.json and run again"):
            run_recipe(recipe)
        Path("run/00-sft/done.json").unlink()
        run_recipe(recipe)
        assert left(tmp_path / "run") == left(folder / "whole")


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_adapter_is_refused_or_is_the_same_adapter(
    runs: Runs, chat_model: Path, tmp_path: Path, seed: int
) -> None:
    """Wherever it is read: put on its model, and merged. A turned byte in its hash's own name leaves it without one."""
    shutil.copytree(runs[1] / "whole" / "00-sft" / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    values = weights.read_bytes()[-4:]
    flip(weights, random.Random(seed))
    for read in (
        lambda: load_adapted(str(chat_model), tmp_path / "adapter"),
        lambda: merge_into(resolve(str(chat_model)), tmp_path / "adapter", tmp_path / "merged"),
    ):
        sentence = refusal(read)
        if sentence:
            assert "adapter" in sentence
            assert not (tmp_path / "merged").exists()
        else:
            assert weights.read_bytes()[-4:] == values


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"])
@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_model_that_is_cut_short_is_one_sentence(chat_model: Path, tmp_path: Path, name: str, how: str) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    DAMAGES[how](tmp_path / "model" / name, random.Random(0))
    with pytest.raises(LuthierError, match="model"):
        load(str(tmp_path / "model"))
