"""What stages keep: used again for the same input, made anew for another, whole whatever happens."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from preprocess.stagecache import StageKey, digest, kept, remembered, remembered_all


class Maker:
    """Counts how often it was asked."""

    def __init__(self, value: bytes = b"picture") -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.value


def test_a_key_names_all_that_it_depends_on() -> None:
    key = StageKey("caption", 1, {"beams": 3, "model": "blip"})
    others = [
        StageKey("mask", 1, {"beams": 3, "model": "blip"}).of("a", "b"),
        StageKey("caption", 2, {"beams": 3, "model": "blip"}).of("a", "b"),
        StageKey("caption", 1, {"beams": 4, "model": "blip"}).of("a", "b"),
        key.of("a", "c"),
        key.of("ab"),
        key.of("b", "a"),
    ]
    assert key.of("a", "b") == StageKey("caption", 1, {"model": "blip", "beams": 3}).of("a", "b")
    assert len({key.of("a", "b"), *others}) == 7


def test_a_file_is_made_once_for_a_key(tmp_path: Path) -> None:
    make = Maker()
    assert kept(tmp_path / "a.png", "k1", make) == digest(b"picture")
    assert kept(tmp_path / "a.png", "k1", make) == digest(b"picture")
    assert (make.calls, (tmp_path / "a.png").read_bytes()) == (1, b"picture")
    assert kept(tmp_path / "a.png", "k2", Maker(b"other")) == digest(b"other")
    assert (tmp_path / "a.png").read_bytes() == b"other"


@pytest.mark.parametrize("harm", ["changed", "gone", "no record", "half a record", "a list for a record"])
def test_a_file_that_cannot_be_trusted_is_made_again(harm: str, tmp_path: Path) -> None:
    path, record = tmp_path / "a.png", tmp_path / "a.png.key"
    kept(path, "k", Maker())
    if harm == "changed":
        path.write_bytes(b"pic")
    elif harm == "gone":
        path.unlink()
    elif harm == "no record":
        record.unlink()
    else:
        record.write_text("[]" if "list" in harm else record.read_text()[:9])
    make = Maker()
    assert kept(path, "k", make) == digest(b"picture")
    assert (make.calls, path.read_bytes()) == (1, b"picture")
    kept(path, "k", make)
    assert make.calls == 1


def test_an_answer_is_asked_for_once_and_can_be_found_by_eye(tmp_path: Path) -> None:
    make = Maker()
    answers = [remembered(tmp_path, "my dog/1", "f" * 64, lambda: [make().decode(), 1]) for _ in range(2)]
    assert answers == [["picture", 1]] * 2
    assert make.calls == 1
    assert [path.name for path in tmp_path.iterdir()] == ["my_dog_1.ffffffffffffffff.json"]
    assert remembered(tmp_path, "my dog/1", "f" * 63 + "e", lambda: "of a key that starts alike") != answers[0]


def test_none_is_an_answer_too(tmp_path: Path) -> None:
    assert remembered(tmp_path, "a", "k" * 64, lambda: None) is None
    assert remembered(tmp_path, "a", "k" * 64, lambda: "asked again") is None


def test_a_batch_is_asked_only_for_what_is_missing(tmp_path: Path) -> None:
    wanted = [(name, StageKey("s", 1).of(name)) for name in "abcd"]
    remembered(tmp_path, *wanted[1], lambda: "kept b")
    asked: list[list[int]] = []

    def make(indices: list[int]) -> list[str]:
        asked.append(indices)
        return [f"new {wanted[index][0]}" for index in indices]

    for _ in range(2):
        assert remembered_all(tmp_path, wanted, make) == ["new a", "kept b", "new c", "new d"]
    assert asked == [[0, 2, 3]]


def fill(folder: Path, process: int) -> list[str]:
    for round_ in range(40):
        content = bytes([process]) * 5000
        kept(folder / "a.png", f"of {process}", lambda content=content: content)
        remembered(folder, "a", f"{round_:02}" * 32, lambda: process)
    return [path.name for path in folder.iterdir()]


def test_two_processes_on_one_folder_do_no_harm(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(fill, [(tmp_path, 1), (tmp_path, 2)])
    assert (tmp_path / "a.png").read_bytes() in {b"\1" * 5000, b"\2" * 5000}
    values = [json.loads(path.read_text())["value"] for path in tmp_path.glob("*.json")]
    assert len(values) == 40
    assert set(values) <= {1, 2}
    assert not list(tmp_path.glob(".*"))
    for process in (1, 2):  # whatever the race left, each gets its own back
        content = bytes([process]) * 5000
        assert kept(tmp_path / "a.png", f"of {process}", lambda content=content: content) == digest(content)
