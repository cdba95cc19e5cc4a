"""AdapterFusion against its paper's equation, and its members: frozen, followed where they help, kept in the file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.adapter_fusion import AdapterFusion as Fusion
from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.errors import AdapterError, RecipeError
from luthier.models.recompute import checkpoint_layers
from luthier.models.trainable import freeze_base
from luthier.recipe.adapters import AdapterFusion, AnyAdapter, Bottleneck, LoRA

HIDDEN = 32
IDS = torch.arange(1, 25).view(2, 12)
MEMBERS = {
    "after": (Bottleneck(size=6), Bottleneck(size=4, activation="gelu", scale=0.5), Bottleneck(size=6)),
    "beside": (Bottleneck(size=5, parallel=True, scale=4.0), Bottleneck(size=5, parallel=True)),
    "feed_forward": (Bottleneck(size=3, after="feed_forward"), Bottleneck(size=3, after="feed_forward")),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": nn.functional.gelu, "relu": torch.relu}


def network(hidden: int = HIDDEN) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def randomize(model: nn.Module, seed: int, std: float = 0.2) -> None:
    for i, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(1000 * seed + i))


def stored(folder: Path, settings: AnyAdapter, seed: int = 0, std: float = 0.2) -> str:
    """A trained adapter in a folder."""
    model = network()
    inject(model, settings, seed=seed)
    randomize(model, seed, std)
    save_adapter(model, folder, base_model="base")
    return str(folder)


def fusion_of(folder: Path, kind: str = "after") -> AdapterFusion:
    return AdapterFusion(adapters=tuple(stored(folder / str(i), m, i) for i, m in enumerate(MEMBERS[kind])))


def fused(settings: AdapterFusion) -> LlamaForCausalLM:
    """As if trained."""
    model = network()
    inject(model, settings, seed=3)
    randomize(model, 9, 0.1)
    return model


def fusions(model: nn.Module) -> list[Fusion]:
    return [layer.adapters["default"] for layer in adapted_layers(model).values()]


class ByThePaper(nn.Module):
    """Eq. 3 with every member's output formed; the value matrix is 1 + V, and s_n is within U_n and u_n already."""

    def __init__(self, fusion: Fusion, base: nn.Module) -> None:
        super().__init__()
        self.fusion, self.base = fusion, base

    def forward(self, *inputs: Tensor, **options: Tensor) -> object:
        result, f = self.base(*inputs, **options), self.fusion
        y = result[0] if isinstance(result, tuple) else result
        x = y if not f.members[0].parallel else inputs[0] if inputs else options["hidden_states"]
        made = []
        for i, member in enumerate(f.members):
            down, bias = f.down.split(f.sizes)[i], f.down_bias.split(f.sizes)[i]
            inner = FUNCTIONS[member.activation](x @ down.T + bias)
            made.append(y + inner @ f.up.split(f.sizes, dim=1)[i].T + f.up_bias[i])
        z = torch.stack(made, dim=-2)
        scores = ((y @ f.fusion_query.T)[..., None, :] * (z @ f.fusion_key.T)).sum(-1)
        mixed = (scores.softmax(-1)[..., None] * z).sum(-2)
        output = mixed @ (torch.eye(HIDDEN, dtype=y.dtype) + f.fusion_value).T
        return (output, *result[1:]) if isinstance(result, tuple) else output


@pytest.mark.parametrize("kind", MEMBERS)
def test_logits_and_gradients_are_those_of_the_papers_equation(kind: str, tmp_path: Path) -> None:
    """In float64, to 1e-10: the algebra that never forms z changes only the order of sums."""
    model = fused(fusion_of(tmp_path, kind)).double()
    own = list(adapter_parameters(model).values())
    found = model(IDS).logits
    gradients = torch.autograd.grad(found.square().mean(), own)
    for path, layer in adapted_layers(model).items():
        model.set_submodule(path, ByThePaper(layer.adapters["default"], layer.base))
    expected = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().mean(), own), rtol=0, atol=1e-10)


def test_it_starts_as_the_members_average_but_for_small_scores(tmp_path: Path) -> None:
    """Exactly, once Q and K are zero: y + (d_1 + d_2) / 2, d_n what member n adds."""
    settings = fusion_of(tmp_path, "feed_forward")
    model = network()
    inject(model, settings, seed=0)
    y = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    fusion = fusions(model)[0]
    weights = fusion.weights(y, fusion.middles(y))
    assert not torch.equal(weights, torch.full_like(weights, 0.5))
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5), rtol=0, atol=0.05)
    for matrix in (fusion.fusion_query, fusion.fusion_key):
        nn.init.zeros_(matrix)
    alone = [member_output(folder, y) for folder in settings.adapters]
    torch.testing.assert_close(fusion(y, base=torch.clone), sum(alone) / 2, rtol=0, atol=1e-5)


