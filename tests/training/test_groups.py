"""Weight decay reaches matrices and spares norms, biases and embeddings; rates follow adapter, layer and name."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapter_parameters, inject
from luthier.errors import RecipeError, TrainingError
from luthier.recipe.adapters import IA3, AdaLoRA, AnyAdapter, BitFit, Bottleneck, DoRA, LoRA, Prompt, VeRA
from luthier.recipe.training import Training
from luthier.training.groups import decays
from luthier.training.optimizers import make_optimizer
from luthier.training.rules import ADAMW, MUON


def network(*, tied: bool = False, num_layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def settings(**given: object) -> Training:
    return Training.model_validate(
        {"data": "rows", "adapter": None, "learning_rate": 1e-3, "weight_decay": 0.1} | given
    )


@pytest.mark.parametrize("tied", [True, False])
def test_norms_biases_and_embeddings_are_spared(tied: bool) -> None:
    """An output layer of its own decays; one that is the embedding does not."""
    decaying = {name for name, decay in decays(network(tied=tied)).items() if decay}
    projections = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    expected = {f"model.layers.0.{name}.weight" for name in projections}
    assert decaying == (expected if tied else expected | {"lm_head.weight"})


def test_a_norm_is_known_by_its_class_even_with_a_matrix() -> None:
    class GroupedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

    assert decays(nn.ModuleDict({"n": GroupedRMSNorm(), "l": nn.Linear(2, 2)})) == {
        "n.weight": False,
        "l.weight": True,
        "l.bias": False,
    }


def test_adapters_that_stand_for_embeddings_or_norms_or_factors_are_spared() -> None:
    for kind in (IA3(), Prompt(), BitFit(), VeRA(r=4), LoRA(r=4, modules_to_save=("embed_tokens", "model.norm"))):
        model = network().requires_grad_(False)
        inject(model, kind, seed=0)
        decaying = {name for name, decay in decays(model).items() if decay}
        assert all(".lora_" in name for name in decaying), kind.type
        assert bool(decaying) == (kind.type == "lora")


def test_only_what_is_trained_is_optimized_each_once() -> None:
    model = network().requires_grad_(False)
    inject(model, LoRA(r=4), seed=0)
    groups = make_optimizer(model, settings()).param_groups
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in adapter_parameters(model).values())


def test_the_groups_carry_the_settings() -> None:
    chosen = {"type": "adamw", "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6}
    groups = make_optimizer(network(), settings(optimizer=chosen)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {(g["lr"], g["beta1"], g["beta2"], g["epsilon"]) for g in groups} == {(1e-3, 0.8, 0.95, 1e-6)}


def test_parameters_learn_at_the_multiple_of_the_rate_that_their_adapter_asks_for() -> None:
    """LoRA+'s ratio reaches B alone, DoRA's the magnitudes alone; the schedule multiplies what each group has."""
    model = network().requires_grad_(False)
    inject(model, DoRA(r=4, lr_ratio_b=16, lr_ratio_magnitude=0.5), seed=0)
    ratio_of = {
        id(p): group["rate_ratio"] for group in make_optimizer(model, settings()).param_groups for p in group["params"]
    }
    expected = {"lora_A": 1.0, "lora_B": 16.0, "magnitude": 0.5}
    for name, parameter in adapter_parameters(model).items():
        assert ratio_of[id(parameter)] == expected[name.rpartition(".")[2]], name


@pytest.mark.parametrize("stable", [True, False])
def test_embeddings_keep_wide_moments_where_that_is_asked_for(stable: bool) -> None:
    """An output layer of its own is no embedding."""
    model = network()
    optimizer = make_optimizer(model, settings(optimizer={"type": "adam8bit", "stable_embedding": stable}))
    wide = [id(p) for group in optimizer.param_groups if group["wide"] for p in group["params"]]
    assert wide == ([id(model.get_input_embeddings().weight)] if stable else [])


def test_adam8bit_has_the_groups_of_adamw() -> None:
    """Rates and decays of every parameter; only embeddings are set apart besides."""
    model = network().requires_grad_(False)
    inject(model, DoRA(r=4, lr_ratio_b=16, modules_to_save=("embed_tokens",)), seed=0)
    found = [
        {
            id(p): [group[name] for name in ("lr", "rate_ratio", "weight_decay", "beta1", "beta2", "epsilon")]
            for group in make_optimizer(model, settings(optimizer=name)).param_groups
            for p in group["params"]
        }
        for name in ("adamw", "adam8bit")
    ]
    assert found[0] == found[1]
    groups = make_optimizer(model, settings(optimizer="adam8bit")).param_groups
    assert [len(group["params"]) for group in groups if group["wide"]] == [1]


def ratios(model: nn.Module, **given: object) -> dict[str, float]:
    groups = make_optimizer(model, settings(**given)).param_groups
    ratio_of = {id(p): group["rate_ratio"] for group in groups for p in group["params"]}
    return {name: ratio_of[id(p)] for name, p in model.named_parameters() if id(p) in ratio_of}


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit"])
def test_each_layer_learns_with_a_share_of_the_next_ones_rate(optimizer: str) -> None:
    """rate * decay^(L - i); embeddings are layer 0, what follows the last layer learns as it does."""
    found = ratios(network(num_layers=3), layer_decay=0.5, optimizer=optimizer)
    expected = {"model.embed_tokens": 0.125, "model.layers.0": 0.25, "model.layers.1": 0.5, "model.layers.2": 1.0}
    for name, ratio in found.items():
        layer = next((key for key in expected if name.startswith(f"{key}.")), None)
        assert ratio == (expected[layer] if layer else 1.0), name
    assert {"model.norm.weight", "lm_head.weight"} < found.keys()


def test_a_tied_output_layer_learns_as_the_embedding_that_it_is() -> None:
    assert ratios(network(tied=True, num_layers=2), layer_decay=0.5)["model.embed_tokens.weight"] == 0.25


@pytest.mark.parametrize(
    "kind", [LoRA(r=4, lr_ratio_b=16), Bottleneck(), Prompt()], ids=["lora", "bottleneck", "prompt"]
)
def test_a_layers_adapters_learn_at_its_rate_times_their_own_ratio(kind: AnyAdapter) -> None:
    """Those on no layer learn at the full rate."""
    model = network(num_layers=2).requires_grad_(False)
    inject(model, kind, seed=0)
    plain, decayed = ratios(model), ratios(model, layer_decay=0.5)
    for name, ratio in plain.items():
        share = 0.5 if ".layers.0." in name else 1.0
        assert decayed[name] == ratio * share, name
    assert (plain == decayed) == (kind.type == "prompt")


def test_what_has_no_layers_has_no_layer_decay() -> None:
    with pytest.raises(TrainingError, match="layer_decay: Linear has no numbered layers"):
        make_optimizer(nn.Linear(2, 2), settings(layer_decay=0.9))


def by_name(model: nn.Module, word: str, **given: object) -> dict[str, object]:
    """What the group of each trained parameter says under a word."""
    groups = make_optimizer(model, settings(**given)).param_groups
    said = {id(p): group[word] for group in groups for p in group["params"]}
    return {name: said[id(p)] for name, p in model.named_parameters() if id(p) in said}


def test_muon_takes_the_layers_matrices_and_adamw_the_rest() -> None:
    """Of the rest are the output layer, which is a matrix on no layer, and vectors."""
    rules = by_name(network(), "rule", optimizer="muon")
    matrices = {name for name, rule in rules.items() if rule is MUON}
    assert matrices == {name for name in rules if "_proj.weight" in name}
    assert {rule for name, rule in rules.items() if name not in matrices} == {ADAMW}
    assert "lm_head.weight" in rules.keys() - matrices


def test_muon_takes_an_adapters_matrices_but_no_columns() -> None:
    for kind, expected in ((LoRA(r=4), {"lora_A", "lora_B"}), (AdaLoRA(target_r=2, init_r=3), {"lora_A", "lora_B"})):
        model = network().requires_grad_(False)
        inject(model, kind, seed=0)
        rules = by_name(model, "rule", optimizer="muon")
        assert {name.rpartition(".")[2] for name, rule in rules.items() if rule is MUON} == expected


def test_the_first_pattern_that_fits_decides_and_multiplies_what_adapter_and_layer_ask_for() -> None:
    model = network(num_layers=2).requires_grad_(False)
    inject(model, LoRA(r=4, lr_ratio_b=16), seed=0)
    named = {"*.q_proj.*.lora_B": {"weight_decay": 0.0}, "*.lora_B": 3.0, "*.layers.1.*": {"weight_decay": 0.7}}
    given = {"layer_decay": 0.5, "parameter_groups": named}
    found, decay = ratios(model, **given), by_name(model, "weight_decay", **given)
    for name, ratio in found.items():
        layer, own = 0.5 if ".layers.0." in name else 1.0, 16.0 if "lora_B" in name else 1.0
        by_q = "q_proj" in name and "lora_B" in name
        assert ratio == layer * own * (3.0 if "lora_B" in name and not by_q else 1.0), name
        plain = 0.7 if ".layers.1." in name and "lora_A" in name else 0.1
        assert decay[name] == (0.0 if by_q else plain), name


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"*.lora_C": 2}, r'no trained parameter fits "\*.lora_C"; nearest are model\S+lora_\w, model\S+lora_\w'),
        ({"*embed_tokens*": 2}, r'no trained parameter fits "\*embed_tokens\*"'),
        ({"*.lora_?": 2, "*.lora_B": 3}, r'what fits "\*.lora_B" fits a pattern before it; put it first'),
    ],
)
def test_a_pattern_that_gets_no_parameter_is_an_error(patterns: dict[str, float], message: str) -> None:
    """Also one whose parameters are frozen."""
    model = network().requires_grad_(False)
    inject(model, LoRA(r=4), seed=0)
    with pytest.raises(RecipeError, match=f"parameter_groups: {message}"):
        make_optimizer(model, settings(parameter_groups=patterns))


def test_what_has_no_layers_has_no_muon() -> None:
    with pytest.raises(TrainingError, match="optimizer: muon: Linear has no numbered layers"):
        make_optimizer(nn.Linear(2, 2), settings(optimizer="muon"))
