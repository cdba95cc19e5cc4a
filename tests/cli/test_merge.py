"""`luthier merge` from the adapter's folder to a model that others load."""

import json
from pathlib import Path

import pytest
import torch

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.peft_format import save_adapter
from luthier.cli.main import main
from luthier.models.load import load
from luthier.recipe.adapters import LoRA


@pytest.fixture
def adapter(chat_model: Path, tmp_path: Path) -> Path:
    model = load(str(chat_model))
    inject(model.network, LoRA(r=2), seed=0)
    for parameter in adapter_parameters(model.network).values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model.network, tmp_path / "adapter", base_model="tiny")
    return tmp_path / "adapter"


@pytest.mark.parametrize(("flags", "certified"), [([], True), (["--no-verify", "--dtype", "bf16"], False)])
def test_a_merge_says_what_it_wrote(
    flags: list[str],
    certified: bool,
    adapter: Path,
    chat_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "merged"
    with pytest.raises(SystemExit) as end:
        main(["merge", "--model", str(chat_model), "--adapter", str(adapter), "--output", str(output), *flags])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"14 layers merged into {output}" in text
    assert ("loaded again: KL" in text) is certified
    assert (output / "certificate.json").exists() is certified


def renamed_base(adapter: Path, name: str | None) -> list[str]:
    """The command for an adapter that names this base."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
    return ["merge", "--adapter", str(adapter), "--output", str(adapter.with_name("merged")), "--no-verify"]


def test_the_base_that_the_adapter_names_is_the_default(adapter: Path, chat_model: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(renamed_base(adapter, str(chat_model)))
    assert end.value.code == 0
    assert (
        load(str(adapter.with_name("merged"))).network.num_parameters()
        == load(str(chat_model)).network.num_parameters()
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [(None, "does not say what it was trained on"), ("no/such/folder", "trained on no/such/folder, which is not")],
)
def test_a_base_that_cannot_be_known_asks_for_the_flag(
    name: str | None, sentence: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(renamed_base(adapter, name))
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "give --model" in error
