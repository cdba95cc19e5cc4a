"""Runs beside one another: what differs, what came of each stage, and a page that needs nothing else."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from luthier.cli.report import command
from luthier.errors import CheckpointError
from luthier.pipeline import compare as module
from luthier.pipeline.compare import compare, write_comparison

FIRST = "- pretrain: {data: text.txt}\n- sft: {data: rows.jsonl, learning_rate: 1e-4, adapter: {type: lora, r: 8}}\n"
SECOND = "- sft: {data: rows.jsonl, learning_rate: 1e-3, adapter: {type: lora, r: 8}}\n"


def step_line(step: int, loss: float) -> dict[str, float]:
    """100 tokens in half a second for 36 J."""
    rest = {"seconds": 0.5, "memory_bytes": 2**30, "energy_joules": 36.0}
    return {"step": step, "epoch": step / 10, "loss": loss, "tokens": 100 * step, **rest}


def stage(folder: Path, losses: list[float], evaluations: dict[int, float], *, done: bool = True) -> None:
    folder.mkdir(parents=True)
    lines = [step_line(step, loss) for step, loss in enumerate(losses, start=1)]
    for step, loss in evaluations.items():
        told = {"eval_loss": loss, "eval_forgetting": step / 100, "seconds": 1.0, "energy_joules": 10.0}
        lines.append({"step": step, **told})
    lines.sort(key=lambda line: (line["step"], "eval_loss" in line))
    written = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    if done:
        (folder / "done.json").write_text("{}")


def run(folder: Path, stages: str, *, model: str = "base") -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"model: {model}\noutput: runs/{folder.name}\nstages:\n{stages}")
    return folder


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """Two stages, done."""
    folder = run(tmp_path / "one", FIRST)
    stage(folder / "00-pretrain", [3.0, 2.5], {})
    stage(folder / "01-sft", [2.0, 1.0, 0.5, 0.25], {0: 2.5, 2: 1.25, 4: 1.5})
    return folder


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """One stage, stopped after two steps, the second with a loss that is not finite."""
    folder = run(tmp_path / "two", SECOND)
    stage(folder / "00-sft", [1.5, math.nan], {0: 2.5}, done=False)
    return folder


def rows(title: str, *folders: Path) -> dict[str, list[str]]:
    return dict(compare(folders).measured(title).rows)


def test_only_settings_that_differ_are_shown_by_stage(one: Path, two: Path) -> None:
    """The output differs always, and the stage that one run lacks differs in nothing."""
    assert compare([one, two]).differing().rows == [("sft.learning_rate", ["0.0001", "0.001"])]


def test_what_a_type_of_adapter_lacks_stays_empty(one: Path, tmp_path: Path) -> None:
    other = run(tmp_path / "dora", SECOND.replace("lora", "dora"), model="other")
    differing = dict(compare([one, other]).differing().rows)
    assert differing["model"] == ["base", "other"]
    assert differing["sft.adapter.type"] == ["lora", "dora"]
    assert differing["sft.adapter.lr_ratio_magnitude"] == ["", "1.0"]


def test_stages_are_matched_by_their_words(one: Path, two: Path) -> None:
    comparison = compare([one, two])
    assert comparison.words == ["pretrain", "sft"]
    assert rows("pretrain", one, two)["Steps"] == ["2", ""]
    assert rows("sft", one, two)["Steps"] == ["4", "2"]


def test_a_word_that_comes_twice_is_counted(tmp_path: Path) -> None:
    twice = run(tmp_path / "twice", SECOND + SECOND)
    assert compare([twice]).words == ["sft", "sft 2"]


def test_the_numbers_are_those_of_the_metrics(one: Path, two: Path) -> None:
    """Of one: 4 steps of 0.5 s and 3 evaluations of 1 s; 400 tokens in 2 s; 4 * 36 + 3 * 10 = 174 J, 0.04833 Wh."""
    found = {name: cells[0] for name, cells in rows("sft", one, two).items()}
    assert found == {
        "State": "done",
        "Steps": "4",
        "Tokens": "400",
        "Time": "5.0 s",
        "Tokens per second": "200.0",
        "Final loss": "0.2500",
        "Held-out loss before": "2.5000",
        "Held-out loss, best": "1.2500",
        "Held-out loss, last": "1.5000",
        "Forgetting": "+4.00 %",
        "Peak memory": "1.00 GiB",
        "Energy": "0.04833 Wh",
    }


def test_a_run_that_is_going_or_has_not_begun_has_what_there_is(one: Path, two: Path, tmp_path: Path) -> None:
    begun = run(tmp_path / "begun", SECOND)
    found = rows("sft", one, two, begun)
    assert found["State"] == ["done", "not finished", "no step done yet"]
    assert found["Held-out loss before"] == ["2.5000", "", ""]
    assert found["Steps"] == ["4", "2", ""]


def test_a_folder_that_is_no_run_is_refused_and_so_is_one_named_twice(one: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tmp.* holds no run \(recipe\.yaml is missing\)|holds no run"):
        compare([one, tmp_path])
    with pytest.raises(CheckpointError, match="one is named twice"):
        compare([one, one.parent / "one"])


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [run(tmp_path / place / "mine", SECOND) for place in ("a", "b")]
    assert compare(folders).names == ["a/mine", "b/mine"]


def test_json_holds_numbers_and_null_for_what_is_not_there(one: Path, two: Path) -> None:
    printed = CliRunner().invoke(command("report"), [str(one), str(two), "--json"]).stdout
    read: dict[str, Any] = json.loads(printed)
    assert read["settings"] == {"sft.learning_rate": {"one": "0.0001", "two": "0.001"}}
    assert read["stages"]["pretrain"]["two"] is None
    found = read["stages"]["sft"]
    assert [found["one"]["final_loss"], found["two"]["final_loss"]] == [0.25, None]
    assert [found["one"]["best_eval_loss"], found["one"]["energy_joules"]] == [1.25, 174.0]
    assert not (one.parent / "comparison.html").exists()


class Tags(HTMLParser):
    """The tags of a page, its attributes and its texts; an assertion error where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.names, self.texts = [], set(), []  # type: ignore[var-annotated]
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        self.open += [] if tag == "meta" else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(*folders: Path) -> str:
    return write_comparison(compare(folders), folders[0].parent / "page.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_nothing_else(one: Path, two: Path) -> None:
    text = page_of(one, two)
    page = Tags(text)
    assert "://" not in text
    assert {"script", "img", "link", "iframe", "a"}.isdisjoint(page.tags)
    assert {"src", "href", "style"}.isdisjoint(page.names)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert [child.tag for child in ElementTree.fromstring(drawing)][:2] == ["title", "desc"]
    assert len(set(re.findall(r'\bid="(.*?)"', text))) == text.count(' id="')


def test_curves_lie_over_one_another_each_with_its_name_and_look(one: Path, two: Path) -> None:
    text = page_of(one, two)
    assert re.findall(r"<h4>(.*?)</h4>", text) == ["Loss, smoothed", "Loss, smoothed", "Held-out loss"]
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)[1]
    assert re.findall(r'<polyline class="(.*?)"', drawn) == ["run-0", "run-1"]
    assert '<span class="run-0">one</span><span class="run-1">two</span>' in text
    assert "one: 2 at step 1, 0.25 at step 4" in text


