"""What is written stands whole or not at all."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from luthier.files import replacing, write_whole, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_takes_the_older_one_s_place(tmp_path: Path) -> None:
    for text in ("old", "n\u00e9w"):
        write_whole(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "n\u00e9w"
    assert names(tmp_path) == ["a.txt"]


def test_a_link_is_exchanged_and_a_leftover_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".last.part").symlink_to("nowhere")
    for target in ("a", "b"):
        with replacing(tmp_path / "last") as beside:
            beside.symlink_to(target)
    assert (tmp_path / "last").readlink() == Path("b")
    assert names(tmp_path) == ["last"]


@pytest.mark.parametrize("whole", [replacing, written_whole])
def test_what_breaks_off_leaves_the_old_and_nothing_beside(
    whole: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole(place):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["place"]
    assert names(place) == ["old"]


def test_a_folder_takes_the_older_one_s_place(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with written_whole(tmp_path / "folder") as beside:
            (beside / name).touch()
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder"]
