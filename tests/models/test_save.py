"""What was saved comes back bit for bit, in a form that others' tools read, and nothing of the user's is lost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from luthier.adapters.inject import inject
from luthier.errors import AdapterError, ModelError
from luthier.models.load import DTYPES, Model, load
from luthier.models.save import save
from luthier.recipe.adapters import LoRA

Factory = Callable[..., PreTrainedModel]

TEXTS = ["plain words", "  spaces \r\n\t", "<|im_start|>user\nhi<|im_end|>", "Ünïcödé 漢字 🎉", ""]


def equal(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(one == other and bool((a == b).all()) and a.dtype == b.dtype for (one, a), (other, b) in pairs)


@pytest.mark.parametrize("max_shard_bytes", [20_000, 5_000_000_000])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["gemma3_text", "llama", "qwen3"])
def test_a_saved_model_comes_back_bit_for_bit(
    architecture: str, tied: bool, dtype: str, max_shard_bytes: int, network: Factory, model: Model, tmp_path: Path
) -> None:
    model.network = network(architecture, tie_word_embeddings=tied).to(DTYPES[dtype])
    place = save(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    loaded = load(str(place), dtype=dtype)
    assert equal(loaded.network, model.network)
    assert [loaded.tokenizer.encode(text) for text in TEXTS] == [model.tokenizer.encode(text) for text in TEXTS]
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_tied_weights_are_stored_once(dtype: str | None, model: Model, tmp_path: Path) -> None:
    place = save(model, tmp_path / "saved", dtype=dtype)
    assert "lm_head.weight" not in load_file(place / "model.safetensors")
    network = load(str(place)).network
    assert network.lm_head.weight.data_ptr() == network.model.embed_tokens.weight.data_ptr()


def test_a_type_asked_for_is_that_of_the_file_alone(model: Model, tmp_path: Path) -> None:
    place = save(model, tmp_path / "saved", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(place / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    assert equal(load(str(place), dtype="bf16").network, model.network.to(torch.bfloat16))


def test_transformers_alone_reads_it(model: Model, tmp_path: Path) -> None:
    place = save(model, tmp_path / "saved")
    assert equal(AutoModelForCausalLM.from_pretrained(place), model.network)
    assert AutoTokenizer.from_pretrained(place).encode(TEXTS[2]) == model.tokenizer.encode(TEXTS[2])


@pytest.mark.parametrize("given", [None, 7, [7, 9]])
def test_generation_stops_where_the_template_ends_a_turn(
    given: int | list[int] | None, model: Model, tmp_path: Path
) -> None:
    model.network.generation_config.eos_token_id = given
    place = save(model, tmp_path / "saved")
    end, turn_end = model.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    before = given if isinstance(given, list) else [given]
    expected = sorted({*before, end, turn_end} - {None})
    assert GenerationConfig.from_pretrained(place).eos_token_id == expected
    assert load(str(place)).network.generation_config.eos_token_id == expected


def test_sampling_settings_that_do_not_say_sample_are_no_reason_not_to_save(model: Model, tmp_path: Path) -> None:
    model.network.generation_config.temperature = 0.6
    saved = GenerationConfig.from_pretrained(save(model, tmp_path / "saved"))
    assert (saved.do_sample, saved.temperature) == (True, 0.6)


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_a_model_without_a_usable_template_is_saved(template: str | None, model: Model, tmp_path: Path) -> None:
    """The second template loses all turns but the first, so it cannot say where an answer ends."""
    model.tokenizer.chat_template = template
    place = save(model, tmp_path / "saved")
    assert GenerationConfig.from_pretrained(place).eos_token_id == model.tokenizer.eos_token_id
    assert load(str(place)).tokenizer.chat_template == template


def test_a_folder_with_anything_else_is_left_alone(model: Model, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "file").touch()
    for place, complaint in ((tmp_path, r"holds \w+(\.md)?, which is no part of a model"), (tmp_path / "file", "is a")):
        with pytest.raises(ModelError, match=complaint):
            save(model, place)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "notes.md"}


def test_an_older_model_is_replaced_whole(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "saved", max_shard_bytes=20_000)
    with torch.no_grad():
        model.network.model.norm.weight.add_(1)
    place = save(model, tmp_path / "saved")
    assert [file.name for file in place.glob("*.safetensors*")] == ["model.safetensors"]
    assert equal(load(str(place)).network, model.network)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_an_older_model_survives_a_save_that_fails(model: Model, tmp_path: Path) -> None:
    place = save(model, tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    model.network.config.unwritable = {1, 2}
    with pytest.raises(TypeError):
        save(model, place)
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    model: Model, tmp_path: Path, full_disk: Callable[[], None]
) -> None:
    full_disk()
    with pytest.raises(ModelError, match=r"cannot be written .* make room"):
        save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_an_unmerged_adapter_is_never_lost_in_silence(model: Model, tmp_path: Path) -> None:
    inject(model.network, LoRA(r=2), seed=0)
    with pytest.raises(AdapterError, match="carries an adapter; merge it first"):
        save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_everyone_may_read_what_the_owner_shares(model: Model, tmp_path: Path) -> None:
    place = save(model, tmp_path / "saved")
    assert len({file.stat().st_mode for file in place.iterdir()}) == 1
