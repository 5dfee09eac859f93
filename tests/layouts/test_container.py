"""The safetensors container: as the library reads and writes it; what is damaged or no such file is one sentence."""

from __future__ import annotations

import io
import json
import pickle
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.layouts.container import DTYPES, Entry, LayoutError, Opened, write, write_all

TENSORS = {
    **{f"t.{name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()},
    "scalar": torch.tensor(0.5),
    "empty": torch.empty(0, 3),
    "strided": torch.arange(12.0).reshape(3, 4).T,
    "ünï": torch.ones(1),
}


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    write_all(tmp_path / "ours.safetensors", TENSORS, {"title": "ä", "b": "{}"})
    save_file({key: tensor.contiguous() for key, tensor in TENSORS.items()}, tmp_path / "its.safetensors", {"a": "b"})
    loaded = load_file(tmp_path / "ours.safetensors")
    its = Opened(tmp_path / "its.safetensors")
    assert loaded.keys() == TENSORS.keys() == set(its)
    for key, tensor in TENSORS.items():
        for found in (loaded[key], its.tensor(key)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), key
            assert torch.equal(found.float(), tensor.float()), key
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"title": "ä", "b": "{}"}
    assert its.metadata == {"a": "b"}
    assert stat.S_IMODE((tmp_path / "ours.safetensors").stat().st_mode) == 0o644


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_all(path, {"a": torch.ones(2)}, {})
    entries = {"a": Entry(torch.float32, (2,)), "b": Entry(torch.float32, (3,))}
    one, two = torch.zeros(2), torch.zeros(3)
    for tensors, said in (
        ([("a", one)], "1 tensors were announced and did not come, b first"),
        ([("b", two), ("a", one)], "b is not the tensor that comes next"),
        ([("a", one), ("b", one)], r"b is \[2\]"),
        ([("a", one), ("b", two), ("c", one)], "c is not the tensor that comes next"),
    ):
        with pytest.raises(ValueError, match=said):
            write(path, entries, tensors, {})
    assert torch.equal(Opened(path).tensor("a"), torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


class Bomb:
    """Makes a file if a pickle with it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def header(length: int, text: str, data: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text.encode() + data


def longer(file: bytes, by: int) -> bytes:
    """The same file with another length of its header in front."""
    return (int.from_bytes(file[:8], "little") + by).to_bytes(8, "little") + file[8:]


def bad_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    save_file({"a": torch.ones(8), "b": torch.ones(8)}, folder / "good.safetensors")
    good = (folder / "good.safetensors").read_bytes()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    wide = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}})
    return {
        "nothing": (b"", "has 0 bytes"),
        "truncated": (good[:-5], "is cut off: its tensors need"),
        "truncated in the header": (good[:40], "is cut off: its header has"),
        "longer": (good + b"xx", "is damaged: its tensors need"),
        "a header of 2**62 bytes": (header(2**62, "{}"), "begins with a header of"),
        "a header length that is too short": (longer(good, -3), "the header of .* is damaged"),
        "a header length that is too long": (longer(good, 3), "the header of .* is damaged"),
        "a header that is a list": (header(2, "[]"), "the header of .* is damaged"),
        "a deep header": (header(200_000, "[" * 200_000), "the header of .* is damaged"),
        "an unknown dtype": (header(len(entry) + 6, '{"a":' + entry.replace("F32", "F99") + "}", b"1234"), "F99"),
        "a shape that is too large": (header(len(wide), wide, b"1234"), "does not take bytes 0 to 4"),
        "two in one place": (header(2 * len(entry) + 11, f'{{"a":{entry},"b":{entry}}}', b"1234"), "b is not where"),
        "a zip bomb": (zipped.getvalue(), "is a zip, as torch.save makes them"),
        "a pickle": (pickle.dumps(Bomb(folder / "ran"), protocol=4), "is a pickle, which could run code"),
        "a web page": (b"<!DOCTYPE html><html>", "is a web page"),
    }


def test_bad_files_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    for name, (data, said) in bad_files(tmp_path).items():
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        with pytest.raises(LayoutError, match=said) as caught:
            Opened(path)
        assert "\n" not in str(caught.value), name
        assert str(path) in str(caught.value), name
    assert not (tmp_path / "ran").exists()


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")]).half()}, tmp_path / "x.safetensors")
    file = Opened(tmp_path / "x.safetensors")
    assert torch.equal(file.finite("a"), torch.ones(2))
    with pytest.raises(LayoutError, match="NaN or infinite, in b for one"):
        file.finite("b")


@pytest.mark.parametrize("mark", [b"\x80\x02", b"\x80\x05", b"PK", b"<\x01"])
def test_a_header_whose_length_looks_like_another_kind_is_read(tmp_path: Path, mark: bytes) -> None:
    """A header of 640 bytes begins with the two that pickles begin with."""
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    wanted = int.from_bytes(mark, "little")
    header = whole[8 : 8 + length].ljust(wanted)  # as the library pads its own
    (tmp_path / "b.safetensors").write_bytes(wanted.to_bytes(8, "little") + header + whole[8 + length :])
    assert load_file(tmp_path / "b.safetensors")["a"].tolist() == [1, 1]
    assert Opened(tmp_path / "b.safetensors").tensor("a").tolist() == [1, 1]
