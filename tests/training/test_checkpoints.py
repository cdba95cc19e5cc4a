"""A checkpoint gives its state back bit for bit; what is damaged or of another run is never taken for it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import CheckpointError
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import train_step
from luthier.training.run import Run

RunOf = Callable[..., Run]


def checkpoints(folder: Path, *, keep_last: int = 2, fingerprint: str = "mine") -> Checkpoints:
    return Checkpoints(folder / "checkpoints", keep_last=keep_last, fingerprint=fingerprint)


def saved(run: Run, kept: Checkpoints, num_steps: int, *, best: tuple[int, ...] = ()) -> Run:
    """A checkpoint after each step; those in `best` are saved as the best so far."""
    for _ in range(num_steps):
        train_step(run)
        kept.save(run.state, best=run.state.progress.step in best)
    return run


def names(kept: Checkpoints) -> list[str]:
    return sorted(path.name for path in kept.folder.iterdir())


def link(kept: Checkpoints, name: str) -> str:
    return (kept.folder / name).readlink().name


def test_a_checkpoint_gives_every_tensor_and_number_back(run_of: RunOf, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    run = saved(run_of(), kept, 3)
    run.state.progress.best_loss = 0.1 + 0.2
    kept.save(run.state)
    fresh = run_of().state
    kept.load(kept.latest() or tmp_path, fresh)
    assert fresh.progress == run.state.progress
    ours, theirs = fresh.tensors(), run.state.tensors()
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer/exp_avg_sq/") for name in ours)
    assert all(torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items())


def test_a_restored_state_shares_no_memory_with_the_file(run_of: RunOf, tmp_path: Path) -> None:
    """So training goes on without writing into the checkpoint."""
    kept = checkpoints(tmp_path)
    saved(run_of(), kept, 1)
    fresh = run_of()
    path = kept.latest()
    assert path is not None
    before = (path / "state.safetensors").read_bytes()
    kept.load(path, fresh.state)
    train_step(fresh)
    assert (path / "state.safetensors").read_bytes() == before


def test_only_the_newest_and_the_best_are_kept(run_of: RunOf, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    saved(run_of(), kept, 5, best=(1, 2))
    assert names(kept) == ["best", "last", "step-00000002", "step-00000004", "step-00000005"]
    assert (link(kept, "best"), link(kept, "last")) == ("step-00000002", "step-00000005")
    assert kept.best() == kept.folder / "step-00000002"


def test_without_an_evaluation_there_is_no_best(run_of: RunOf, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, keep_last=1)
    saved(run_of(), kept, 2)
    assert kept.best() is None
    assert names(kept) == ["last", "step-00000002"]


def test_before_the_first_save_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert checkpoints(tmp_path).latest() is None
    assert checkpoints(tmp_path).best() is None


def damage(path: Path, place: float, how: str) -> None:
    """One bit turned, the end cut off, or nothing left; at a place from 0 to 1."""
    content = bytearray(path.read_bytes())
    at = int(place * (len(content) - 1))
    if how == "flip":
        content[at] ^= 1
    path.unlink()
    if how != "gone":
        path.write_bytes(content if how == "flip" else content[:at])


@pytest.fixture(scope="module")
def two_steps(run_of: RunOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    saved(run_of(), checkpoints(folder), 2, best=(1, 2))
    return folder


@settings(max_examples=40, deadline=None)
@given(
    file=st.sampled_from(["state.safetensors", "progress.json"]),
    place=st.floats(0, 1),
    how=st.sampled_from(["flip", "cut", "gone"]),
)
def test_any_damage_falls_back_to_the_checkpoint_before(two_steps: Path, file: str, place: float, how: str) -> None:
    """A bit turned in a space between two words of progress.json is no damage: it says the same, or is no JSON."""
    copy = two_steps.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(two_steps, copy, symlinks=True)
    kept = checkpoints(copy)
    newest = kept.folder / "step-00000002"
    before = json.loads((newest / "progress.json").read_text())
    damage(newest / file, place, how)
    found = kept.latest()
    if found == newest:
        assert json.loads((newest / "progress.json").read_text()) == before
    else:
        assert found == kept.folder / "step-00000001"
        assert link(kept, "best") == link(kept, "last") == "step-00000001"


def test_a_damaged_checkpoint_is_reported_and_made_again(
    run_of: RunOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged ones count for nothing: with keep_last 1 the one made after going back is not the one thrown away."""
    kept = checkpoints(tmp_path, keep_last=3)
    saved(run_of(), kept, 3)
    for step in (2, 3):
        damage(kept.folder / f"step-{step:08d}" / "state.safetensors", 0.5, "cut")
    found, again = kept.latest(), run_of()
    assert found is not None
    kept.load(found, again.state)
    assert [record.args[0].name for record in caplog.records] == ["step-00000003", "step-00000002"]
    once_more = checkpoints(tmp_path, keep_last=1)
    saved(again, once_more, 1)
    assert names(once_more) == ["last", "step-00000002"]
    assert once_more.latest() == kept.folder / "step-00000002"


