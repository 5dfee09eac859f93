"""Data sets of the hub, through the real clients, from a hub on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import entry, png
from hub_stub import Hub, serving
from PIL import Image

from preprocess import PreprocessError, ingest
from preprocess.hub import dataset_id
from trainer.args import HubArgs

ROOT = Path(__file__).parents[2]
TOKEN = "hf_0123456789secret"
# The client reads its environment when it is imported, so it has a process of its own: this, which does many commands.
DRIVER = """
import contextlib, io, json, sys
from preprocess.__main__ import main
answers = []
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        answers.append(main(words))
    answers.append(said.getvalue())
print(json.dumps(answers))
"""


def noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def parquet(rows: Sequence[dict[str, Any]], **columns: dict[str, Any]) -> bytes:
    """A table as the library writes it: with the features of its columns inside."""
    import pyarrow
    from pyarrow import parquet as files

    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    fields = [pyarrow.field("image", image), *(pyarrow.field(name, pyarrow.list_(pyarrow.string()) if "List" in
              feature.values() else pyarrow.string()) for name, feature in columns.items())]  # fmt: skip
    features = {"image": {"_type": "Image"}, **columns}
    info = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    buffer = io.BytesIO()
    files.write_table(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(fields, info)), buffer)
    return buffer.getvalue()


TEXT = {"dtype": "string", "_type": "Value"}
TEXTS = {"feature": TEXT, "_type": "List"}
WEB = {"0001.png": noise(1), "0001.txt": b"a first", "0002.png": noise(2), "0002.txt": b"a second"}


def repos(private: Path) -> dict[str, dict[str, bytes]]:
    lines = b'{"file_name": "a.png", "text": "a first"}\n{"file_name": "b.png", "text": "a second"}\n'
    cells = [{"bytes": noise(1), "path": "there/one.png"}, {"bytes": noise(2), "path": None}]
    hostile = [*cells, {"bytes": None, "path": str(private)}, {"bytes": None, "path": f"file://{private}"}]
    hostile += [{"bytes": None, "path": "http://127.0.0.1/x.png"}, None]
    return {
        "dogs/folder": {"train/a.png": noise(1), "train/b.png": noise(2), "train/metadata.jsonl": lines},
        "dogs/table": {
            "data/train-00000-of-00001.parquet": parquet(
                [{"image": cells[n], "prompt": [f"a {word}", f"the {word}"]} for n, word in enumerate(("1st", "2nd"))],
                prompt=TEXTS,
            )
        },
        "dogs/web": {"shard-000.tar": b"".join(entry(*pair) for pair in WEB.items()) + bytes(1024)},
        "dogs/hostile": {"train.parquet": parquet([{"image": cell, "text": "x"} for cell in hostile], text=TEXT)},
        "dogs/named": {
            "train.parquet": parquet(
                [{"image": cell, "file_name": "../../same.PNG", "text": "x" * 16 * n}
                 for n, cell in enumerate([*cells, {"bytes": noise(3), "path": None}])],
                file_name=TEXT,
                text=TEXT,
            )
        },
    }  # fmt: skip


def environment(home: Path, hub: Hub) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **own, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}


def driven(commands: Sequence[Sequence[str]], env: dict[str, str]) -> list[tuple[int, str]]:
    words = [[*command, "--resolution", "32", "--step", "16"] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(words), env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return list(zip(answers[::2], answers[1::2], strict=True))


COMMANDS = {
    **{f"{name} {how}": [f"dogs/{name}", *flags] for name in ("folder", "table", "web", "hostile")
       for how, flags in {"plain": [], "streamed": ["--hub.streaming"]}.items()},
    "named plain": ["hf://datasets/dogs/named", "--limits.caption_bytes=30"],
    "named streamed": ["hf://datasets/dogs/named", "--hub.streaming"],
    "two sources": ["dogs/web|hf://datasets/dogs/table", "--hub.take=1", "--dedupe=off"],
    "gated": ["gated/dogs"],
    "missing": ["dogs/none"],
    "split": ["dogs/folder", "--hub.split=test"],
    "revision": ["dogs/folder", "--hub.revision=zz"],
    "column": ["dogs/table", "--hub.caption=words"],
    "no picture": ["dogs/table", "--hub.image=prompt"],
    "rows plain": ["dogs/web", "--limits.entries=1"],
    "rows streamed": ["dogs/web", "--limits.entries=1", "--hub.streaming"],
    "bytes streamed": ["dogs/web", "--limits.total_bytes=4000", "--hub.streaming"],
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    out: Path
    answers: dict[str, tuple[int, str]]
    hub: Hub

    def rows(self, name: str) -> list[dict[str, Any]]:
        assert self.answers[name][0] == 0, self.answers[name][1]
        lines = (self.out / name / "dataset.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def left_out(self, name: str) -> dict[str, str]:
        lines = (self.out / name / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
        return {skip["file"]: skip["reason"] for skip in map(json.loads, lines)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("hub")
    private = out / "private.png"
    private.write_bytes(png("green"))
    with serving(repos(private)) as hub:
        commands = [[*words, "--out", str(out / name)] for name, words in COMMANDS.items()]
        answers = driven(commands, environment(out / "home", hub))
    return Done(out, dict(zip(COMMANDS, answers, strict=True)), hub)


@pytest.mark.parametrize("how", ["plain", "streamed"])
@pytest.mark.parametrize(
    ("name", "sources", "column"),
    [("folder", ["a.png", "b.png"], "text"), ("table", ["one.png", "train-000001.png"], "prompt"),
     ("web", ["0001.png", "0002.png"], "txt")],
)  # fmt: skip
def test_a_data_set_gives_its_pictures_and_captions(
    done: Done, name: str, sources: list[str], column: str, how: str
) -> None:
    rows = done.rows(f"{name} {how}")
    assert [row["source"] for row in rows] == sources
    assert {row["caption_from"] for row in rows} == {f"the column {column}"}
    captions = [row["captions"] or [row["caption"]] for row in rows]
    if name == "table":
        assert captions == [["TOK, a 1st", "TOK, the 1st"], ["TOK, a 2nd", "TOK, the 2nd"]]
    else:
        assert captions == [["TOK, a first"], ["TOK, a second"]]
    kept = [pixels((done.out / f"{name} {how}" / row["file"]).read_bytes()) for row in rows]
    assert kept == [pixels(noise(1)), pixels(noise(2))]


@pytest.mark.parametrize("how", ["plain", "streamed"])
def test_a_row_cannot_name_files_of_this_machine_or_others(done: Done, how: str) -> None:
    assert len(done.rows(f"hostile {how}")) == 2
    reasons = sorted(done.left_out(f"hostile {how}").values())
    assert len(reasons) == 4
    assert reasons.pop() == "its row holds no picture"
    assert all("which is no file of this data set" in reason for reason in reasons)


def test_rows_of_one_name_and_long_captions(done: Done) -> None:
    assert [row["source"] for row in done.rows("named streamed")] == [
        "same.PNG",
        "same-000001.PNG",
        "same-000002.PNG",
    ]
    assert done.left_out("named plain") == {
        "same-000002.PNG": "its caption has more than the 30 bytes allowed (data.limits.caption_bytes)"
    }
    assert [row["source"] for row in done.rows("two sources")] == ["table/one.png", "web/0001.png"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gated", "'gated/dogs' is a gated dataset on the Hub. Visit"),
        ("missing", "'dogs/none' doesn't exist on the Hub or cannot be accessed."),
        ("split", "Unknown split \"test\". Should be one of ['train']"),
        ("revision", "Revision 'zz' doesn't exist for dataset 'dogs/folder'"),
        ("column", "data.hub.caption is 'words', and the columns are image, prompt"),
        ("no picture", "data.hub.image is 'prompt', and the columns of pictures are image"),
        ("rows plain", "dogs/web has 2 rows, and 1 are allowed (data.limits.entries); take fewer (data.hub.take)"),
        ("rows streamed", "dogs/web has more than 1 rows (data.limits.entries); take fewer (data.hub.take)"),
        ("bytes streamed", "has more than 4000 bytes of pictures (data.limits.total_bytes); take fewer"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(done: Done, name: str, said: str) -> None:
    status, words = done.answers[name]
    sentence = next(line for line in words.splitlines() if line.startswith("preprocess: "))
    assert (status, said in sentence) == (2, True), words
    assert "Traceback" not in words


def test_the_token_goes_to_the_hub_and_into_no_file(done: Done) -> None:
    assert f"Bearer {TOKEN}" in done.hub.tokens
    for name in COMMANDS:
        files = [path for path in (done.out / name).rglob("*") if path.is_file()]
        assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_options_of_the_hub_are_for_its_data_sets(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(noise(0))
    for options in ({"split": "test"}, {"take": 2, "streaming": True}):
        names = ", ".join(f"data.hub.{name}" for name in options)
        with pytest.raises(PreprocessError, match=rf"^{names} would do nothing: data\.source '.*in' is no data set"):
            ingest(str(tmp_path / "in"), tmp_path / "run", hub=HubArgs.model_validate(options))


def test_no_hub_to_be_reached_is_one_sentence(done: Done) -> None:
    env = environment(done.out / "empty", done.hub) | {"HF_HUB_OFFLINE": "1"}
    [(status, words)] = driven([["dogs/folder", "--out", str(done.out / "offline")]], env)
    assert status == 2
    assert words.startswith("preprocess: data.source 'dogs/folder' is nothing on this machine, and as a data set")
    assert "OfflineModeIsEnabled" in words or "offline" in words.lower()


def test_without_the_extra_it_is_asked_for_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "in").mkdir()
    for i in range(2):
        (tmp_path / f"in/{i}.png").write_bytes(noise(i))
    assert len(ingest(str(tmp_path / "in"), tmp_path / "run")[0]) == 2
    with pytest.raises(
        PreprocessError, match=r"which needs datasets, and it is not installed: pip install 'datasets=="
    ):
        ingest("owner/name", tmp_path / "other")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("owner/name", "owner/name"),
        ("hf://datasets/owner/na-me.v2", "owner/na-me.v2"),
        ("hf://datasets/here/zip.zip", "here/zip.zip"),
        ("here/name", None),
        ("owner/pictures.zip", None),
        ("owner/a/b", None),
        ("../name", None),
        ("/owner/name", None),
        ("~/name", None),
        ("name", None),
        ("https://owner/name", None),
        ("hf://models/owner/name", None),
    ],
)
def test_what_is_an_id(source: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert dataset_id(source) == name
