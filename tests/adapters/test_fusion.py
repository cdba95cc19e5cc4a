"""Fused updates obey each method's law, equal PEFT's where PEFT has the method, and refuse what does not fit."""

from collections.abc import Mapping, Sequence
from random import Random

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.fusion import FUSIONS, Update, fuse
from luthier.errors import AdapterError

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)
RANKS = st.lists(st.integers(1, 5), min_size=1, max_size=4)
EXACT = {"rtol": 1e-12, "atol": 1e-11}  # float64's roundings of sums of some dozens of products of normal draws
WORDS = pytest.mark.parametrize("method", FUSIONS)


def drawn(seed: int, ranks: Sequence[int], size_out: int = 6, size_in: int = 7) -> list[dict[str, Update]]:
    """An adapter of one layer for each rank, factors normal in float64, scales of either sign."""
    generator, random = torch.Generator().manual_seed(seed), Random(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [{"q": Update(normal(r, size_in), normal(size_out, r), random.choice([-1.5, 0.5, 2.0]))} for r in ranks]


def weights_of(seed: int, ranks: Sequence[int]) -> list[float]:
    return [Random(seed).uniform(-2, 2) for _ in ranks]


def delta(update: Update) -> Tensor:
    return update.scale * update.b @ update.a


def weighted_sum(adapters: Sequence[Mapping[str, Update]], weights: Sequence[float]) -> Tensor:
    return sum((w * delta(adapter["q"]) for adapter, w in zip(adapters, weights, strict=True)), torch.zeros(()))


@WORDS
@given(SEEDS, st.integers(1, 5), SIZES, SIZES)
def test_one_adapter_of_weight_one_is_itself(method: str, seed: int, r: int, size_out: int, size_in: int) -> None:
    adapters = drawn(seed, [r], size_out, size_in)
    fused = fuse(adapters, [1.0], method=method, density=1.0)
    torch.testing.assert_close(delta(fused["q"]), delta(adapters[0]["q"]), **EXACT)


@pytest.mark.parametrize("method", ["concatenate", "svd", "linear", "ties"])
@given(SEEDS, st.integers(2, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_adapters_does_not_matter(method: str, seed: int, count: int, random: Random) -> None:
    ranks = [3] * count
    weighted = list(zip(drawn(seed, ranks), weights_of(seed, ranks), strict=True))
    shuffled = random.sample(weighted, count)
    one, other = (fuse([a for a, _ in pairs], [w for _, w in pairs], method=method) for pairs in (weighted, shuffled))
    torch.testing.assert_close(delta(one["q"]), delta(other["q"]), **EXACT)


@given(SEEDS, RANKS, SIZES, SIZES)
def test_concatenation_is_the_weighted_sum(seed: int, ranks: list[int], size_out: int, size_in: int) -> None:
    adapters, weights = drawn(seed, ranks, size_out, size_in), weights_of(seed, ranks)
    fused = fuse(adapters, weights, method="concatenate")["q"]
    torch.testing.assert_close(delta(fused), weighted_sum(adapters, weights), **EXACT)
    assert (len(fused.a), fused.b.shape[1]) == (sum(ranks), sum(ranks))


@given(SEEDS, RANKS, SIZES, SIZES, st.none() | st.integers(1, 8))
def test_svd_leaves_out_the_smallest_singular_values(
    seed: int, ranks: list[int], size_out: int, size_in: int, r: int | None
) -> None:
    """Eckart and Young: no matrix of rank r is nearer than the root of the squares of the values beyond the r-th."""
    adapters, weights = drawn(seed, ranks, size_out, size_in), weights_of(seed, ranks)
    fused, whole = fuse(adapters, weights, method="svd", r=r)["q"], weighted_sum(adapters, weights)
    rank = max(ranks) if r is None else r
    tail = torch.linalg.svdvals(whole)[rank:]
    torch.testing.assert_close(torch.linalg.norm(delta(fused) - whole), torch.linalg.norm(tail), **EXACT)
    assert len(fused.a) == fused.b.shape[1] == min(rank, sum(ranks), size_out, size_in)


def test_svd_never_builds_the_dense_matrix() -> None:
    """Which would take 720 GB here."""
    a, b = torch.ones(2, 300_000).double(), torch.ones(300_000, 2).double()
    fused = fuse([{"q": Update(a, b, 1.0)}, {"q": Update(a, b, 3.0)}], None, method="svd")["q"]
    corner = delta(Update(fused.a[:, :3], fused.b[:3], fused.scale))
    torch.testing.assert_close(corner, torch.full((3, 3), 4.0).double())


@WORDS
@given(SEEDS, st.integers(1, 4))
def test_a_weight_counts_as_a_factor_of_the_scale(method: str, seed: int, count: int) -> None:
    """Bit for bit, since doubling is exact."""
    adapters, weights = drawn(seed, [3] * count), weights_of(seed, [3] * count)
    doubled = [{"q": Update(adapter["q"].a, adapter["q"].b, 2 * adapter["q"].scale)} for adapter in adapters]
    one = fuse(doubled, weights, method=method)["q"]
    other = fuse(adapters, [2 * weight for weight in weights], method=method)["q"]
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)


@WORDS
def test_fused_factors_lie_whole_in_memory_as_files_need_them(method: str) -> None:
    fused = fuse(drawn(0, [3, 3]), None, method=method)["q"]
    assert fused.a.is_contiguous()
    assert fused.b.is_contiguous()


@WORDS
def test_no_weights_are_the_average(method: str) -> None:
    adapters = drawn(0, [3, 3, 3])
    one, other = fuse(adapters, None, method=method)["q"], fuse(adapters, [1 / 3] * 3, method=method)["q"]
    assert torch.equal(delta(one), delta(other))


@WORDS
def test_a_layer_that_an_adapter_leaves_alone_counts_as_zero_there(method: str) -> None:
    """The others' weights do not grow for it; factors of zeros say the same. DARE, whose draws differ, drops none."""
    density = 1.0 if method.startswith("dare") else 0.5
    present, absent, zero = *drawn(0, [3, 3]), {"q": Update(torch.zeros(3, 7), torch.zeros(6, 3), 1.0)}
    fused = fuse([present, {"k": absent["q"]}], [0.5, 0.25], method=method, density=density)
    alone = fuse([present, zero], [0.5, 0.25], method=method, density=density)
    assert list(fused) == ["q", "k"]
    torch.testing.assert_close(delta(fused["q"]), delta(alone["q"]), **EXACT)


@WORDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_factors_are_widened_to_float32(method: str, dtype: torch.dtype) -> None:
    adapters = drawn(0, [2, 2])
    narrow = [{"q": Update(u["q"].a.to(dtype), u["q"].b.to(dtype), u["q"].scale)} for u in adapters]
    wide = [{"q": Update(u["q"].a.double(), u["q"].b.double(), u["q"].scale)} for u in narrow]
    fused, reference = fuse(narrow, None, method=method)["q"], fuse(wide, None, method=method)["q"]
    assert (fused.a.dtype, fused.b.dtype, reference.a.dtype) == (torch.float32, torch.float32, torch.float64)
    torch.testing.assert_close(delta(fused).double(), delta(reference), rtol=1e-5, atol=1e-5)


def test_ties_keeps_the_largest_and_averages_those_of_the_elected_sign() -> None:
    """Two of four entries stay: [4, 0, -3, 0], [0, 4, 5, 0], [0, -4, -5, 0]; their sums 4, 0, -3, 0 elect + + - +.

    With scales 1, 4, 9 (roots 1, 2, 3): 1*4 / 1 = 4; 2*4 / 1 = 8; (1*-3 + 3*-5) / 2 = -9; of nobody, 0.
    """
    rows = [[4.0, 1.0, -3.0, 1.0], [3.0, 4.0, 5.0, -1.0], [1.0, -4.0, -5.0, 0.0]]
    b = torch.tensor([[1.0], [0.5]])
    adapters = [{"q": Update(torch.tensor([row]), b, scale)} for row, scale in zip(rows, [1.0, 4, 9], strict=True)]
    fused = fuse(adapters, [1.0, 1.0, 1.0], method="ties")["q"]
    assert fused.a.tolist() == [[4.0, 8.0, -9.0, 0.0]]
    assert fused.b.tolist() == [[2.0], [0.0]]


def test_dare_drops_the_share_it_says_and_keeps_the_expected_value() -> None:
    """Of n = 40,000 ones, density 0.3: kept are 12,000 +- 5 * sqrt(n * 0.3 * 0.7) = 458, each 1 / 0.3."""
    ones = {"q": Update(torch.ones(200, 200), torch.ones(200, 200), 1.0)}
    fused = fuse([ones], [1.0], method="dare_linear", density=0.3)["q"]
    for factor in (fused.a, fused.b):
        assert set(factor.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.3))}
        assert abs(int(factor.count_nonzero()) - 12_000) < 458
        assert float(factor.mean()) == pytest.approx(1, abs=458 / 12_000)
    assert not torch.equal(fused.a, fused.b)


