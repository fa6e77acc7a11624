"""A folder of a studio, and the bundled model that all tests of it share."""

import pytest

import cutaway as ca
from cutaway.studio.folder import Folder
from tests.studio.here import guarded, studio_here


@pytest.fixture(scope="session")
def miniworld():
    return ca.load("miniworld")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one file that has an id; beside it lies one that must never be read."""
    place = tmp_path_factory.mktemp("studio")
    (place / "secret.jsonl").write_text('{"text": "never to be read"}\n', encoding="utf-8")
    notes = place / "My notes.txt"
    notes.write_text("The capital of Norway is\nThe capital of Italy is\n", encoding="utf-8")
    return Folder.of(place / "studio", [notes])


@pytest.fixture(scope="module")
def studio(folder, miniworld):
    return studio_here(folder, miniworld)


@pytest.fixture(scope="module")
def guard(studio):
    return guarded(studio)
