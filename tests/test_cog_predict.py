"""Cog's real server draws: with any weights that callers bring, which leave no trace, within its bounds."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cog_server import ROOT, Server, Site, server, site
from conftest import draw_pictures
from PIL import Image
from safetensors.torch import load_file

from trainer import cog_door, cog_schema, kept, serve_door

SCHEMA = cog_schema.schema((ROOT / "train.py").read_text(), (ROOT / "predict.py").read_text())["components"]["schemas"]


@pytest.fixture(scope="module")
def parcels(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, bytes]:
    """What two trainings gave, by their triggers."""
    pictures = draw_pictures(tmp_path_factory.mktemp("given") / "pictures")
    packed = pictures.parent / "x.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(pictures.iterdir()):
            archive.write(file, file.name)
    short = {"sample": {"steps": 1}, "hooks": {"tensorboard": False}, "runtime": {"device": "cpu"}}
    made: dict[str, bytes] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPERA_KEPT", str(pictures.parent / "kept"))
        for number, trigger in enumerate(("KIT", "DOT")):
            given = {"input_images": packed, "trigger_word": trigger, "base_model": str(tiny_base), "steps": 2}
            given |= {"seed": number, "lora_rank": 3, "batch_size": 1, "resolution": 32, "n_sample_imgs": 1}
            made[trigger] = cog_door.train(
                {**given, "learning_rate": 0.5, "args": json.dumps(short)}
            ).weights.read_bytes()
        assert not list(kept.top().iterdir())
    return made


@pytest.fixture(scope="module")
def pages() -> Iterator[Site]:
    with site() as pages:
        yield pages


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Server]:
    environment = {"TEMPERA_BASE": str(tiny_base), "TEMPERA_PRIVATE_URLS": "1"}
    with server(tmp_path_factory.mktemp("cog"), "predict", **environment) as running:
        yield running


def data_url(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def png(picture: Image.Image) -> str:
    made = io.BytesIO()
    picture.save(made, "PNG")
    return f"data:image/png;base64,{base64.b64encode(made.getvalue()).decode()}"


def answer_of(running: Server, given: dict[str, object]) -> dict[str, Any]:
    running.wait("READY")
    quick = {"prompt": "a red KIT", "num_inference_steps": 1, "seed": 0}
    status, answer = running.post("predictions", {**quick, **given})
    assert status == 200, answer
    return answer


def drawn(running: Server, **given: object) -> list[np.ndarray[Any, Any]]:
    answer = answer_of(running, given)
    assert answer["status"] == "succeeded", answer
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.split(",", 1)[1])))) for one in answer["output"]]


def failed(running: Server, **given: object) -> str:
    answer = answer_of(running, given)
    assert answer["status"] == "failed", answer
    return str(answer["error"]).rpartition("DrawingError: ")[2]


def rezipped(parcel: bytes, folder: str = "") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(parcel)) as tar, zipfile.ZipFile(made, "w") as archive:
        for member in tar.getmembers():
            if member.isreg():
                file = tar.extractfile(member)
                assert file
                archive.writestr(folder + member.name, file.read())
    return made.getvalue()


def member(parcel: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(parcel)) as tar:
        file = tar.extractfile(name)
        assert file
        return file.read()


def test_two_weights_taken_in_turn_leave_no_trace(painter: Server, parcels: dict[str, bytes]) -> None:
    kit, dot = (data_url(parcel) for parcel in parcels.values())
    (bare,) = drawn(painter)
    (first,) = drawn(painter, replicate_weights=kit)
    (other,) = drawn(painter, replicate_weights=dot, prompt="a red DOT")
    (again,) = drawn(painter, replicate_weights=kit)
    (bare_again,) = drawn(painter)
    assert np.array_equal(first, again)
    assert np.array_equal(bare, bare_again)
    assert not np.array_equal(first, bare)
    assert not np.array_equal(first, other)
    assert np.array_equal(bare, drawn(painter, replicate_weights=kit, lora_scale=0)[0]) is False, (
        "its trigger is new words"
    )


def test_weights_are_told_by_content(painter: Server, pages: Site, parcels: dict[str, bytes]) -> None:
    kit = parcels["KIT"]
    (whole,) = drawn(painter, replicate_weights=data_url(kit))
    assert np.array_equal(whole, drawn(painter, replicate_weights=data_url(rezipped(kit)))[0])
    assert np.array_equal(whole, drawn(painter, replicate_weights=data_url(rezipped(kit, "output/it/")))[0])
    pages.files["_weights"] = kit
    assert np.array_equal(whole, drawn(painter, replicate_weights=f"{pages.url}/moved/_weights")[0])
    lora, words = member(kit, "lora.safetensors"), member(kit, "embeddings.safetensors")
    pages.files["lora"] = lora
    (alone,) = drawn(painter, replicate_weights=data_url(lora))
    assert not np.array_equal(alone, whole)
    both = drawn(painter, replicate_weights=data_url(words), extra_lora=f"{pages.url}/lora")[0]
    assert np.array_equal(whole, both)
    stronger = drawn(
        painter, replicate_weights=data_url(words), extra_lora=[f"{pages.url}/lora"], extra_lora_scale=[2]
    )[0]
    assert not np.array_equal(both, stronger)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello", "neither a .safetensors file nor a tar or zip"),
        (b"", "neither a .safetensors file nor a tar or zip"),
        (b"\x10\0\0\0\0\0\0\0{" + b"x" * 40, "weights.safetensors is damaged"),
        (b"\x80\x04\x95pickled", "neither"),
    ],
)
def test_weights_that_are_none(painter: Server, content: bytes, said: str) -> None:
    assert said in failed(painter, replicate_weights=data_url(content))


def test_inputs_that_cannot_be_used(painter: Server, pages: Site, parcels: dict[str, bytes]) -> None:
    kit = data_url(parcels["KIT"])
    picture, huge = png(Image.new("RGB", (32, 32))), png(Image.new("RGB", (2100, 16)))
    cases: list[tuple[dict[str, object], str]] = [
        ({"replicate_weights": "/etc/passwd"}, "files of the server are not yours"),
        ({"replicate_weights": f"{pages.url}/gone"}, "404"),
        ({"extra_lora": "/etc/passwd"}, "files of the server are not yours"),
        ({"extra_lora": f"{pages.url}/gone"}, "404"),
        ({"extra_lora": [kit] * 5}, "4 are allowed"),
        ({"extra_lora": [kit], "extra_lora_scale": [1, 2]}, "one for each"),
        ({"extra_lora": kit, "extra_lora_scale": 9}, "from -2 to 3"),
        ({"extra_lora_scale": 1}, "nothing without extra_lora"),
        ({"lora_scale": 0.5}, "nothing without weights"),
        ({"mask": picture}, "give it as image"),
        ({"prompt_strength": 0.5}, "nothing without image"),
        ({"image": data_url(b"no picture")}, "picture"),
        ({"image": huge}, "too much for one request"),
        ({"width": 2048, "height": 2048, "num_outputs": 8}, "too much for one request"),
        ({"output_quality": 5}, "for webp and jpg"),
        ({"guidance_scale": 0.5, "negative_prompt": "x"}, "guides nowhere"),
        ({"replicate_weights": kit, "extra_lora": kit}, "trigger"),
    ]
    for given, said in cases:
        assert said in failed(painter, **given), given


def test_every_input_past_its_bounds_is_named_and_at_them_passes(painter: Server) -> None:
    count = 0
    for name, one in SCHEMA["Input"]["properties"].items():
        wrong = [one[bound] + step for bound, step in (("minimum", -1), ("maximum", 1)) if bound in one]
        wrong += ["yes"] if one.get("type") in ("integer", "number") else [{}]
        wrong += ["x" * 4001] if "maxLength" in one else []
        for value in wrong:
            count += 1
            status, answer = painter.post("predictions", {"prompt": "x", name: value})
            assert status == 422, (name, value, answer)
            assert {tuple(detail["loc"]) for detail in answer["detail"]} == {("body", "input", name)}
        for value in (one[bound] for bound in ("minimum", "maximum") if bound in one):
            said = failed(painter, **{name: value, "image": "/etc/passwd"})  # looked at after the bounds
            assert "image must be a URL" in said
    assert count > 20
    status, answer = painter.post("predictions", {"seed": 1})
    assert (status, answer["detail"][0]["loc"]) == (422, ["body", "input", "prompt"])


def test_pictures_to_begin_with_sizes_and_formats(painter: Server) -> None:
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    (anew,) = drawn(painter, image=png(picture), mask=png(half), num_inference_steps=2)
    kept_half = np.asarray(picture)[:, 16:]
    assert np.array_equal(anew[:, 16:], kept_half)
    assert not np.array_equal(anew[:, :16], np.asarray(picture)[:, :16])
    least, near, far = (
        drawn(painter, image=png(picture), prompt_strength=strength, num_inference_steps=10)[0].astype(int)
        for strength in (0.1, 0.2, 1.0)
    )
    assert 0 < np.abs(near - least).mean() < np.abs(far - least).mean()  # random weights keep little of the picture
    two = drawn(painter, width=48, height=32, num_outputs=2, scheduler="euler")
    assert [one.shape for one in two] == [(32, 48, 3)] * 2
    assert np.array_equal(two[1], drawn(painter, width=48, height=32, seed=1, scheduler="euler")[0])
    sizes = {}
    for kind, quality in (("png", None), ("webp", 90), ("jpg", 90), ("jpg", 5)):
        answer = answer_of(painter, {"output_format": kind, **({"output_quality": quality} if quality else {})})
        assert answer["output"][0].startswith(f"data:image/{kind.replace('jpg', 'jpeg')};")
        sizes[kind, quality] = len(answer["output"][0])
    assert sizes["jpg", 5] < sizes["jpg", 90]


def test_the_log_says_what_may_be_wrong(painter: Server, parcels: dict[str, bytes]) -> None:
    kit = data_url(parcels["KIT"])
    assert "does not name KIT" in answer_of(painter, {"replicate_weights": kit, "prompt": "a red dog"})["logs"]
    said = answer_of(painter, {"replicate_weights": kit, "prompt": "a red KIT", "seed": 7})
    assert "does not name" not in said["logs"]
    assert "seed 7" in said["logs"]
    assert "\r" not in said["logs"]
    assert said["metrics"]["weights"] == 1


def test_a_cancel_leaves_nothing_half_done(painter: Server, parcels: dict[str, bytes]) -> None:
    kit, dot = (data_url(parcel) for parcel in parcels.values())
    (before,) = drawn(painter, replicate_weights=kit)
    painter.wait("READY")
    long = {"prompt": "a DOT", "replicate_weights": dot, "num_inference_steps": 200, "num_outputs": 8}
    painter.ask("PUT", "/predictions/long", {"input": long}, {"Prefer": "respond-async"})
    time.sleep(0.5)
    assert painter.post("predictions", {"prompt": "x"})[0] == 409
    assert painter.ask("POST", "/predictions/long/cancel")[0] == 200
    painter.wait("READY")
    assert np.array_equal(before, drawn(painter, replicate_weights=kit)[0])
    failed(painter, lora_scale=0.5)
    assert not painter.leftovers()


def test_weights_stay_in_memory_the_last_used_of_them(
    tiny_base: Path, parcels: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with COG_WEIGHTS a server's own stay for good."""
    monkeypatch.setenv("TEMPERA_BASE", str(tiny_base))
    own = tmp_path / "own.tar"
    own.write_bytes(parcels["DOT"])
    loaded = serve_door.Loaded(str(own))
    kit = load_file(io_path(tmp_path, member(parcels["KIT"], "lora.safetensors")))
    from safetensors.torch import save_file

    quick: dict[str, object] = {"prompt": "a DOT", "num_inference_steps": 1, "seed": 0}
    assert loaded.healthy()
    for number in range(serve_door.MOST_WEIGHTS + 2):
        file = tmp_path / f"{number}"
        save_file({name: tensor + number for name, tensor in kit.items()}, file)
        loaded.draw({**quick, "replicate_weights": file})
    assert len(loaded._read) == serve_door.MOST_WEIGHTS + 1  # pyright: ignore[reportPrivateUsage]
    painter = loaded._painter  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(serve_door.DrawingError, match=r"both stand for the trigger 'DOT'$"):
        loaded.draw({**quick, "extra_lora": data_url(own.read_bytes())})
    (picture,) = loaded.draw(quick)
    assert loaded._painter is painter  # pyright: ignore[reportPrivateUsage]
    assert picture.is_file()
    assert loaded._own in loaded._read  # pyright: ignore[reportPrivateUsage]


def io_path(folder: Path, content: bytes) -> Path:
    path = folder / "kit.safetensors"
    path.write_bytes(content)
    return path


def test_the_command_of_the_readme_draws(painter: Server) -> None:
    (command,) = re.findall(r"^curl .*predictions (?:.*\\\n)*.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    painter.wait("READY")
    said = command.replace("http://localhost:5000", f"http://127.0.0.1:{painter.port}")
    answer = json.loads(subprocess.run(["bash", "-ec", said], check=True, capture_output=True).stdout)
    assert answer["status"] == "succeeded"
    assert len(answer["output"]) == 2
