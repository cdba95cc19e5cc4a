"""`luthier adapters`: what each type of adapter costs on a model; `luthier adapters fuse`: several made one."""

import json
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.table import Table

from luthier.adapters.fuse_saved import fuse_saved
from luthier.adapters.fusion import FUSIONS
from luthier.pipeline.adapter_costs import AdapterCost, adapter_costs
from luthier.recipe.adapters import ADAPTER_SETTINGS
from luthier.recipe.training import DType

__all__ = ["command"]


def command(word: str) -> click.Command:
    """The command `adapters`."""

    @click.group(word, invoke_without_command=True, help="Say what each type of adapter costs on a model.")
    @click.option("--model", default="smollm2-135m", show_default=True, help="The model that would be adapted.")
    @click.option("--type", "types", multiple=True, type=click.Choice(list(ADAPTER_SETTINGS)), help="Only this type.")
    @click.option("--r", type=click.IntRange(1), help="The rank, for all but vera. [default: each its own]")
    @click.option("--dtype", default="bf16", show_default=True, type=click.Choice(get_args(DType)))
    @click.option("--tokens", default=512, show_default=True, type=click.IntRange(8), help="Tokens of a step.")
    @click.option("--repeats", default=5, show_default=True, type=click.IntRange(0), help="Steps timed; 0 times none.")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @click.pass_context
    def adapters(
        ctx: click.Context,
        model: str,
        types: tuple[str, ...],
        r: int | None,
        dtype: DType,
        tokens: int,
        repeats: int,
        as_json: bool,
    ) -> None:
        if ctx.invoked_subcommand is not None:
            return
        costs, frozen = adapter_costs(model, types=types, r=r, dtype=dtype, num_tokens=tokens, repeats=repeats)
        if as_json:
            described = {"frozen_seconds": frozen, "adapters": [cost.as_dict() for cost in costs]}
            click.echo(json.dumps(described, indent=1))
        else:
            _print(costs, frozen, f"{model}, {dtype}, a step of {tokens} tokens")

    adapters.add_command(_fuse())
    return adapters


def _print(costs: list[AdapterCost], frozen: float | None, title: str) -> None:
    table = Table("type", "r", "trained", "share", "file", "memory", "time", "merges", title=title)
    for cost in sorted(costs, key=lambda cost: cost.trainable_parameters):
        took = "" if cost.seconds is None or frozen is None else f"{cost.seconds / frozen:+.0%}"
        trained, file, memory = f"{cost.trainable_parameters:,}", cost.file_bytes / 1e6, cost.memory_bytes / 1e6
        sizes = f"{cost.share:.2%}", f"{file:.2f} MB", f"{memory:+.0f} MB"
        table.add_row(cost.type, str(cost.r or ""), trained, *sizes, took, "yes" if cost.mergeable else "no")
    console = Console()
    console.print(table)
    against = "" if frozen is None else f", which takes {frozen:.2f} s"
    console.print(f"memory and time: of a training step besides those of the frozen model{against}")


def _fuse() -> click.Command:
    @click.command("fuse", help="Fuse LoRA adapters of one model into one.")
    @click.option("--adapter", "adapters", multiple=True, required=True, type=click.Path(path_type=Path))
    @click.option("--weight", "weights", multiple=True, type=float, help="One for each. [default: the average]")
    @click.option("--method", default="concatenate", show_default=True, type=click.Choice(list(FUSIONS)))
    @click.option("--r", type=click.IntRange(1), help="The rank that svd leaves. [default: the largest given]")
    @click.option("--density", default=0.5, show_default=True, help="The share of entries that ties and dare keep.")
    @click.option("--seed", default=0, show_default=True, help="Of dare's draws.")
    @click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder of the fused adapter.")
    def fuse(
        adapters: tuple[Path, ...],
        weights: tuple[float, ...],
        method: str,
        r: int | None,
        density: float,
        seed: int,
        output: Path,
    ) -> None:
        settings = fuse_saved(adapters, output, method=method, weights=weights or None, r=r, density=density, seed=seed)
        click.echo(f"{len(adapters)} adapters fused into {output}: a LoRA of rank {settings.r}, which PEFT reads too")

    return fuse
