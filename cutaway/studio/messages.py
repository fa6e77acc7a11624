"""Messages: what the page and the tools send and get, as typed models; the OpenAPI document comes from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_TEXT = 20_000  # characters of a prompt
Text = Annotated[str, Field(max_length=MOST_TEXT)]
Name = Annotated[str, Field(max_length=200)]
State = Literal["waiting", "running", "done", "refused", "cancelled", "lost"]


class Message(BaseModel):
    """The base of all messages: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(Message):
    """The base of questions about a model; `model` is one of those that the studio was started with."""

    model: Name = ""


# --- what there is


class Entry(Message):
    """An entry of a method's form."""

    name: str
    type: Literal["string", "integer", "number", "boolean"]
    default: Any = None
    required: bool
    nullable: bool
    choices: list[str]
    several: bool
    help: str
    subject: str
    instead: list[str]


class MethodCard(Message):
    """A method: its question, its control, and its form."""

    name: str
    room: str
    answers: str
    paper: str
    control: str
    rung: str
    cost: str
    results: list[str]
    form: list[Entry]
    json_schema: dict[str, Any]


class TaskCard(Message):
    """A task by name."""

    name: str
    metric: str
    example: str
    target: str
    foil: str
    corrupt: str


class ModelCard(Message):
    """A model: its sizes and what can be asked of it."""

    name: str
    source: str
    state: Literal["absent", "loading", "ready", "failed"]
    family: str = ""
    sizes: dict[str, int] = {}
    tasks: list[TaskCard] = []
    sites: list[str] = []
    why: str = ""


class FileCard(Message):
    """A file that a form may name as `file:ID`."""

    id: str
    name: str


class About(Message):
    """The studio: its version, models, files and screens."""

    version: str
    models: list[ModelCard]
    files: list[FileCard]
    methods: list[MethodCard]


class Refusal(Message):
    """A refusal: what, why, and what instead."""

    what: str
    why: str
    instead: str


# --- results


class Drawing(Message):
    """The picture of a field, as a fragment of HTML that holds no script and whose labels are escaped."""

    field: str
    title: str
    axes: list[str]
    unit: str
    html: str
    numbers: str


class Shown(Message):
    """A result as the page shows it: pictures, numbers, how it was computed, and how to repeat it."""

    id: str
    kind: str
    method: str
    question: str
    paper: str
    control: str
    rung: str
    summary: list[str]
    drawings: list[Drawing]
    empty: list[str]
    how: str
    python: str
    command: str
    seconds: float | None = None


class Values(Request):
    """A call of a method: the values of its form."""

    method: Name
    values: dict[str, Any] = {}


class Cost(Message):
    """The cost of a call before it is made."""

    lines: list[str]
    forwards: float | None
    backwards: float | None
    seconds: float | None
    memory: int | None


class ResultOf(Request):
    """A result by its id, and the fields to draw; all that have a value if none is named."""

    result: Name
    fields: list[Name] = []


class TwoResults(Request):
    """Two results of one kind by their ids, and the fields to draw of their difference."""

    first: Name
    second: Name
    fields: list[Name] = []


class Data(Message):
    """A result as data: its fields with axes and values, labels, units, and its record."""

    kind: str
    fields: dict[str, Any]
    labels: dict[str, Any]
    units: dict[str, Any]
    facts: dict[str, Any]
    reasons: dict[str, Any]
    record: dict[str, Any]


class Page(Message):
    """A page of HTML that opens from disk."""

    html: str


class Lines(Message):
    """A result as text of at most 2 kB."""

    text: str


class Claim(Request):
    """A sentence about a result."""

    result: Name
    sentence: Text


class Judged(Message):
    """A sentence judged by the rung of a result: the words that claim more than the numbers support."""

    allowed: bool
    beyond: list[str]
    rung: str
    instead: str


# --- jobs


class Job(Message):
    """A call that runs in the background."""

    id: str
    method: str
    model: str
    values: dict[str, Any]
    state: State
    done: float
    total: float
    made: float
    ended: float | None
    result: str | None
    refusal: Refusal | None


# --- prompts


class Prompt(Request):
    """A prompt."""

    prompt: Text
    top: Annotated[int, Field(ge=1, le=100)] = 10


class Token(Message):
    """A token: its id and its text."""

    id: int
    text: str


class Guess(Message):
    """A next token with its probability and its logit."""

    id: int
    text: str
    probability: float
    logit: float


class Predicted(Message):
    """The tokens of a prompt, and what the model expects next."""

    tokens: list[Token]
    next: list[Guess]


# --- interventions


class EditEntry(Message):
    """A change inside the model, at all positions or at some of them.

    `number` is the factor of `scale` and the strength of `steer` and `latent`; `file` has the direction or dictionary.
    """

    kind: Literal["zero", "mean", "resample", "patch", "scale", "steer", "latent"]
    address: Name
    positions: Annotated[list[int], Field(max_length=64)] = []
    number: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    file: Name = ""
    latent: Annotated[int, Field(ge=0)] = 0


class Intervene(Request):
    """Changes of a prompt's run; `other` is the prompt that `patch` takes values of."""

    prompt: Text
    other: Text = ""
    target: Name = ""
    foil: Name = ""
    edits: Annotated[list[EditEntry], Field(min_length=1, max_length=32)]
    top: Annotated[int, Field(ge=1, le=30)] = 8
    words: Annotated[int, Field(ge=0, le=64)] = 0
    samples: Annotated[int, Field(ge=1, le=100)] = 20
    seed: Annotated[int, Field(ge=0)] = 0


class Effect(Message):
    """A change beside the band that the same changes elsewhere leave; it is marked outside of it."""

    value: float
    low: float
    high: float
    marked: bool


class ChangedToken(Message):
    """A next token before and after."""

    id: int
    text: str
    probability: list[float]
    logit: list[float]
    change: Effect
    logit_change: Effect


class Intervened(Message):
    """Next tokens before and after changes; `values` is the call of `patching.intervene` that gives them."""

    effect: Effect
    unit: str
    target: str
    foil: str
    divergence: Effect
    tokens: list[ChangedToken]
    text: str
    edited_text: str
    band: str
    how: str
    python: str
    command: str
    values: dict[str, Any]


# --- attention


class Attention(Request):
    """The attention of a layer on a prompt: of one head or of all, for `count` queries from `start` on.

    `other` is a second prompt, whose attention is answered too.
    """

    prompt: Text
    other: Text = ""
    layer: Annotated[int, Field(ge=0)]
    head: Annotated[int, Field(ge=0)] | None = None
    top: Annotated[int, Field(ge=1, le=32)] = 8
    start: Annotated[int, Field(ge=0)] = 0
    count: Annotated[int, Field(ge=1, le=256)] = 256


class HeadLooks(Message):
    """The largest weights of each query of a head, the largest first, with the positions of their keys."""

    head: int
    keys: list[list[int]]
    weights: list[list[float]]


class Looked(Message):
    """The tokens of a prompt, and the attention of some of them."""

    tokens: list[Token]
    heads: list[HeadLooks]


class Attended(Looked):
    """The attention of a prompt from the query `start` on.

    Of two prompts `difference` is the first minus the second, entry by entry; `apart` says why there is none.
    """

    start: int
    other: Looked | None = None
    difference: list[HeadLooks] = []
    apart: str = ""
