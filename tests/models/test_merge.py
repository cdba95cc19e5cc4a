"""A merge that never loads the model writes what a merge in memory writes, or nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters.base import Adapter
from luthier.adapters.inject import ADAPTERS, adapter_parameters, inject
from luthier.adapters.merge import merge_adapters
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.errors import AdapterError, ExportError, ModelError
from luthier.models.certificate import certify
from luthier.models.load import Model, load
from luthier.models.merge import merge_into
from luthier.models.save import save
from luthier.models.sources import resolve
from luthier.models.weights import weights_hash
from luthier.recipe.adapters import (
    IA3,
    AdaLoRA,
    AdapterSettings,
    BitFit,
    DoRA,
    DyLoRA,
    LoHa,
    LoKr,
    LoRA,
    VeRA,
)

Factory = Callable[..., PreTrainedModel]
Saved = Callable[..., Path]

SHARDED = 20_000  # bytes a file, which cuts a tiny model into several


def trained(base: Path, settings: AdapterSettings | None = None, *, base_sha256: str | None = None) -> Path:
    """The folder of an adapter of this model, as if trained."""
    model = load(str(base))
    inject(model.network, settings or LoRA(r=4), seed=3)
    for i, parameter in enumerate(adapter_parameters(model.network).values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    save_adapter(model.network, base.parent / "adapter", base_model="base", base_sha256=base_sha256)
    return base.parent / "adapter"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    same = first.keys() == second.keys() and all(first[name].dtype == second[name].dtype for name in first)
    return same and all(torch.equal(first[name], second[name]) for name in first)


class Case(NamedTuple):
    """stored: the type of the base's weights; wanted: of the merged ones."""

    architecture: str
    tied: bool
    shard: int
    stored: str
    wanted: str | None


