"""Activations on disk: shards in one random order over everything, a manifest that says what they are, exact reading.

A folder holds `manifest.json` (model, documents, packing, masking, sites, dtype, tokens, the SHA-256 of every file),
`moments.safetensors`, and shards `shard-00000.safetensors` …, each with one tensor a site [token, width] and the words
of the tokens (`ids`, `document`, `context`, `position`, and `mask` where masked tokens were kept). Shards are mapped
into memory, and each is checked against its sum before its first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.files import held, read_tensors
from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused, nearest
from cutaway.core.repeat import Made
from cutaway.models.model import Model
from cutaway.models.moments import Moments
from cutaway.streams.batch import Batch
from cutaway.streams.folders import check_model, check_sum, read_manifest
from cutaway.streams.order import permutation
from cutaway.streams.reader import storage

MOMENTS, KIND, VERSION = "moments.safetensors", "activations", 2
WORDS = {"ids": torch.int32, "document": torch.int64, "context": torch.int64, "position": torch.int32,
         "mask": torch.uint8}  # fmt: skip
_OPEN = 4  # shards mapped at once


class Shards:
    """A folder of activations.

    Attributes:
        folder: where they lie.
        manifest: what they are.
        made: how they are opened again.

    Raises:
        Refused: no manifest, one that was changed, files missing or of other sizes, or activations of another model
            than the one given.
    """

    def __init__(self, folder: str | Path, model: Model | None = None):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, KIND, VERSION, _files)
        if model is not None:
            check_model(self.folder, self.manifest, model)
        whole = str(self.folder.absolute())
        self.made: Made | None = Made(f"ca.streams.Shards({whole!r})", {"": whole})
        self._checked: set[str] = set()
        self._map = lru_cache(_OPEN)(self._opened)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.manifest["tokens"]

    @property
    def widths(self) -> dict[str, int]:
        """Width of the activations by address."""
        return dict(self.manifest["sites"])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the activations are kept in."""
        return storage(self.manifest["dtype"])

    @property
    def beginning(self) -> str:
        """The token that contexts begin with, in words."""
        return self.manifest.get("beginning", f"beginning-of-text token: {self.manifest['packing']['bos']}")

    @property
    def content(self) -> str:
        """Hash of the activations and their order."""
        return hash_text(*(row["sha256"] for row in self.manifest["shards"]))

    def identity(self) -> dict[str, Any]:
        """Return what the activations are, for records."""
        of = {n: self.manifest[n] for n in ("model", "documents", "packing", "masking")}
        return {"hash": self.content, "tokens": self.tokens, "sites": list(self.widths), **of}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"tokens": self.tokens}

    def moments(self) -> dict[str, Moments]:
        """Return the moments of the activations at each site, over all tokens that are kept.

        Raises:
            Refused: the file was changed.
        """
        path = self.folder / MOMENTS
        check_sum(path, self.manifest["moments"])
        tensors, _ = read_tensors(path)
        return {a: Moments.from_tensors(tensors, f"{a}/") for a in self.widths}

    def verify(self) -> None:
        """Check every file against its sum.

        Raises:
            Refused: a file was changed.
        """
        self.moments()
        for row in self.manifest["shards"]:
            check_sum(self.folder / row["file"], row["sha256"])

    def shard(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of one shard, mapped into memory, checked before its first use.

        Raises:
            Refused: the file was changed.
        """
        return self._map(number)

    def stream(
        self,
        sites: str | Sequence[str] | None = None,
        *,
        batch: int = 4096,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        epochs: int | None = 1,
        part: tuple[int, int] = (0, 1),
    ) -> ShardStream:
        """Return the batches in the order on disk; later epochs permute the shards and the tokens in each, by the seed.

        `part=(i, n)` gives the i-th of n equal parts of every batch, for n processes.

        Raises:
            Refused: a site that was not harvested, or parts that cannot be made.
        """
        wanted = list(self.widths) if sites is None else [sites] if isinstance(sites, str) else list(sites)
        for a in wanted:
            if a not in self.widths:
                near = nearest(a, self.widths)
                why = "it was not harvested" + (f"; near: {near}" if near else "")
                raise Refused(f"site {a}", why, f"there are {', '.join(self.widths)}")
        return ShardStream(self, wanted, batch, storage(dtype or self.dtype), seed, epochs, part)

    def _opened(self, number: int) -> dict[str, Tensor]:
        row = self.manifest["shards"][number]
        path = self.folder / row["file"]
        if row["file"] not in self._checked:
            check_sum(path, row["sha256"])
            self._checked.add(row["file"])
        return read_tensors(path)[0]  # views of the mapped file


class ShardStream:
    """Batches from shards; see `Shards.stream`. Every batch has the same size but the very last."""

    def __init__(
        self,
        shards: Shards,
        sites: list[str],
        batch: int,
        dtype: torch.dtype,
        seed: int,
        epochs: int | None,
        part: tuple[int, int],
    ):
        if batch < 1 or not 0 <= part[0] < part[1] or batch % part[1]:
            raise Refused(
                f"batch={batch}, part={part}", "it cannot be cut so", "use (i, n), i < n, n a divisor of batch"
            )
        self.shards, self.sites, self.size, self.dtype = shards, sites, batch, dtype
        self.seed, self.epochs, self.part = seed, epochs, part
        self._token = 0  # handed out so far, over all epochs and parts
        self._epoch: tuple[int, list[int], list[int]] = (-1, [], [])  # number, order of the shards, where each begins

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by address."""
        return {a: self.shards.widths[a] for a in self.sites}

    @property
    def beginning(self) -> str:
        """The token that contexts begin with, in words."""
        return self.shards.beginning

    @property
    def epoch(self) -> int:
        """Number of times all tokens had been handed out before the last one."""
        return max(0, self._token - 1) // self.shards.tokens

    def moments(self) -> dict[str, Moments]:
        """Return the moments of each site over all tokens of the shards; none where masked tokens were kept and counted
        with them.

        Raises:
            Refused: the file was changed.
        """
        if not self.shards.manifest["masking"]["dropped"]:
            return {}
        found = self.shards.moments()
        return {a: found[a] for a in self.sites}

    def identity(self) -> dict[str, Any]:
        """Return the model and documents of the manifest and the options of reading, for records."""
        m = self.shards.manifest
        own = {"sites": self.sites, "batch": self.size, "seed": self.seed, "dtype": str(self.dtype).split(".")[1]}
        return {
            "kind": "shards",
            "content": self.shards.content,
            "model": m["model"],
            "documents": m["documents"],
            "packing": m["packing"],
            **own,
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        whole = self.shards.tokens
        end = None if self.epochs is None else whole * self.epochs
        low, high = self._token, self._token + self.size
        if end is not None:
            high = min(high, end)
        if low >= high:
            raise StopIteration
        i, n = self.part
        mine = (low + (high - low) * i // n, low + (high - low) * (i + 1) // n)
        pieces = list(self._pieces(*mine))
        self._token = high
        acts = {a: _joined([p[a].to(self.dtype) for p in pieces]) for a in self.sites}
        masks = [p["mask"].bool() if "mask" in p else torch.ones(len(p["ids"]), dtype=torch.bool) for p in pieces]
        words = {w: _joined([p[w].long() for p in pieces]) for w in WORDS if w != "mask"}
        return Batch(acts, mask=_joined(masks), **words)

    def state(self) -> dict[str, Any]:
        """Return the cursor, JSON-ready."""
        return {"kind": "shards", "key": self._key(), "token": self._token}

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken; the part may be another.

        Raises:
            Refused: the state of another stream: other activations, sites, batch, dtype or seed.
        """
        if state.get("key") != self._key():
            why = "it is of another stream: other activations, sites, batch, dtype or seed"
            raise Refused("a stream's state", why, "make the stream as it was made then")
        self._token = int(state["token"])
        return self

    def _pieces(self, low: int, high: int) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of tokens `low` to `high`, cut where shards and epochs end."""
        whole = self.shards.tokens
        while low < high:
            epoch, at = divmod(low, whole)
            order, begins = self._order(epoch)
            n = next(n for n in reversed(range(len(order))) if begins[n] <= at)
            number, first = order[n], at - begins[n]
            size = self.shards.manifest["shards"][number]["tokens"]
            last = min(size, first + high - low)
            chosen: slice | Tensor = slice(first, last)
            if epoch:
                chosen = self._within(epoch, number, size)[first:last]
            names = [*self.sites, *(w for w in WORDS if w in self.shards.shard(number))]
            yield {name: self.shards.shard(number)[name][chosen] for name in names}
            low += last - first

    def _order(self, epoch: int) -> tuple[list[int], list[int]]:
        if self._epoch[0] != epoch:
            rows = self.shards.manifest["shards"]
            order = permutation(len(rows), self.seed, "epoch", epoch).tolist() if epoch else list(range(len(rows)))
            sizes = [rows[n]["tokens"] for n in order]
            self._epoch = (epoch, order, [0, *accumulate(sizes)][:-1])
        return self._epoch[1:]

    def _within(self, epoch: int, number: int, size: int) -> Int[Tensor, "token"]:
        return permutation(size, self.seed, "epoch", epoch, "shard", number)

    def _key(self) -> str:
        return hash_text(self.shards.content, *self.sites, str(self.size), str(self.dtype), str(self.seed))


def _files(m: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the shards that a manifest names, after checking all entries that are read, even if its key is valid."""
    for name, kind in (("tokens", int), ("dtype", str), ("moments", str), ("model", dict), ("masking", dict)):
        held(m, name, kind)
    sites, rows = held(m, "sites", dict), held(m, "shards", list)
    for site in sites:
        held(sites, site, int)
    for row in rows:
        held(row, "tokens", int)
    if sum(row["tokens"] for row in rows) != m["tokens"] or any(row["tokens"] < 1 for row in rows) or not sites:
        raise ValueError(f"its shards do not hold the {m['tokens']} tokens and {len(sites)} sites that it names")
    return rows


def _joined(parts: list[Tensor]) -> Tensor:
    """Return a tensor of its own, never a view of a mapped file."""
    return torch.cat(parts) if len(parts) > 1 else parts[0].clone()
