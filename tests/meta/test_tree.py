"""The tree: the wheel takes all data along, and no file speaks of one machine."""

import re
import subprocess
import tomllib
from pathlib import Path

from tests.meta.tree import PACKAGE, ROOT


def test_package_data_covers_every_file_that_is_not_code():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"][
        "cutaway"
    ]
    shipped = {p for pattern in patterns for p in PACKAGE.glob(pattern)}
    data = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data <= shipped, sorted(str(p) for p in data - shipped)


def test_bundled_models_are_small():
    for model in PACKAGE.glob("zoo/*/data"):
        assert sum(p.stat().st_size for p in model.iterdir()) <= 6 * 2**20, model


def test_no_file_speaks_of_one_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    machine = re.compile(r"/work/|/tmp/[a-z]|/root/|/home/[a-z]")
    wrong = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if name.startswith(".ci/") or path == Path(__file__) or not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{name}:{n}" for n, line in enumerate(text.splitlines(), 1) if machine.search(line)]
    assert not wrong, wrong
