"""Loading gives the network and tokenizer that were saved, runs no foreign code, and changes nothing around it."""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from luthier.errors import ModelError, NetworkError
from luthier.models.load import Model, load
from luthier.models.save import save
from luthier.models.sources import resolve

Factory = Callable[..., PreTrainedModel]

IDS = torch.tensor([[5, 17, 250, 3, 99, 41]])


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    return save(model, tmp_path / "saved")


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_only_the_type_asked_for_is_loaded(dtype: str, expected: torch.dtype, folder: Path) -> None:
    loaded = load(str(folder), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {expected}
    assert (loaded.dtype, loaded.device) == (expected, torch.device("cpu"))
    assert loaded.config is loaded.network.config
    assert not loaded.network.training


@pytest.mark.parametrize("attention", [None, "eager", "sdpa"])
def test_every_attention_gives_the_same_logits(attention: str | None, folder: Path, model: Model) -> None:
    with torch.no_grad():
        found = load(str(folder), attention=attention).network(IDS).logits
        expected = model.network(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_generation_with_a_cache_is_what_transformers_generates(folder: Path, model: Model) -> None:
    ours = load(str(folder)).network.generate(
        IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    theirs = model.network.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.tolist() == theirs.tolist()


def test_training_in_place_does_not_reach_the_file(folder: Path) -> None:
    """Weights are mapped from the file, so a write must copy the page, not change the file."""
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in load(str(folder)).network.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_tokenizer_comes_with_its_template(folder: Path, model: Model) -> None:
    loaded, turns = load(str(folder)).tokenizer, [{"role": "user", "content": "Häagen 漢 <|im_end|>"}]
    assert loaded.apply_chat_template(turns) == model.tokenizer.apply_chat_template(turns)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_tensor_that_is_missing_or_misshapen_is_never_left_random(name: str, fault: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    if fault == "misshapen":
        tensors[name] = tensor[:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=str(folder)):
        load(str(folder))


def test_a_model_with_no_output_layer_is_no_language_model(network: Factory, model: Model, folder: Path) -> None:
    untied = Model(network(tie_word_embeddings=False), model.tokenizer, model.source)
    save(untied, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors of a LlamaForCausalLM, the first lm_head\.weight"):
        load(str(folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_one_sentence(file: str, folder: Path) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(ModelError, match=str(folder)) as error:
        load(str(folder))
    assert "\n" not in str(error.value)


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    mapped = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": mapped}))
    with pytest.raises(ModelError, match=str(folder)):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_loading_says_nothing_and_leaves_no_setting_behind(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def settings() -> tuple[object, ...]:
        bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
        return bars, verbosity, logging.getLogger().level, list(warnings.filters), torch.get_default_dtype()

    before = settings()
    load(str(folder), dtype="bf16")
    assert settings() == before
    assert capfd.readouterr() == ("", "")


def test_smollm2_answers() -> None:
    """The real model, greedy: what no random or wrongly permuted weights would say."""
    try:
        resolve("smollm2-135m")
    except NetworkError as error:
        pytest.skip(str(error))
    loaded = load("smollm2-135m")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    answer = loaded.network.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
