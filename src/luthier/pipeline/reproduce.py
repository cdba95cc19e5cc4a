"""A run had once more from its manifest: the same recipe, on what has the same hashes, cut into the same pieces.

On the same versions, machine and number of threads every artifact comes out with the same bytes, unless memory ran out
on the way, and that is looked at when the run is over. Elsewhere sums round otherwise; what differs is said before the
run begins.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.errors import CheckpointError, RecipeError
from luthier.models.sources import resolve
from luthier.pipeline.manifest import data_hashes, hardware, versions
from luthier.pipeline.run import Listeners, run_recipe
from luthier.pipeline.train import Summary
from luthier.recipe.document import Recipe, parse_recipe
from luthier.recipe.yaml_text import read_yaml, write_yaml

__all__ = ["Manifest", "reproduce"]

logger = logging.getLogger(__name__)

_NEEDED = ("recipe", "versions", "hardware", "base_model", "data", "artifacts", "micro_batch_tokens")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a run's manifest.json says."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises RecipeError for a file that is no manifest, or not one of a whole run."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"{path}: is not a manifest that can be read ({error}); name a run's manifest.json"
            ) from None
        missing = [name for name in _NEEDED if not isinstance(content, dict) or name not in content]
        if missing:
            raise RecipeError(f"{path}: lacks {', '.join(missing)}, so the run cannot be had once more from it")
        return cls(path, content)

    def recipe(self, output: str | None = None) -> Recipe:
        """The run's recipe, with steps cut as they were. output: by default the run's own, with `-again`."""
        written: Any = read_yaml(self.content["recipe"], str(self.path)).value
        written["output"] = output or f"{written['output']}-again"
        for stage, cut in zip(written["stages"], self.content["micro_batch_tokens"].values(), strict=True):
            for settings in stage.values():
                settings["micro_batch_tokens"] = cut
        return parse_recipe(write_yaml(written), name=str(self.path))

    def refuse_changed(self, recipe: Recipe) -> None:
        """Raises CheckpointError where the base model, data or rewards are not what the run had."""
        base, data = self.content["base_model"], self.content["data"]
        here = {name: digest for stage in recipe.stages for name, digest in data_hashes(stage.settings).items()}
        changed = [name for name in sorted(data.keys() | here.keys()) if data.get(name) != here.get(name)]
        if resolve(recipe.model).weights_hash != base["sha256"]:
            changed.insert(0, recipe.model)
        if changed:
            raise CheckpointError(f"{self.path}: the run had another {', '.join(changed)} than there is here; get that")

    def differing(self) -> list[str]:
        """What is not as it was, so that sums may round otherwise: `torch 2.11.0, then 2.13.0`."""
        found = []
        for then, now in ((self.content["versions"], versions()), (self.content["hardware"], hardware())):
            found += [f"{name} {now.get(name)}, then {value}" for name, value in then.items() if now.get(name) != value]
        return found

    def shortages(self) -> list[str]:
        """Where memory ran out in the run, from when on its steps were cut smaller than a recipe can say."""
        found = self.content.get("shortages", {}).items()
        return [f"in {stage}, whose micro-batches then had up to {tokens} tokens" for stage, tokens in found]


def reproduce(
    path: Path, *, output: str | None = None, listeners: Listeners = lambda index, stage: ()
) -> tuple[Recipe, list[Summary], list[str]]:
    """Runs what the manifest says. Returns the recipe, the stages' summaries, and the artifacts that have other bytes.

    Raises what reading it and its checks raise, and what `run_recipe` raises.
    """
    manifest = Manifest.read(path)
    recipe = manifest.recipe(output)
    manifest.refuse_changed(recipe)
    with _threads(manifest.content["hardware"].get("threads")):
        if differing := manifest.differing():
            logger.warning("numbers may differ in their last digits: %s", "; ".join(differing))
        if shortages := manifest.shortages():
            logger.warning("memory ran out %s: the same bytes cannot be had again", "; ".join(shortages))
        summaries = run_recipe(recipe, listeners=listeners)
    made = Manifest.read(Path(recipe.output) / "manifest.json").content["artifacts"]
    hashed = {name: entry["sha256"] for name, entry in manifest.content["artifacts"].items() if "sha256" in entry}
    return recipe, summaries, [name for name, digest in hashed.items() if made.get(name, {}).get("sha256") != digest]


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """As many as the run had, for the time of the context: sums are cut by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
