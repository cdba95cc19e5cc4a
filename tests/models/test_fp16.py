"""What float16 cannot hold is refused where it would become infinite: in loading, in saving and in merging."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.errors import ModelError
from luthier.models.load import load
from luthier.models.save import rounded, save


@pytest.fixture
def great(chat_model: Path, tmp_path: Path) -> Path:
    """The tiny model with one number that float16 cannot hold."""
    model = load(str(chat_model))
    with torch.no_grad():
        model.network.model.norm.weight[0] = 7e4
    return save(model, tmp_path / "great")


def test_a_model_that_fits_is_loaded_rounded(chat_model: Path) -> None:
    wide, narrow = load(str(chat_model)).network, load(str(chat_model), dtype="fp16").network
    for name, parameter in narrow.named_parameters():
        assert torch.equal(parameter, wide.get_parameter(name).half()), name


def test_a_model_with_too_great_numbers_is_not_loaded(great: Path) -> None:
    assert load(str(great), dtype="bf16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"norm\.weight has numbers that fp16 cannot hold; load it"):
        load(str(great), dtype="fp16")


def test_a_model_with_too_great_numbers_is_not_saved(great: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"norm\.weight has numbers that fp16 cannot hold; choose dtype bf16 or fp32"):
        save(load(str(great)), tmp_path / "saved", dtype="fp16")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("values", [torch.tensor([65504.0, -1.0]), torch.tensor([torch.inf, 1.0])], ids=str)
def test_rounding_keeps_what_fits_and_what_was_infinite(values: Tensor) -> None:
    assert torch.equal(rounded(values, torch.float16, "weight"), values.half())
