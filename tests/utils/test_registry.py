"""Names in messages: the nearest one, or the nearest few of a long list."""

import importlib
from pathlib import Path

import pytest

from utils.registry import did_you_mean, listed, nearest

DATA_SETS = ["cuhk_pedes", "icfg_pedes", "rstpreid", "synthetic"]


@pytest.mark.parametrize("name", ["CUHK-PEDES", "cuhkpedes", "CUHK", "cuhk pedes", "CUHK_PEDS"])
def test_a_data_set_is_known_by_the_spelling_of_its_paper(name: str) -> None:
    assert nearest(name, DATA_SETS) == "cuhk_pedes"


def test_the_beginning_of_one_name_is_enough() -> None:
    assert [nearest(name, DATA_SETS) for name in ("ICFG", "RSTP", "RSTPReid")] == ["icfg_pedes", "rstpreid", "rstpreid"]
    assert nearest("", DATA_SETS) is nearest("market", DATA_SETS) is None


def test_a_long_list_is_shortened_to_the_nearest_few() -> None:
    many = [f"option_{number}" for number in range(20)]
    assert did_you_mean("xyz_19", many).startswith("choose from option_19, ")
    assert did_you_mean("xyz", many).endswith(" and 14 others") and did_you_mean("x", []) == "choose from nothing"
    assert listed("abc") == "a, b, c" and listed("abcdefgh") == "a, b, c, d, e, f and 2 others"


def test_the_modules_of_a_package_are_imported_before_the_first_look_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "parts.py").write_text("from utils.registry import Registry\nPARTS = Registry('part', 'some_package')\n")
    (folder / "first.py").write_text("from some_package.parts import PARTS\nPARTS.register('first')(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    parts = importlib.import_module("some_package.parts").PARTS
    assert list(parts) == ["first"] and parts.get("first", "part") == 1
