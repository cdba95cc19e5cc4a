"""Draws the tables of README.md as bars, and what was learned from rewards as curves for docs/rewards.md.

Reads results.json, writes one SVG for each group in it; reads policy_curves.json, which policy_learn.py writes.
"""

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


def curve(title: str, points: list[tuple[float, float]]) -> str:
    """One line over steps, from the lowest value to the highest, with its values at both ends."""
    height, left, right, top, bottom = 260, 60, WIDTH - 60, 40, 220
    steps, values = [x for x, _ in points], [y for _, y in points]
    low, high = min(0.0, *values), max(values)
    at = [
        (
            left + (x - steps[0]) / (steps[-1] - steps[0]) * (right - left),
            bottom - (y - low) / (high - low) * (bottom - top),
        )
        for x, y in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    labels = [
        f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{value:.2f}</text>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{OURS}"/>'
        for (x, y), value in zip(at, values, strict=True)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13" fill="#333">',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text x="8" y="20" font-size="14">{escape(title)}</text>',
            f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="{THEIRS}"/>',
            f'<polyline points="{line}" fill="none" stroke="{OURS}" stroke-width="2"/>',
            *labels,
            *[
                f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{step:g}</text>'
                for (x, _), step in zip(at, steps, strict=True)
            ],
            f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">step</text>',
            "</svg>\n",
        ]
    )


def main() -> None:
    """Writes every plot."""
    for name, group in json.loads((HERE / "results.json").read_text()).items():
        (HERE / f"{name}.svg").write_text(bars(group["title"], group["unit"], group["values"]))
    for name, run in json.loads((HERE / "policy_curves.json").read_text()).items():
        task, method = name.split(", ")
        title = f"Held-out reward, {task}, by {method}: {run['minutes']:.0f} minutes"
        (HERE.parent / "docs" / f"rewards_{task}.svg").write_text(curve(title, run["held_out"]))


if __name__ == "__main__":
    main()
