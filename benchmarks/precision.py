"""Held-out loss after the same training in several number formats, against what another seed changes.

SmolLM2-135M, LoRA r 16, Alpaca rows; the seed decides the adapter's start and the order of the rows, the held-out rows
are the same for all. A format is as good as float32 where the mean of its differences from it, seed by seed, is small
beside the deviation between seeds.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import luthier as lt

ALPACA = Path("../shared/data/alpaca_en.jsonl")


def losses(dtype: str, seed: int, steps: int, files: dict[str, str], folder: Path) -> tuple[float, float]:
    """Held-out loss before the first step and after the last."""
    stage: dict[str, Any] = {"max_length": 512, "batch_size": 8, "max_steps": steps, "save_every": None, **files}
    stage |= {"dtype": dtype, "seed": seed, "eval_every": steps}
    output = folder / f"{dtype}-{seed}"
    lt.run_recipe(lt.Recipe(model="smollm2-135m", output=str(output), stages=[{"sft": stage}]))  # type: ignore[list-item]
    summary = json.loads((output / "00-sft" / "summary.json").read_text(encoding="utf-8"))
    return summary["first_eval_loss"], summary["final_eval_loss"]


def main() -> None:
    """Prints a row a seed, and what the formats differ by."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], help="others are held against the first")
    parser.add_argument("--held-out", type=int, default=120, help="rows, the last of the file")
    given = parser.parse_args()
    rows = ALPACA.read_text(encoding="utf-8").splitlines(keepends=True)
    found: dict[str, list[float]] = {dtype: [] for dtype in given.dtypes}
    print(f"| seed | {' | '.join(given.dtypes)} |\n| --- |{' --- |' * len(given.dtypes)}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "held_out.jsonl")}
        Path(files["data"]).write_text("".join(rows[: -given.held_out]), encoding="utf-8")
        Path(files["eval_data"]).write_text("".join(rows[-given.held_out :]), encoding="utf-8")
        for seed in given.seeds:
            pairs = [losses(dtype, seed, given.steps, files, folder) for dtype in given.dtypes]
            for dtype, (_, last) in zip(given.dtypes, pairs, strict=True):
                found[dtype].append(last)
            print(f"| {seed} | {' | '.join(f'{first:.4f} to {last:.4f}' for first, last in pairs)} |", flush=True)
    base, *others = given.dtypes
    print(f"\n{base}: {stdev(found[base]):.4f} between seeds")
    for dtype in others:
        differences = [a - b for a, b in zip(found[dtype], found[base], strict=True)]
        print(f"{dtype}: {fmean(differences):+.4f} from {base}, {stdev(differences):.4f} between seeds")


if __name__ == "__main__":
    main()
