"""Packing: every token is there once, boundaries and beginnings are where the policy says, cursors go on exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutaway.core.refuse import Refused
from cutaway.streams import Packing, from_ids, from_texts
from cutaway.streams.packing import Cursor, Packer
from tests.streams.common import Letters, texts

LETTERS = Letters()


def packed(documents, packing, tokenizer=LETTERS):
    """Contexts as lists of (id, document), padding left out, and the cursor of each group."""
    rows, cursors = [], []
    for c in Packer(from_texts(documents), tokenizer, packing).contexts(Cursor()):
        cursors.append(c.cursor)
        rows += [list(zip(i[r].tolist(), d[r].tolist(), strict=True))
                 for i, d, r in zip(c.ids, c.document, c.real, strict=True)]  # fmt: skip
    return rows, cursors


def plain(documents, bos, eos):
    """Every document's tokens one after the other, as the policy makes them."""
    first, last = [1] if bos in ("document", "both") else [], [2] if eos else []
    return [(t, n) for n, d in enumerate(documents) for t in [*first, *(10 + ord(c) - 97 for c in d), *last]]


@given(
    st.lists(st.text("abcxyz", max_size=12), min_size=1, max_size=9).filter(any),
    st.integers(2, 9), st.sampled_from(["both", "context", "document", "none"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_every_token_is_there_once_and_in_order(documents, context, bos, eos, across):
    rows, _ = packed(documents, Packing(context, bos, eos, across, rows=3))
    assert all(len(r) <= context for r in rows)
    if across:
        assert all(len(r) == context for r in rows[:-1])
    else:
        assert all(len({d for _, d in r}) == 1 for r in rows)
    flat = []
    for row in rows:
        if bos in ("context", "both"):
            assert row[0][0] == 1
        extra = bos == "context" or (bos == "both" and (not flat or flat[-1][1] == row[0][1]) and flat != [])
        flat += row[1:] if extra else row
    assert flat == plain(documents, bos, eos)


def test_a_context_that_begins_with_a_document_has_one_beginning():
    rows, _ = packed(["abc", "d", "efghij"], Packing(4, "both"))
    ids = [[t for t, _ in r] for r in rows]
    assert ids == [[1, 10, 11, 12], [1, 13, 1, 14], [1, 15, 16, 17], [1, 18, 19]]
    assert [[d for _, d in r] for r in rows][1:] == [[1, 1, 2, 2], [2, 2, 2, 2], [2, 2, 2]]


@pytest.mark.parametrize("packing", [Packing(7, rows=2), Packing(5, "context", across=False, rows=3)])
def test_from_every_cursor_packing_goes_on_as_before(packing):
    packer = Packer(from_texts(texts(20)), Letters(), packing)
    whole = list(packer.contexts(Cursor(), epochs=2))
    for n, c in list(enumerate(whole))[::9]:
        rest = list(packer.contexts(Cursor(**c.cursor.as_dict()), epochs=2))
        assert len(rest) == len(whole) - n
        for a, b in zip(rest, whole[n:], strict=True):
            assert a.cursor == b.cursor
            assert torch.equal(a.ids, b.ids)
            assert torch.equal(a.document, b.document)
    assert {c.cursor.epoch for c in whole} == {0, 1}


def test_the_default_follows_the_tokenizer_and_leaves_ids_as_they_are():
    of_texts = from_texts(["ab"])
    assert Packing().resolved(Letters(), of_texts) == Packing(bos="both")
    assert Packing().resolved(Letters(bos=False), of_texts) == Packing(bos="none", eos=True)
    assert Packing().resolved(None, of_texts) == Packing(bos="none")
    ids = from_ids(torch.arange(10, 22).reshape(3, 4))
    assert Packing().resolved(Letters(), ids) == Packing(bos="none")
    groups = list(Packer(ids, Letters(), Packing(4)).contexts(Cursor()))
    assert torch.equal(groups[0].ids, ids.ids)


def test_other_documents_than_those_of_the_cursor_are_refused():
    made = list(Packer(from_texts(texts(40)), Letters(), Packing(8, rows=1)).contexts(Cursor()))[20].cursor
    for other in (texts(40, seed=1), texts(2)):
        with pytest.raises(Refused, match="document"):
            list(Packer(from_texts(other), Letters(), Packing(8, rows=1)).contexts(made))


@pytest.mark.parametrize(
    ("packing", "tokenizer", "words"),
    [
        (Packing(1), Letters(), "too small"),
        (Packing(rows=0), Letters(), "too small"),
        (Packing(bos="both"), Letters(bos=False), "no bos token"),
        (Packing(eos=True), Letters(eos=False), "no eos token"),
        (Packing(bos="often"), Letters(), "no policy"),
    ],
)
def test_packing_that_cannot_be_is_refused(packing, tokenizer, words):
    with pytest.raises(Refused, match=words):
        Packer(from_texts(["a"]), tokenizer, packing)


def test_no_tokens_and_no_tokenizer_are_refused():
    with pytest.raises(Refused, match="no token in them"):
        packed([""], Packing(4, "none"))
    with pytest.raises(Refused, match="without a tokenizer"):
        packed(["a"], Packing(4), None)
