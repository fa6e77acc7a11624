"""The public surface is frozen, small, described, and cheap to import."""

import json
import pkgutil
import subprocess
import sys
from importlib import import_module

import cutaway as ca
from tests.meta.tree import PACKAGE, ROOT, ROW

NAMES = {
    "Model", "Pair", "Refused", "Result", "Task", "chat", "edits", "explain", "load", "methods", "open", "resuming",
    "self_check",
}  # fmt: skip
ROOMS = {room for room in ROW if (PACKAGE / room / "__init__.py").exists()} - {"core", "cli", "studio", "compat"}
HEAVY = ["pandas", "matplotlib", "datasets", "transformers", "fastapi", "scipy"]


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


def test_public_names_are_frozen_and_all_resolve():
    assert len(NAMES) <= 13  # docs/decisions/20-chats.md
    assert set(ca.__all__) == NAMES | ROOMS
    for name in ca.__all__:
        assert getattr(ca, name) is not None
        assert getattr(ca, name).__doc__, name
    assert set(dir(ca)) == {*ca.__all__, "__version__"}


def test_the_edits_are_found_under_one_name():
    assert set(ca.edits.__all__) >= {"Replace", "Add", "Scale", "Ablate", "Project", "Freeze", "Knockout"}
    assert all(issubclass(getattr(ca.edits, name), ca.edits.Edit) for name in ca.edits.__all__)


def test_method_rooms_are_the_rooms_that_hold_methods():
    holding = {p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py") if "\n@method(" in p.read_text("utf-8")}
    assert holding <= set(ca.METHOD_ROOMS)
    assert all(ROW[room] in (5, 6, 7) for room in ca.METHOD_ROOMS)


def test_every_method_is_reached_by_its_own_name():
    rows = ca.methods()
    assert rows
    for name, row in rows.items():
        room, function = name.split(".")
        assert getattr(getattr(ca, room), function) is row.function


def test_version_is_the_one_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == ca.__version__
    assert f"## {ca.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_changelog_stays_readable():
    """Merges once brought back a list of 200 entries behind the short one."""
    _, *versions = (ROOT / "CHANGELOG.md").read_text("utf-8").split("\n## ")
    assert versions
    assert all(v.count("\n- ") <= 30 for v in versions)


def test_import_budget():
    code = (
        "import sys, json, torch; before = set(sys.modules); import cutaway;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    added = json.loads(fresh(code))
    assert len(added) <= 60, added
    alone = json.loads(fresh("import sys, json, cutaway; print(json.dumps(sorted(sys.modules)))"))
    assert not {m.split(".")[0] for m in alone} & {*HEAVY, "torch", "numpy"}


def test_reading_the_method_table_imports_nothing_heavy_beyond_torch():
    code = "import sys, json, torch; before = set(sys.modules); import cutaway; cutaway.methods(); print(json.dumps("
    added = json.loads(fresh(code + "sorted(set(sys.modules) - before)))"))
    assert not {m.split(".")[0] for m in added} & set(HEAVY)


def test_results_can_draw_themselves_once_the_package_is_imported():
    from cutaway.core.render import RENDERERS

    assert set(RENDERERS) == {"figure", "notebook"}
    shown = fresh(
        "import torch, cutaway as ca; from dataclasses import make_dataclass; from jaxtyping import Float;"
        "Bar = make_dataclass('Bar', [('effect', Float[torch.Tensor, 'head'])], bases=(ca.Result,), frozen=True,"
        " kw_only=True); bar = Bar(effect=torch.ones(3)); print(bar._repr_html_()[:4], type(bar.plot()).__name__)"
    )
    assert shown.split() == ["<div", "Figure"]


def test_every_lazy_name_of_every_room_is_there():
    for found in pkgutil.walk_packages(ca.__path__, "cutaway."):
        if found.ispkg:
            package = import_module(found.name)
            assert all(hasattr(package, name) for name in {*dir(package), *getattr(package, "__all__", ())}), found.name
