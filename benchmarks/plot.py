"""Draws the tables of README.md as bars: reads results.json, writes one SVG for each group in it."""

import json
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, LABEL, BAR, GAP = 720, 210, 22, 8
OURS, THEIRS = "#2f6f4f", "#b9b2a5"


def bars(title: str, unit: str, values: dict[str, float]) -> str:
    """One horizontal bar a value, the longest as wide as there is room."""
    room = (WIDTH - LABEL - 90) / max(values.values())
    height = 40 + len(values) * (BAR + GAP)
    rows = []
    for i, (name, value) in enumerate(values.items()):
        y, colour = 34 + i * (BAR + GAP), OURS if name.startswith("luthier") else THEIRS
        rows.append(f'<text x="{LABEL - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        rows.append(f'<rect x="{LABEL}" y="{y}" width="{value * room:.1f}" height="{BAR}" fill="{colour}" rx="2"/>')
        rows.append(f'<text x="{LABEL + value * room + 6:.1f}" y="{y + 16}">{value:g}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13" fill="#333">',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text x="8" y="20" font-size="14">{escape(title)} ({escape(unit)})</text>',
            *rows,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Writes every plot."""
    for name, group in json.loads((HERE / "results.json").read_text()).items():
        (HERE / f"{name}.svg").write_text(bars(group["title"], group["unit"], group["values"]))


if __name__ == "__main__":
    main()
