"""Import aliases and the runner of notebooks, in a process of its own where it matters which modules are there."""

import io
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from cutaway import Refused, compat
from cutaway.cli.compat import run
from cutaway.compat import aliases
from cutaway.compat.notebook import code_cells, run_cells, without_lines
from tests.meta.tree import imports, sources


def test_modules_are_found_by_their_names_of_all_versions(monkeypatch):
    files = {"activation_cache", "config", "hook_points", "native", "utils"}
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: path.stem in files or path.parent.name == "sae_lens")
    found = {
        "ActivationCache": "activation_cache",
        "HookedTransformerConfig": "config",
        "config.hooked_transformer_config": "config",
        "components.mlps.mlp": "native",
        "hook_points": "hook_points",
        "utilities.tensors": "utils",
    }
    for name, here in found.items():
        assert aliases.facade_of(f"transformer_lens.{name}") == f"cutaway.compat.transformer_lens.{here}"
    assert aliases.facade_of("sae_lens.toolkit.pretrained_saes_directory") == "cutaway.compat.sae_lens"
    assert aliases.facade_of("transformer_lens.no_such_module") is None


def test_an_alias_hands_out_the_objects_of_the_facade_and_counts_them():
    from cutaway.compat.circuitsvis.render import RenderedHTML as Own

    with compat.imports() as used:
        import circuitsvis as cv  # type: ignore[import-not-found]
        import circuitsvis.attention  # type: ignore[import-not-found]
        from circuitsvis.utils.render import RenderedHTML  # type: ignore[import-not-found]

        assert RenderedHTML is Own
        assert "attention_heads" in dir(cv.attention)
        assert cv.attention.attention_heads is cv.attention.attention_heads
        cv.examples.seen = 1
    assert used.used == {"circuitsvis.utils.render.RenderedHTML": 1, "circuitsvis.attention.attention_heads": 2}
    assert "attention.attention_heads 2, utils.render.RenderedHTML 1" in str(used)
    assert sys.modules["cutaway.compat.circuitsvis.examples"].seen == 1  # what a notebook sets, the façade has
    assert "circuitsvis" not in sys.modules
    assert aliases.Aliases.running() is None


def test_names_that_a_facade_does_not_have_are_refused_and_recorded():
    with compat.imports() as used:
        import circuitsvis.attention as attention  # type: ignore[import-not-found]

        with pytest.raises(ImportError, match="use attention_heads"):
            from circuitsvis.attention import attention_head  # type: ignore[import-not-found]  # noqa: F401
        with pytest.raises(AttributeError, match="does not have it"):
            attention.nothing_like_it  # noqa: B018
        with pytest.raises(ImportError, match="does not have it"):
            import circuitsvis.no_such_module  # type: ignore[import-not-found]  # noqa: F401
        # Below a module that was moved, a name of nothing may be one of its modules; a class or function it is not.
        from transformer_lens.components import GatedMLP  # type: ignore[import-not-found]

        with pytest.raises(TypeError, match=r"components\.GatedMLP"):
            GatedMLP()
    assert list(used.refused) == [
        "circuitsvis.attention.attention_head",
        "circuitsvis.attention.nothing_like_it",
        "circuitsvis.no_such_module",
        "transformer_lens.components.GatedMLP",
    ]


def test_models_are_named_within_the_block_and_blocks_may_be_nested():
    with compat.imports({"a": "one", "b": "two"}) as outer:
        with compat.imports(models={"a": "other"}) as inner:
            assert (compat.MODELS, inner) == ({"a": "other", "b": "two"}, outer)
        assert compat.MODELS == {"a": "one", "b": "two"}
        assert aliases.Aliases.running() is outer
    assert compat.MODELS == {}


def test_a_package_that_is_imported_already_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", ModuleType("transformer_lens"))
    with pytest.raises(Refused, match=r"transformer_lens\n.*imported already"), compat.imports():
        pass
    assert aliases.Aliases.running() is None


