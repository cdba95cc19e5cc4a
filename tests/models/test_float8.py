"""A model's layers multiply in eight bits, and nothing else of the model knows of it."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.adapters.adapted import bare
from luthier.adapters.inject import inject
from luthier.adapters.switch import adapters_off
from luthier.adapters.targets import named_places
from luthier.data.batches import TokenBatch, collate, cut
from luthier.data.examples import Origin
from luthier.data.sequences import TokenGroup, TokenSequence
from luthier.errors import ModelError, RecipeError
from luthier.kernels.float8 import AmaxWindows
from luthier.kernels.streams import STREAM_MULTIPLE
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.float8 import float8_layers, in_float8, out_of_float8
from luthier.models.fuse import FastLinear, fuse
from luthier.models.recompute import checkpoint_layers
from luthier.models.score import evaluating, score
from luthier.recipe.adapters import LoRA
from luthier.recipe.precision import FP8, CurrentFP8, DelayedFP8

LAYERS = {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def network_of() -> Callable[..., PreTrainedModel]:
    def made(*, adapter: bool = False, fused: bool = True, fp8: FP8 | None = None, **given: object) -> PreTrainedModel:
        """The same weights each time, in eight bits by these settings, delayed if none are given."""
        register_attention()
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation=ATTENTION)
        network = LlamaForCausalLM(config).train()
        if fused:
            fuse(network)
            in_float8(network, fp8 or DelayedFP8(**given))
        if adapter:
            for one in inject(network.requires_grad_(False), LoRA(r=4), seed=0):
                torch.nn.init.normal_(one.lora_B, std=0.1)
        return network

    return made


def rows(*lengths: int, first: int = 1) -> list[TokenSequence]:
    draw = np.random.default_rng(first)
    ids = [draw.integers(10, 97, size=length, dtype=np.int32) for length in lengths]
    return [TokenSequence(one, np.arange(len(one)) > 0, Origin("rows", i)) for i, one in enumerate(ids)]


def step(network: PreTrainedModel, *batches: TokenBatch) -> dict[str, Tensor]:
    """The gradients of a step's summed loss; the windows move."""
    network.zero_grad(set_to_none=True)
    layers = float8_layers(network).values()
    for windows in layers:
        windows.begin()
    for batch in batches:
        score(network, batch).logprobs.sum().backward()
    for windows in layers:
        windows.end()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def seen(network: PreTrainedModel) -> dict[str, Tensor]:
    return {name: windows.seen.clone() for name, windows in float8_layers(network).items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """|g - h| / |h| over all parameters."""
    assert one.keys() == other.keys()
    squared = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return float((squared / sum(float(other[name].double().square().sum()) for name in one)) ** 0.5)


@pytest.mark.parametrize("adapter", [False, True])
def test_every_linear_layer_of_the_blocks_is_in_eight_bits_and_no_other(network_of, adapter: bool) -> None:  # type: ignore[no-untyped-def]
    network, plain = network_of(adapter=adapter), network_of(adapter=adapter, fused=False)
    assert float8_layers(network).keys() == {f"model.layers.{i}.{name}" for i in range(2) for name in LAYERS}
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert dict(network.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_layers_that_are_skipped_stay_as_they_are(network_of) -> None:  # type: ignore[no-untyped-def]
    network = network_of(skip=("*.down_proj", "model.layers.0.*"))
    assert float8_layers(network).keys() == {f"model.layers.1.{name}" for name in LAYERS - {"mlp.down_proj"}}


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("*.dawn_proj", r'fp8: skip: no linear layer fits "\*.dawn_proj"; names look like model.layers.0.self_attn'),
        ("lm_head", 'no linear layer fits "lm_head"'),
        ("*", "fp8: skip leaves no layer in eight bits; remove a pattern, or fp8"),
    ],
)
def test_patterns_that_fit_nothing_or_all_are_refused(network_of, skip: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match=message):
        network_of(skip=(skip,))


def test_a_model_without_such_layers_is_refused(network_of) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match="LlamaForCausalLM has no linear layers in its blocks; leave fp8 out"):
        in_float8(network_of(fused=False), CurrentFP8())


@pytest.mark.parametrize("fp8", [DelayedFP8(), CurrentFP8()])
def test_the_model_differs_by_rounding_and_is_itself_again_without(network_of, fp8: object) -> None:  # type: ignore[no-untyped-def]
    """E4M3 rounds to 2^-4 at most, a quarter of it on the mean, and errors of a sum's terms cancel out in part."""
    network, plain, batch = network_of(fp8=fp8), network_of(fused=False), collate(rows(17, 30, 17))
    expected = step(plain, batch)
    assert 1e-3 < distance(step(network, batch), expected) < 2**-4
    out_of_float8(network)
    assert not float8_layers(network)
    assert distance(step(network, batch), expected) < 1e-5


