"""Reading prompts and going on by one token gives the logits of transformers' own whole forward pass."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.merge import adapters_merged
from luthier.adapters.switch import assign_rows
from luthier.kernels.decoding import Decoding, OwnKeys
from luthier.models.attention import ATTENTION, RAGGED, register_attention, supports_ragged
from luthier.models.decode import can_decode, next_logits, read_prompts
from luthier.recipe.adapters import Bottleneck, DoRA, LoRA, Prefix, Prompt

Factory = Callable[..., PreTrainedModel]

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
WINDOWED = {name: {"sliding_window": 4} for name in ("cohere2", "exaone4", "gemma3_text", "mistral", "olmo3", "phi3")}
SETTINGS: dict[str, dict[str, Any]] = {
    **WINDOWED,
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7},
    "opt": {"word_embed_proj_dim": 32},
}
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def tiny(network: Factory, name: str) -> PreTrainedModel:
    """Weights so large that attention is sharp and every token counts."""
    register_attention()
    built = network(name, **SIZES, **ENDS, **SETTINGS.get(name, {})).requires_grad_(False)
    for parameter in built.parameters():
        parameter *= 3
    built.set_attn_implementation(ATTENTION if supports_ragged(built.config) else "eager")
    return built


def tokens(*lengths: int) -> list[NDArray[np.int32]]:
    draw = np.random.default_rng(1)
    return [draw.integers(1, VOCABULARY, size=length, dtype=np.int32) for length in lengths]


def near(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest: float32 sums of another order."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def whole(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The last logits by transformers' own attention, with no cache and no neighbour."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    model.set_attn_implementation(ours)
    return logits


@pytest.mark.parametrize("name", sorted(RAGGED))
@torch.inference_mode()
def test_every_architecture_decodes_what_its_own_forward_pass_gives(network: Factory, name: str) -> None:
    """Two prompts, the first with two answers, by three tokens each. Windows are shorter than what they see."""
    model, prompts = tiny(network, name), tokens(6, 3)
    keys, logits = read_prompts(model, prompts)
    near(logits, torch.stack([whole(model, prompt.tolist()) for prompt in prompts]))
    own, owners, groups = OwnKeys(3, 3), (0, 0, 1), [(slice(0, 2), keys.of(0)), (slice(2, 3), keys.of(1))]
    rows = [prompts[owner].tolist() for owner in owners]
    for step, new in enumerate(([5, 6, 7], [8, 9, 10], [5, 12, 13])):
        positions = torch.tensor([len(row) for row in rows])
        decoding = Decoding.of(own, [step] * 3, groups, positions, model.dtype)
        logits = next_logits(model, torch.tensor(new), decoding)
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
        near(logits, torch.stack([whole(model, row) for row in rows]))


@pytest.mark.parametrize("lengths", [(32,), (31, 1), (1,), (33, 40)], ids=str)
@torch.inference_mode()
def test_prompts_of_any_length_are_read_as_if_alone(network: Factory, lengths: tuple[int, ...]) -> None:
    """Streams that are made up to a multiple of 32, and one that is one already."""
    model, prompts = tiny(network, "llama"), tokens(*lengths)
    keys, logits = read_prompts(model, prompts)
    assert logits.shape == (len(lengths), VOCABULARY)
    assert keys.lengths == lengths
    for place, prompt in enumerate(prompts):
        assert all(k.shape[1] == v.shape[1] == len(prompt) for k, v in keys.of(place).values())
        near(logits[place], whole(model, prompt.tolist()))


@torch.inference_mode()
def test_bfloat16_logits_come_in_float32_and_are_near_the_exact_ones(network: Factory) -> None:
    """Two layers round their inputs, products and sums to 8 bits, 2^-8 each time: 5% of the largest."""
    exact, prompts = tiny(network, "llama").bfloat16().float(), tokens(6)
    expected = read_prompts(exact, prompts)[1]
    narrow = exact.bfloat16()
    keys, logits = read_prompts(narrow, prompts)
    decoding = Decoding.of(OwnKeys(2, 1), [0, 0], [(slice(0, 2), keys.of(0))], torch.tensor([6, 6]), narrow.dtype)
    after = next_logits(narrow, torch.tensor([5, 6]), decoding)
    wide = torch.stack([whole(narrow.float(), [*prompts[0].tolist(), token]) for token in (5, 6)])
    for one, other in ((logits, expected), (after, wide)):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize("settings", [LoRA(r=2), DoRA(r=2)], ids=["lora", "dora"])
def test_adapters_on_linear_layers_are_decoded(network: Factory, settings: LoRA | DoRA) -> None:
    model, prompts = tiny(network, "llama"), tokens(6)
    plain = whole(model, prompts[0].tolist())
    inject(model, settings, seed=0)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    assert can_decode(model)
    with torch.inference_mode():
        expected = whole(model, prompts[0].tolist())
        near(read_prompts(model, prompts)[1][0], expected)
        assert not torch.allclose(expected, plain, atol=0.1)
        with adapters_merged(model):
            near(read_prompts(model, prompts)[1][0], expected)


@pytest.mark.parametrize(
    "settings",
    [
        Bottleneck(size=4),
        Prefix(num_virtual_tokens=2),
        Prompt(num_virtual_tokens=2),
        LoRA(r=2, new_tokens=("<new>",)),
        LoRA(r=2, target_modules=("q_proj",), modules_to_save=("norm",)),
    ],
    ids=["bottleneck", "prefix", "prompt", "new_tokens", "modules_to_save"],
)
def test_adapters_elsewhere_than_on_linear_layers_are_left_to_transformers(network: Factory, settings: Any) -> None:
    model = tiny(network, "llama")
    assert can_decode(model)
    inject(model, settings, seed=0)
    assert not can_decode(model)


def test_other_attention_and_rows_with_adapters_of_their_own_are_left_to_transformers(network: Factory) -> None:
    assert not can_decode(tiny(network, "gemma2"))
    model = tiny(network, "llama")
    inject(model, LoRA(r=2), seed=0)
    with assign_rows(model, ["default", None]):
        assert not can_decode(model)
    assert can_decode(model)
    model.set_attn_implementation("sdpa")
    assert not can_decode(model)
