"""A reward model's adapter on a model that answers: both say what they say alone, and it leaves without a trace."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.peft_format import save_adapter
from luthier.adapters.switch import adapter_names
from luthier.data.examples import Chat, Message
from luthier.errors import AdapterError
from luthier.models.heads import with_head, with_trained_head
from luthier.models.load import Model, load, load_either
from luthier.models.rewards import load_reward, rewards
from luthier.models.rewards_beside import RewardsBeside
from luthier.models.trainable import freeze_base
from luthier.recipe.adapters import AnyAdapter, LoRA

CHATS = [Chat((Message("user", "What is 1?"), Message("assistant", answer))) for answer in ("A number.", "Who knows??")]
IDS = torch.arange(3, 19)[None]


def trained(base: Path, folder: Path, settings: AnyAdapter, *, headed: bool = True) -> Path:
    """The folder of an adapter on this model, as if trained."""
    model = with_head(load_either(str(base)), seed=0) if headed else load(str(base))
    inject(model.network, with_trained_head(settings) if headed else settings, seed=3)
    for i, parameter in enumerate(adapter_parameters(model.network).values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    save_adapter(model.network, folder, base_model="base", base_sha256=model.source.weights_hash)
    return folder


def policy_on(base: Path) -> Model:
    model = load(str(base))
    inject(model.network, LoRA(r=2, target_modules=["q_proj"]), seed=1)
    for parameter in adapter_parameters(model.network).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(7))
    freeze_base(model.network)
    return model


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.network(IDS).logits
    return found


@pytest.mark.parametrize(
    "settings", [LoRA(r=4), LoRA(r=4, bias="all", modules_to_save=("embed_tokens",))], ids=["lora", "much"]
)
def test_both_say_what_they_say_alone_and_share_every_weight(
    chat_model: Path, tmp_path: Path, settings: AnyAdapter
) -> None:
    adapter, model = trained(chat_model, tmp_path / "reward", settings), policy_on(chat_model)
    answered, config = logits(model), model.config.to_dict()
    beside = RewardsBeside(model, adapter)
    assert beside(CHATS) == rewards(load_reward(str(chat_model), adapter=adapter), CHATS)
    assert torch.equal(logits(model), answered)
    assert model.config.to_dict() == config
    own = {p.data_ptr() for p in model.network.parameters()}
    apart = [name for name, p in beside.model.network.named_parameters() if p.data_ptr() not in own]
    assert [name for name in apart if not name.startswith("score.")] == []


def test_it_gives_rewards_the_same_while_the_policy_changes(chat_model: Path, tmp_path: Path) -> None:
    model = policy_on(chat_model)
    beside = RewardsBeside(model, trained(chat_model, tmp_path / "reward", LoRA(r=4, dropout=0.5)))
    before = beside(CHATS)
    model.network.train()
    learning = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    assert {id(p) for p in learning} < {id(p) for p in adapter_parameters(model.network).values()}
    model.network(IDS).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in learning)
    torch.optim.SGD(learning, lr=1.0).step()
    assert beside(CHATS) == before
    assert model.network.training


def test_it_leaves_the_model_as_it_was(chat_model: Path, tmp_path: Path) -> None:
    model, adapter = policy_on(chat_model), trained(chat_model, tmp_path / "reward", LoRA(r=4))
    answered, layers = logits(model), adapted_layers(model.network).keys()
    first, second = RewardsBeside(model, adapter), RewardsBeside(model, adapter)
    assert adapter_names(model.network) == ["default", "reward", "reward-1"]
    first.close()
    assert second(CHATS) == rewards(load_reward(str(chat_model), adapter=adapter), CHATS)
    second.close()
    second.close()
    assert adapter_names(model.network) == ["default"]
    assert adapted_layers(model.network).keys() == layers
    assert torch.equal(logits(model), answered)


def test_what_cannot_stand_beside_is_refused_with_the_model_as_it_was(
    chat_model: Path, wide_chat_model: Path, tmp_path: Path
) -> None:
    model = policy_on(chat_model)
    of_text = trained(chat_model, tmp_path / "text", LoRA(r=4), headed=False)
    with pytest.raises(AdapterError, match="was trained without a head, so it gives no rewards"):
        RewardsBeside(model, of_text)
    of_other = trained(wide_chat_model, tmp_path / "other", LoRA(r=4))
    with pytest.raises(AdapterError, match="made for another model"):
        RewardsBeside(model, of_other)
    assert adapter_names(model.network) == ["default"]
