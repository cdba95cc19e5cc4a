"""What SmolLM2-135M forgets of general text while it goes on pretraining on Shakespeare; what mixing and the guard do.

Three runs of the same steps on ../shared/data/tinyshakespeare.txt: the text alone, the text with 30% of general text
(c4_en_text.jsonl) among it, and the text alone at a learning rate that is far too high. Held out is the end of
Shakespeare; general is the beginning of wikitext2_valid.txt, which no run learns from. The guard stops the third run;
the first two are let go as far as they go, so that their curves can be compared.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import luthier as lt
from luthier.training.callbacks import read_metrics

DATA = Path("../shared/data")
SHAKESPEARE, GENERAL, MIXED = DATA / "tinyshakespeare.txt", DATA / "wikitext2_valid.txt", DATA / "c4_en_text.jsonl"
HELD_OUT_CHARACTERS = 24_000
USUAL = {"max_length": 512, "batch_size": 4, "eval_every": 10, "save_every": None, "epochs": 100}
LET_GO = 1e9  # a rise that no run reaches


def split(folder: Path) -> dict[str, str]:
    """Shakespeare's files to learn from and to compare on."""
    text = SHAKESPEARE.read_text(encoding="utf-8")
    files = {"data": text[:-HELD_OUT_CHARACTERS], "eval_data": text[-HELD_OUT_CHARACTERS:]}
    for name, part in files.items():
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
    return {name: str(folder / f"{name}.txt") for name in files}


def contenders(rate: float, hot: float) -> dict[str, dict[str, Any]]:
    """What each run has of its own."""
    free = {"forgetting": {"text": str(GENERAL), "stop": LET_GO}}
    return {
        "alone": {"learning_rate": rate, **free},
        "30% general": {"learning_rate": rate, "mix": {str(MIXED): 0.3}, **free},
        "too hot": {"learning_rate": hot, "eval_every": 3, "forgetting": str(GENERAL)},
    }


def curve(stage: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains, and gives the evaluations of the run, the step it ended at and the loss of the weights it handed back."""
    started = time.perf_counter()
    lt.run_recipe(lt.Recipe(model="smollm2-135m", output=str(folder), stages=[{"pretrain": stage}]))  # type: ignore[list-item]
    lines = read_metrics(folder / "00-pretrain" / "metrics.jsonl")
    names = ("step", "eval_perplexity", "eval_forgetting_perplexity", "eval_forgetting")
    summary = json.loads((folder / "00-pretrain" / "summary.json").read_text(encoding="utf-8"))
    return {
        "minutes": (time.perf_counter() - started) / 60,
        "evaluations": [{name: line[name] for name in names} for line in lines if "eval_perplexity" in line],
        "steps": summary["steps"],
        "final_eval_loss": summary["final_eval_loss"],
    }


def main() -> None:
    """Runs all three, prints a table and keeps the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hot", type=float, default=4e-3)
    parser.add_argument("--only", help="contenders whose name holds this")
    parser.add_argument("--output", type=Path, help="a JSON file for the curves")
    given = parser.parse_args()
    kept = json.loads(given.output.read_text()) if given.output and given.output.exists() else {}
    print("| run | step | held-out perplexity | general perplexity | forgetting |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = split(folder)
        for name, own in contenders(given.learning_rate, given.hot).items():
            if given.only and given.only not in name:
                continue
            stage = {**USUAL, **files, **own, "max_steps": given.steps, "dtype": given.dtype}
            kept[name] = curve(stage, folder / name.replace(" ", "-"))
            for line in kept[name]["evaluations"]:
                perplexities = f"{line['eval_perplexity']:.2f} | {line['eval_forgetting_perplexity']:.2f}"
                print(f"| {name} | {line['step']} | {perplexities} | {line['eval_forgetting']:+.1%} |", flush=True)
            if given.output:
                given.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
