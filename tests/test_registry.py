"""A part is found by table name, module:attr or file.py:attr; what is not found is answered with the nearest name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from trainer.adapters import ADAPTERS
from trainer.hooks import HOOKS
from trainer.models import FAMILIES
from trainer.objectives import OBJECTIVES
from trainer.registry import PartError, load, nearest

TABLE = {"path": "pathlib:PurePath", "broken": "pathlib:Nothing"}


def test_name_module_and_file(tmp_path: Path) -> None:
    part = tmp_path / "my_part.py"
    part.write_text("from dataclasses import dataclass\n@dataclass\nclass Thing:\n    x: int = 7\n")
    assert load(TABLE, "path", "part").__name__ == "PurePath"
    assert load(TABLE, "collections:OrderedDict", "part").__name__ == "OrderedDict"
    assert load(TABLE, f"{part}:Thing", "part")().x == 7


def test_a_file_is_what_it_says_now_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    part = tmp_path / "my_part.py"
    for value in (1, 2):  # as long, and of the same second
        part.write_text(f"Thing = {value}\n", encoding="utf-8")
        os.utime(part, (1_700_000_000, 1_700_000_000))
        assert load({}, f"{part}:Thing", "part") == value
    assert [path.name for path in tmp_path.iterdir()] == ["my_part.py"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("paht", "part 'paht' is unknown; did you mean path?"),
        ("zzzzzz", "part 'zzzzzz' is unknown (allowed: path, broken, module:attr or file.py:attr)"),
        ("no_such_package.mod:Thing", "there is no module 'no_such_package.mod'"),
        ("nowhere.py:Thing", "there is no file 'nowhere.py'"),
        ("pathlib:PurePaht", "pathlib has no 'PurePaht'; did you mean PurePath?"),
        ("broken", "pathlib has no 'Nothing'"),
    ],
)
def test_messages(spec: str, said: str) -> None:
    with pytest.raises(PartError) as caught:
        load(TABLE, spec, "part")
    assert said in str(caught.value)


def test_code_is_refused_where_the_caller_may_not_choose_it(tmp_path: Path) -> None:
    part = tmp_path / "evil.py"
    part.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Thing: ...\n")
    with pytest.raises(PartError, match="would import code"):
        load(TABLE, f"{part}:Thing", "part", code=False)
    assert not (tmp_path / "ran").exists()
    assert load(TABLE, "path", "part", code=False).__name__ == "PurePath"


def test_an_error_inside_a_module_that_exists_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part_with_missing_import.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load(TABLE, "part_with_missing_import:Thing", "part")


@pytest.mark.parametrize("table", [FAMILIES, ADAPTERS, OBJECTIVES, HOOKS])
def test_every_entry_of_every_table_loads(table: dict[str, str]) -> None:
    for name in table:
        assert callable(load(table, name, "part"))


def test_nearest() -> None:
    assert nearest("adapter.rnak", ["adapter.rank", "adapter.alpha"]) == "adapter.rank"
    assert nearest("xyz", ["adapter.rank"]) is None