def test_where_all_are_damaged_there_is_nothing_to_go_on_from(run_of: RunOf, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    saved(run_of(), kept, 2)
    for step in (1, 2):
        damage(kept.folder / f"step-{step:08d}" / "progress.json", 0, "gone")
    assert kept.latest() is None


def test_a_checkpoint_of_another_run_is_refused(run_of: RunOf, tmp_path: Path) -> None:
    saved(run_of(), checkpoints(tmp_path), 1)
    with pytest.raises(CheckpointError, match=re.escape("step-00000001 was made with other settings, data or model")):
        checkpoints(tmp_path, fingerprint="other").latest()


def test_a_checkpoint_of_another_adapter_is_refused_by_name(run_of: RunOf, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    saved(run_of(), kept, 1)
    wider = run_of()
    wider.state.network.register_parameter("more", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(CheckpointError, match="more"):
        kept.load(kept.latest() or tmp_path, wider.state)


@pytest.mark.parametrize("leftover", [".step-00000002.partial-99999999", ".last.part"])
def test_what_a_kill_left_behind_is_written_over(run_of: RunOf, tmp_path: Path, leftover: str) -> None:
    kept = checkpoints(tmp_path)
    run = saved(run_of(), kept, 1)
    half = kept.folder / leftover
    half.symlink_to("nowhere") if "last" in leftover else half.mkdir()
    saved(run, kept, 1)
    assert names(kept) == ["last", "step-00000001", "step-00000002"]


def test_links_that_a_kill_left_behind_are_set_right(run_of: RunOf, tmp_path: Path) -> None:
    """Killed after the checkpoint was renamed and before `last` and `best` were."""
    kept = checkpoints(tmp_path)
    saved(run_of(), kept, 2, best=(1, 2))
    for name in ("last", "best"):
        (kept.folder / name).unlink()
        (kept.folder / name).symlink_to("step-00000001")
    assert kept.latest() == kept.folder / "step-00000002"
    assert link(kept, "last") == link(kept, "best") == "step-00000002"


def test_what_a_kill_kept_from_being_thrown_away_goes_when_the_run_goes_on(run_of: RunOf, tmp_path: Path) -> None:
    saved(run_of(), checkpoints(tmp_path, keep_last=9), 3, best=(1,))
    kept = checkpoints(tmp_path, keep_last=1)
    assert kept.latest() == kept.folder / "step-00000003"
    assert names(kept) == ["best", "last", "step-00000001", "step-00000003"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    kept = checkpoints(tmp_path)
    run = saved(run_of(), kept, 1)
    monkeypatch.setattr("luthier.training.checkpoints.save_file", full)
    train_step(run)
    with pytest.raises(CheckpointError, match=r"step-00000002: cannot be written .*No space left.*; make room"):
        kept.save(run.state)
    assert kept.latest() == kept.folder / "step-00000001"


def test_clearing_forgets_everything(run_of: RunOf, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    saved(run_of(), kept, 1)
    kept.clear()
    kept.clear()
    assert kept.latest() is None
