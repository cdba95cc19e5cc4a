"""Merges a large model of equal numbers and prints what it cost. Run by test_merge.py as `merge_memory.py FOLDER F32`.

In bytes: how far the process's peak rose above what it held before, the model, and its three largest tensors.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from luthier.models.merge import merge_into
from luthier.models.sources import resolve
from luthier.models.weights import LazyTensor, write_safetensors

SIZES = {"vocab_size": 256, "hidden_size": 2048, "intermediate_size": 8192, "num_key_value_heads": 8}


def write_base(folder: Path, dtype: str) -> list[LazyTensor]:
    config = LlamaConfig(num_attention_heads=32, num_hidden_layers=3 if dtype == "F32" else 6, **SIZES)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    kind = np.float32 if dtype == "F32" else np.uint16
    tensors = [LazyTensor(name, dtype, tuple(t.shape), partial(np.ones, t.shape, kind)) for name, t in state.items()]
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    config.save_pretrained(folder)
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="b").save_pretrained(folder)
    return tensors


def write_adapter(folder: Path, tensors: list[LazyTensor]) -> None:
    r, parts = 16, {}
    for tensor in tensors:
        if "_proj" in tensor.name:
            name = f"base_model.model.{tensor.name.removesuffix('.weight')}"
            parts[f"{name}.lora_A.weight"] = torch.ones(r, tensor.shape[1])
            parts[f"{name}.lora_B.weight"] = torch.ones(tensor.shape[0], r)
    folder.mkdir()
    save_file(parts, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(folder: Path, dtype: str) -> None:
    tensors = write_base(folder / "base", dtype)
    write_adapter(folder / "adapter", tensors)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
    before = psutil.Process().memory_info().rss
    merge_into(resolve(str(folder / "base")), folder / "adapter", folder / "merged")
    sizes = sorted(tensor.num_bytes for tensor in tensors)
    print(json.dumps({"grown": peak_bytes() - before, "model": sum(sizes), "largest_three": sum(sizes[-3:])}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