def test_a_model_whose_factors_are_codes_already_is_computed_exactly(network_of) -> None:  # type: ignore[no-untyped-def]
    """By a layer that gets a row of powers of two, and has such weights: nothing is rounded, so nothing differs."""
    network = network_of()
    layer = bare(dict(named_places(network))["model.layers.0.mlp.up_proj"])
    assert isinstance(layer, FastLinear)
    generator = torch.Generator().manual_seed(0)
    weight, x = (2.0 ** torch.randint(-3, 4, size, generator=generator) for size in ((48, 32), (5, 32)))
    layer.weight.data.copy_(weight)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-6, atol=0)


def test_an_adapters_own_products_stay_in_their_type(network_of) -> None:  # type: ignore[no-untyped-def]
    network = network_of(adapter=True)
    place = dict(named_places(network))["model.layers.1.mlp.gate_proj"]
    adapter, x = place.adapters["default"], torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    added = place(x) - place.base(x)
    expected = adapter.scale * (x @ adapter.lora_A.T) @ adapter.lora_B.T
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-6)
    gradients = step(network, collate(rows(20, 12)))
    assert all(".adapters." in name for name in gradients)
    assert all(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize("fp8", [DelayedFP8(window=3), CurrentFP8()])
@pytest.mark.parametrize("adapter", [False, True])
def test_layers_computed_twice_give_the_same_bits_and_the_same_windows(  # type: ignore[no-untyped-def]
    network_of, adapter: bool, fp8: object
) -> None:
    found = []
    for every in (0, 1, "selective"):
        network = network_of(adapter=adapter, fp8=fp8)
        checkpoint_layers(network, every)
        for lengths in ((20, 12), (30, 9), (14, 18)):
            gradients = step(network, collate(rows(*lengths)))
        shares = [windows.shares_cut_off() for windows in float8_layers(network).values()]
        found.append((gradients, seen(network), dict(enumerate(shares))))
    for one, other in (pair for again in found[1:] for pair in zip(found[0], again, strict=True)):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("lengths", [(16, 16, 32, 32), (33, 40, 21, 50)])
def test_packing_and_cutting_change_no_code_but_by_the_order_of_sums(  # type: ignore[no-untyped-def]
    network_of, lengths: tuple[int, ...]
) -> None:
    """The codes are those of the same scales. Sums in another order move some numbers over the middle between two codes
    now and then; rounding itself moved the gradient by 1e-3 at least.
    """
    network, items = network_of(), rows(*lengths)
    step(network, collate(items))
    start = seen(network)
    whole, found = step(network, collate(items)), seen(network)
    for batches in (cut(items, None, packing=False), [collate(items[:2]), collate(items[2:])]):
        for name, windows in float8_layers(network).items():
            windows.seen.copy_(start[name])
        assert distance(step(network, *batches), whole) < 1e-5
        for name, value in seen(network).items():
            torch.testing.assert_close(value, found[name], rtol=1e-5, atol=0)


def test_what_a_stream_is_made_up_with_has_no_greater_numbers(network_of) -> None:  # type: ignore[no-untyped-def]
    """The embedding of token 0 is a thousand times as large as any: as padding it would rule all scales."""
    network = network_of()
    network.get_input_embeddings().weight.data[0] *= 1000
    step(network, collate(rows(STREAM_MULTIPLE + 9)))
    made_up = seen(network)
    for windows in float8_layers(network).values():
        windows.seen.zero_()
    one = rows(STREAM_MULTIPLE + 9)[0]
    step(network, collate([one, TokenSequence(one.token_ids[: STREAM_MULTIPLE - 9], np.zeros(23, bool), one.origin)]))
    for name, value in seen(network).items():
        torch.testing.assert_close(value, made_up[name], rtol=1e-5, atol=0)


def test_answers_that_share_a_prompt_are_scored_as_each_by_itself(network_of) -> None:  # type: ignore[no-untyped-def]
    """Their gradients at the prompt's tokens are rounded once they are added up, and not each: so gradients of weights
    differ by rounding.
    """
    network = network_of(adapter=True)
    prompt, chosen, rejected = (one.token_ids for one in rows(11, 6, 8))
    pair = [
        TokenSequence(np.concatenate([prompt, answer]), np.arange(11 + len(answer)) >= 11, Origin("rows", 1))
        for answer in (chosen, rejected)
    ]
    shared, apart = collate([TokenGroup(tuple(pair))]), collate(pair)
    step(network, shared)
    assert shared.num_tokens < apart.num_tokens
    for without in (nullcontext(), adapters_off(network)):
        with without:
            found = [score(network, batch).logprobs for batch in (shared, apart)]
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert distance(step(network, shared), step(network, apart)) < 2**-4


def test_evaluating_moves_no_window(network_of) -> None:  # type: ignore[no-untyped-def]
    network, batch = network_of(), collate(rows(20))
    step(network, batch)
    start = seen(network)
    for windows in float8_layers(network).values():
        windows.begin()
    with evaluating(network):
        score(network, batch)
    with torch.no_grad():
        score(network, batch)
    for name, windows in float8_layers(network).items():
        windows.end()
        assert torch.equal(windows.seen, start[name])
        assert isinstance(windows, AmaxWindows)
