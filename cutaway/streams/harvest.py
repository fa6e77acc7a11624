"""Harvest: the activations of many tokens to disk, in one random order over everything, ready to train on.

The model reads the documents once, no further than the deepest site; every token goes to a random bucket (`buckets`),
and when all are there the buckets are permuted and written as shards. Memory holds one flush and one bucket. What is
done is noted down at every flush; the same call goes on from there after an interruption, with the same bits at the
end as without it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cutaway.core.address import Address
from cutaway.core.files import read_tensors, write_json, write_tensors
from cutaway.core.progress import advance
from cutaway.core.record import counting, hash_text, machine, versions
from cutaway.core.refuse import Keyword, Refused
from cutaway.models.moments import Moments
from cutaway.streams.buckets import MOST, Buckets, Column
from cutaway.streams.folders import MANIFEST, NOTES, about, file_hash, finished, recalled, signed
from cutaway.streams.masks import MASKING, Masking
from cutaway.streams.packing import PACKING, Cursor, Packing
from cutaway.streams.reader import Models, Reader
from cutaway.streams.shards import KIND, MOMENTS, VERSION, WORDS, Shards
from cutaway.streams.sources import Documents

PARTS = "parts"
SHARD = 1 << 27  # bytes of a shard
_FLUSH = 1 << 26  # bytes that wait to be written
_EVERY = 30.0  # seconds between two notes


def harvest(
    model: Models,
    documents: Documents,
    sites: str | Address | Sequence[str | Address],
    out: str | Path,
    *,
    packing: Packing = PACKING,
    masking: Masking = MASKING,
    tokens: int | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    covariance: bool = False,
    shard: int = SHARD,
    fast_kernels: bool = True,
) -> Shards:
    """Write the activations at some sites of up to `tokens` tokens to the folder `out`, in a random order.

    `tokens` counts those that are kept; without it all documents are read. `dtype` is that of the files (the model's
    own if None), `covariance` adds the matrices to the moments, `shard` is the size of a file in bytes, `fast_kernels`
    as for `LiveStream`. The same call on the same folder goes on where it was interrupted, and gives back what is there
    if it had finished.

    Raises:
        Refused: a folder with something else, too little room on the disk, or what `LiveStream` refuses.
    """
    if (tokens is not None and tokens < 1) or shard < 1:
        raise Refused((Keyword("tokens", tokens), f", shard={shard}"), "both are at least 1", "leave them out")
    reader = Reader(model, documents, sites, packing, masking, dtype, fast_kernels)
    return _Harvest(reader, Path(out), tokens, seed, covariance, shard).run()


class _Harvest:
    """A harvest under way; it resumes from its notes alone."""

    def __init__(self, reader: Reader, out: Path, tokens: int | None, seed: int, covariance: bool, shard: int):
        self.reader, self.out, self.tokens, self.seed, self.shard = reader, out, tokens, seed, shard
        options = {"tokens": tokens, "seed": seed, "covariance": covariance, "shard": shard}
        self.key = hash_text(reader.key, repr(options))
        words = [Column(n, 0, d) for n, d in WORDS.items() if n != "mask" or not reader.rule.masking.drop]
        self.columns = [*(Column(a, w, reader.dtype) for a, w in reader.widths.items()), *words]
        self.row = sum(c.bytes for c in self.columns)
        self.moments = {a: Moments(w, covariance) for a, w in reader.widths.items()}
        self.cursor, self.kept, self.finished = Cursor(), 0, False
        self.rows: list[dict[str, Any]] = []
        self.cost = {"forwards": 0.0, "seconds": 0.0}
        buckets = min(MOST, 64 if tokens is None else max(1, -(-tokens * self.row // (2 * shard))))
        self.buckets = Buckets(out / PARTS, self.columns, [0] * buckets, seed)

    def run(self) -> Shards:
        """Go on to the end."""
        if finished(self.out, self.key):
            found = Shards(self.out, self.reader.model)
            self._clean()
            return found
        if (self.out / NOTES).is_file():
            self._recall()
        self._check_room()
        self._note()
        self.buckets.trim()
        if not self.finished:
            self._read()
        self._write_shards()
        self._write_manifest()
        return Shards(self.out)

    def _read(self) -> None:
        noted, start = time.monotonic(), time.perf_counter()
        before = dict(self.cost)
        with counting() as spent:
            for group in self.reader.groups(self.cursor):
                batch = group.batch
                if self.tokens is not None and len(batch) > self.tokens - self.kept:
                    batch = batch.rows(slice(self.tokens - self.kept))
                if len(batch):
                    for a, x in batch.acts.items():
                        self.moments[a].update(x)
                    words = [getattr(batch, c.name) for c in self.columns if c.name in WORDS]
                    self.buckets.put(group.cursor.context, [*batch.acts.values(), *words])
                self.kept += len(batch)
                self.cursor = group.after
                self.finished = self.kept == self.tokens
                self.cost = {
                    "forwards": before["forwards"] + spent.forwards,
                    "seconds": before["seconds"] + time.perf_counter() - start,
                }
                if self.tokens is not None:
                    advance(self.kept, self.tokens)
                if self.finished:
                    break
                if time.monotonic() - noted > _EVERY:
                    self._note()
                    noted = time.monotonic()
                elif self.buckets.pending > _FLUSH:
                    self.buckets.flush()
        if not self.kept:
            raise Refused("harvest", "every token is masked", "mask less")
        self.finished = True
        tensors = {n: t for a, m in self.moments.items() for n, t in m.tensors(f"{a}/").items()}
        write_tensors(self.out / MOMENTS, tensors, {"kind": "moments"})
        self._note()

    def _write_shards(self) -> None:
        size = max(1, self.shard // self.row)
        for tensors in self.buckets.shuffled(sum(r["tokens"] for r in self.rows), size):
            path = self.out / f"shard-{len(self.rows):05d}.safetensors"
            write_tensors(path, tensors, {"kind": KIND})  # two entries would come in any order, and change the sum
            self.rows.append(about(path) | {"tokens": len(tensors["ids"])})
            self._note()

    def _write_manifest(self) -> None:
        own = self.reader.identity()
        manifest = {
            "kind": KIND,
            "version": VERSION,
            "harvest": self.key,
            "tokens": self.kept,
            "asked": self.tokens,
            "sites": self.reader.widths,
            "dtype": own["dtype"],
            "seed": self.seed,
            "model": own["model"],
            "documents": own["documents"],
            "packing": own["packing"],
            "beginning": self.reader.packer.beginning,
            "masking": self.reader.rule.as_dict(),
            "computed": self.reader.noted_kernels(),
            "mean_norm": {a: m.mean_norm for a, m in self.moments.items()},
            "moments": file_hash(self.out / MOMENTS),
            "shards": self.rows,
            "cost": self.cost,
            "versions": versions(),
            "machine": machine(),
        }
        write_json(self.out / MANIFEST, signed(manifest))
        self._clean()

    def _clean(self) -> None:
        (self.out / NOTES).unlink(missing_ok=True)
        shutil.rmtree(self.out / PARTS, ignore_errors=True)

    def _note(self) -> None:
        """Flush, and note down what is done; moments have a file of their own once they are finished."""
        self.buckets.flush()
        moments = {} if self.finished else self.moments
        tensors = {n: t for a, m in moments.items() for n, t in m.tensors(f"{a}/").items()}
        rule = self.reader.rule
        header = {
            "kind": "harvest",
            "harvest": self.key,
            "cursor": self.cursor.as_dict(),
            "kept": self.kept,
            "finished": self.finished,
            "lengths": self.buckets.lengths,
            "rows": self.rows,
            "cost": self.cost,
            "thresholds": rule.thresholds,
            "way": self.reader.noted_kernels(),
            "counts": rule.counts,
        }
        write_tensors(self.out / NOTES, tensors, header)

    def _recall(self) -> None:
        tensors, h = recalled(self.out, self.key)
        self.cursor, self.kept, self.finished = Cursor(**h["cursor"]), h["kept"], h["finished"]
        self.buckets.lengths, self.rows, self.cost = h["lengths"], h["rows"], h["cost"]
        self.reader.restore_kernels(h["way"])
        self.reader.rule.thresholds, self.reader.rule.counts = h["thresholds"], h["counts"]
        tensors = read_tensors(self.out / MOMENTS)[0] if self.finished else tensors
        self.moments = {a: Moments.from_tensors(tensors, f"{a}/") for a in self.moments}

    def _check_room(self) -> None:
        if self.tokens is None:
            return
        need = 2 * self.row * self.tokens - self.row * self.kept  # the buckets stay until the shards are written
        free = shutil.disk_usage(self.out).free
        if need > free:
            why = f"it needs {need / 2**30:.1f} GiB while it works, and {free / 2**30:.1f} GiB are free"
            raise Refused(f"a harvest of {self.tokens} tokens to {str(self.out)!r}", why, "ask for fewer, or bfloat16")
