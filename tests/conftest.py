"""What holds for all tests, and the tiny chat model that whole runs are tried with."""

import json
from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import luthier

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# A busy machine takes longer than the 200 ms that hypothesis allows an example; that is no fault of the code.
hypothesis.settings.register_profile("luthier", deadline=None)
hypothesis.settings.load_profile("luthier")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Test processes run side by side, one a core, and tiny tensors take ten times as long on contended threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer model from a configuration and a seed, with a byte tokenizer and a ChatML template."""
    return _saved(tmp_path_factory.mktemp("models") / "tiny", hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="session")
def wide_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with layers that have room for the usual ranks of adapters."""
    return _saved(tmp_path_factory.mktemp("models") / "wide", hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="session")
def speaker(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, taught to say something short and to stop."""
    folder = tmp_path_factory.mktemp("speaker")
    rows = [{"question": f"What is {i}?", "answer": "ab" * (i % 3 + 1)} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = luthier.load(str(chat_model))
    given = {"adapter": None, "learning_rate": 1e-2, "epochs": 20, "batch_size": 8, "save_every": None}
    luthier.sft(model, data=folder / "rows.jsonl", output=folder / "run", **given)
    return Path(luthier.save(model, folder / "model"))


def _saved(folder: Path, **sizes: int) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    end = "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, chat_template=_CHATML)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**shape, **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
