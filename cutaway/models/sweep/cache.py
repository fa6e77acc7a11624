"""The ledger of a sweep: what is done is written down, so that an interrupted sweep goes on where it stopped.

A file is tied to its sweep by a hash of model, prompts, edits and metric; another sweep's file is refused, never mixed
in. `with resuming(folder): …` keeps the ledger of every sweep inside it, each in a file named by that hash, so that a
whole analysis started again computes only what it had not done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.content import content
from cutaway.core.files import read_tensors, reading, write_tensors
from cutaway.core.record import versions
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import generator
from cutaway.models.access import taps
from cutaway.models.access.reading import Measure, OfLogits, Reads, Seen, measure_of
from cutaway.models.edits.edit import Edit
from cutaway.models.loading.identity import described
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

_EVERY = 20.0  # seconds between two writes
_FOLDER: ContextVar[Path | None] = ContextVar("cutaway_resuming", default=None)


@contextmanager
def resuming(folder: Path | str) -> Iterator[None]:
    """Within the block, what sweeps have done is kept in `folder`, also when they are interrupted, and not done again.

    Raises:
        Refused: the folder is a file, or cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(
            Keyword("resume", str(folder)), f"it is no folder to write in ({error.strerror})", "name another"
        ) from error
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def ledger_folder() -> Path | None:
    """Return the folder of the innermost `resuming` block, if any."""
    return _FOLDER.get()


class Ledger:
    """Values of the variants and prompts done so far, [variant, batch, …]; without `path` in memory only."""

    def __init__(self, variants: int, prompts: int, path: Path | None = None, key: str = ""):
        self.path, self.key = path, key
        self.values: Tensor | None = None
        self.done: Bool[Tensor, "variant batch"] = torch.zeros(variants, prompts, dtype=torch.bool)
        self.written = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    @classmethod
    def open(cls, variants: int, prompts: int, path: Path | None, key: Callable[[], str]) -> Ledger:
        """Open the ledger of a sweep: in its own file, in the folder of `resuming`, or in memory only."""
        folder = ledger_folder()
        if path is None and folder is None:
            return cls(variants, prompts)
        made = key()
        file = path if path is not None or folder is None else folder / f"{made}.safetensors"
        return cls(variants, prompts, file, made)

    def put(self, variants: Sequence[int], rows: Sequence[int], values: Float[Tensor, "some row *metric"]) -> None:
        """Enter the values of some variants on some prompts."""
        if self.values is None:
            self.values = values.new_zeros((*self.done.shape, *values.shape[2:]), dtype=torch.float32)
        place = torch.tensor(list(variants))[:, None], torch.tensor(list(rows))[None]
        self.values[tuple(i.to(values.device) for i in place)] = values.detach().float()
        self.done[place] = True
        if self.path is not None and time.monotonic() - self.written > _EVERY:
            self.write()

    def write(self) -> None:
        """Write what is done."""
        if self.path is not None and self.values is not None:
            tensors = {"values": self.values, "done": self.done.to(torch.uint8)}
            write_tensors(self.path, tensors, {"kind": "sweep", "sweep": self.key})
            self.written = time.monotonic()

    def _read(self, path: Path) -> None:
        tensors, header = read_tensors(path)
        if header.get("sweep") != self.key:
            why = "it belongs to another sweep: other model, prompts, edits or metric"
            raise Refused(Keyword("resume", str(path)), why, "give the file of this sweep, or a new name")
        with reading(path):
            values, done = tensors["values"], tensors["done"].bool()
            if done.shape != self.done.shape or values.shape[:2] != done.shape:
                raise ValueError(f"it has the shapes {tuple(done.shape)} and {tuple(values.shape)}")
            self.values, self.done = values, done


def sweep_key(model: Model, tokens: Tokens, variants: Sequence[Sequence[Edit]], metric: Measure | OfLogits) -> str:
    """Return the key that ties a file to its sweep: versions, model, edits around it, prompts, edits and metric, whole.

    A metric is known by what it is and, if it reads last logits alone, by what it makes of seeded random ones.

    Raises:
        Refused: an edit or a metric that holds something whose value cannot be read.
    """
    values, measure = None, measure_of(metric)
    if measure.reads == Reads():
        logits = torch.randn(len(tokens), model.shape.d_vocab, generator=generator(0)).to(model.device)
        values = measure(Seen(logits), torch.arange(len(tokens), device=logits.device))
    prompts = (tokens.ids, tokens.mask, *((tokens.tails,) if tokens.tails else ()))
    return content((*model_key(model), *prompts, variants, metric, values))


def model_key(model: Model) -> tuple[object, ...]:
    """Return what ties kept numbers to a model: versions, its identity, and the edits around it.

    Raises:
        Refused: something is attached to it that cannot be read.
    """
    who = {name: said for name, said in model.identity().items() if name != "name"}
    # Numbers are reused under this key: every byte of the weights is read again, and everything attached must be read.
    who["weights"], (_, unread) = model.fingerprint(fresh=True), described(model.hf)
    if unread:
        what, where = "a sweep that is kept", ", ".join(unread)
        raise Refused(what, f"nobody can tell what is attached at {where}", "sweep without resume, or take it off")
    return versions(), who, taps.around(model.anatomy)
