"""`luthier data`: what the files hold, row by row and in sum, before a run spends hours on it; and files made anew."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from luthier.cli.sample import command as sample
from luthier.data.audit import audit
from luthier.data.encoding import encode
from luthier.data.masks import TrainOn
from luthier.data.preview import preview as spans_of
from luthier.data.reading import Reading, read_examples
from luthier.data.sequences import Item, TokenGroup, TokenSequence, sequences_of
from luthier.data.writing import write_examples
from luthier.models.load import Model, load

__all__ = ["command"]

_FILES = click.argument("files", nargs=-1, required=True)
_FORMAT = click.option("--format", "format_", help="The format of the rows; recognised where it is not named.")
_MODEL = click.option("--model", default="smollm2-135m", show_default=True, help="Whose template and tokenizer.")
_TRAIN_ON = click.option(
    "--train-on", default="assistant", show_default=True, type=click.Choice(["assistant", "last", "all"])
)


def command(word: str) -> click.Command:
    """The group `data`."""
    group = click.Group(word, no_args_is_help=False, help="Look at data before training on it, or make it.")
    for subcommand in (preview, validate, convert, stats, sample("sample")):
        group.add_command(subcommand)
    return group


@click.command()
@_FILES
@_FORMAT
@_MODEL
@_TRAIN_ON
@click.option("--rows", default=3, show_default=True, type=click.IntRange(1), help="How many rows are shown.")
def preview(files: tuple[str, ...], format_: str | None, model: str, train_on: TrainOn, rows: int) -> None:
    """Show rows as the model sees them: trained text in green, the rest grey; a prompt once, then its answers."""
    console = Console()
    reading = read_examples(files, task=None, format=format_, on_error="skip")
    loaded = load(model)
    for item in _encoded(reading, loaded, train_on, limit=rows):
        counts = f": {len(item)} tokens, {item.num_trained} trained\n"
        console.print(RichText.assemble((str(item.origin), "bold"), counts, *_coloured(item, loaded)))


@click.command()
@_FILES
@_FORMAT
def validate(files: tuple[str, ...], format_: str | None) -> None:
    """Report every bad row with file, line and reason; exit code 1 if there is one."""
    reading = read_examples(files, task=None, format=format_, on_error="skip")
    for row in reading.bad:
        click.echo(f"{row.origin}: {row.reason}")
    click.echo(f"{reading.num_rows} rows: {len(reading.examples)} good, {len(reading.bad)} bad")
    if reading.bad:
        raise click.exceptions.Exit(1)


@click.command()
@_FILES
@_FORMAT
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The JSONL file to write.")
def convert(files: tuple[str, ...], format_: str | None, output: Path) -> None:
    """Write the rows as OpenAI messages, one JSON object a line: conversations, preferences or feedback."""
    reading = read_examples(files, task=None, format=format_)
    count = write_examples((example for _, example in reading.examples), output)
    click.echo(f"{count} rows written to {output}")


@click.command()
@_FILES
@_FORMAT
@_MODEL
@_TRAIN_ON
@click.option("--max-length", default=2048, show_default=True, type=click.IntRange(2))
def stats(files: tuple[str, ...], format_: str | None, model: str, train_on: TrainOn, max_length: int) -> None:
    """Count rows and tokens, and audit the masks."""
    reading = read_examples(files, task=None, format=format_, on_error="skip")
    loaded = load(model)
    items = _encoded(reading, loaded, train_on)
    console = Console()
    console.print(_table(reading, items))
    stops = loaded.network.generation_config.eos_token_id
    eos = stops if isinstance(stops, list) else [stops]
    for line in audit(items, loaded.tokenizer, train_on=train_on, max_length=max_length, eos_token_ids=eos).lines():
        console.print(line, markup=False)


def _encoded(reading: Reading, model: Model, train_on: TrainOn, limit: int | None = None) -> list[Item]:
    rows = reading.examples[:limit]
    return [item for origin, example in rows for item in encode(example, origin, model.tokenizer, train_on=train_on)]


def _coloured(item: Item, model: Model) -> Iterator[tuple[str, str]]:
    """Text and style, in turns; of a group the prompt once, then a heading and the words of each answer."""
    if not isinstance(item, TokenGroup):
        yield from _styled(item, model)
        return
    for number, sequence in enumerate(item.sequences, start=1):
        prompt, *answer = _styled(sequence, model)
        if number == 1:
            yield prompt
        yield f"\n{_heading(item, number)}: {sequence.num_trained} tokens\n", "bold"
        yield from answer


def _styled(sequence: TokenSequence, model: Model) -> list[tuple[str, str]]:
    return [(span.text, "green" if span.trained else "dim") for span in spans_of(sequence, model.tokenizer)]


def _heading(group: TokenGroup, number: int) -> str:
    if group.desirable is not None:
        return "desirable" if group.desirable else "undesirable"
    scored = f", score {group.scores[number - 1]:g}" if group.scores else ""
    return f"answer {number} of {len(group.sequences)}{', the best' if number == 1 else ''}{scored}"


def _table(reading: Reading, items: list[Item]) -> Table:
    table = Table("", "", show_header=False)
    lengths = np.array([len(s) for s in sequences_of(items)] or [0])
    tokens, trained = sum(map(len, items)), sum(item.num_trained for item in items)
    formats = ", ".join(f"{name} ({count})" for name, count in Counter(reading.formats.values()).items())
    for name, value in {
        "rows": f"{reading.num_rows:,}: {len(reading.examples):,} good, {len(reading.bad):,} bad",
        "formats (files)": formats,
        "sequences": f"{len(sequences_of(items)):,}",
        "tokens": f"{tokens:,}, of them trained {trained:,} ({trained / max(1, tokens):.0%})",
        "length": f"median {np.median(lengths):.0f}, 95% {np.quantile(lengths, 0.95):.0f}, longest {lengths.max():,}",
    }.items():
        table.add_row(name, value)
    return table
