import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.cli.report import command
from luthier.errors import CheckpointError
from luthier.pipeline.report import Sample, write_report
from luthier.pipeline.report_svg import FRAME, Line, chart, smoothed

VOID = {"meta"}
EVALUATIONS = {0: 2.0, 40: 1.0}
TITLES = ["Loss", "Learning rate", "Gradient norm", "Tokens per second", "Memory in GiB", "Entropy"]


class Page(HTMLParser):
    """Tags, attributes and texts of a page; an assertion error where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def step_line(step: int) -> dict[str, float]:
    """A step of 100 tokens in half a second, its loss 3 - step / 40: 2.975 at first, 2 at step 40."""
    times = {"tokens": 100 * step, "seconds": 0.5, "tokens_per_second": 200.0, "memory_bytes": 2**30 + step}
    rates = {"grad_norm": 1.0 / step, "learning_rate": 1e-4 * step, "entropy": 1.5}
    return {"step": step, "epoch": step / 40, "loss": 3 - step / 40, **rates, **times}


def write_metrics(folder: Path, evaluations: dict[int, float]) -> None:
    lines = [step_line(step) for step in range(1, 41)]
    for step, loss in evaluations.items():
        lines.append({"step": step, "eval_loss": loss, "eval_perplexity": math.exp(loss), "seconds": 10.0})
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two stages, of which the first evaluates."""
    (tmp_path / "recipe.yaml").write_text("model: base\nstages:\n- sft: {data: '<b>&.jsonl'}\n- pretrain: {data: b}\n")
    for name, evaluations in {"00-sft": EVALUATIONS, "01-pretrain": {}}.items():
        write_metrics(tmp_path / name, evaluations)
        (tmp_path / name / "done.json").write_text("{}")
    manifest = {"versions": {"torch": "9.8.7"}, "data": {"<b>&.jsonl": "ab12"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def page_of(folder: Path, *samples: Sample) -> str:
    return write_report(folder, samples=samples).read_text(encoding="utf-8")


def cards_of(text: str) -> list[dict[str, str]]:
    """Label -> value and note, for each stage."""
    groups = re.findall(r'<dl class="cards">(.*?)</dl>', text, re.DOTALL)
    divs = [re.findall(r"<dt>(.*?)</dt>(.*?)</div>", group) for group in groups]
    return [{label: " ".join(re.findall(r">([^<]+)<", rest)) for label, rest in group} for group in divs]


def test_every_stage_has_a_chart_of_every_metric(run: Path) -> None:
    text = page_of(run)
    for section in text.split("<section>")[1:3]:
        assert re.findall(r"<h4>(.*?)</h4>", section) == TITLES
    assert re.findall(r"<h2>(\d\d-\w+)", text) == ["00-sft", "01-pretrain"]


def test_the_numbers_are_those_of_the_metrics(run: Path) -> None:
    """40 steps of 0.5 s and 2 evaluations of 10 s are 40 s; 4,000 tokens in 20 s; e**2 = 7.389, e = 2.718, 1/e - 1."""
    cards = cards_of(page_of(run))[0]
    assert cards["Steps"] == "40 epoch 1.00"
    assert cards["Time"] == "40.0 s 500 ms a step"
    assert cards["Tokens"] == "4,000"
    assert cards["Tokens per second"] == "200.0"
    assert cards["Final loss"] == "2.000 first 2.975"
    assert cards["Held-out loss"] == "2.000 → 1.000 −50.0 %"  # noqa: RUF001
    assert cards["Held-out perplexity"] == "7.389 → 2.718 −63.2 %"  # noqa: RUF001
    assert cards["Peak memory"] == "1.00 GiB"


def test_a_stage_without_evaluations_says_so(run: Path) -> None:
    text = page_of(run)
    assert cards_of(text)[1]["Held-out loss"] == "not compared nothing was held out"
    assert "In 01-pretrain, training loss went from 2.975 to 2.000" in text
    assert text.split("<section>")[2].count('class="held"') == 0


def test_the_result_is_the_held_out_perplexity_where_there_is_one(run: Path) -> None:
    write_metrics(run / "other", EVALUATIONS)
    (run / "other" / "metrics.jsonl").replace(run / "01-pretrain" / "metrics.jsonl")
    assert "In 01-pretrain, held-out perplexity went from 7.389 to 2.718 (−63.2 %) in 40 steps" in page_of(run)  # noqa: RUF001


def test_a_run_that_is_going_has_a_page_too(run: Path) -> None:
    metrics = run / "00-sft" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    for gone in ("00-sft/done.json", "01-pretrain/done.json", "01-pretrain/metrics.jsonl", "manifest.json"):
        (run / gone).unlink()
    text = page_of(run)
    assert "Not finished. In 00-sft, training loss" in text
    assert cards_of(text)[0]["Held-out loss"] == "not compared 1 of 2 evaluations"
    assert "no step done yet" in text
    assert "manifest.json is written when the run ends." in text


def test_the_page_is_well_formed_and_its_drawings_are_xml_with_title_and_description(run: Path) -> None:
    text = page_of(run, Sample("a", "b", "c"))
    assert Page(text).tags.count("svg") == 2 * len(TITLES)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(drawing)
        ids = [root[0].get("id"), root[1].get("id")]
        assert [root[0].tag, root[1].tag, " ".join(map(str, ids))] == ["title", "desc", root.get("aria-labelledby")]
    assert len(set(re.findall(r'\bid="(.*?)"', text))) == text.count(' id="')


def test_the_page_refers_to_nothing_outside_and_forbids_scripts(run: Path) -> None:
    text = page_of(run)
    page = Page(text)
    assert "://" not in text
    assert {"script", "img", "link", "iframe", "a"}.isdisjoint(page.tags)
    assert {"src", "href", "style"}.isdisjoint(name for name, _ in page.attributes)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


@settings(deadline=None, max_examples=25)  # each example compiles the template and writes two pages
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_no_text_becomes_markup(run_once: Path, text: str) -> None:
    hostile = f"</pre><script>alert('1')</script>\"<b onclick=x>{text}"
    plain, page = Page(page_of(run_once, Sample("", "", ""))), Page(page_of(run_once, *[Sample(*[hostile] * 3)]))
    assert page.tags == plain.tags
    assert page.texts.count(hostile) == 3


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has not begun."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text("stages: [sft: {data: rows.jsonl}]\n")
    return folder


def test_recipe_and_manifest_are_tables_with_escaped_cells(run: Path) -> None:
    text = page_of(run)
    for cell in ("<b>&.jsonl", "9.8.7", "ab12", "base"):
        assert cell in Page(text).texts
    assert '<th scope="row">adapter.r</th><td>16</td>' in text
    assert text.count('<th scope="col">') == 4


def test_a_lone_surrogate_in_a_message_does_not_stop_the_page(run: Path) -> None:
    assert "a?b" in page_of(run, Sample("a\ud800b", "", ""))


def test_samples_stay_with_the_run_until_there_are_new_ones(run: Path) -> None:
    first = page_of(run, Sample("Why?", "Who\nknows", "So."))
    assert page_of(run) == first
    assert page_of(run, Sample("Why?", "So.", "So it\u2028is.")) != first
    assert "So it\u2028is." in Page(page_of(run)).texts


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"recipe\.yaml is missing"):
        write_report(tmp_path)


def test_the_command_prints_where_the_page_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("report").main([str(run)], standalone_mode=False)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").is_file()


values = st.floats(-1e9, 1e9).filter(lambda y: y == 0 or abs(y) > 1e-9)


@settings(deadline=None)
@given(ys=st.lists(values, min_size=1, max_size=600), from_zero=st.booleans())
def test_every_point_lies_in_the_field_and_the_ticks_enclose_it(ys: list[float], from_zero: bool) -> None:
    drawn = chart("x", [Line("y", "single", list(enumerate(ys, start=1)))], from_zero=from_zero)
    assert all(FRAME.left <= x <= FRAME.right and FRAME.top <= y <= FRAME.bottom for x, y in drawn.lines[0].points)
    assert [drawn.y_ticks[0].at, drawn.y_ticks[-1].at] == [FRAME.bottom, FRAME.top]
    assert 2 <= len(drawn.y_ticks) <= 9
    assert all(FRAME.left <= tick.at <= FRAME.right for tick in drawn.x_ticks)


def test_a_spike_in_a_long_line_is_drawn() -> None:
    ys = [1.0] * 10_000
    ys[4321] = 5.0
    points = chart("x", [Line("y", "single", list(enumerate(ys)))]).lines[0].points
    assert len(points) < 500
    assert min(y for _, y in points) == FRAME.top


def test_ticks_are_round_and_small_numbers_are_short() -> None:
    drawn = chart("x", [Line("y", "single", [(1, 0.0), (2, 0.001)])])
    assert [tick.label for tick in drawn.y_ticks] == ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]
    assert [tick.label for tick in drawn.x_ticks] == ["1", "2"]


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    drawn = chart("x", [Line("y", "single", [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)])])
    assert (drawn.num_left_out, len(drawn.lines[0].points)) == (2, 2)


def test_smoothing_keeps_a_straight_line() -> None:
    line = [(step, 2.0 * step) for step in range(100)]
    assert smoothed(line) == line
