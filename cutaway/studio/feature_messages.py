"""Messages of the screen of features: stores, their tables and pages, searches, and texts of yours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cutaway.core.latent_row import LatentRow
from cutaway.studio.messages import Message, Name, Request, Shown, Text

Latent = Annotated[int, Field(ge=0, lt=1 << 31)]


class StoreCard(Message):
    """A store of features: its dictionaries with the number of latents of each, and the tokens that count."""

    id: str
    name: str
    model: str
    dictionaries: dict[str, int]
    opened: dict[str, str | None]
    tokens: int
    held_out: int
    labels: int


class Stores(Message):
    """The stores of the studio, and the dictionaries that ship with the model, which can be harvested."""

    stores: list[StoreCard]
    dictionaries: list[str]


class InStore(Request):
    """A dictionary of a store; its only one if none is named."""

    store: Name
    dictionary: Name = ""


class LatentsOf(InStore):
    """A page of the table of latents."""

    sort: Literal["latent", "density", "largest", "mean", "F1", "label"] = "density"
    descending: bool = True
    only: Literal["all", "alive", "dead", "rare", "dense", "start", "ruled", "unruled"] = "alive"
    text: Name = ""
    after: Name = ""
    most: Annotated[int, Field(ge=1, le=200)] = 50


class LatentPage(Message):
    """A page of the table, how many latents the filters leave, and the cursor of the next page."""

    rows: list[LatentRow]
    total: int
    next: str


class Search(InStore):
    """A search: words of labels, `token:…`, `phrase:…`, `fires-on:…`, `raises:…` or `like:…`."""

    query: Name
    most: Annotated[int, Field(ge=1, le=100)] = 30


class Hit(Message):
    """A latent that was found, why beside what chance would give, and its label."""

    dictionary: str
    latent: int
    why: str
    label: str


class Hits(Message):
    """Latents that were found, the best first, and what was looked for."""

    by: str
    hits: list[Hit]


class LatentOf(InStore):
    """A latent of a store."""

    latent: Latent


class LabelCard(Message):
    """A description of a latent with its scores."""

    source: str
    text: str
    scores: dict[str, Any]


class StripToken(Message):
    """A token of a strip: its text, and the activation on it; None where it is masked."""

    text: str
    value: float | None


class Strip(Message):
    """An example: its activation, the quantiles between which it lies, whether it is held out, and its tokens."""

    value: float
    place: str
    held_out: bool
    peak: int
    tokens: list[StripToken]


class FeaturePage(Message):
    """The page of a latent: its row, labels, examples and card."""

    row: LatentRow
    store: str
    dictionary: str
    labels: list[LabelCard]
    strips: list[Strip]
    shown: Shown


class ReadText(InStore):
    """A text to be read by the latents of a dictionary, one of them in particular if it is named.

    `other` is a second text, which is read too.
    """

    text: Text
    other: Text = ""
    latent: Latent | None = None
    top: Annotated[int, Field(ge=1, le=20)] = 6
    dense: Annotated[float, Field(ge=0, le=1)] = 1.0


class Active(Message):
    """A latent that is active on a token, also as a share of its largest activation in the store."""

    latent: int
    value: float
    share: float
    density: float
    label: str


class ReadToken(Message):
    """A token of a text: the share that the code misses, the named latent's activation, and its strongest latents."""

    text: str
    special: bool
    error: float
    active: int
    value: float | None
    top: list[Active]


class Changed(Message):
    """A latent on two tokens, and the difference of its activations, also as a share of its largest in the store."""

    latent: int
    value: float
    other: float
    change: float
    share: float
    density: float
    label: str


class ChangedRead(Message):
    """A token of each of two texts, the named latent's difference, and the latents that differ most."""

    text: str
    other: str
    special: bool
    value: float | None
    top: list[Changed]


class ReadingOf(Message):
    """A text as latents read it, with the largest activation of the named one in the store.

    Of two texts `difference` is the first minus the second, token by token; `apart` says why there is none.
    """

    tokens: list[ReadToken]
    largest: float | None
    python: str
    other: tuple[ReadToken, ...] = ()
    difference: tuple[ChangedRead, ...] = ()
    apart: str = ""


class DirectionOf(Message):
    """A latent's decoder row as a direction: its id, the sites, and the length of one step."""

    id: str
    sites: list[str]
    step: float


# --- jobs


class Harvest(Request):
    """A harvest of dictionaries that ship with the model, with rules for their latents."""

    dictionary: Name
    tokens: Annotated[int, Field(ge=1_000, le=2_000_000)] = 20_000
    seed: int = 0


class CausalCard(LatentOf):
    """The card of a latent with what its ablation changes."""

    contexts: Annotated[int, Field(ge=1, le=64)] = 8
    samples: Annotated[int, Field(ge=1, le=16)] = 4
    seed: int = 0


class ComparedStores(InStore):
    """Two dictionaries whose latents are matched by where they fire."""

    second_store: Name
    second_dictionary: Name = ""
    samples: Annotated[int, Field(ge=1, le=8)] = 2
    seed: int = 0
