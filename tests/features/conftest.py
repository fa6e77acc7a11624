"""The store of the small harvest, made once."""

import pytest

from tests.features.common import made


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The store of all sentences; tests that write into it copy it."""
    return made(tmp_path_factory.mktemp("features") / "store")
