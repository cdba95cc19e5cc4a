"""What is said of an adapter's costs is what a run then has."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.adapters.inject import ADAPTERS, inject
from luthier.adapters.peft_format import save_adapter
from luthier.errors import AdapterError
from luthier.models.load import load
from luthier.models.trainable import freeze_base, trainable_parameters
from luthier.pipeline.adapter_costs import adapter_costs, of_rank


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model in files."""
    place = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(place)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0").save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("word", [word for word in ADAPTERS if word != "fusion"])
def test_parameters_and_file_are_those_of_the_adapter(word: str, base: str, tmp_path: Path) -> None:
    (cost,), _ = adapter_costs(base, types=[word], r=4, dtype="fp32", num_tokens=32, repeats=0)
    model = load(base)
    freeze_base(model.network)
    inject(model.network, of_rank(word, 4), seed=0)
    assert (cost.trainable_parameters, cost.share) == (
        trainable_parameters(model.network)[0],
        pytest.approx(cost.trainable_parameters / trainable_parameters(model.network)[1]),
    )
    save_adapter(model.network, tmp_path, base_model="base")
    in_files = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert cost.file_bytes <= in_files < cost.file_bytes + 10_000  # names and shapes stand before the numbers


def test_every_step_costs_memory_and_time(base: str) -> None:
    """At least parameter, gradient and two moments in float32, less the gradient of the embeddings, [32, 64] in bf16,
    which the frozen model's step has alone, and a few counters.
    """
    costs, frozen = adapter_costs(base, types=["lora", "bitfit"], num_tokens=32, repeats=1)
    assert frozen is not None
    assert frozen > 0
    assert all(cost.memory_bytes > 16 * cost.trainable_parameters - 2 * 32 * 64 - 64 for cost in costs)
    assert all(cost.seconds is not None for cost in costs)


def test_veras_memory_holds_the_shared_pair_once(base: str) -> None:
    """In float32: A [256, 96] and B [96, 256] for all layers, x A^T [32, 256] kept in each of the 14, and parameters,
    gradients and moments; less at most the gradient of the embeddings, [32, 64], which the frozen model's step has
    alone. A second pair is out of reach.
    """
    (cost,), _ = adapter_costs(base, types=["vera"], dtype="fp32", num_tokens=32, repeats=0)
    pair, products = 4 * 2 * 256 * 96, 4 * 14 * 32 * 256
    expected = pair + products + 16 * cost.trainable_parameters
    assert expected - 4 * 32 * 64 <= cost.memory_bytes < expected + pair


@pytest.mark.parametrize(("word", "r"), [("lora", 4), ("adalora", 4), ("vera", 256), ("ia3", None)])
def test_the_rank_that_was_counted_is_said(word: str, r: int | None, base: str) -> None:
    """VeRA's is another kind of rank, so it keeps its own."""
    (cost,), _ = adapter_costs(base, types=[word], r=4, dtype="fp32", num_tokens=32, repeats=0)
    assert cost.as_dict()["r"] == r


def test_a_rank_above_a_layers_size_is_refused(base: str) -> None:
    with pytest.raises(AdapterError, match="r: 64 is above the layer's size; at most 32"):
        adapter_costs(base, types=["lora"], r=64, num_tokens=32, repeats=0)