def test_the_extension_of_live_notebooks_says_what_was_used(capsys):
    compat.load_ipython_extension(SimpleNamespace())
    try:
        from circuitsvis.examples import hello  # type: ignore[import-not-found]

        hello("you")
    finally:
        compat.unload_ipython_extension(SimpleNamespace())
    assert capsys.readouterr().out == "circuitsvis: examples.hello 1\n"


CELLS = [
    "!pip install x \\\n  --quiet\n%load_ext autoreload\nx = 1",
    "try:\n    import google.colab\n    !mkdir x && \\\n      y\n    c = True\nexcept ImportError:\n    c = False",
    "import google.colab",
    "%%bash\nls",
    "import circuitsvis as cv\ncv.examples.hello('you')",
    "%%time\nfrom circuitsvis.examples import NoSuchName",
    "1 /",
    "assert not c\nprint(x)\nfrom beside import y\nopen('left', 'w').close()\nx + y",
]


def notebook(tmp_path, cells, **more):
    path = tmp_path / "a.ipynb"
    rows = [{"cell_type": "code", "source": c.splitlines(keepends=True)} for c in cells]
    path.write_text(json.dumps({"nbformat": 4, "cells": [{"cell_type": "markdown", "source": "# A"}, *rows], **more}))
    return path


def test_a_notebook_is_run_from_the_command_line(tmp_path):
    """Cells of other systems are skipped, a failure stops no other cell, values of last lines are shown."""
    (tmp_path / "beside.py").write_text("y = 40")
    command = [sys.executable, "-m", "cutaway", "compat", "run", str(notebook(tmp_path, CELLS)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    data = json.loads(done.stdout)
    states = [f"{cell['number']} {cell['state']}" for cell in data["cells"]]
    assert states == ["1 ran", "2 ran", "3 skipped", "4 skipped", "5 ran", "6 failed", "7 failed", "8 ran"]
    assert data["used"] == {"circuitsvis.examples.hello": 1}
    assert [r["what"] for r in data["refused"]] == ["circuitsvis.examples.NoSuchName"]
    assert "left out: !pip install x" in data["cells"][0]["why"]
    assert "1\n41\n" in done.stderr
    assert (tmp_path / "left").exists()
    assert done.returncode == 1


def test_what_a_cell_defines_stays_and_no_other_file_is_a_notebook(tmp_path):
    namespace = {"__name__": "__main__"}
    states = [c.state for c in run_cells(notebook(tmp_path, ["def f():\n    return y", "y = 2", "z = f()"]), namespace)]
    assert (states, namespace["z"]) == (["ran"] * 3, 2)
    with pytest.raises(Refused, match="format 4"):
        code_cells(notebook(tmp_path, [], nbformat=3))
    done = subprocess.run([sys.executable, "-m", "cutaway", "compat", "run", "x.ipynb", "--model", "a"],
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, "give NAME=FOLDER" in done.stderr) == (2, True)


def test_magics_are_kept_for_those_who_know_them():
    text = "  %matplotlib inline\n!ls\na = b % c\nb?"
    assert without_lines(text, magics=True)[0] == "  %matplotlib inline\npass\na = b % c\nb?"
    assert without_lines(text, magics=False) == ("  pass\npass\na = b % c\npass", ["%matplotlib inline", "!ls", "b?"])


def test_only_one_file_of_the_house_knows_the_facades():
    own = [p for p in sources() if p.startswith("cutaway/compat/")]
    knowing = {p for p, tree in sources().items() if p not in own
               for module, _ in imports(tree, p) if module.startswith("cutaway.compat")}  # fmt: skip
    assert knowing == {"cutaway/cli/compat.py"}


def test_packages_that_a_notebook_lacks_are_named(tmp_path):
    reply = run(notebook(tmp_path, ["import no_such_package.part", "x = 1"]))
    console = Console(record=True, file=io.StringIO(), width=120)
    reply.show(console)
    said = console.export_text()
    assert "pip install no_such_package\n" in said
    assert "2 cells: 1 ran, 1 failed, 0 skipped" in said
    assert reply.code == 1
