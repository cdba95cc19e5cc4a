"""Every type of adapter against PEFT's class, forward and backward: one layer, and SmolLM2-135M.

Both run in this process on the same input, in turns, and the medians are compared. Each is what its users run: ours
over the layers that `fuse` leaves, PEFT's over transformers' own, and in bfloat16 PEFT's adapters compute in float32.
Kept bytes are those that autograd holds between forward and backward; peak bytes are the most that a step holds at
once, gradients included. Neither counts the network and the input. DyLoRA, which PEFT lacks, runs at its full rank
against PEFT's LoRA; types that have no like there are measured alone.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from luthier.adapters.inject import ADAPTERS, inject
from luthier.kernels.streams import Segments
from luthier.models.fuse import fuse
from luthier.models.load import load
from luthier.models.sources import resolve
from luthier.pipeline.adapter_costs import of_rank
from luthier.recipe.adapters import AnyAdapter
from luthier.training.footprint import LiveBytes

MODEL, RANK, TOKENS = "smollm2-135m", 16, 512
IN, OUT = 576, 1536
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WHOLE = ("prefix", "prompt")  # sit on the whole decoder, so that they have no layer


def peft_config(word: str, targets: list[str]) -> peft.PeftConfig | None:
    """PEFT's settings for the same adapter, or None for a type that it does not have."""
    names: dict[str, Any] = {"target_modules": targets}
    lora = {**names, "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM"}
    feed_forward = [name for name in targets if name == "down_proj"]
    configs: dict[str, Callable[[], peft.PeftConfig]] = {
        "adalora": lambda: peft.AdaLoraConfig(**names, init_r=24, target_r=16, lora_alpha=48, total_step=1000),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "dylora": lambda: peft.LoraConfig(**lora),
        "ia3": lambda: peft.IA3Config(target_modules=_ia3(targets), feedforward_modules=feed_forward),
        "loha": lambda: peft.LoHaConfig(**names, r=RANK, alpha=RANK),
        "lokr": lambda: peft.LoKrConfig(**names, r=RANK, alpha=RANK),
        "lora": lambda: peft.LoraConfig(**lora),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16),
        "vera": lambda: peft.VeraConfig(**names, r=256),
    }
    return configs[word]() if word in configs else None


def _ia3(targets: list[str]) -> list[str]:
    return [name for name in targets if name in ("k_proj", "v_proj", "down_proj")] or targets


def settings_of(word: str) -> AnyAdapter:
    """Ours, with the rank of the comparison."""
    return of_rank(word, RANK)


