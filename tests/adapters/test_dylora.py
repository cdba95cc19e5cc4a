"""One DyLoRA serves at every rank from min_r to r, in memory, from its file, and merged."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.base import Step
from luthier.adapters.dylora import DyLoRA, rank_to_serve, set_rank
from luthier.adapters.inject import adapted_layers, adapter_parameters, before_step, inject
from luthier.adapters.merge import merge_adapters
from luthier.adapters.peft_format import load_adapter, read_adapter, save_adapter
from luthier.cli.main import main
from luthier.errors import AdapterError
from luthier.models.load import load
from luthier.recipe.adapters import AdapterSettings, LoRA
from luthier.recipe.adapters import DyLoRA as Settings

IDS = torch.arange(1, 25).view(2, 12)
SETTINGS = Settings(r=8, min_r=2, alpha=12)
RANKS = range(2, 9)


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def perturb(model: nn.Module) -> None:
    for i, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))


def adapted(settings: AdapterSettings = SETTINGS) -> LlamaForCausalLM:
    model = network()
    inject(model, settings, seed=3)
    perturb(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


def at_rank(rank: int) -> Tensor:
    model = adapted()
    set_rank(model, rank)
    return logits(model)


def drawn(step: Step) -> int:
    model = network()
    adapters = inject(model, Settings(r=8, min_r=2, target_modules=("q_proj", "v_proj")), seed=0)
    before_step(adapters, step)
    ranks = {adapter.drawn for adapter in adapters if isinstance(adapter, DyLoRA)}
    assert len(ranks) == 1
    return ranks.pop()


def test_the_rank_of_a_step_is_that_of_all_layers_and_depends_on_seed_and_step_alone() -> None:
    first = [drawn(Step(i, 9, 7)) for i in range(9)]
    torch.manual_seed(1)
    assert [drawn(Step(i, 1000, 7)) for i in range(9)] == first
    assert [drawn(Step(i, 9, 8)) for i in range(9)] != first


def test_ranks_are_drawn_evenly_but_for_the_highest() -> None:
    """Of 2,100 draws a quarter and a seventh of the rest, 750, are the highest rank, with a deviation of 22; on each of
    the 6 others fall 225, with a deviation of 14. 75 and 110 are five of these.
    """
    [adapter] = inject(network(), Settings(r=8, min_r=2, target_modules=("layers.0.self_attn.q_proj",)), seed=0)
    counts = dict.fromkeys(RANKS, 0)
    for i in range(2100):
        before_step([adapter], Step(i, 2100, 0))
        counts[adapter.drawn] += 1
    assert abs(counts.pop(8) - 750) < 110
    assert all(abs(count - 225) < 75 for count in counts.values())


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_training_at_a_rank_computes_what_is_served_at_it(rank: int) -> None:
    model = adapted().train()
    step = next(step for step in (Step(i, 99, 0) for i in range(99)) if drawn(step) == rank)
    before_step([layer.adapters["default"] for layer in adapted_layers(model).values()], step)
    assert torch.equal(logits(model), at_rank(rank))


def test_the_highest_rank_is_the_usual_one_and_each_gives_another_model() -> None:
    served = {rank: at_rank(rank) for rank in RANKS}
    assert torch.equal(logits(adapted()), served[8])
    for rank in RANKS:
        assert all((served[rank] - served[other]).abs().max() > 1e-2 for other in RANKS if other != rank)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_merging_at_a_rank_equals_serving_at_it(rank: int) -> None:
    """To 1e-5: one product instead of two, in float32."""
    model = adapted()
    set_rank(model, rank)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), at_rank(rank), rtol=0, atol=1e-5)


def test_a_saved_adapter_is_loaded_at_any_rank(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path, base_model="base")
    for rank in (None, *RANKS):
        model = network()
        load_adapter(model, tmp_path, rank=rank)
        assert torch.equal(logits(model), at_rank(rank or 8))


def test_a_file_keeps_all_ranks_and_remembers_the_chosen_one(tmp_path: Path) -> None:
    model, again = adapted(), network()
    set_rank(model, 3)
    save_adapter(model, tmp_path, base_model="base")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), at_rank(3))
    set_rank(again, 8)
    assert torch.equal(logits(again), at_rank(8))


def test_peft_loads_the_file_as_a_lora_of_the_highest_rank(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path)
    assert theirs.peft_config["default"].r == 8
    torch.testing.assert_close(logits(theirs), at_rank(8), rtol=0, atol=1e-5)


def test_a_lora_of_pefts_stays_a_lora(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(network(), config).save_pretrained(tmp_path, save_embedding_layers=False)
    assert read_adapter(tmp_path).settings.type == "lora"


@pytest.mark.parametrize(
    ("settings", "rank", "sentence"),
    [
        (SETTINGS, 1, "rank: 1 is not among those that the adapter was trained for, 2 to 8; choose one of these"),
        (SETTINGS, 9, "rank: 9 is not among those"),
        (LoRA(r=8), 4, "rank: an adapter of type lora serves as it is; leave rank out, or train one of type dylora"),
    ],
    ids=["below", "above", "lora"],
)
def test_a_rank_that_is_not_there_is_refused(
    settings: AdapterSettings, rank: int, sentence: str, tmp_path: Path
) -> None:
    model, other = adapted(settings), network()
    save_adapter(model, tmp_path, base_model="base")
    with pytest.raises(AdapterError, match=sentence):
        set_rank(model, rank)
    with pytest.raises(AdapterError, match=sentence):
        load_adapter(other, tmp_path, rank=rank)
    assert not adapted_layers(other)


def test_a_file_that_remembers_no_number_is_refused() -> None:
    with pytest.raises(AdapterError, match=r'^rank: the file remembers "4\.5", which is no number; save the adapter'):
        rank_to_serve(SETTINGS, None, "4.5")


def test_the_rank_of_an_adapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(AdapterError, match='the model carries no adapter named "other"'):
        set_rank(adapted(), 4, name="other")


@pytest.fixture
def folder(chat_model: Path, tmp_path: Path) -> Path:
    """Of an adapter of the chat model, as if trained."""
    model = load(str(chat_model))
    inject(model.network, SETTINGS, seed=0)
    perturb(model.network)
    save_adapter(model.network, tmp_path / "adapter", base_model=str(chat_model))
    return tmp_path / "adapter"


@pytest.mark.parametrize("rank", [4, None])
def test_the_merge_command_writes_the_rank_asked_for_with_its_certificate(
    folder: Path, chat_model: Path, rank: int | None
) -> None:
    """To 1e-5, as merging does in memory; the certificate would refuse another rank."""
    merged, flags = folder.with_name("merged"), ["--rank", str(rank)] if rank else []
    with pytest.raises(SystemExit) as end:
        main(["merge", "--adapter", str(folder), "--output", str(merged), *flags])
    assert end.value.code == 0
    live = load(str(chat_model)).network
    load_adapter(live, folder, rank=rank)
    torch.testing.assert_close(logits(load(str(merged)).network), logits(live), rtol=0, atol=1e-5)


def test_the_generate_command_answers_at_the_rank_asked_for(
    folder: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, command = [], ["generate", "Hello", "--model", str(chat_model), "--adapter", str(folder)]
    for flags in (["--rank", "2"], ["--rank", "2"], []):
        with pytest.raises(SystemExit):
            main([*command, "--max-new-tokens", "12", *flags])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_rank_without_an_adapter_is_one_sentence(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", "Hello", "--model", str(chat_model), "--rank", "4"])
    assert end.value.code == 1
    assert "--rank is an adapter's; give --adapter too" in capsys.readouterr().err
