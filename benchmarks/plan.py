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
from pathlib import Path
from typing import Any

DATA = Path("../shared/data")
CHAT = ["sft", "--data", str(DATA / "alpaca_en.jsonl"), "--max-length", "512"]
TOOLS = ["sft", "--data", str(DATA / "glaive_toolcall_en.jsonl"), "--max-length", "1024"]
TEXT = ["pretrain", "--data", str(DATA / "wikitext2_valid.txt"), "--max-length", "1024"]
FULL = ["--adapter", "none", "--batch-size", "2"]
CHECKPOINTED = ["--gradient-checkpointing"]

TENSORS = ("weights", "masters", "gradients", "optimizer", "activations")
SETTINGS: dict[str, list[str]] = {
    "LoRA, bf16": [*CHAT, "--dtype", "bf16"],
    "LoRA, fp32": [*CHAT, "--dtype", "fp32"],
    "LoRA r 128, bf16": [*CHAT, "--dtype", "bf16", "--adapter.r", "128"],
    "LoRA dropout 0.1, fp32": [*CHAT, "--dtype", "fp32", "--adapter.dropout", "0.1"],
    "LoRA, bf16, micro-batches of 1536": [*CHAT, "--dtype", "bf16", "--micro-batch-tokens", "1536"],
    "LoRA, fp32, one sequence at a time": [*CHAT, "--dtype", "fp32", "--no-packing"],
    "LoRA, bf16, all layers recomputed": [*CHAT, "--dtype", "bf16", *CHECKPOINTED, "1", "--micro-batch-tokens", "1024"],
    "LoRA, fp32, every second recomputed": [*CHAT, "--dtype", "fp32", *CHECKPOINTED, "2"],
    "LoRA, bf16, 1024 tokens": [*TOOLS, "--dtype", "bf16", "--batch-size", "4"],
    "LoRA, fp32, 1024 tokens": [*TEXT, "--dtype", "fp32", "--batch-size", "2"],
    "full, fp32": [*CHAT, "--dtype", "fp32", *FULL],
    "full, bf16": [*CHAT, "--dtype", "bf16", *FULL],
}


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


def main() -> None:
    """Prints one line a setting: planned, measured, and how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", help="settings whose name holds this")
    options = parser.parse_args()
    print("| setting | tensors | planned | measured | off by |\n| --- | --- | --- | --- | --- |")
    errors = []
    for name, arguments in SETTINGS.items():
        if options.only and options.only not in name:
            continue
        with_defaults = arguments if "--batch-size" in arguments else [*arguments, "--batch-size", "8"]
        with_defaults = [*with_defaults, "--max-steps", str(options.steps)]
        said, measured = plan(with_defaults), measured_bytes(with_defaults)
        planned, tensors = said["peak_bytes"], sum(said["parts"][part] for part in TENSORS)
        errors.append(planned / measured - 1)
        sizes = " | ".join(f"{size / 1e9:.2f} GB" for size in (tensors, planned, measured))
        print(f"| {name} | {sizes} | {errors[-1]:+.0%} |", flush=True)
    print(f"\nfurthest off: {max(map(abs, errors)):.0%}")


if __name__ == "__main__":
    main()