class OneLayer(nn.Module):
    """A network of a single linear layer, as PEFT and `inject` want one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(hidden_size=IN)
        self.up_proj = nn.Linear(IN, OUT, bias=False, dtype=dtype).requires_grad_(False)

    def get_output_embeddings(self) -> None:
        """It has none."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, IN] -> [tokens, OUT]."""
        result: Tensor = self.up_proj(x)
        return result


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of a network."""

    network: nn.Module
    inputs: tuple[Tensor, ...]
    run: Callable[[], None]


def layer_steps(word: str, dtype: str) -> dict[str, Step]:
    """One layer's forward and backward, ours and PEFT's."""
    x = torch.randn(TOKENS, IN).to(DTYPES[dtype]).requires_grad_()
    grad = torch.randn(TOKENS, OUT).to(DTYPES[dtype])

    def step(network: nn.Module) -> Step:
        return Step(network, (x, grad), lambda: network(x).backward(grad))

    ours = OneLayer(DTYPES[dtype])
    fuse(ours)  # type: ignore[arg-type]
    only = {"target_modules": ("up_proj",), **({"feedforward_modules": ()} if word == "ia3" else {})}
    settings = settings_of(word).model_copy(update=only)
    inject(ours, settings, seed=0)
    steps = {"luthier": step(ours.train())}
    config = peft_config(word, ["up_proj"])
    if config is not None:
        config.task_type = None
        theirs = peft.get_peft_model(OneLayer(DTYPES[dtype]), config)  # type: ignore[arg-type]
        steps["peft"] = step(theirs.base_model.model.train())
    return steps


def model_steps(word: str, dtype: str, tokens: int = TOKENS) -> dict[str, Step]:
    """Forward and backward of the whole model on four rows: in one stream, as Luthier trains, and as PEFT's batch."""
    ids = torch.randint(5, 40_000, (4, tokens // 4), generator=torch.Generator().manual_seed(0))
    places = torch.arange(tokens // 4).repeat(4)[None]
    in_stream = {"input_ids": ids.view(1, -1), "position_ids": places, "use_cache": False}
    in_stream["segments"] = Segments.alone([tokens // 4] * 4)

    def step(network: PreTrainedModel, given: dict[str, Any]) -> Step:
        def run() -> None:
            network(**given, logits_to_keep=1).logits.float().square().mean().backward()

        return Step(network, (), run)

    ours = load(MODEL, dtype=dtype).network  # type: ignore[arg-type]
    fuse(ours)
    ours.requires_grad_(False)
    inject(ours, settings_of(word), seed=0)
    steps = {"luthier": step(ours.train(), in_stream)}
    config = peft_config(word, LINEARS)
    if config is not None:
        plain = AutoModelForCausalLM.from_pretrained(resolve(MODEL).folder, dtype=DTYPES[dtype])
        steps["peft"] = step(peft.get_peft_model(plain, config).train(), {"input_ids": ids})
    return steps


def kept_bytes(step: Step) -> int:
    """What autograd keeps between forward and backward: each storage once, those of parameters, buffers and the input
    left out, however they are looked at.
    """
    given = [*step.network.parameters(), *step.network.buffers(), *step.inputs]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.run()
    return sum(seen.values())


def peak_bytes(step: Step) -> int:
    """The most that forward and backward hold at once, besides the network and the input; counted by PyTorch."""
    counter = LiveBytes()
    counter.ignore([*step.network.parameters(), *step.network.buffers(), *step.inputs])
    with counter:
        step.run()
    step.network.zero_grad(set_to_none=True)
    return counter.peak


def compared(steps: dict[str, Step], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds, taken in turns after two rounds that do not count, and bytes."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step.run()
            times[name].append(time.perf_counter() - started)
            step.network.zero_grad(set_to_none=True)
    return {
        name: {
            "seconds": statistics.median(times[name][2:]),
            "kept_bytes": kept_bytes(step),
            "peak_bytes": peak_bytes(step),
        }
        for name, step in steps.items()
    }


def main() -> None:
    """Prints one line a type, and writes all numbers where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["layer", "model"], default="layer")
    parser.add_argument("--type", action="append", choices=sorted(ADAPTERS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    steps_of = layer_steps if given.part == "layer" else model_steps
    repeats = given.repeats or (60 if given.part == "layer" else 5)
    results = {}
    print(
        "| type | time | kept | peak | speed over PEFT | kept over PEFT's | peak over PEFT's |\n" + "| --- " * 7 + "|"
    )
    for word in given.type or [word for word in sorted(ADAPTERS) if word != "fusion"]:
        if given.part == "layer" and word in (*WHOLE, "bottleneck"):
            continue
        results[word] = compared(steps_of(word, given.dtype), repeats)
        print(line(word, results[word]), flush=True)
    if given.output:
        given.output.write_text(json.dumps(results, indent=1) + "\n")


def line(word: str, measured: dict[str, dict[str, float]]) -> str:
    """One type as a row of the table in README.md."""
    ours, theirs = measured["luthier"], measured.get("peft")
    kinds = ("kept_bytes", "peak_bytes")
    cells = [f"{1e3 * ours['seconds']:.1f} ms", *(f"{ours[kind] / 1e6:.1f} MB" for kind in kinds)]
    if theirs is None:
        return f"| {word} | {' | '.join(cells)} | | | |"
    cells.append(f"{theirs['seconds'] / ours['seconds']:.2f}x")
    cells += [f"{ours[kind] / theirs[kind]:.2f}" for kind in kinds]
    return f"| {word} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
