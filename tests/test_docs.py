"""What the documents show works as it stands: Python runs, commands end well, recipes are valid.

A document's Python blocks are one script. Its recipes and commands are gone through in order, each recipe becoming
`recipe.yaml`, in a folder with the files that the documents name.
"""

import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.cli.main import main
from luthier.recipe.document import parse_recipe

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
QUICK = "README.md", "rewards.md"  # documents whose commands do not wait for the longer proofs
SETS_UP = "make", "pip"  # commands that set up an environment of their own, which is not done while testing


def blocks(text: str, *languages: str) -> Iterator[tuple[int, str, str]]:
    """(first line, counted from 0; language; content) of each block in one of the languages."""
    for block in BLOCK.finditer(text):
        if block[1] in languages:
            yield text.count("\n", 0, block.start(2)), block[1], block[2]


def script(text: str) -> str:
    """The Python blocks of a document, each on its own lines of it, so that an error names the line."""
    lines = ["" for _ in text.splitlines()]
    for first, _, content in blocks(text, "python"):
        code = content.splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block; a line may go on after a backslash."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def documents(*languages: str) -> list[Path]:
    return [path for path in FILES if any(blocks(path.read_text(encoding="utf-8"), *languages))]


@pytest.fixture
def place(tmp_path: Path, speaker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files that the documents name. A folder of an alias's name goes before the alias, so
    the tiny model stands in for the one that would have to be fetched.
    """
    shutil.copytree(speaker, tmp_path / "smollm2-135m")
    shutil.copy(speaker / "chat_template.jinja", tmp_path / "mine.jinja")
    rows = [{"question": f"What is {i}?", "answer": f"A number, {i}."} for i in range(12)]
    for name in ("qa.jsonl", "more.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "Why?"}]))
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "Who knows?"} for row in rows]
    verdicts = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    prompts = [{"prompt": row["question"]} for row in rows]
    sums = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(12)]
    for name, made in (("pairs", pairs), ("verdicts", verdicts), ("prompts", prompts), ("sums", sums)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    quiz = [{"question": row["question"], "choices": ["A word.", row["answer"]], "answer": "B"} for row in rows]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    (tmp_path / "judge.py").write_text("def shorter(prompt, answer, row):\n    return -len(answer)\n")
    (tmp_path / "faq.csv").write_text("Frage;Antwort\nWas ist 1?;Eine Zahl.\nWas ist 2?;Auch eine.\n")
    (tmp_path / "notes").mkdir()
    for name in ("notes/one.txt", "general.txt"):
        (tmp_path / name).write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", documents("python"), ids=lambda path: path.name)
@pytest.mark.usefixtures("place")
def test_the_python_in_a_document_runs(document: Path) -> None:
    code = compile(script(document.read_text(encoding="utf-8")), str(document), "exec")
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize(
    "document",
    [
        path if path.name in QUICK else pytest.param(path, marks=pytest.mark.slow, id=path.name)
        for path in documents("sh", "yaml")
    ],
    ids=lambda path: path.name,
)
def test_the_recipes_in_a_document_are_valid_and_its_commands_end_well(
    document: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first, language, content in blocks(document.read_text(encoding="utf-8"), "sh", "yaml"):
        where = f"{document.name}:{first + 1}"
        if language == "yaml":
            parse_recipe(content, name=where)
            (place / "recipe.yaml").write_text(content, encoding="utf-8")
            continue
        for words in commands(content):
            if words[0] in SETS_UP:
                continue
            assert words[0] == "luthier", f"{where}: {words}"
            monkeypatch.setattr("sys.stdin", io.StringIO("What is 1?\n"))
            with pytest.raises(SystemExit) as ended:
                main(words[1:])
            assert ended.value.code == 0, f"{where}: {shlex.join(words)}"


def test_every_make_target_in_a_document_exists() -> None:
    known = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in documents("sh"):
        for _, _, content in blocks(path.read_text(encoding="utf-8"), "sh"):
            assert {words[1] for words in commands(content) if words[0] == "make"} <= set(known)


@pytest.mark.parametrize("document", FILES, ids=lambda path: path.name)
def test_the_files_that_a_document_links_to_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_a_block_keeps_its_lines_and_prose_is_left_out() -> None:
    assert script("# Title\n\n```python\nx = 1\n```\nand\n```sh\nls\n```\n").rstrip("\n") == "\n\n\nx = 1"


def test_a_command_ends_with_its_line_unless_a_backslash_says_so() -> None:
    assert commands("luthier models  # all\n\nluthier sft \\\n  --data 'a b'\n") == [
        ["luthier", "models"],
        ["luthier", "sft", "--data", "a b"],
    ]


def test_every_task_is_documented_with_commands() -> None:
    tasks = {"alignment.md", "data.md", "memory.md", "merging.md", "rewards.md", "training.md"}
    assert tasks <= {path.name for path in documents("sh")}
    assert "python.md" in {path.name for path in documents("python")}
