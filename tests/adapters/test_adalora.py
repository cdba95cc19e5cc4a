"""AdaLoRA's choice of ranks, and what of it lasts."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.base import Adapter, Step
from luthier.adapters.inject import adapted_layers, adapter_parameters, after_step, inject, penalty
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.adapters.rank_budget import highest
from luthier.errors import AdapterError
from luthier.recipe.adapters import AdaLoRA


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def on(model: nn.Module) -> list[Adapter]:
    return [layer.adapters["default"] for layer in adapted_layers(model).values()]


def pruned(folder: Path) -> Path:
    """An adapter after the one step of its run, in which its ranks are chosen by chance: scores alike are none."""
    model = network()
    adapters = inject(model, AdaLoRA(target_r=2, init_r=4), seed=0)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    for adapter in adapters:
        for buffer in adapter.importance.buffers():  # type: ignore[union-attr]
            nn.init.uniform_(buffer, generator=torch.Generator().manual_seed(len(adapter.name)))
    after_step(adapters, Step(0, 1, 0))
    save_adapter(model, folder, base_model="base")
    return folder


@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_the_highest_scores_of_all_layers_stay_and_ties_never_exceed_the_budget(
    scores: list[list[int]], data: st.DataObject
) -> None:
    budget = data.draw(st.integers(1, sum(map(len, scores))))
    chosen = highest([torch.tensor(own, dtype=torch.float32) for own in scores], budget)
    flags = [flag for own in chosen for flag in own.tolist()]
    values = [value for own in scores for value in own]
    stayed = [value for value, flag in zip(values, flags, strict=True) if flag]
    assert len(stayed) <= budget
    assert stayed == [value for value in values if stayed and value >= min(stayed)]
    assert len(stayed) == budget or sorted(values)[-budget] == sorted(values)[-budget - 1]


def test_an_adapter_that_is_read_from_a_file_has_its_ranks_for_good(tmp_path: Path) -> None:
    model = network()
    load_adapter(model, pruned(tmp_path))
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    assert 0 < sum(len(p) for name, p in before.items() if name.endswith("lora_E")) <= 2 * 14
    for parameter in adapter_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    after_step(on(model), Step(9, 10, 0))
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


def test_a_pruned_adapter_is_saved_again_as_it_was_read(tmp_path: Path) -> None:
    model = network()
    load_adapter(model, pruned(tmp_path / "first"))
    save_adapter(model, tmp_path / "second", base_model="base")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_file_of_higher_ranks_than_its_settings_is_refused(tmp_path: Path) -> None:
    config = pruned(tmp_path) / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"init_r": 4', '"init_r": 1').replace('"target_r": 2', '"target_r": 1')
    )
    with pytest.raises(AdapterError, match=r"made for another model: .*lora_A is"):
        load_adapter(network(), tmp_path)


def test_the_regulariser_can_be_left_out_and_is_zero_for_orthogonal_factors() -> None:
    model = network()
    adapters = inject(model, AdaLoRA(target_r=2, init_r=4, orth_reg_weight=2.0), seed=0)
    for adapter in adapters:
        nn.init.eye_(adapter.lora_A)  # type: ignore[arg-type]
        nn.init.eye_(adapter.lora_B)  # type: ignore[arg-type]
    assert float(penalty(adapters).detach()) == 0.0  # type: ignore[union-attr]
    assert penalty(inject(network(), AdaLoRA(target_r=2, orth_reg_weight=0), seed=0)) is None


def test_a_start_rank_over_a_layers_size_is_refused() -> None:
    with pytest.raises(AdapterError, match="k_proj: r: 18 is above the layer's size; at most 16"):
        inject(network(), AdaLoRA(target_r=12), seed=0)


def test_choosing_ranks_never_waits_for_the_device() -> None:
    """On "meta" there are no values, and who asks for one gets an error."""
    model = network().to("meta")
    adapters = inject(model, AdaLoRA(target_r=2, init_r=4, prune_every=2), seed=0)
    for index in range(10):
        for parameter in adapter_parameters(model).values():
            parameter.grad = torch.empty_like(parameter)
        after_step(adapters, Step(index, 10, 0))
    assert all(adapter.settled for adapter in adapters)
