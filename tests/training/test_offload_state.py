"""Masters and moments in files or in another memory: the same bytes, no file left, and refused without room."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.errors import RecipeError, TrainingError
from luthier.training.checkpoints import Checkpoints
from luthier.training.footprint import Footprint
from luthier.training.loop import fit, train_step
from luthier.training.offload_state import beside_model, in_file, keep_in, room_in
from luthier.training.optimizers import OPTIMIZERS, make_optimizer
from luthier.training.precision import Keep, Precision, float32_masters
from luthier.training.run import Run
from luthier.training.state import Progress, TrainState

RunOf = Callable[..., Run]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def run_kept(run_of: RunOf, word: str, *, keep: Keep | None, every: bool = False, narrow: bool = True) -> Run:
    """Of a network that is trained whole, whose masters and moments are kept so."""
    network = run_of().state.network
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".adapters." not in name)
    network = network.bfloat16() if narrow else network
    run = run_of(network=network, optimizer=word, adapter=None)
    run.state.precision.close()
    precision = Precision(float32_masters(network, keep=keep, every=every))
    run.state = TrainState(network, make_optimizer(network, run.settings, precision, keep=keep), Progress(), precision)
    return run


def same(run: Run, other: Run) -> bool:
    found, expected = run.state.tensors(), other.state.tensors()
    names = found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())
    networks = (dict(one.state.network.named_parameters()) for one in (run, other))
    mine, theirs = networks
    return names and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("word", OPTIMIZERS)
def test_in_files_a_run_ends_with_the_same_bytes_and_goes_on_from_them(
    run_of: RunOf, tmp_path: Path, word: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.training.offload_state._SMALLEST_IN_FILE", 64)
    keep, checkpoints = keep_in("disk", tmp_path / "run", CPU), Checkpoints(tmp_path, keep_last=1, fingerprint="one")
    plain = run_kept(run_of, word, keep=None, narrow=narrow)
    kept, resumed = (run_kept(run_of, word, keep=keep, narrow=narrow) for _ in range(2))
    train_step(kept)
    checkpoints.load(checkpoints.save(kept.state), resumed.state)
    for run in (plain, kept, resumed):
        fit(run)
    assert same(kept, plain)
    assert same(resumed, plain)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "fp32"])
def test_masters_of_every_parameter_elsewhere_end_with_the_same_bytes(run_of: RunOf, narrow: bool) -> None:
    """As in the host's memory beside a GPU; here another piece of the same memory stands for it."""
    plain = run_kept(run_of, "adamw", keep=None, narrow=narrow)
    elsewhere = run_kept(run_of, "adamw", keep=Tensor.clone, every=True, narrow=narrow)
    trained = elsewhere.state.trained()
    assert all(trained[n] is not p for n, p in elsewhere.state.network.named_parameters() if p.requires_grad)
    fit(plain)
    fit(elsewhere)
    assert same(elsewhere, plain)
    assert all(p.grad is None for p in elsewhere.state.network.parameters())


def mapped_files() -> int:
    return Path("/proc/self/maps").read_text().count("/optimizer-")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which files are mapped")
def test_masters_and_both_moments_are_mapped(run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the embedding and the output layer, the only ones with so many numbers."""
    monkeypatch.setattr("luthier.training.offload_state._SMALLEST_IN_FILE", 97 * 32)
    before = mapped_files()
    run = run_kept(run_of, "adamw", keep=partial(in_file, folder=tmp_path))
    assert mapped_files() == before + 2
    train_step(run)
    assert mapped_files() == before + 6


def test_a_file_holds_the_values_and_small_tensors_need_none(tmp_path: Path) -> None:
    values = torch.randn(100, 100).bfloat16()
    assert torch.equal(in_file(values, folder=tmp_path), values)
    small, turned = torch.ones(8), values.t()
    assert in_file(small, folder=tmp_path) is small
    assert in_file(turned, folder=tmp_path) is turned


def test_where_there_is_no_room_for_a_file_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file and no folder")
    with pytest.raises(TrainingError, match=r"offload_optimizer: \S+taken cannot take the optimizer's moments"):
        in_file(torch.ones(4096), folder=tmp_path / "taken")


def test_in_the_hosts_memory_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="offload_optimizer: on a CPU all is in the machine's memory already"):
        keep_in("memory", tmp_path, CPU)
    assert keep_in(None, tmp_path, GPU) is None
    assert keep_in("memory", tmp_path, GPU) is not None


def test_a_plan_counts_beside_the_model_what_stays_there() -> None:
    """On a GPU gradients go to their masters at once, each as large as its gradient."""
    whole = Footprint(weights=100, masters=200, gradients=200, optimizer=400, activations=50)
    expected = {
        (None, CPU): (950, 0),
        ("memory", CPU): (950, 0),
        ("disk", CPU): (350, 600),
        ("memory", GPU): (150, 800),
        ("disk", GPU): (150, 800),
    }
    for (place, device), sizes in expected.items():
        beside, elsewhere = beside_model(whole, place, device)
        assert (beside.peak_bytes, elsewhere) == sizes


def test_room_is_that_of_the_disk_or_the_memory(tmp_path: Path) -> None:
    assert room_in("disk", tmp_path / "not" / "yet" / "there") > 0
    assert room_in("memory", tmp_path) > 0