def member_output(folder: str, y: Tensor) -> Tensor:
    """What a stored bottleneck makes of y, at the first place."""
    model = network()
    load_adapter(model, Path(folder))
    output: Tensor = next(iter(adapted_layers(model).values())).adapters["default"](y, base=torch.clone)
    return output


@pytest.mark.parametrize("favoured", [0, 1])
def test_a_fusion_that_favours_one_member_equals_it(favoured: int, tmp_path: Path) -> None:
    """Q y is y's sum, at least 3 here; the members add 1 and -1 to the first number, which K takes 100 times: the
    scores are 600 apart or more.
    """
    for i, first in enumerate((1.0, -1.0)):
        model = network()
        inject(model, Bottleneck(size=3, after="feed_forward"), seed=i)
        randomize(model, i)
        for layer in adapted_layers(model).values():
            nn.init.zeros_(layer.adapters["default"].adapter_up[0])
            nn.init.constant_(layer.adapters["default"].adapter_up_bias[0], first)
        save_adapter(model, tmp_path / str(i), base_model="base")
    model = network()
    inject(model, AdapterFusion(adapters=(str(tmp_path / "0"), str(tmp_path / "1"))), seed=0)
    fusion = fusions(model)[0]
    nn.init.zeros_(fusion.fusion_query)
    nn.init.ones_(fusion.fusion_query[0])
    nn.init.zeros_(fusion.fusion_key)
    nn.init.constant_(fusion.fusion_key[0, 0], 100.0 if favoured == 0 else -100.0)
    y = torch.rand(7, HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.1
    expected = member_output(str(tmp_path / str(favoured)), y)
    torch.testing.assert_close(fusion(y, base=torch.clone), expected, rtol=0, atol=1e-6)


def test_the_weights_of_a_token_add_up_to_one(tmp_path: Path) -> None:
    fusion = fusions(fused(fusion_of(tmp_path)))[0]
    y = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(1))
    weights = fusion.weights(y, fusion.middles(y))
    assert weights.shape == (50, 3)
    assert (weights > 0).all()
    assert (weights > 0.4).any()
    torch.testing.assert_close(weights.sum(1), torch.ones(50), rtol=0, atol=1e-6)


def test_training_finds_the_member_that_helps(tmp_path: Path) -> None:
    """The teacher is the second member's model; the first member is noise. The weights start at a half each."""
    folders = [stored(tmp_path / str(i), Bottleneck(size=6, after="feed_forward"), i, std=0.5) for i in range(2)]
    teacher, model = network(), network()
    load_adapter(teacher, Path(folders[1]))
    inject(model, AdapterFusion(adapters=tuple(folders)), seed=0)
    taught = teacher(IDS).logits.log_softmax(-1).detach()
    optimizer = torch.optim.Adam(adapter_parameters(model).values(), lr=0.01)
    divergences = []
    for _ in range(60):
        divergence = nn.functional.kl_div(model(IDS).logits.log_softmax(-1), taught, log_target=True, reduction="sum")
        divergence.backward()
        optimizer.step()
        optimizer.zero_grad()
        divergences.append(float(divergence.detach()))
    assert divergences[-1] < 0.1 * divergences[0]
    assert [weight_of_the_second(model, layer) > 0.8 for layer in fusions(model)] == [True, True]


@torch.no_grad()
def weight_of_the_second(model: nn.Module, fusion: Fusion) -> float:
    """The second member's mean weight over the text at one place."""
    given: list[Tensor] = []
    hook = fusion.place.register_forward_hook(lambda module, inputs, output: given.append(output.flatten(0, -2)))
    model(IDS)
    hook.remove()
    return float(fusion.weights(given[0], fusion.middles(given[0]))[:, 1].mean())


def test_members_stay_as_they_are_and_count_as_no_parameters(tmp_path: Path) -> None:
    model = fused(fusion_of(tmp_path))
    assert {name.rpartition(".")[2] for name in adapter_parameters(model)} == {
        "fusion_query",
        "fusion_key",
        "fusion_value",
    }
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(adapter_parameters(model).values(), lr=1.0).step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(not buffer.requires_grad and buffer.grad is None for buffer in model.buffers())


