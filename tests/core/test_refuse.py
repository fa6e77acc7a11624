"""A refusal names what, why and what instead, in the caller's own words."""

import pytest

from cutaway.core.out_of_memory import in_halves, raising_out_of_memory
from cutaway.core.refuse import OutOfMemory, Refused, nearest


def test_message_has_three_lines_and_its_data():
    refused = Refused("file 'x'", "it is missing", "check the path")
    assert str(refused).splitlines() == ["file 'x'", "  why: it is missing", "  instead: check the path"]
    assert refused.as_dict() == {"what": "file 'x'", "why": "it is missing", "instead": "check the path"}


def test_nearest_offers_close_words_only():
    assert nearest("resid_pst", ["resid_post", "resid_pre", "z"]).split(", ")[0] == "resid_post"
    assert nearest("qqqq", ["resid_post", "z"]) == ""


@pytest.mark.parametrize(
    ("error", "kind"),
    [(MemoryError(), OutOfMemory), (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), OutOfMemory),
     (RuntimeError("memory layout"), RuntimeError), (Refused("memory", "memory", "memory"), Refused)],
)  # fmt: skip
def test_only_memory_that_runs_out_is_a_refusal_of_its_kind(error, kind):
    with pytest.raises(Exception) as found, raising_out_of_memory("a batch"):
        raise error
    assert type(found.value) is kind


def test_work_is_halved_by_the_kind_of_a_refusal_and_not_by_its_words():
    sizes = list[int]()

    def work(part):
        sizes.append(len(part))
        if len(part) > 1:
            raise OutOfMemory("x", "no room", "y")

    in_halves(range(3), 3, work)
    assert sizes == [3, 1, 2, 1, 1]
    with pytest.raises(Refused, match="memory"):
        in_halves(range(3), 3, lambda part: (_ for _ in ()).throw(Refused("x", "the memory is not enough", "y")))
