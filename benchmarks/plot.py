"""Draws the tables of README.md as bars, and what was learned, and forgotten, as curves for docs/.

Reads results.json, writes one SVG for each group in it; reads policy_curves.json, forgetting.json and plan.json, which
the scripts of these names write.
"""

import json
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, LABEL, BAR, GAP = 720, 210, 22, 8
OURS, THEIRS = "#2f6f4f", "#b9b2a5"
COLOURS = (OURS, "#8a4b1f", "#3b5b92")

Points = list[tuple[float, float]]


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
    return framed(f"{title} ({unit})", height, rows)


def curves(title: str, lines: dict[str, Points], *, from_zero: bool = True) -> str:
    """A line over steps for each name, from the lowest value to the highest, with each line's values along it."""
    height, left, right, top, bottom = 260, 60, WIDTH - 130, 40, 220
    steps = [x for points in lines.values() for x, _ in points]
    values = [y for points in lines.values() for _, y in points]
    low, high = min(0.0 if from_zero else min(values), *values), max(values)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - min(steps)) / (max(steps) - min(steps)) * (right - left)
        return left + across, bottom - (y - low) / (high - low) * (bottom - top)

    drawn = []
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        places = [at(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (_, value) in zip(places, points, strict=True):
            drawn.append(f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{value:.2f}</text>')
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        if len(lines) > 1:
            drawn.append(f'<text x="{places[-1][0] + 26:.1f}" y="{places[-1][1] + 4:.1f}">{escape(name)}</text>')
    ticks = [
        f'<text x="{at(step, low)[0]:.1f}" y="{bottom + 20}" text-anchor="middle">{step:g}</text>'
        for step in sorted(set(steps))
    ]
    base = f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="{THEIRS}"/>'
    under = f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">step</text>'
    return framed(title, height, [base, *drawn, *ticks, under])


def scatter(title: str, points: dict[str, tuple[float, float]], share: float) -> str:
    """Planned over measured bytes in GB, a dot a setting, with a band of so great a share on both sides."""
    size, left, bottom = 420, 60, 440
    most = 1.1 * max(max(point) for point in points.values())

    def at(measured: float, planned: float) -> str:
        return f"{left + measured / most * size:.1f},{bottom - planned / most * size:.1f}"

    band = " ".join([at(0, 0), at(most / (1 + share), most), at(most, most), at(most, most * (1 - share))])
    drawn = [f'<polygon points="{band}" fill="#e8e4dc"/>']
    drawn.append(f'<polyline points="{at(0, 0)} {at(most, most)}" stroke="{THEIRS}" fill="none"/>')
    for name, (measured, planned) in points.items():
        x, y = at(measured, planned).split(",")
        drawn.append(
            f'<circle cx="{x}" cy="{y}" r="4" fill="{OURS}" fill-opacity="0.7"><title>{escape(name)}</title></circle>'
        )
    for tick in range(int(most) + 1):
        x, y = at(tick, tick).split(",")
        drawn.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
        drawn.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{tick}</text>')
    drawn.append(f'<text x="{left + size / 2}" y="{bottom + 38}" text-anchor="middle">measured, GB</text>')
    drawn.append(f'<text x="{left + size + 12}" y="60">planned, GB; on the line</text>')
    drawn.append(f'<text x="{left + size + 12}" y="78">as measured, the band within {share:.0%}</text>')
    return framed(title, bottom + 50, drawn)


def framed(title: str, height: int, drawn: list[str]) -> str:
    """A whole SVG file."""
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    style = 'font-family="system-ui, sans-serif" font-size="13" fill="#333"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="20" font-size="14">{escape(title)}</text>',
    ]
    return "\n".join([*head, *drawn, "</svg>\n"])


def main() -> None:
    """Writes every plot whose numbers are there."""
    docs = HERE.parent / "docs"
    for name, group in json.loads((HERE / "results.json").read_text()).items():
        (HERE / f"{name}.svg").write_text(bars(group["title"], group["unit"], group["values"]))
    for name, run in json.loads((HERE / "policy_curves.json").read_text()).items():
        task, method = name.split(", ")
        title = f"Held-out reward, {task}, by {method}: {run['minutes']:.0f} minutes"
        (docs / f"rewards_{task}.svg").write_text(curves(title, {task: run["held_out"]}))
    runs = json.loads((HERE / "forgetting.json").read_text())
    for kind, title in (("eval_forgetting_perplexity", "general text"), ("eval_perplexity", "Shakespeare, held out")):
        lines = {
            name: [(line["step"], line[kind]) for line in run["evaluations"]]
            for name, run in runs.items()
            if name != "too hot"
        }
        text = curves(f"Perplexity of {title}, while learning Shakespeare", lines, from_zero=False)
        (docs / f"forgetting_{title.split()[0].lower().strip(',')}.svg").write_text(text)
    if (HERE / "plan.json").exists():
        plans = json.loads((HERE / "plan.json").read_text())
        points = {name: (found["measured"] / 1e9, found["planned"] / 1e9) for name, found in plans.items()}
        (HERE / "plan.svg").write_text(scatter("Peak memory of a stage, planned and measured", points, 0.1))


if __name__ == "__main__":
    main()