@pytest.mark.parametrize("kind", MEMBERS)
def test_it_comes_back_bit_for_bit_without_its_members_folders(kind: str, tmp_path: Path) -> None:
    settings = fusion_of(tmp_path / "members", kind)
    first, second = fused(settings), network()
    save_adapter(first, tmp_path / "fusion", base_model="base")
    shutil.rmtree(tmp_path / "members")
    read = load_adapter(second, tmp_path / "fusion")
    assert isinstance(read, AdapterFusion)
    assert read.adapters == settings.adapters
    assert read.bottlenecks == MEMBERS[kind]
    assert torch.equal(second(IDS).logits, first(IDS).logits)
    save_adapter(second, tmp_path / "again", base_model="base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "fusion" / file).read_bytes()


def test_a_further_member_costs_narrow_rows_alone(tmp_path: Path) -> None:
    """Less than one row of the hidden size a token, where what the member makes of it would be one."""
    folders = [stored(tmp_path / str(i), Bottleneck(size=3, after="feed_forward"), i) for i in range(4)]
    y, kept = torch.randn(200, HIDDEN, requires_grad=True), []
    for num_members in (2, 4):
        model = network()
        inject(model, AdapterFusion(adapters=tuple(folders[:num_members])), seed=0)
        fusion, held = fusions(model)[0], dict[int, int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=held: held.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,  # type: ignore[misc]
            lambda t: t,
        ):
            output = fusion(y, base=torch.clone)
        own = {t.untyped_storage().data_ptr() for t in (*fusion.parameters(), *fusion.buffers())}
        kept.append(sum(size for place, size in held.items() if place not in own))
        del output
    assert kept[0] < 4 * 200 * 4 * HIDDEN
    assert kept[1] - kept[0] < 2 * 200 * 4 * HIDDEN


def test_recomputing_layers_leaves_gradients_as_they_are(tmp_path: Path) -> None:
    settings, found = fusion_of(tmp_path), []
    for every in (0, 1):
        model = fused(settings).train()
        checkpoint_layers(model, every)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad for p in adapter_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_bfloat16_model_with_float32_parameters_gets_float32_gradients(tmp_path: Path) -> None:
    model = network().bfloat16()
    inject(model, fusion_of(tmp_path), seed=0)
    result = model(IDS, labels=IDS)
    result.loss.backward()
    assert result.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in adapter_parameters(model).values()} == {torch.float32}


def test_it_runs_without_values(tmp_path: Path) -> None:
    settings = fusion_of(tmp_path)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = network()
        freeze_base(model)
        inject(model, settings, seed=0)
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_a_fusion_has_two_members_or_more_and_knows_all_or_none() -> None:
    with pytest.raises(RecipeError, match="adapters: there is nothing to choose from in one; name two folders or more"):
        AdapterFusion(adapters=("one",))
    with pytest.raises(RecipeError, match="members: there are 1 for 2 adapters"):
        AdapterFusion(adapters=("one", "two"), members=(Bottleneck().model_dump_json(),))
    with pytest.raises(RecipeError, match=r"members\[0\]: .*not the settings of a bottleneck adapter"):
        AdapterFusion(adapters=("one", "two"), members=("{", "{"))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (Bottleneck(size=4, after="attention"), "1: its after is attention and that of"),
        (Bottleneck(size=4, parallel=True), "1: its parallel is True and that of"),
        (Bottleneck(size=4, modules_to_save=("lm_head",)), "1: was trained with modules_to_save besides, which cannot"),
        (LoRA(r=2), "1: holds an adapter of type LORA; only bottlenecks are fused"),
    ],
    ids=["placement", "parallel", "modules", "type"],
)
def test_members_that_cannot_stand_together_are_refused(other: AnyAdapter, sentence: str, tmp_path: Path) -> None:
    settings = AdapterFusion(
        adapters=(stored(tmp_path / "0", Bottleneck(size=4)), stored(tmp_path / "1", other, seed=1))
    )
    model = network()
    with pytest.raises(AdapterError, match=re.escape(sentence)):
        inject(model, settings, seed=0)
    assert not adapted_layers(model)


def test_members_of_another_model_are_refused(tmp_path: Path) -> None:
    settings = fusion_of(tmp_path)
    with pytest.raises(
        AdapterError, match=r"made for another model: .*adapter_down.weight is \(6, 32\), here \(6, 48\)"
    ):
        inject(network(hidden=48), settings, seed=0)


@pytest.mark.parametrize("harm", ["missing", "no json", "settings", "weights"])
def test_a_damaged_member_is_refused_by_its_folder(harm: str, tmp_path: Path) -> None:
    settings = fusion_of(tmp_path)
    config, weights = tmp_path / "1" / "adapter_config.json", tmp_path / "1" / "adapter_model.safetensors"
    if harm == "missing":
        config.unlink()
    elif harm == "no json":
        config.write_text("{")
    elif harm == "settings":
        config.write_text(json.dumps({**json.loads(config.read_text()), "luthier": {"size": "wide"}}))
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match=re.escape(str(tmp_path / "1"))):
        inject(network(), settings, seed=0)
