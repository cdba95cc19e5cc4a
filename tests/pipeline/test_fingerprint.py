"""A checkpoint belongs to one run: what decides the run's numbers decides its fingerprint."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from luthier.data.audit import Audit
from luthier.data.examples import Origin
from luthier.data.prepare import Counts, Prepared
from luthier.data.sequences import TokenSequence
from luthier.models.load import Model, load
from luthier.pipeline.train import make_run
from luthier.recipe.training import SFT

SPLITS = [([4, 4, 4], 1), ([4, 4, 4], 0), ([4, 4, 4], 2), ([4, 8], 1), ([8, 4], 1), ([2, 2, 4, 4], 2), ([12], 0)]


@pytest.fixture(scope="module")
def model(chat_model: Path) -> Model:
    return load(str(chat_model))


def fingerprint(model: Model, folder: Path, lengths: list[int], num_held_out: int) -> str:
    """Of a run on the tokens 0 to 11, cut into these lengths, of which the first few are held out."""
    parts = np.split(np.arange(12, dtype=np.int32), np.cumsum(lengths)[:-1])
    rows = [TokenSequence(part, np.ones(len(part), dtype=bool), Origin("rows.jsonl", 1)) for part in parts]
    prepared = Prepared(rows[num_held_out:], rows[:num_held_out], Audit((), 0, 0, 0), Counts(*[0] * 9))
    run = make_run("sft", SFT(data="rows.jsonl", batch_size=1), model, prepared, folder, micro_batch_tokens=512)
    assert run.checkpoints is not None
    return run.checkpoints.fingerprint


def test_the_same_tokens_cut_or_held_out_in_another_way_are_another_run(model: Model, tmp_path: Path) -> None:
    for one, other in combinations(SPLITS, 2):
        assert fingerprint(model, tmp_path, *one) != fingerprint(model, tmp_path, *other), (one, other)


def test_the_same_cut_is_the_same_run(model: Model, tmp_path: Path) -> None:
    assert fingerprint(model, tmp_path, *SPLITS[0]) == fingerprint(model, tmp_path / "elsewhere", *SPLITS[0])
