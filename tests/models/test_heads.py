"""A reward model is the body of its language model under one more layer, and transformers reads its folder alike."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from luthier.adapters.inject import inject
from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenGroup, TokenSequence
from luthier.errors import AdapterError, ModelError
from luthier.models.attention import ATTENTION, register_attention, supports_ragged
from luthier.models.fuse import fuse
from luthier.models.heads import score_rewards, with_head
from luthier.models.load import DTYPES, Model, load, load_either, outline
from luthier.models.rewards import load_reward
from luthier.models.save import save
from luthier.models.sources import ResolvedSource
from luthier.recipe.adapters import LoRA

Factory = Callable[..., PreTrainedModel]
Headed = Callable[..., Model]

WINDOW = {"sliding_window": 4}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "gemma2": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
    "gpt_neox": {},
    "llama": {},
    "mistral": WINDOW,
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


@pytest.fixture
def headed(network: Factory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Headed:
    def build(architecture: str = "llama", *, seed: int = 1, dtype: str = "fp32", **settings: object) -> Model:
        register_attention()
        causal = network(architecture, **(ARCHITECTURES[architecture] | settings)).to(DTYPES[dtype])
        causal.set_attn_implementation(ATTENTION if supports_ragged(causal.config) else "eager")
        return with_head(Model(causal, tokenizer, ResolvedSource("tiny", "folder", tmp_path)), seed=seed)

    return build


def rows(lengths: tuple[int, ...] = (9, 2, 17, 6)) -> list[TokenSequence]:
    draw = np.random.default_rng(0)
    tokens = [draw.integers(256, size=n, dtype=np.int32) for n in lengths]
    return [TokenSequence(ids, np.zeros(len(ids), dtype=np.bool_), Origin("rows", i)) for i, ids in enumerate(tokens)]


def padded(sequences: list[TokenSequence], padding: int, side: str) -> dict[str, Tensor]:
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), padding)
    mask = torch.zeros_like(ids)
    for i, one in enumerate(sequences):
        place = slice(longest - len(one), None) if side == "left" else slice(len(one))
        ids[i, place], mask[i, place] = torch.from_numpy(one.token_ids.astype(np.int64)), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_rewards_are_transformers_own_on_padded_batches(
    architecture: str, side: str, headed: Headed, tmp_path: Path
) -> None:
    """To 1e-5: float32 sums of another order, over two layers. The rewards lie a thousand times farther apart."""
    model = headed(architecture)
    found = score_rewards(model, collate(rows()))
    place = save(model, tmp_path / "saved")
    theirs = AutoModelForSequenceClassification.from_pretrained(place, attn_implementation="eager")
    expected = theirs(**padded(rows(), model.config.pad_token_id, side)).logits.squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float(expected.max() - expected.min()) > 1e-2


@torch.no_grad()
def test_answers_that_share_their_prompt_have_the_rewards_of_whole_conversations(headed: Headed) -> None:
    model, (prompt, first, second) = headed(), rows((12, 5, 8))
    ids = [np.concatenate([prompt.token_ids, answer.token_ids]) for answer in (first, second)]
    whole = [TokenSequence(one, np.zeros(len(one), dtype=np.bool_), Origin("rows", 0)) for one in ids]
    shared = score_rewards(model, collate([TokenGroup(tuple(whole))]))
    torch.testing.assert_close(shared, score_rewards(model, collate(whole)), rtol=0, atol=1e-6)


def test_gradients_are_transformers_own(headed: Headed) -> None:
    """Of the rewards' squares, which weigh every sequence otherwise; to 1e-5 of the largest gradient."""
    ours, theirs = headed().network, headed().network
    theirs.set_attn_implementation("eager")
    score_rewards(ours, collate(rows())).square().sum().backward()
    theirs(**padded(rows(), theirs.config.pad_token_id, "right")).logits.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert float(expected["score.weight"].abs().max()) > 0
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * largest, msg=name)


def test_the_body_is_no_second_copy(network: Factory, model: Model) -> None:
    before = {name: tensor.data_ptr() for name, tensor in model.network.base_model.state_dict().items()}
    reward = with_head(model, seed=0)
    assert {name: tensor.data_ptr() for name, tensor in reward.network.base_model.state_dict().items()} == before
    assert {name for name, _ in reward.network.named_parameters() if not name.startswith("model.")} == {"score.weight"}
    assert with_head(reward, seed=5) is reward


def test_the_head_is_drawn_from_the_seed(headed: Headed) -> None:
    """64 numbers of standard deviation 1 / sqrt(65); four standard errors of their own deviation are 35%."""
    first, again, other = (headed(seed=seed).network.score.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.detach().std()) * math.sqrt(65) == pytest.approx(1, abs=0.35)


