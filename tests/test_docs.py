"""The Python that the documents show runs as it stands: each document is one script, in a folder with what it names."""

import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def script(text: str) -> str:
    """The Python blocks of a document, each on its own lines of it, so that an error names the line."""
    lines = ["" for _ in text.splitlines()]
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
DOCUMENTS = [path for path in FILES if BLOCK.search(path.read_text(encoding="utf-8"))]


@pytest.fixture
def place(tmp_path: Path, chat_model: Path) -> Path:
    """A folder with the files that the documents name. A folder of an alias's name goes before the alias, so the tiny
    model stands in for the one that would have to be fetched.
    """
    shutil.copytree(chat_model, tmp_path / "smollm2-135m")
    rows = [{"question": f"What is {i}?", "answer": f"A number, {i}."} for i in range(12)]
    for name in ("qa.jsonl", "more.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes").mkdir()
    for name in ("notes/one.txt", "general.txt"):
        (tmp_path / name).write_text("The quick brown fox jumps over the lazy dog.\n" * 8)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_python_in_a_document_runs(document: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    code = compile(script(document.read_text(encoding="utf-8")), str(document), "exec")
    exec(code, {"__name__": "__main__"})


def test_a_block_keeps_its_lines_and_prose_is_left_out() -> None:
    assert script("# Title\n\n```python\nx = 1\n```\nand\n```sh\nls\n```\n").rstrip("\n") == "\n\n\nx = 1"


def test_the_python_interface_is_documented() -> None:
    assert "python.md" in {document.name for document in DOCUMENTS}