def test_dares_delta_is_that_of_linear_in_the_mean() -> None:
    """Over 2,000 seeds, within 5 standard errors in each of the 42 entries."""
    adapters = drawn(0, [2, 2])
    deltas = [delta(fuse(adapters, None, method="dare_linear", seed=seed)["q"]) for seed in range(2000)]
    errors = torch.stack(deltas).mean(0) - delta(fuse(adapters, None, method="linear")["q"])
    assert bool((errors.abs() < 5 * torch.stack(deltas).std(0) / 2000**0.5).all())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dares_draws_depend_on_the_seed_and_the_layers_name_alone(method: str) -> None:
    update = drawn(0, [3])[0]["q"]

    def fused(names: str, seed: int) -> dict[str, Tensor]:
        return {n: delta(u) for n, u in fuse([dict.fromkeys(names, update)], None, method=method, seed=seed).items()}

    one, other = fused("qkv", 1), fused("vq", 1)
    assert all(torch.equal(one[name], other[name]) for name in "qv")
    assert not torch.equal(one["q"], one["k"])
    assert not torch.equal(one["q"], fused("q", 2)["q"])


@given(SEEDS, st.floats(0.1, 1))
def test_dare_ties_of_one_adapter_is_dare_linear(seed: int, density: float) -> None:
    """A sole adapter agrees with itself."""
    adapters = drawn(seed, [3])
    linear, ties = (fuse(adapters, [1.0], method=m, density=density)["q"] for m in ("dare_linear", "dare_ties"))
    assert torch.equal(linear.a, ties.a)
    assert torch.equal(linear.b, ties.b)


