"""The same parameters in PEFT's LoRA and in ours give the same logits and the same gradients."""

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapter_parameters, inject
from luthier.recipe.adapters import LoRA

IDS = torch.arange(1, 25).view(2, 12)


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def named_as_ours(theirs: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """`base_model.model.X.lora_A.default.weight` is `X.adapters.default.lora_A` here."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{path}.adapters.default.lora_{rest.partition('.')[0]}"] = parameter
    return found


@pytest.mark.parametrize("rs_scaling", [False, True])
@pytest.mark.parametrize("alpha", [3.0, 32.0])
def test_logits_and_gradients_equal_pefts(rs_scaling: bool, alpha: float) -> None:
    """To 1e-5, gradients of the largest: float32 sums of other order. PEFT's random B is made a tenth: with alpha 32
    the whole of it makes a network in which either's roundings grow to 3e-5 of float64's gradients.
    """
    config = peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules="all-linear", use_rslora=rs_scaling, init_lora_weights=False
    )
    theirs = peft.get_peft_model(network(), config).eval()
    ours = network().requires_grad_(False)
    inject(ours, LoRA(r=4, alpha=alpha, rs_scaling=rs_scaling), seed=0)
    expected = named_as_ours(theirs)
    own = adapter_parameters(ours)
    assert own.keys() == expected.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(expected[name].mul_(0.1 if name.endswith("lora_B") else 1))
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    largest = max(float(p.grad.abs().max()) for p in expected.values())
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(("init", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
def test_start_values_have_pefts_distribution(init: str, theirs: bool | str) -> None:
    """Deviation and bounds of A within 10%, from 3,000 draws; B is zero in both."""
    config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=theirs)
    expected = named_as_ours(peft.get_peft_model(network(), config))
    ours = network()
    inject(ours, LoRA(r=16, init=init), seed=0)

    def drawn(parameters: dict[str, torch.nn.Parameter], size: int) -> Tensor:
        parts = [p.detach().flatten() for n, p in parameters.items() if n.endswith("lora_A") and p.shape[1] == size]
        return torch.cat(parts)

    for size in (32, 48):
        mine, peers = drawn(adapter_parameters(ours), size), drawn(expected, size)
        assert float(mine.std() / peers.std()) == pytest.approx(1, rel=0.1)
        assert abs(float(mine.mean())) < 0.1 * float(peers.std())
        assert init == "gaussian" or float(mine.abs().max() / peers.abs().max()) == pytest.approx(1, rel=0.1)
    assert not any(bool(p.any()) for n, p in adapter_parameters(ours).items() if n.endswith("lora_B"))
