"""The memory that `luthier plan` says against the memory that the run then takes, for settings of many kinds.

Each setting is planned and run as a command of its own. What is measured is the process's largest resident set, as the
operating system counts it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path("../shared/data")
SMOL = "smollm2-135m"

CHAT = ["sft", "--data", str(DATA / "alpaca_en.jsonl"), "--max-length", "512", "--batch-size", "8"]
TOOLS = ["sft", "--data", str(DATA / "glaive_toolcall_en.jsonl"), "--max-length", "1024", "--batch-size", "4"]
TEXT = ["--data", str(DATA / "wikitext2_valid.txt"), "--batch-size", "2"]
PAIRS = ["--data", str(DATA / "dpo_en_sharegpt.jsonl"), "--max-length", "768", "--batch-size", "3", "--on-long", "drop"]
LABELS = [
    "--data",
    str(DATA / "kto_en_sharegpt.jsonl"),
    "--max-length",
    "768",
    "--batch-size",
    "4",
    "--on-long",
    "drop",
]
SUMS = [
    *("--data", str(DATA / "gsm8k_train.jsonl"), "--reward", "numeric", "--max-length", "512"),
    *("--batch-size", "4", "--group-size", "4", "--max-new-tokens", "64"),
]
FULL = ["--adapter", "none", "--batch-size", "4"]

TENSORS = ("weights", "masters", "gradients", "optimizer", "activations")


def of(kind: list[str], *more: str, bf16: bool = True) -> list[str]:
    """A setting's flags."""
    return [*kind, "--dtype", "bf16" if bf16 else "fp32", *more]


def adapter(word: str, *more: str) -> list[str]:
    """Flags of an adapter."""
    return ["--adapter.type", word, *more]


def settings() -> dict[str, list[str]]:
    """By name, the flags of every setting of one model."""
    small = ("dora", "loha", "lokr", "ia3", "vera", "bottleneck", "prefix", "prompt", "adalora", "bitfit")
    return {
        "LoRA, bf16": of(CHAT),
        "LoRA, fp32": of(CHAT, bf16=False),
        "LoRA r 128, bf16": of(CHAT, "--adapter.r", "128"),
        "LoRA dropout 0.1, fp32": of(CHAT, "--adapter.dropout", "0.1", bf16=False),
        "LoRA, bf16, micro-batches of 512": of(CHAT, "--micro-batch-tokens", "512"),
        "LoRA, bf16, micro-batches of 2048": of(CHAT, "--micro-batch-tokens", "2048"),
        "LoRA, fp32, one sequence at a time": of(CHAT, "--no-packing", bf16=False),
        "LoRA, bf16, all layers recomputed": of(CHAT, "--gradient-checkpointing", "1"),
        "LoRA, fp32, all layers recomputed": of(CHAT, "--gradient-checkpointing", "1", bf16=False),
        "LoRA, fp32, every second recomputed": of(CHAT, "--gradient-checkpointing", "2", bf16=False),
        "LoRA, bf16, tools, 1024 tokens": of(TOOLS),
        "LoRA, fp32, tools, 1024 tokens": of(TOOLS, bf16=False),
        "LoRA, bf16, text, 256 tokens": of(["pretrain", *TEXT, "--max-length", "256"]),
        "LoRA, fp32, text, 1024 tokens": of(["pretrain", *TEXT, "--max-length", "1024"], bf16=False),
        "LoRA, bf16, text, 2048 tokens": of(["pretrain", *TEXT, "--max-length", "2048"]),
        "QLoRA nf4, bf16": of(CHAT, "--quantize-base", "nf4"),
        "QLoRA int8, fp32": of(CHAT, "--quantize-base", "int8", bf16=False),
        **{f"{word}, bf16": of(CHAT, *adapter(word)) for word in small},
        "full, fp32": of(CHAT, *FULL, bf16=False),
        "full, bf16": of(CHAT, *FULL),
        "full, adam8bit, fp32": of(CHAT, *FULL, "--optimizer", "adam8bit", bf16=False),
        "full, bf16, all layers recomputed": of(CHAT, *FULL, "--gradient-checkpointing", "1"),
        "full, fp32, text, 1024 tokens": of(["pretrain", *TEXT, "--max-length", "1024", *FULL], bf16=False),
        "DPO, LoRA, bf16": of(["dpo", *PAIRS]),
        "DPO, LoRA, fp32": of(["dpo", *PAIRS], bf16=False),
        "DPO, full, bf16": of(["dpo", *PAIRS, "--adapter", "none"]),
        "ORPO, LoRA, fp32": of(["orpo", *PAIRS], bf16=False),
        "KTO, LoRA, bf16": of(["kto", *LABELS]),
        "reward model, LoRA, bf16": of(["reward", *PAIRS]),
        "GRPO, LoRA, bf16": of(["grpo", *SUMS]),
        "GRPO, LoRA, fp32": of(["grpo", *SUMS], bf16=False),
        "GRPO, LoRA, bf16, 32 answers": of(["grpo", *SUMS, "--group-size", "8", "--max-new-tokens", "128"]),
        "PPO, LoRA, bf16": of(["ppo", *SUMS[:-4], "--max-new-tokens", "64"]),
    }


