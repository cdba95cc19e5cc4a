"""AdaLoRA agrees with PEFT's: logits, gradients, the choice of ranks step by step, and files both ways."""

import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.adalora import AdaLoRA
from luthier.adapters.base import Step
from luthier.adapters.inject import adapted_layers, adapter_parameters, after_step, inject, penalty
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.adapters.rank_budget import budget_at
from luthier.recipe.adapters import AdaLoRA as Settings

IDS = torch.arange(1, 25).view(2, 12)
SETTINGS = Settings(target_r=2, init_r=5, alpha=7, warmup_ratio=0.1, final_ratio=0.2, prune_every=3)
NUM_STEPS, NUM_LAYERS = 20, 14
Model = LlamaForCausalLM

WARNS_OF_ITS_OWN = pytest.mark.filterwarnings(  # PEFT does so with files of its own, of ranks 0 and of any rank_pattern
    "ignore:.*have invalid shape", "ignore:The following rank_pattern keys did not match"
)


def network() -> Model:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def pefts() -> peft.PeftModel:
    """Its AdaLoRA with the same settings, its parameters at random."""
    config = peft.AdaLoraConfig(
        **{"target_r": 2, "init_r": 5, "lora_alpha": 7, "tinit": 2, "tfinal": 4, "deltaT": 3, "total_step": NUM_STEPS},
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(network(), config).eval()
    for i, parameter in enumerate(named_as_ours(theirs).values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return theirs


def named_as_ours(theirs: peft.PeftModel) -> dict[str, nn.Parameter]:
    """`base_model.model.X.lora_A.default` is `X.adapters.default.lora_A` here."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{path}.adapters.default.lora_{rest[0]}"] = parameter
    return found


@torch.no_grad()
def like(theirs: peft.PeftModel) -> Model:
    ours = network().requires_grad_(False)
    inject(ours, SETTINGS, seed=0)
    expected, own = named_as_ours(theirs), adapter_parameters(ours)
    assert own.keys() == expected.keys()
    for name, parameter in own.items():
        parameter.copy_(expected[name])
    return ours


def on(model: Model) -> list[AdaLoRA]:
    return [layer.adapters["default"] for layer in adapted_layers(model).values()]


def step(ours: Model, theirs: peft.PeftModel, number: int) -> None:
    """Gradients that are the same in both, a step of plain descent with them, and then the choice of ranks."""
    generator, expected = torch.Generator().manual_seed(number), named_as_ours(theirs)
    for name, parameter in adapter_parameters(ours).items():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        expected[name].grad = parameter.grad.clone()
        with torch.no_grad():
            for one in (parameter, expected[name]):
                one -= 0.1 * one.grad
    after_step(on(ours), Step(number - 1, NUM_STEPS, 0))
    theirs.base_model.update_and_allocate(number)


@pytest.fixture
def pruned() -> tuple[Model, peft.PeftModel]:
    """Both after all steps."""
    theirs = pefts()
    ours = like(theirs)
    for number in range(1, NUM_STEPS + 1):
        step(ours, theirs, number)
    return ours, theirs


def test_logits_loss_and_gradients_equal_pefts() -> None:
    """To 1e-5, gradients of the largest: float32 sums of other order. PEFT adds the regulariser to the loss."""
    theirs = pefts()
    ours = like(theirs)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
    added = penalty(on(ours))
    assert added is not None
    loss, expected = ours(IDS, labels=IDS).loss + added, theirs(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    theirs_by_name = named_as_ours(theirs)
    largest = max(float(p.grad.abs().max()) for p in theirs_by_name.values())
    for name, parameter in adapter_parameters(ours).items():
        torch.testing.assert_close(parameter.grad, theirs_by_name[name].grad, rtol=0, atol=1e-5 * largest, msg=name)


def test_the_same_gradients_leave_the_same_ranks_at_every_step() -> None:
    """e is compared bit for bit: the same descent, and zeros in the same places."""
    theirs = pefts()
    ours, e_of_theirs, rows_left = like(theirs), named_as_ours(theirs), []
    for number in range(1, NUM_STEPS + 1):
        step(ours, theirs, number)
        own = {name: p for name, p in adapter_parameters(ours).items() if name.endswith("lora_E")}
        assert all(torch.equal(parameter, e_of_theirs[name]) for name, parameter in own.items()), number
        rows_left.append(sum(int(p.count_nonzero()) for p in own.values()))
    assert rows_left[:2] == [NUM_LAYERS * 5] * 2
    assert rows_left[15:] == [NUM_LAYERS * 2] * 5
    assert len(set(rows_left)) > 3


@given(
    target_r=st.integers(1, 8),
    more=st.integers(0, 8),
    phases=st.tuples(st.floats(0, 0.49), st.floats(0, 0.49)),
    every=st.integers(1, 7),
    num_steps=st.integers(1, 60),
)
def test_the_budget_is_pefts(target_r: int, more: int, phases: tuple[float, float], every: int, num_steps: int) -> None:
    init_r, num_layers = target_r + more, 3
    settings = Settings(
        target_r=target_r, init_r=init_r, warmup_ratio=phases[0], final_ratio=phases[1], prune_every=every
    )
    tinit, tfinal = (int(share * num_steps) for share in phases)
    config = peft.AdaLoraConfig(
        target_r=target_r, init_r=init_r, tinit=tinit, tfinal=tfinal, deltaT=every, total_step=num_steps
    )
    layers = [nn.ParameterDict({"lora_A": nn.ParameterDict({"default": torch.zeros(init_r, 1)})}) for _ in range(3)]
    allocator = RankAllocator(nn.ModuleList(layers), config, "default")
    for number in range(1, num_steps + 1):
        budget, due = allocator.budget_schedule(number)
        expected = budget if due or number == num_steps - tfinal else None
        assert budget_at(settings, num_layers, Step(number - 1, num_steps, 0)) == expected


@WARNS_OF_ITS_OWN
def test_peft_loads_our_pruned_file_and_gives_the_same_logits(
    pruned: tuple[Model, peft.PeftModel], tmp_path: Path
) -> None:
    ours, _ = pruned
    save_adapter(ours, tmp_path, base_model="base")
    assert 0 in [len(rows) for name, rows in load_file(tmp_path / "adapter_model.safetensors").items() if "_A" in name]
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-5)
    assert sum(len(p) for n, p in named_as_ours(theirs).items() if n.endswith("lora_E")) == NUM_LAYERS * 2


@WARNS_OF_ITS_OWN
def test_our_configuration_says_of_the_ranks_what_pefts_says(
    pruned: tuple[Model, peft.PeftModel], tmp_path: Path
) -> None:
    ours, theirs = pruned
    save_adapter(ours, tmp_path / "ours", base_model="base")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    said, expected = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    assert said["rank_pattern"] == expected["rank_pattern"]
    assert all(said[name] == expected[name] for name in ("peft_type", "init_r", "target_r", "lora_alpha", "deltaT"))
    assert said["tinit"] / said["total_step"] == expected["tinit"] / expected["total_step"]


@WARNS_OF_ITS_OWN
@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
def test_we_load_pefts_file_and_give_the_same_logits(
    pruned: tuple[Model, peft.PeftModel], is_pruned: bool, tmp_path: Path
) -> None:
    theirs = pruned[1] if is_pruned else pefts()
    expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = network()
    settings = load_adapter(ours, tmp_path)
    assert isinstance(settings, Settings)
    assert (settings.target_r, settings.init_r, settings.alpha, settings.prune_every) == (2, 5, 7, 3)
    assert sum(adapter.r for adapter in on(ours)) == NUM_LAYERS * (2 if is_pruned else 5)
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=0, atol=1e-5)


def test_start_values_have_pefts_distribution() -> None:
    """Deviation 0.02 within 5%, from 2,000 draws or more; e is zero."""
    ours = network()
    inject(ours, Settings(target_r=8), seed=0)
    theirs = peft.get_peft_model(
        network(), peft.AdaLoraConfig(init_r=12, total_step=10, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for parameters in (adapter_parameters(ours), named_as_ours(theirs)):
        for letter in ("A", "B"):
            drawn: Tensor = torch.cat(
                [p.detach().flatten() for n, p in parameters.items() if n.endswith(f"lora_{letter}")]
            )
            assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)
        assert not any(bool(p.any()) for n, p in parameters.items() if n.endswith("lora_E"))
