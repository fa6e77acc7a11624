"""The page's own files: as light as promised, whole, and in step with what the server offers."""

import gzip
import hashlib
import json
import re

import pytest

from cutaway.studio.server import STATIC
from tools.openapi import written

FILES = sorted(p for p in STATIC.rglob("*") if p.is_file())
OWN = [p for p in FILES if p.suffix in (".js", ".html", ".css") and p.parent.name != "vendor"]
MODULES = [p for p in OWN if p.suffix == ".js"]
LIGHT = 350 * 1024  # bytes, compressed


@pytest.mark.parametrize("path", written(), ids=lambda p: p.name)
def test_document_and_types_are_what_the_server_offers(path):
    assert path.read_text("utf-8") == written()[path], "run: python -m tools.openapi"


def test_the_page_is_light():
    served = [p for p in FILES if p.suffix in (".html", ".js", ".css", ".svg")]
    assert sum(len(gzip.compress(p.read_bytes())) for p in served) < LIGHT


def test_vendored_files_are_those_that_were_taken():
    rows = json.loads((STATIC / "vendor" / "vendored.json").read_text("utf-8"))
    assert {r["file"] for r in rows} == {p.name for p in (STATIC / "vendor").glob("*.js")}
    for row in rows:
        assert hashlib.sha256((STATIC / "vendor" / row["file"]).read_bytes()).hexdigest() == row["sha256"]
        assert all((STATIC / "vendor" / name).is_file() for name in row["licences"])


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.name)
def test_pages_ask_nothing_of_others_and_write_no_markup(path):
    text = path.read_text("utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|dangerously", text)
    assert not re.search(r"\son[a-z]+=\"", text)  # no handler in markup; htm's are functions


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.suffix == ".js" and p.parent.name != "vendor"], ids=lambda p: p.name
)
def test_every_import_is_there(path):
    text = path.read_text("utf-8")
    for names, place in re.findall(r"import (?:\{([^}]*)\} from )?\"([^\"]+)\"", text):
        target = (path.parent / place).resolve()
        assert target.is_file(), place
        own = target.read_text("utf-8")
        for name in (n.strip() for n in names.split(",") if n.strip()):
            exported = re.search(rf"export (?:async )?(?:function|class|const|let) {name}\b", own)
            assert exported or re.search(rf"export\{{[^}}]*\b{name}\b[^}}]*\}}", own), f"{name} of {place}"
