"""What the zoo's tests share."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from cutaway.zoo import miniworld


@pytest.fixture(scope="session")
def world() -> miniworld.World:
    return miniworld.World.load()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(miniworld.path() / "tokenizer.json"))
