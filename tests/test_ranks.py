"""Several processes of a launcher: they make the run of one, one of them writes, and they fail and stop together."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_pictures
from held import HELD
from launched import ROOT, environment, launch, said, torchrun
from safetensors.torch import load_file
from small import items, latents, noise
from torch.distributed import HashStore

from trainer import predict_door, ranks
from trainer.__main__ import main
from trainer.dataset import Dataset
from trainer.ranks import OtherFailed, Ranks, RanksError, launched
from trainer.rundir import RunDir, read_jsonl

OPTIONS = [
    *("--text.tokens", "1", "--adapter.rank", "2", "--adapter.dropout", "0.2", "--data.caption_dropout", "0.3"),
    *("--runtime.batch_size", "1", "--runtime.checkpoint_every", "2", "--sample.prompts", "a red {trigger}"),
    *("--runtime.threads", "1", "--runtime.device", "cpu", "--sample.steps", "1", "--text.init", "similarity"),
    *("--data.resolution", "32", "--sample.strengths=1"),
]


def options(base: Path, pictures: Path, out: Path, *more: str) -> list[str]:
    return ["object", str(pictures), "--model.base", str(base), "--runtime.out", str(out), *OPTIONS, *more]


def alike(one: RunDir, two: RunDir) -> None:
    """Same tensors, same metrics but for the time. Of two numbers there is one sum, so they are equal to the bit."""
    for name in ("adapter", "rows"):
        a, b = (load_file(run.newest_checkpoint()[1] / f"{name}.safetensors") for run in (one, two))  # type: ignore
        assert a.keys() == b.keys()
        assert all(torch.equal(tensor, b[key]) for key, tensor in a.items()), name
        assert any(tensor.any() for tensor in a.values())
    lines = [[{**line, "seconds": 0} for line in read_jsonl(run.metrics)] for run in (one, two)]
    assert lines[0] == lines[1]


def files(root: Path) -> set[str]:
    """All but the caches, where each rank may have entries of its own."""
    found = {path.relative_to(root) for path in root.rglob("*") if path.is_file() and "tfevents" not in path.name}
    return {str(path) for path in found if path.parts[0] != "cache"}


def test_two_processes_make_the_run_of_one_that_accumulates_twice(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    steps = ("--runtime.steps", "3", "--runtime.name", "run")
    two = launch(tmp_path / "logs", "train.py", *options(tiny_base, tiny_pictures, tmp_path / "two", *steps))
    assert two.status == 0, two.said
    assert main(options(tiny_base, tiny_pictures, tmp_path / "one", *steps, "--runtime.accumulate", "2")) == 0
    one, both = RunDir(tmp_path / "one" / "run"), RunDir(tmp_path / "two" / "run")
    alike(one, both)
    assert files(one.root) == files(both.root), "nobody but the first writes, and it writes the same files"
    assert len(list(both.tensorboard.iterdir())) == 1
    assert [line["images"] for line in read_jsonl(both.metrics)] == [2, 2, 2]
    assert both.log.read_text().count("step 3/3") == 1
    assert "2 processes" in two.said[0]
    assert (two.said[1], two.printed[1]) == ("", "")
    assert two.printed[0].startswith("grid")
    assert json.loads(both.env.read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_launch_that_is_stopped_goes_on_bit_for_bit(
    number: signal.Signals, tiny_base: Path, tiny_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--runtime.steps", "12", "--runtime.name", "run")
    stopped = RunDir(tmp_path / "two" / "run")
    logs = tmp_path / "logs"
    held, hook = tmp_path / "held", ("--hooks.extra", f"{ROOT}/tests/held.py:Held")
    command = torchrun(logs, "train.py", *options(tiny_base, tiny_pictures, tmp_path / "two", *steps, *hook))
    env = {**environment(), HELD: str(held)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    wait_for(process, held.exists)
    if number == signal.SIGKILL:  # of one rank; the launcher then ends the other
        subprocess.run(["pkill", "-9", "-n", "-P", str(process.pid)], check=True)
    else:
        process.send_signal(number)
        wait_for(process, lambda: "stopping after this update" in said(logs, "stderr")[0])
    held.unlink()
    assert process.wait(180) != 0
    if number != signal.SIGKILL:
        assert [text.count("continue with") for text in said(logs, "stderr")] == [1, 0]
    newest = stopped.newest_checkpoint()
    assert newest is not None
    assert 4 <= newest[0] < 12
    assert main(["--resume", str(stopped.root)]) == 2
    assert "was begun by 2 processes" in capsys.readouterr().err
    assert launch(tmp_path / "again", "train.py", "--resume", str(stopped.root)).status == 0
    assert main(options(tiny_base, tiny_pictures, tmp_path / "one", *steps, "--runtime.accumulate", "2")) == 0
    alike(RunDir(tmp_path / "one" / "run"), stopped)


def wait_for(process: subprocess.Popen[bytes], what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_engine_does_between_processes(tmp_path: Path) -> None:
    done = launch(tmp_path / "logs", "tests/together.py", str(tmp_path))
    assert done.status == 0, done.said
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("device").startswith("cpu")
    assert second.pop("device").startswith("cpu")
    assert first == second
    assert first["rows"] == ["a0", "a1", 0, 1]
    assert first["mean"] == [[2.0, 4.0], [2.0, 3.0], None, [60000.0]]
    assert first["start"] == [[1.0] * 3] * 2
    assert first["alike"]
    assert first["drifted"].startswith("at step 2 rank 1 of 2 holds other parameters than rank 0")
    pictures = items([(32, 32)] * 4)
    name = Dataset(pictures, latents(pictures), batch_size=1, seed=3).micro(3).names[0]
    assert first["not finite"][0] == "2"
    assert f"the loss is not finite at step 2 (pictures: {name})" in first["not finite"][1]
    assert (tmp_path / "checkpoints" / "step_000001").is_dir()
    assert not (tmp_path / "checkpoints" / "step_000002").exists()


# --- preprocess


def test_two_processes_preprocess_what_one_does_and_decode_each_picture_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from preprocess.__main__ import main as alone

    pictures = draw_pictures(tmp_path / "pictures")
    monkeypatch.setenv("DECODES", str(tmp_path / "decodes"))
    flags = [str(pictures), "--resolution", "64", "--step", "16"]
    two = launch(tmp_path / "logs", "tests/decodes.py", *flags, "--out", str(tmp_path / "two"))
    assert two.status == 0, two.said
    assert alone([*flags, "--out", str(tmp_path / "one")]) == 0
    for name in ("dataset.jsonl", "skipped.jsonl", "survey.json", "sheet.html"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    decoded = [(tmp_path / f"decodes.{rank}").read_text().split() for rank in (0, 1)]
    assert sorted(len(part) for part in decoded) == [2, 3]
    assert len({*decoded[0], *decoded[1]}) == 5
    assert two.printed[0].replace("/two", "/one") == capsys.readouterr().out
    assert two.printed[1] == ""
    assert two.said == ["", ""]


@pytest.mark.slow  # how the others hear of it is shown by threads, below
def test_ranks_that_meet_a_broken_archive_say_one_sentence_and_end(tmp_path: Path) -> None:
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\x03\x04" + bytes(99))
    done = launch(tmp_path / "logs", "-m", "preprocess", str(broken), "--out", str(tmp_path / "out"))
    assert done.status == 1, "a launcher has a status of its own"
    assert done.launcher.count("exitcode  : 2") == 2
    lines = "".join(done.said).splitlines()
    assert len(lines) == 1
    assert "broken.zip" in lines[0]
    assert done.printed == ["", ""]


# --- how ranks meet


def in_threads(store: Any, *calls: Callable[[Ranks], Any]) -> list[Any]:
    """What each rank's call gives, or the exception that it raises."""

    def outcome(rank: int) -> Any:
        here = Ranks(rank, len(calls), store)
        try:
            return calls[rank](here)
        except (OtherFailed, RanksError) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, range(len(calls))))