def test_a_runs_name_becomes_no_markup(two: Path) -> None:
    hostile = two.rename(two.parent / "<b onclick=x>&")
    assert "<b onclick=x>&" in Tags(page_of(hostile)).texts


def test_each_colour_stands_out_on_light_and_dark_paper() -> None:
    """At least 3 to 1, which WCAG asks of lines (1.4.11); neighbours differ in their dashes besides."""
    folder = Path(module.__file__).parent
    papers = re.findall(r"--card: (#\w+);", (folder / "report.css").read_text())
    schemes = re.findall(r":root \{(.*?)\}", (folder / "compare.css").read_text())
    for paper, scheme in zip(papers, schemes, strict=True):
        colours = re.findall(r"--run-\d: (#\w+);", scheme)
        assert len(colours) == 8
        assert min(contrast(colour, paper) for colour in colours) >= 3


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of luminances."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_command_shows_tables_and_writes_the_page_beside_the_first_run(one: Path, two: Path) -> None:
    shown = CliRunner().invoke(command("report"), [str(one), str(two)], env={"COLUMNS": "200"}).stdout
    assert re.search(r"sft\.learning_rate\s+0\.0001\s+0\.001", shown)
    assert re.search(r"Final loss\s+0\.2500\s+nan", shown)
    assert shown.endswith(f"{one.parent / 'comparison.html'}\n")
    assert (one.parent / "comparison.html").is_file()


def test_the_page_goes_where_output_says(one: Path, two: Path, tmp_path: Path) -> None:
    for folders in ([one], [one, two]):
        wanted = tmp_path / f"page-{len(folders)}.html"
        CliRunner().invoke(command("report"), [*map(str, folders), "--output", str(wanted)])
        assert "<!doctype html>" in wanted.read_text(encoding="utf-8")
    assert not (one / "report.html").exists()
    assert not (tmp_path / "comparison.html").exists()
