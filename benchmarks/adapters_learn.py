"""Every type of adapter on one real task: what it costs, and what it learns in a few hundred steps.

Short rows of GSM8K, one a step, SmolLM2-135M in bfloat16, the same rows in the same order for all, and default settings
but for what RUNS names. Each run has a process of its own, so its peak memory is its own. All are held against the
untouched model in bfloat16: a type whose held-out loss does not fall below its ends the script with exit code 1, and so
does a DyLoRA that is not better at a higher rank. The loss at the start is another where the adapter does not start as
the identity, and over a quantized base.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.batches import cut
from luthier.data.prepare import prepare
from luthier.models.adapted import load_adapted
from luthier.models.load import Model, load
from luthier.pipeline.methods import next_tokens
from luthier.recipe import SFT
from luthier.training.callbacks import read_metrics
from luthier.training.loop import evaluate_loss

MODEL = "smollm2-135m"
DATA, NUM_ROWS, MAX_LENGTH = Path("../shared/data/gsm8k_train.jsonl"), 500, 144
SETTINGS = {"max_length": MAX_LENGTH, "batch_size": 1, "eval_fraction": 0.08, "eval_every": 1000, "save_every": None}
NF4 = {"quantize_base": "nf4"}
RUNS: dict[str, dict[str, object]] = {
    **{kind: {"adapter": kind} for kind in ("lora", "dora", "loha", "lokr", "vera", "ia3", "adalora", "dylora")},
    **{kind: {"adapter": kind} for kind in ("bottleneck", "prefix", "prompt", "bitfit")},
    "fusion of two bottlenecks": {"adapter": {"type": "fusion"}},
    "lora, pissa": {"adapter": {"init": "pissa"}},
    "lora over nf4 (QLoRA)": NF4,
    "lora over nf4, loftq": {**NF4, "adapter": {"init": "loftq"}},
    "lora over int8": {"quantize_base": "int8"},
}


def short_rows(place: Path) -> None:
    """The first rows of the data that fit, for all runs."""
    tokenizer = load(MODEL).tokenizer
    lines = DATA.read_text().split("\n")[:-1]  # text may hold other line breaks
    fitting = (
        line for line in lines if len(tokenizer(line).input_ids) < MAX_LENGTH - 20
    )  # the template takes the rest
    place.write_text("".join(f"{line}\n" for line in islice(fitting, NUM_ROWS)))


def run(settings: dict[str, object], steps: int, rows: Path, folder: Path) -> dict[str, Any]:
    """What one run left in its folder; the run has a process of its own."""
    stage = {"data": str(rows), **SETTINGS, **settings, "max_steps": steps}
    recipe = {"model": MODEL, "output": str(folder), "seed": 1, "stages": [{"sft": stage}]}
    code = "import json, sys, luthier; luthier.run_recipe(luthier.Recipe(**json.loads(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", code, json.dumps(recipe)], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "00-sft" / "summary.json").read_text())
    metrics = read_metrics(folder / "00-sft" / "metrics.jsonl")
    return {
        "trained_parameters": summary["trained_parameters"],
        "file_bytes": (folder / "00-sft" / "adapter" / "adapter_model.safetensors").stat().st_size,
        "memory_bytes": max(line["memory_bytes"] for line in metrics if "memory_bytes" in line),
        "milliseconds_per_step": statistics.median(1e3 * line["seconds"] for line in metrics if "loss" in line),
        "first_eval_loss": summary["first_eval_loss"],
        "final_eval_loss": summary["final_eval_loss"],
    }


def settings_of(name: str, steps: int, rows: Path, folder: Path) -> dict[str, object]:
    """A run's settings. A fusion's members, of two sizes, are trained first, each for half of the steps."""
    if not name.startswith("fusion"):
        return RUNS[name]
    members = [folder.with_name(f"member of size {size}") for size in (32, 64)]
    for size, member in zip((32, 64), members, strict=True):
        run({"adapter": {"type": "bottleneck", "size": size}}, steps // 2, rows, member)
    return {"adapter": {"type": "fusion", "adapters": [str(member / "00-sft" / "adapter") for member in members]}}


def held_out_loss(model: Model, rows: Path) -> float:
    """On the rows that the runs hold out."""
    settings = SFT(data=str(rows), seed=1, **SETTINGS)
    held_out = prepare(settings, model.tokenizer, quarantine=rows.with_suffix(".left_out")).evaluation
    return evaluate_loss(model.network, cut(held_out, 512), next_tokens)


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table in README.md."""
    return (
        f"| {name} | {found['trained_parameters']:,} | {found['file_bytes'] / 1e6:.2f} MB "
        f"| {found['memory_bytes'] / 1e9:.2f} GB | {found['milliseconds_per_step']:.0f} ms "
        f"| {found['untouched_loss']:.3f} | {found['first_eval_loss']:.3f} | {found['final_eval_loss']:.3f} |"
    )


def main() -> None:
    """Runs all, or those that are named, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", action="append", choices=list(RUNS))
    parser.add_argument("--output", type=Path, help="A JSON file for the numbers; those that it has are not run again.")
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output and given.output.exists() else {}
    print(
        "| adapter | parameters | file | peak memory | step | loss untouched | at the start | after |\n"
        + "| --- " * 8
        + "|"
    )
    for name in given.only or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            if name not in results:
                rows, place = Path(folder) / "rows.jsonl", Path(folder) / "run"
                short_rows(rows)
                results[name] = run(settings_of(name, given.steps, rows, place), given.steps, rows, place)
                known = [found["untouched_loss"] for found in results.values() if "untouched_loss" in found]
                results[name]["untouched_loss"] = known[0] if known else held_out_loss(load(MODEL, dtype="bf16"), rows)
                if name == "dylora":
                    served = {
                        rank: load_adapted(MODEL, place / "00-sft" / "adapter", rank=rank) for rank in (1, 4, 8, 16)
                    }
                    results[name]["loss_by_rank"] = {rank: held_out_loss(each, rows) for rank, each in served.items()}
        print(row(name, results[name]), flush=True)
        if given.output:
            given.output.write_text(json.dumps(results, indent=1) + "\n")
    by_rank = results.get("dylora", {}).get("loss_by_rank", {})
    print("one dylora file at rank " + ", ".join(f"{rank}: {loss:.3f}" for rank, loss in by_rank.items()))
    idle = [name for name, found in results.items() if not found["final_eval_loss"] < found["untouched_loss"]]
    if idle:
        sys.exit(f"learned nothing: {', '.join(idle)}")
    if list(by_rank.values()) != sorted(by_rank.values(), reverse=True):
        sys.exit("a higher rank of the DyLoRA is no better")


if __name__ == "__main__":
    main()