def pefts_model(ranks: Sequence[int]) -> peft.PeftModel:
    """A tiny network with an adapter of random factors for each rank; the last one leaves most layers alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    network = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    targets = [["q_proj", "k_proj", "v_proj", "down_proj"]] * (len(ranks) - 1) + [["q_proj", "v_proj"]]
    configs = [
        peft.LoraConfig(r=r, lora_alpha=3 * i + 2, target_modules=names, init_lora_weights=False)
        for i, (r, names) in enumerate(zip(ranks, targets, strict=True))
    ]
    model = peft.get_peft_model(network, configs[0], adapter_name="0")
    for i, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(i), config)
    return model


def pefts_updates(model: peft.PeftModel, name: str) -> dict[str, Update]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    return {
        path: Update(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for path, layer in layers.items()
        if name in layer.lora_A
    }


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")  # PEFT says that nothing is dropped
@pytest.mark.parametrize(
    ("method", "theirs", "ranks", "density"),
    [
        ("concatenate", "cat", [4, 2, 3], 0.5),
        ("svd", "svd", [4, 2, 3], 0.5),
        ("linear", "linear", [4, 4, 4], 0.5),
        ("ties", "ties", [4, 4, 4], 0.4),
        ("ties", "ties", [4, 4, 4], 1.0),
        ("dare_linear", "dare_linear", [4, 4, 4], 1.0),
        ("dare_ties", "dare_ties", [4, 4, 4], 1.0),
    ],
)
def test_fused_updates_equal_pefts(method: str, theirs: str, ranks: list[int], density: float) -> None:
    """To 1e-5 of the largest entry: float32 sums in another order, and PEFT's SVD is of the dense matrix."""
    model, weights = pefts_model(ranks), [0.7, -0.4, 1.2]
    ours = fuse([pefts_updates(model, name) for name in "012"], weights, method=method, density=density)
    model.add_weighted_adapter(["0", "1", "2"], weights, "fused", combination_type=theirs, density=density)
    expected = pefts_updates(model, "fused")
    assert ours.keys() == expected.keys()
    for path, update in expected.items():
        reference = delta(update).detach()
        largest = float(reference.abs().max())
        torch.testing.assert_close(delta(ours[path]), reference, rtol=0, atol=1e-5 * largest, msg=path)


def shaped(a: tuple[int, ...], b: tuple[int, ...], value: float = 1.0) -> dict[str, Update]:
    return {"q": Update(torch.full(a, value), torch.full(b, value), 1.0)}


FITTING = shaped((2, 7), (6, 2))


@pytest.mark.parametrize(
    ("adapters", "weights", "settings", "message"),
    [
        ([FITTING], None, {"method": "tie"}, 'tie: unknown fusion method; did you mean "ties"?'),
        ([FITTING], None, {"method": "svd", "r": 0}, "r: expected at least 1, got 0"),
        ([FITTING], None, {"method": "linear", "r": 2}, "r: only svd chooses its rank, and the method is linear;"),
        ([FITTING], None, {"density": 0.0}, "density: expected more than 0 and at most 1, got 0.0"),
        ([FITTING], None, {"density": float("nan")}, "density: expected more than 0 and at most 1, got nan"),
        ([FITTING], [1.0, 2.0], {}, "weights: 2 given for 1 adapters; give one for each"),
        ([FITTING] * 2, [1.0, float("nan")], {}, "weights[1]: expected a finite number, got nan"),
        ([], None, {}, "fusion of 0 adapters: they change no layer;"),
        ([{}, {}], None, {}, "fusion of 2 adapters: they change no layer;"),
        ([FITTING, shaped((2, 8), (6, 2))], None, {}, "q: the adapters are of different models, with weights [6, 7] "),
        ([shaped((2, 7), (6, 3))], None, {}, "q: factors b [6, 3] and a [2, 7] do not fit;"),
        ([shaped((7,), (6, 7))], None, {}, "q: factors b [6, 7] and a [7] do not fit;"),
        ([shaped((2, 7), (6, 2), float("inf"))], None, {}, "q: an update holds values that are not finite;"),
        ([FITTING, shaped((3, 7), (6, 3))], None, {}, "q: the adapters' ranks differ (2, 3); use concatenate or svd"),
    ],
)
def test_what_does_not_fit_is_one_clear_sentence(
    adapters: list[dict[str, Update]], weights: list[float] | None, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError) as refused:
        fuse(adapters, weights, **({"method": "ties"} | settings))
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
