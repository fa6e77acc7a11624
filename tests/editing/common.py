"""What the tests of this room share: requests in the words of tiny models, and the miniworld's texts."""

from functools import cache
from itertools import islice

from cutaway.editing import Probe, Request, Requests
from cutaway.tasks.prompts import Prompts
from cutaway.zoo.miniworld.documents import WorldDocuments
from tests.conformance.subjects import miniworld, numbered


def numbered_requests() -> Requests:
    """Two requests over `w…` with objects of one and of two tokens, each with a paraphrase and a neighbour."""
    made = []
    for i, new in ((0, "w90"), (1, "w91 w92")):
        about = numbered(10 + i, 20 + i)
        probes = (
            Probe("paraphrase", f"w5 {about} w6", new),
            Probe("neighbourhood", f"{numbered(30 + i, 40)} w7 w8", "w80"),
        )
        made.append(Request(about, f"{about} w7 w8", new, "w80", probes))
    return Requests(tuple(made), "numbered")


def numbered_texts() -> Prompts:
    """Twelve texts of random words."""
    return Prompts(tuple(numbered(*((7 * i + 3 * k * k) % 99 + 1 for k in range(20))) for i in range(12)))


@cache
def documents(n: int = 300) -> Prompts:
    """Documents of the miniworld."""
    return Prompts(tuple(islice(WorldDocuments(miniworld().world).read(0), n)), "documents")
