"""`luthier data`: what the files hold, row by row and in sum, before a run spends hours on it."""

from collections import Counter
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from luthier.data.audit import audit
from luthier.data.examples import Text
from luthier.data.masks import TrainOn, encode_chat, encode_text
from luthier.data.preview import preview as spans_of
from luthier.data.reading import Reading, read_examples
from luthier.data.sequences import TokenSequence
from luthier.data.writing import write_messages
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
    group = click.Group(word, no_args_is_help=False, help="Look at data before training on it.")
    for subcommand in (preview, validate, convert, stats):
        group.add_command(subcommand)
    return group


@click.command()
@_FILES
@_FORMAT
@_MODEL
@_TRAIN_ON
@click.option("--rows", default=3, show_default=True, type=click.IntRange(1), help="How many rows are shown.")
def preview(files: tuple[str, ...], format_: str | None, model: str, train_on: TrainOn, rows: int) -> None:
    """Show rows as the model sees them: trained text in green, the rest grey."""
    console = Console()
    reading = read_examples(files, format=format_, on_error="skip")
    loaded = load(model)
    for sequence in _encoded(reading, loaded, train_on, limit=rows):
        counts = f": {len(sequence)} tokens, {sequence.num_trained} trained\n"
        text = RichText.assemble((str(sequence.origin), "bold"), counts)
        for span in spans_of(sequence, loaded.tokenizer):
            text.append(span.text, style="green" if span.trained else "dim")
        console.print(text)


@click.command()
@_FILES
@_FORMAT
def validate(files: tuple[str, ...], format_: str | None) -> None:
    """Report every bad row with file, line and reason; exit code 1 if there is one."""
    reading = read_examples(files, format=format_, on_error="skip")
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
    """Write the rows as OpenAI messages, one JSON object a line."""
    reading = read_examples(files, format=format_)
    count = write_messages((example for _, example in reading.examples), output)
    click.echo(f"{count} rows written to {output}")


@click.command()
@_FILES
@_FORMAT
@_MODEL
@_TRAIN_ON
@click.option("--max-length", default=2048, show_default=True, type=click.IntRange(2))
def stats(files: tuple[str, ...], format_: str | None, model: str, train_on: TrainOn, max_length: int) -> None:
    """Count rows and tokens, and audit the masks."""
    reading = read_examples(files, format=format_, on_error="skip")
    loaded = load(model)
    sequences = _encoded(reading, loaded, train_on)
    console = Console()
    console.print(_table(reading, sequences))
    stops = loaded.network.generation_config.eos_token_id
    eos = stops if isinstance(stops, list) else [stops]
    for line in audit(sequences, loaded.tokenizer, train_on=train_on, max_length=max_length, eos_token_ids=eos).lines():
        console.print(line, markup=False)


def _encoded(reading: Reading, model: Model, train_on: TrainOn, limit: int | None = None) -> list[TokenSequence]:
    sequences: list[TokenSequence] = []
    for origin, example in reading.examples[:limit]:
        if isinstance(example, Text):
            sequences.append(encode_text(example.text, origin, model.tokenizer))
        else:
            sequences += encode_chat(example, origin, model.tokenizer, train_on=train_on)
    return sequences


def _table(reading: Reading, sequences: list[TokenSequence]) -> Table:
    table = Table("", "", show_header=False)
    lengths = np.array([len(s) for s in sequences] or [0])
    trained = sum(s.num_trained for s in sequences)
    formats = ", ".join(f"{name} ({count})" for name, count in Counter(reading.formats.values()).items())
    for name, value in {
        "rows": f"{reading.num_rows:,}: {len(reading.examples):,} good, {len(reading.bad):,} bad",
        "formats (files)": formats,
        "sequences": f"{len(sequences):,}",
        "tokens": f"{lengths.sum():,}, of them trained {trained:,} ({trained / max(1, lengths.sum()):.0%})",
        "length": f"median {np.median(lengths):.0f}, 95% {np.quantile(lengths, 0.95):.0f}, longest {lengths.max():,}",
    }.items():
        table.add_row(name, value)
    return table