SECOND = (
    "LoRA, bf16",
    "LoRA, fp32",
    "LoRA, fp32, tools, 1024 tokens",
    "LoRA, bf16, all layers recomputed",
    "full, bf16",
)
SECOND += ("QLoRA nf4, bf16", "dora, bf16", "full, fp32", "DPO, LoRA, fp32", "GRPO, LoRA, bf16")


def second_model(folder: Path) -> str:
    """A Qwen3 of 16 layers and 200 million parameters from a configuration, with an output layer of its own, and the
    first model's tokenizer.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import luthier as lt

    tokenizer = lt.load(SMOL).tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "head_dim": 64}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 8192}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(**sizes, **heads, **ends, vocab_size=len(tokenizer), tie_word_embeddings=False)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def luthier(*arguments: str) -> str:
    """A command's output."""
    command = [sys.executable, "-m", "luthier.cli.main", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def plan(arguments: list[str]) -> dict[str, Any]:
    """What `luthier plan` says."""
    said: dict[str, Any] = json.loads(luthier("plan", *arguments, "--json"))
    return said


def measured_bytes(arguments: list[str]) -> int:
    """The largest resident set of the run, from the kernel's account of the ended process."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "luthier.cli.main", *arguments, "--output", f"{folder}/run"]
        with Path(os.devnull).open("w") as nowhere:
            process = subprocess.Popen(run, stdout=nowhere, stderr=nowhere)
            _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {status}")
    return usage.ru_maxrss * 1024


def planned(arguments: list[str]) -> dict[str, float]:
    """Bytes planned, those of tensors and of each part among them, and the seconds that the command took."""
    started = time.perf_counter()
    said = plan(arguments)
    seconds = time.perf_counter() - started
    tensors = sum(said["parts"][part] for part in TENSORS)
    found = {"tensors": tensors, "planned": said["peak_bytes"], "loading": said["loading_bytes"]}
    return {**found, "seconds": seconds, **said["parts"]}


def row(name: str, found: dict[str, float]) -> str:
    """A line of the table."""
    sizes = " | ".join(f"{found[key] / 1e9:.2f} GB" for key in ("tensors", "planned", "measured"))
    return f"| {name} | {sizes} | {found['planned'] / found['measured'] - 1:+.0%} | {found['seconds']:.1f} s |"


def main() -> None:
    """Prints one line a setting: planned, measured, how far apart they are; and how long the plan took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", help="settings whose name holds this")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers; what stands there is not run again")
    parser.add_argument("--replan", action="store_true", help="plan again what stands there")
    options = parser.parse_args()
    kept = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    print("| setting | tensors | planned | measured | off by | planning |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        other = second_model(Path(folder))
        cases = {name: [*flags, "--model", SMOL] for name, flags in settings().items()}
        cases |= {f"Qwen3: {name}": [*settings()[name], "--model", other] for name in SECOND}
        for name, flags in cases.items():
            if options.only and options.only not in name:
                continue
            flags = [*flags, "--max-steps", str(options.steps)]
            measured = kept[name]["measured"] if name in kept else measured_bytes(flags)
            if name not in kept or options.replan:
                kept[name] = {**planned(flags), "measured": measured}
            print(row(name, kept[name]), flush=True)
            if options.output:
                options.output.write_text(json.dumps(kept, indent=1) + "\n")
    off = [abs(found["planned"] / found["measured"] - 1) for found in kept.values()]
    print(f"\n{sum(one <= 0.1 for one in off)} of {len(off)} within 10%, furthest off: {max(off):.0%}")


if __name__ == "__main__":
    main()