@torch.no_grad()
def test_a_narrow_model_gives_rewards_in_float32(headed: Headed) -> None:
    """Two layers round to 8 bits, 2^-8 each time: 5% of the largest."""
    found, expected = (score_rewards(headed(dtype=dtype), collate(rows())) for dtype in ("bf16", "fp32"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_fused_network_gives_the_same_rewards_under_the_same_names(architecture: str, headed: Headed) -> None:
    model = headed(architecture)
    names, expected = list(model.network.state_dict()), score_rewards(model, collate(rows()))
    assert fuse(model.network).fused["Linear"] > 0
    assert list(model.network.state_dict()) == names
    torch.testing.assert_close(score_rewards(model, collate(rows())), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_says_that_it_is_a_reward_model(tied: bool, headed: Headed, tmp_path: Path) -> None:
    place = save(headed(tie_word_embeddings=tied), tmp_path / "saved")
    config, tensors = json.loads((place / "config.json").read_text()), load_file(place / "model.safetensors")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["id2label"], config["label2id"]) == ({"0": "reward"}, {"reward": 0})
    assert config["problem_type"] == "regression"
    assert tensors["score.weight"].shape == (1, 64)
    assert not any("lm_head" in name for name in tensors)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_saved_reward_model_comes_back_bit_for_bit(dtype: str, headed: Headed, tmp_path: Path) -> None:
    model = headed(dtype=dtype)
    place = save(model, tmp_path / "saved", max_shard_bytes=20_000)
    for loaded in (load_reward(str(place), dtype=dtype), load_either(str(place), dtype=dtype)):
        found = loaded.network.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in model.network.state_dict().items())
        assert torch.equal(score_rewards(loaded, collate(rows())), score_rewards(model, collate(rows())))
        assert loaded.tokenizer.pad_token == model.tokenizer.pad_token


def test_padding_never_ends_a_conversation(headed: Headed, tokenizer: PreTrainedTokenizerFast) -> None:
    """The end of a turn is <|im_end|> and that of a text <|endoftext|>; only <|im_start|> is left of the tiny one."""
    for given in (None, "<|im_end|>", "<|endoftext|>"):
        tokenizer.pad_token = given
        model = headed()
        assert model.tokenizer.pad_token == "<|im_start|>"
        assert model.config.pad_token_id == model.tokenizer.pad_token_id
        assert tokenizer.pad_token == given
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>", "<|other|>"]})
    assert headed().tokenizer.pad_token == "<|pad|>"
    tokenizer.pad_token = "<|other|>"
    assert headed().tokenizer is tokenizer


def test_without_a_token_to_pad_with_there_is_no_padding(headed: Headed, caplog: pytest.LogCaptureFixture) -> None:
    model = headed(vocab_size=257)
    assert model.config.pad_token_id is model.tokenizer.pad_token is None
    assert "no special token is left to pad with" in caplog.text


def test_a_model_without_weights_gets_its_head_too(model: Model, tmp_path: Path) -> None:
    place = save(model, tmp_path / "saved")
    with FakeTensorMode(allow_non_fake_inputs=True):
        planned = with_head(outline(str(place)), seed=0).network
        rewards = score_rewards(planned, collate(rows()))
    assert isinstance(planned.score.weight, FakeTensor)
    assert rewards.shape == (4,)
    shapes = {name: value.shape for name, value in with_head(load(str(place)), seed=0).network.state_dict().items()}
    assert {name: value.shape for name, value in planned.state_dict().items()} == shapes


def test_a_reward_model_is_never_taken_for_a_language_model(headed: Headed, tmp_path: Path) -> None:
    """Its embeddings are tied, so a language model could be made of its tensors."""
    place = str(save(headed(tie_word_embeddings=True), tmp_path / "saved"))
    for read in (load, outline):
        with pytest.raises(
            ModelError, match=r"is a LlamaForSequenceClassification, which gives rewards .* load_reward"
        ):
            read(place)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert outline(place, either=True).network.score.weight.shape == (1, 64)


def test_a_language_model_is_never_taken_for_a_reward_model(model: Model, tmp_path: Path) -> None:
    place = save(model, tmp_path / "saved")
    with pytest.raises(ModelError, match="is a llama language model, which gives no rewards; train a reward model"):
        load_reward(str(place))


def test_a_classifier_or_a_damaged_reward_model_is_refused(headed: Headed, tmp_path: Path) -> None:
    place = save(headed(), tmp_path / "saved")
    tensors, config = load_file(place / "model.safetensors"), json.loads((place / "config.json").read_text())
    save_file({n: t for n, t in tensors.items() if n != "score.weight"}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lack 1 tensors of a LlamaForSequenceClassification, the first score\.weight"
    ):
        load_reward(str(place))
    save_file(tensors | {"score.weight": torch.ones(3, 64)}, place / "model.safetensors", {"format": "pt"})
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (place / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(ModelError, match="with 3 labels gives no single reward"):
        load_reward(str(place))


def test_what_cannot_get_a_head_is_refused(network: Factory, model: Model) -> None:
    other = Model(network("granite"), model.tokenizer, model.source)
    with pytest.raises(ModelError, match="tiny: transformers has no sequence classification for granite"):
        with_head(other, seed=0)
    inject(model.network, LoRA(r=2), seed=0)
    with pytest.raises(AdapterError, match="carries an adapter, and the model gets a head; merge the adapter first"):
        with_head(model, seed=0)
