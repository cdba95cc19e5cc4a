"""How pages are written: a template filled in, every text escaped, numbers in the same words on each page."""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from luthier.files import replacing
from luthier.pipeline.report_svg import FRAME

__all__ = ["change", "duration", "energy", "gibibytes", "number", "rendered", "write_page"]


def rendered(template: str, values: dict[str, Any]) -> str:
    """The page that a template of this folder makes of the values."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(values | {"frame": FRAME})


def write_page(path: Path, text: str) -> Path:
    """Writes the file whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate in a message has no bytes
    return path


def number(value: float) -> str:
    """Four digits, or all of a large one."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def change(before: float, after: float, form: str) -> str:
    """The change in per cent; nothing where it has no meaning."""
    if not (math.isfinite(after) and 0 < before < math.inf):
        return ""
    return form.format(f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}"))


def duration(seconds: float) -> str:
    """`12.3 s`, `5 min 06 s` or `2 h 09 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


def energy(joules: float) -> str:
    """In watt-hours, of which 3,600 joules make one."""
    return f"{number(joules / 3600)} Wh"


def gibibytes(size: int) -> str:
    """`1.25 GiB`."""
    return f"{size / 2**30:.2f} GiB"
