"""A step's footprint from a few layers is the footprint of the whole network, byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from luthier.models.load import load
from luthier.pipeline import footprints
from luthier.pipeline.footprints import Outlined, Stage, footprint_of
from luthier.pipeline.plan import largest_micro_batch
from luthier.pipeline.policy import COLUMNS
from luthier.pipeline.prepare import prepare_data
from luthier.pipeline.reference import placeholders
from luthier.recipe.adapters import ADAPTER_SETTINGS
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.training.footprint import step_footprint

NUM_LAYERS = 8


@pytest.fixture(scope="module")
def deep_model(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By architecture, folders of models of eight layers; of Gemma's every second one slides a window."""
    folder, tokenizer = tmp_path_factory.mktemp("deep"), AutoTokenizer.from_pretrained(chat_model)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": NUM_LAYERS, "pad_token_id": None}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    kinds = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
    torch.manual_seed(0)
    networks = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends)),
        "gemma": Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, **heads, **ends, head_dim=32, sliding_window=8, layer_types=kinds)
        ),
    }
    for name, network in networks.items():
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in networks}


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "sft", {}),
    "bf16": ("llama", "sft", {"dtype": "bf16"}),
    "full": ("llama", "sft", {"adapter": None, "dtype": "bf16"}),
    "recomputed": ("llama", "sft", {"gradient_checkpointing": 1}),
    "every third recomputed": ("llama", "sft", {"gradient_checkpointing": 3}),
    "selective": ("llama", "sft", {"gradient_checkpointing": "selective", "dtype": "bf16"}),
    "dropout": ("llama", "sft", {"adapter": {"type": "dora", "dropout": 0.1}}),
    "nf4": ("llama", "sft", {"quantize_base": "nf4"}),
    "windows": ("gemma", "sft", {}),
    "some frozen": ("llama", "sft", {"adapter": None, "freeze": ["*.layers.0.*"]}),
    "muon, the last layer apart": ("llama", "sft", {"optimizer": "muon", "parameter_groups": {"*.layers.7.*": 2}}),
    "dpo": ("llama", "dpo", {}),
}


QUICK = ("lora", "full", "selective", "dpo")


def of_adapter(name: str) -> Any:
    return pytest.param("llama", "sft", {"adapter": {"type": name}}, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("architecture", "word", "more"),
    [
        *(
            pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow)
            for name, case in CASES.items()
        ),
        *map(of_adapter, sorted(ADAPTER_SETTINGS.keys() - {"fusion"})),  # which needs adapters that are trained already
    ],
)
def test_a_few_layers_give_the_bytes_of_all(
    deep_model: dict[str, str], tmp_path: Path, architecture: str, word: str, more: dict[str, Any]
) -> None:
    answers = {"chosen": "yes " * 9, "rejected": "no"} if word == "dpo" else {"completion": "yes " * 9}
    rows = [{"prompt": f"Is {i} even?" * (i + 1), **answers} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = deep_model[architecture]
    usual = {"data": str(tmp_path / "rows.jsonl"), "model": name, "dtype": "fp32", "batch_size": 4}
    settings: Any = settings_from(STAGE_SETTINGS[word], {**usual, **more})
    prepared = prepare_data(settings, load(name), tmp_path / "stage")
    batch = placeholders(largest_micro_batch(settings, prepared, 1000), *COLUMNS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = Outlined(Stage(word, settings, name))
        expected = step_footprint(whole.state, batch, whole.objective)
    assert footprint_of(Stage(word, settings, name), batch)[1] == expected


def test_the_period_of_layers_is_seen(deep_model: dict[str, str]) -> None:
    """A period of one, of three where every third is recomputed, none where one is frozen."""
    periods = []
    for more in ({}, {"gradient_checkpointing": 3}, {"adapter": None, "freeze": ["*.layers.7.*"]}):
        settings: Any = settings_from(STAGE_SETTINGS["sft"], {"data": "rows.jsonl", "dtype": "fp32", **more})
        with FakeTensorMode(allow_non_fake_inputs=True):
            kinds = footprints._kinds(Outlined(Stage("sft", settings, deep_model["llama"])).model)
        periods.append(footprints._period(kinds))
    assert periods == [1, 3, NUM_LAYERS]