CASES = [
    Case("llama", True, 10**9, "fp32", None),
    Case("llama", False, SHARDED, "bf16", None),
    Case("qwen2", True, SHARDED, "fp32", "bf16"),
    Case("qwen2", False, 10**9, "bf16", "fp32"),
    Case("gemma3_text", True, SHARDED, "bf16", None),
    Case("gpt_neox", False, SHARDED, "fp32", None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_streaming_equals_merging_in_memory_bit_for_bit(case: Case, base: Saved, tmp_path: Path) -> None:
    """qwen2 and gpt_neox have biases in the layers that are merged."""
    place = base(case.architecture, dtype=case.stored, shard=case.shard, tie_word_embeddings=case.tied)
    adapter = trained(place)
    model = load(str(place), dtype="fp32" if case.wanted else case.stored)
    load_adapter(model.network, adapter)
    merge_adapters(model.network)
    whole = save(model, tmp_path / "whole", dtype=case.wanted)
    merged = merge_into(resolve(str(place)), adapter, tmp_path / "merged", dtype=case.wanted)
    assert merged.num_layers > 0
    assert equal(tensors(merged.folder), tensors(whole))
    for file in whole.glob("*.json"):
        assert file.name.endswith("index.json") or file.read_bytes() == (merged.folder / file.name).read_bytes()


EVERY_TYPE: dict[str, AdapterSettings] = {
    "adalora": AdaLoRA(target_r=3, target_modules=("q_proj", "up_proj")),
    "bitfit": BitFit(target_modules=("q_proj", "v_proj")),
    "dora": DoRA(r=4, bias="lora_only"),
    "dylora": DyLoRA(r=4),
    "ia3": IA3(),
    "loha": LoHa(r=2),
    "lokr": LoKr(r=2, target_modules=("o_proj", "down_proj")),
    "lora": LoRA(r=4, init="pissa", bias="all", modules_to_save=("model.norm",)),
    "vera": VeRA(r=8, target_modules=("k_proj", "down_proj")),
}


@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_every_type_that_can_be_merged_is_streamed_as_it_is_in_memory(kind: str, base: Saved, tmp_path: Path) -> None:
    """To 1e-6: LoRA of the weight's own parts has its factors joined in the file."""
    place = base("qwen2", shard=SHARDED)
    adapter = trained(place, EVERY_TYPE[kind])
    model, before = load(str(place)), tensors(place)
    load_adapter(model.network, adapter)
    merge_adapters(model.network)
    whole = tensors(save(model, tmp_path / "whole"))
    merged = tensors(merge_into(resolve(str(place)), adapter, tmp_path / "merged").folder)
    assert whole.keys() == merged.keys()
    assert not equal(merged, before)
    for name, value in whole.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6, msg=name)


def test_every_type_that_can_be_merged_has_its_case() -> None:
    assert set(EVERY_TYPE) == {kind for kind, cls in ADAPTERS.items() if cls.merge is not Adapter.merge}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_what_is_merged_loads_as_base_and_adapter(architecture: str, base: Saved, tmp_path: Path) -> None:
    """To 1e-5 in float32: one product instead of two. A sharded model keeps its cut, and its index is whole."""
    place = base(architecture, shard=SHARDED)
    adapter = trained(place)
    live, ids = load(str(place)), torch.arange(24)[None]
    load_adapter(live.network, adapter)
    merged = load(str(merge_into(resolve(str(place)), adapter, tmp_path / "merged").folder))
    assert {f.name for f in (tmp_path / "merged").glob("*.safe*")} == {f.name for f in place.glob("*.safe*")}
    torch.testing.assert_close(merged.network(ids).logits, live.network(ids).logits, rtol=0, atol=1e-5)
    assert merged.tokenizer.chat_template == live.tokenizer.chat_template


@pytest.mark.parametrize("settings", [LoRA(r=4), LoRA(r=8, alpha=3, rs_scaling=True, target_modules=("v_proj",))])
def test_peft_merges_to_the_same_weights(settings: LoRA, base: Saved, tmp_path: Path) -> None:
    """A product of r terms is wrong by at most r eps |B||A|, scaled; the sum with W rounds once more. Both err."""
    place = base(tie_word_embeddings=False)
    adapter, network = trained(place, settings), load(str(place)).network
    plain = {name: value.clone() for name, value in network.state_dict().items()}
    theirs = peft.PeftModel.from_pretrained(network, adapter).merge_and_unload().state_dict()
    ours = tensors(merge_into(resolve(str(place)), adapter, tmp_path / "merged").folder)
    assert ours.keys() == theirs.keys()
    eps = torch.finfo(torch.float32).eps
    for name, value in ours.items():
        update = (value - plain[name]).abs()
        bound = 2 * eps * (value.abs() + (settings.r + 2) * update.max() + plain[name].abs())
        assert bool(((value - theirs[name]).abs() <= bound).all()), name


def test_a_base_without_the_networks_prefix_is_merged_under_its_own_names(base: Saved, tmp_path: Path) -> None:
    """Files of a bare transformer lack `model.`; loading adds it, and the merged files lack it too."""
    place = base(tie_word_embeddings=True)
    adapter = trained(place)
    expected = tensors(merge_into(resolve(str(place)), adapter, tmp_path / "one").folder)
    bare = {name.removeprefix("model."): value for name, value in tensors(place).items()}
    save_file(bare, place / "model.safetensors", metadata={"format": "pt"})
    merged = tensors(merge_into(resolve(str(place)), adapter, tmp_path / "two").folder)
    assert equal(merged, {name.removeprefix("model."): value for name, value in expected.items()})


def test_a_base_of_another_shape_or_depth_is_refused(base: Saved, network: Factory, model: Model) -> None:
    adapter = trained(base())
    for settings in ({"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
        model.network = network(**settings)
        other = save(model, adapter.parent / "other")
        with pytest.raises(AdapterError, match="made for another model"):
            merge_into(resolve(str(other)), adapter, adapter.parent / "merged")
    assert not (adapter.parent / "merged").exists()


def test_a_base_with_other_weights_is_refused_if_the_adapter_knows_its_own(base: Saved, tmp_path: Path) -> None:
    place = base()
    adapter = trained(place, base_sha256=weights_hash(place))
    assert merge_into(resolve(str(place)), adapter, tmp_path / "merged").num_layers == 14
    with pytest.raises(AdapterError, match=r"not those that it was trained on \(base\)"):
        merge_into(resolve(str(base(seed=1))), adapter, tmp_path / "other")


def test_weights_that_lack_or_bend_a_layer_are_refused(base: Saved, tmp_path: Path) -> None:
    place = base()
    adapter, whole = trained(place), tensors(place)
    for complaint, change in (
        ("is nothing", {}),
        (r"is F32 \[1, 64\]", {"model.layers.1.self_attn.q_proj.weight": torch.ones(1, 64)}),
        ("is I64", {"model.layers.1.self_attn.q_proj.weight": torch.ones(128, 64, dtype=torch.int64)}),
    ):
        rest = {name: value for name, value in whole.items() if name != "model.layers.1.self_attn.q_proj.weight"}
        save_file(rest | change, place / "model.safetensors")
        with pytest.raises(ModelError, match=rf"layers\.1\.self_attn\.q_proj\.weight shall be merged and {complaint}"):
            merge_into(resolve(str(place)), adapter, tmp_path / "merged")


def test_damaged_weights_are_refused_and_an_index_cannot_leave_its_folder(base: Saved, tmp_path: Path) -> None:
    place = base(shard=SHARDED)
    adapter, index = trained(place), place / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model-00001", "../model-00001"))
    with pytest.raises(ModelError, match="no index of weight files that lie beside it"):
        merge_into(resolve(str(place)), adapter, tmp_path / "merged")
    index.write_text(text)
    shard = max(place.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        merge_into(resolve(str(place)), adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_too_small_a_disk_is_said_before_anything_is_written(
    base: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = base()
    adapter, usage = trained(place), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(ModelError, match=r"takes [\d.]+ MB and 0\.10 MB are free; make room"):
        merge_into(resolve(str(place)), adapter, tmp_path / "new" / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
    base: Saved, tmp_path: Path, full_disk: Callable[[], None]
) -> None:
    place = base()
    adapter = trained(place)
    full_disk()
    with pytest.raises(ModelError, match=r"cannot be written .* make room"):
        merge_into(resolve(str(place)), adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_neither_the_base_nor_the_adapter_is_written_over(base: Saved, tmp_path: Path) -> None:
    place = base()
    adapter = trained(place)
    (tmp_path / "link").symlink_to(place)
    shutil.copytree(adapter, tmp_path / "other")
    for destination in (place, tmp_path / "link", adapter, tmp_path / "other"):
        before = {path: path.read_bytes() for path in destination.iterdir()}
        with pytest.raises(ModelError, match="choose another place"):
            merge_into(resolve(str(place)), adapter, destination)
        assert {path: path.read_bytes() for path in destination.iterdir()} == before


def test_a_quantized_base_is_refused(base: Saved, tmp_path: Path) -> None:
    place = base()
    adapter, config = trained(place), json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="stored quantized"):
        merge_into(resolve(str(place)), adapter, tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_certificate_lies_beside_the_model(dtype: str, base: Saved, tmp_path: Path) -> None:
    place = base(dtype=dtype)
    merged = merge_into(resolve(str(place)), trained(place), tmp_path / "merged", verify=True)
    written = json.loads((merged.folder / "certificate.json").read_text())
    assert written["kl"] <= written["kl_bound"] < written["kl_of_base"]
    assert written["greedy_agreement"] > 0.9
    assert written["num_tokens"] == 64
    assert load(str(merged.folder)).dtype == torch.float32
    assert merge_into(resolve(str(place)), tmp_path / "adapter", merged.folder).certificate is None
    assert not (merged.folder / "certificate.json").exists()


@pytest.mark.parametrize("rounded", [True, False])
def test_a_model_that_lost_its_adapter_gets_no_certificate(rounded: bool, base: Saved) -> None:
    place = base()
    with pytest.raises(ExportError, match="not base and adapter: KL"):
        certify(place, trained(place), place, rounded=rounded)


def test_a_merge_that_rounds_the_adapter_away_leaves_nothing(base: Saved, model: Model, tmp_path: Path) -> None:
    """Updates of 1e-4 of the weights are below bfloat16's last place, 2^-9; large logits make them tell."""
    place = base(dtype="bf16", tie_word_embeddings=False)
    adapter, file = trained(place), tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value * (0.003 if "lora_B" in name else 1) for name, value in load_file(file).items()}, file)
    with torch.no_grad():
        model.network.lm_head.weight.mul_(100)
    save(model, place)
    with pytest.raises(ExportError, match="store it in fp32"):
        merge_into(resolve(str(place)), adapter, tmp_path / "merged", verify=True)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}
    assert merge_into(resolve(str(place)), adapter, tmp_path / "merged", dtype="fp32", verify=True).certificate


def test_a_killed_merge_leaves_a_whole_model_or_none(base: Saved, tmp_path: Path) -> None:
    place = base(shard=SHARDED)
    script = Path(__file__).with_name("killed_merge.py")
    command = [sys.executable, str(script), str(place), str(trained(place)), str(tmp_path / "out"), "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "killed 15 times"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_peak_is_three_tensors_and_300_mb(dtype: str, tmp_path: Path) -> None:
    """Of a model of 740 MB, in float32 or in twice as many layers of bfloat16; imports are not counted."""
    script = Path(__file__).with_name("merge_memory.py")
    command = [sys.executable, str(script), str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["grown"] <= measured["largest_three"] + 300e6
    assert measured["model"] > measured["largest_three"] + 300e6