def test_rows_come_by_turn_and_meetings_leave_nothing_behind() -> None:
    store = HashStore()

    def talk(here: Ranks) -> list[list[Any]]:
        return [here.gathered([f"{here.rank}{meeting}", [meeting]]) for meeting in range(20)]

    found = in_threads(store, talk, talk, talk)
    assert found[0] == found[1] == found[2]
    assert found[0][7] == ["07", "17", "27", [7], [7], [7]]
    assert store.num_keys() < 40, "a long run does not fill the store"


def test_who_waits_for_one_that_failed_ends_with_its_status() -> None:
    def fail(here: Ranks) -> bool:
        time.sleep(0.1)
        return here.fails(2)

    found = in_threads(HashStore(), fail, Ranks.barrier, Ranks.barrier)
    assert found[0] is True
    assert [error.status for error in found[1:]] == [2, 2]


def test_only_the_first_that_fails_speaks() -> None:
    def fail(here: Ranks) -> bool:
        return here.fails(1)

    found = in_threads(HashStore(), fail, fail, fail)
    assert sorted(found) == [False, False, True]
    assert Ranks().fails(1)


class Flying:
    """The clock of `ranks`, which a test moves on while threads go at their own pace."""

    def __init__(self) -> None:
        self.skipped = 0.0
        self.sleep = time.sleep

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped


def test_a_silent_rank_is_given_up_and_one_with_signs_of_life_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Flying()
    monkeypatch.setattr(ranks, "time", clock)
    monkeypatch.setattr(ranks, "BEAT_S", 0.02)
    monkeypatch.setattr(ranks, "LEAVE_S", 0.1)

    def prompt(here: Ranks) -> list[Any]:
        threading.Thread(target=here.beat, daemon=True).start()
        try:
            return here.gathered([here.rank])
        finally:
            here.leave()

    def late(here: Ranks) -> list[Any]:
        """Comes after three times SILENT_S, in steps between which the other has heard of both."""
        threading.Thread(target=here.beat, daemon=True).start()
        for _ in range(6):
            clock.skipped += ranks.SILENT_S / 2
            rises(here.store, 0, 1)
            heard.wait_for_more()
        return prompt(here)

    heard = Heard(monkeypatch)
    assert in_threads(HashStore(), prompt, late) == [[0, 1], [0, 1]]

    def killed(here: Ranks) -> str:
        rises(here.store, 0)
        heard.wait_for_more()
        clock.skipped += 1.1 * ranks.SILENT_S
        return "killed"

    waiting, gone = in_threads(HashStore(), prompt, killed)
    assert gone == "killed"
    assert "rank 1 of 2 has given no sign of life" in str(waiting)


class Heard:
    """How often somebody who waits has looked for signs of life."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        listen = Ranks._listen  # pyright: ignore[reportPrivateUsage]

        def counted(here: Ranks, beats: dict[int, tuple[int, float]], now: float) -> None:
            listen(here, beats, now)
            self.times += 1

        monkeypatch.setattr(Ranks, "_listen", counted)

    def wait_for_more(self) -> None:
        """Until it has been done once more from its beginning to its end."""
        before = self.times
        holds(lambda: self.times >= before + 2)


def rises(store: Any, *numbers: int) -> None:
    """Waits until each of these ranks has given one more sign of life."""
    before = [store.add(f"beat/{rank}", 0) for rank in numbers]
    holds(lambda: all(store.add(f"beat/{rank}", 0) > then for rank, then in zip(numbers, before, strict=True)))


def holds(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_one_that_was_told_to_stop_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "STOP_S", 0.2)

    def told(here: Ranks) -> None:
        here.stopping()
        here.barrier()

    found = in_threads(HashStore(), told, lambda here: None)
    assert "was told to stop, and others gave no answer" in str(found[0])


def test_without_a_launcher_there_is_one_and_half_a_launch_is_refused() -> None:
    assert launched({}) == launched({"WORLD_SIZE": "1", "RANK": "0"}) == (0, 1)
    whole = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched(whole) == (2, 4)
    with pytest.raises(RanksError, match="WORLD_SIZE=4, but RANK, MASTER_PORT is missing"):
        launched({**whole, "RANK": "", "MASTER_PORT": ""})


def test_doors_for_one_process_refuse_several(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    for rank, sentences in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(options(tiny_base, tmp_path, tmp_path, "--dry-run")) == 2
        assert capsys.readouterr().err.count("start it without the launcher") == sentences
        with pytest.raises(SystemExit) as ended:
            predict_door.main(["--weights", str(tmp_path), "--prompt", "a", "--out", str(tmp_path)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("start it without the launcher") == sentences


@pytest.mark.slow
def test_several_concepts_and_a_regularisation_set_are_the_same_for_two_processes(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Turns of concepts, shares of class pictures, kept priors and dropped ranks are those of one process."""
    for number, folder in enumerate(("pictures/dog", "pictures/cat", "stars")):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            noise((40, 40), 90, seed=3 * number + i).convert("RGB").save(tmp_path / folder / f"{i}.png")
    concepts = {
        "dog": {"trigger": "DOG", "class_words": ["red"]},
        "cat": {"trigger": "CAT", "class_words": ["blue"]},
    }
    own = (
        *("--data.concepts", json.dumps(concepts), "--data.regularisation.source", str(tmp_path / "stars")),
        *("--data.regularisation.caption", "a photo of a star", "--data.regularisation.weight", "0.5"),
        *("--objective.prior_weight", "0.5", "--adapter.rank_dropout", "0.3", "--adapter.module_dropout", "0.2"),
        *("--adapter.targets", "attention", "--sample.prompts", "a DOG", "--runtime.steps", "4"),
        *("--runtime.name", "run", "--text.init", "random"),
    )
    two = launch(tmp_path / "logs", "train.py", *options(tiny_base, tmp_path / "pictures", tmp_path / "two", *own))
    assert two.status == 0, two.said
    once = ("--runtime.accumulate", "2")
    assert main(options(tiny_base, tmp_path / "pictures", tmp_path / "one", *own, *once)) == 0
    one, both = RunDir(tmp_path / "one" / "run"), RunDir(tmp_path / "two" / "run")
    alike(one, both)
    assert len(list(read_jsonl(both.dataset))) == 9
    assert [line["images"] for line in read_jsonl(both.metrics)] == [2] * 4
