"""Harvest: everything that a store knows about the latents of dictionaries, in one pass of the model for all of them.

The model reads documents no further than the deepest site that any dictionary reads. Contexts that were seen before
are left out; special tokens and sinks are masked and counted. Memory grows with tokens by fingerprints of contexts
(about a byte per token), and by random examples until every latent has reached its octaves of activation: about one
octave each time that tokens double. Everything else goes to files as soon as half a million entries of codes, or
131,072 tokens, wait. What is done is noted down from time to time, and the same call goes on from there after an
interruption, with the same bits at the end as without it. Several processes (torchrun) share the contexts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from cutaway.core.files import write_tensors
from cutaway.core.progress import advance
from cutaway.core.record import counting, hash_text
from cutaway.core.refuse import Keyword, Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features.store.assemble import Parts, assemble, joined
from cutaway.features.store.corpus import CODED, COUNTED, corpus_rows, counts, fate, rows_of
from cutaway.features.store.dictionaries import described, named
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.hashes import HashedDocuments, Seen
from cutaway.features.store.shelf import Columns, Shelf, by_latent
from cutaway.features.store.tally import Entries, Rows, Tally
from cutaway.features.store.tokenizer import tokenizer_text
from cutaway.models.model import Model
from cutaway.models.sweep.processes import processes, rank
from cutaway.streams.folders import MANIFEST, NOTES, finished, recalled
from cutaway.streams.masks import MASKING, Masking
from cutaway.streams.packing import PACKING, Contexts, Cursor, Packing
from cutaway.streams.reader import Group, Reader
from cutaway.streams.sources import Documents

PART = "part-{}"
ENTRIES = 1 << 19  # of a file of codes
_EVERY = 30.0  # seconds between two notes, or more where noting takes long
_PLACES = (1 << 31) - 1


@dataclass(frozen=True)
class Keep:
    """Sizes of what is kept of each latent.

    Attributes:
        top: number of largest examples, of different contexts.
        samples: number of random examples from each octave of |value|.
        window: tokens around each example whose activations are kept.
        partners: number of latents that fire together with it.
        codes: share of the documents whose whole codes are kept, which rules are scored on.
        score: share of the documents that are held out for scores.
    """

    top: int = 20
    samples: int = 3
    window: int = 32
    partners: int = 10
    codes: float = 1.0
    score: float = 0.5

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("top", "samples", "window", "partners")}
        small = next((n for n, size in sizes.items() if size < 1), None)
        if small is not None:
            raise Refused(Keyword(small, sizes[small]), "it is at least 1", "use for example 20")
        odd = next((n for n in ("codes", "score") if not 0 <= getattr(self, n) <= 1), None)
        if odd is not None:
            raise Refused(Keyword(odd, getattr(self, odd)), "it is a share of the documents", "use 0 to 1")


KEEP = Keep()


def harvest(
    model: Model,
    dictionaries: Dictionary | Sequence[Dictionary] | Mapping[str, Dictionary],
    documents: Documents,
    out: str | Path,
    *,
    packing: Packing = PACKING,
    masking: Masking = MASKING,
    tokens: int | None = None,
    keep: Keep = KEEP,
    like: FeatureStore | None = None,
    seed: int = 0,
) -> FeatureStore:
    """Write the store of features of one or several dictionaries of a model to the folder `out`.

    The same call on the same folder goes on where it was interrupted, and gives back what is there if it had finished.

    Args:
        model: the model that the dictionaries are of.
        dictionaries: the dictionaries, by name if they are to have names other than their sites.
        documents: the text.
        out: a folder, new or of the same call.
        packing: how documents fill contexts.
        masking: which tokens do not count.
        tokens: read contexts until they hold this many tokens; all documents if None.
        keep: how much is kept of each latent.
        like: a store whose thresholds of sinks are used, so that both can be merged.
        seed: of random examples, and of the halves of the documents.

    Raises:
        Refused: a folder with something else, a dictionary of other sites or of several models, or no documents.
    """
    if tokens is not None and tokens < 1:
        raise Refused(Keyword("tokens", tokens), "it is at least 1", "leave it out")
    folder, several = Path(out), processes()
    job = _Job(model, named(dictionaries), documents, packing, masking, tokens, keep, like, seed)
    if several == 1:
        return _Harvest(job, folder, (0, 1)).run()
    _Harvest(job, folder / PART.format(rank()), (rank(), several)).run()
    dist.barrier()
    if rank() == 0:
        _join(folder, several)
    dist.barrier()
    return FeatureStore(folder, model)


@dataclass(frozen=True)
class _Job:
    """The arguments of a harvest."""

    model: Model
    dictionaries: Mapping[str, Dictionary]
    documents: Documents
    packing: Packing
    masking: Masking
    tokens: int | None
    keep: Keep
    like: FeatureStore | None
    seed: int


def _join(folder: Path, several: int) -> None:
    """Make one store of those of all processes."""
    parts = [folder / PART.format(i) for i in range(several)]
    if not (folder / MANIFEST).is_file():
        joined([FeatureStore(p) for p in parts], folder, interleaved=True)
    for p in parts:
        shutil.rmtree(p, ignore_errors=True)


class _Harvest:
    """A harvest under way, or one process's part of it; it resumes from its notes alone."""

    def __init__(self, job: _Job, out: Path, part: tuple[int, int]):
        self.job, self.out, self.part = job, out, part
        tokenizer = job.model.tokenizer
        packing = job.packing.resolved(tokenizer, job.documents)
        self.documents = HashedDocuments(job.documents)
        sites = list(dict.fromkeys(s for d in job.dictionaries.values() for s in d.reads))
        self.reader = Reader(job.model, self.documents, sites, packing, replace(job.masking, drop=False), None)
        if job.like is not None:
            self.reader.rule.thresholds = dict(job.like.manifest["masking"]["thresholds"])
        hashes = {n: d.fingerprint() for n, d in job.dictionaries.items()}
        options = {"tokens": job.tokens, "keep": asdict(job.keep), "seed": job.seed, "part": part}
        like = None if job.like is None else job.like.manifest["key"]
        self.key = hash_text(self.reader.key, repr([hashes, options, like]))
        self.cursor, self.finished, self.seen = Cursor(), False, Seen()
        self.totals: dict[str, int] = {"read": 0, "duplicates": 0}
        self.cost = {"forwards": 0.0, "seconds": 0.0}
        self.fresh = torch.empty(0, dtype=torch.bool)
        self.corpus = Shelf(out, "corpus", rows_of(packing.context))
        sizes = enumerate(d.n_latents for d in job.dictionaries.values())
        self.codes = [Shelf(out, f"codes-{i}", ENTRIES, by_latent(n)) for i, n in sizes]
        self.tallies = [self._tally(d) for d in job.dictionaries.values()]

    def run(self) -> FeatureStore:
        """Go on to the end."""
        if not finished(self.out, self.key):
            if (self.out / NOTES).is_file():
                self._recall()
            else:
                self._note()
            if not self.finished:
                self._read()
            assemble(self._parts(), self.out)
        (self.out / NOTES).unlink(missing_ok=True)
        return FeatureStore(self.out, self.job.model)

    @torch.no_grad()
    def _read(self) -> None:
        start, before, noted, every = time.perf_counter(), dict(self.cost), time.monotonic(), _EVERY
        with counting() as spent:
            for group in self.reader.groups(self.cursor, select=self._select):
                self._take(group)
                self.cursor = group.after
                self.cost["forwards"] = before["forwards"] + spent.forwards
                self.cost["seconds"] = before["seconds"] + time.perf_counter() - start
                if self.job.tokens is not None:
                    advance(min(self.totals["read"], self.job.tokens), self.job.tokens)
                if time.monotonic() - noted > every:
                    begun = time.monotonic()
                    self._note()
                    noted = time.monotonic()
                    every = max(_EVERY, 10 * (noted - begun))
        if not self.totals.get("counted") and self.part == (0, 1):
            raise Refused("features of these documents", "every token is masked", "mask less, or give other documents")
        self.finished = True
        self._note()

    def _select(self, contexts: Iterator[Contexts]) -> Iterator[Contexts]:
        """Yield this process's contexts among which some are new, until there are tokens enough."""
        mine, of = self.part
        for c in contexts:
            if self.job.tokens is not None and self.totals["read"] >= self.job.tokens:
                return
            self.fresh = ~self.seen.duplicates(c)
            self.totals["read"] += int(c.real[self.fresh].sum())
            own = c.cursor.context // self.reader.packer.packing.rows % of == mine
            self.totals["duplicates"] += int((~self.fresh).sum()) * own
            if own and bool(self.fresh.any()):
                yield c

    def _take(self, group: Group) -> None:
        """Take in the new contexts of a group."""
        job, batch, width = self.job, group.batch, self.reader.packer.packing.context
        first = self.totals.get("contexts", 0)
        if (first + len(self.fresh)) * width > _PLACES:
            raise Refused("a harvest of more than 2³¹ tokens", "places have 31 bits", "harvest parts, one store each")
        documents = batch.document.unique().tolist()
        fates = {n: fate(self.documents.hashes[n], job.seed, job.keep.score, job.keep.codes) for n in documents}
        self.documents.forget(min(documents))
        rows = corpus_rows(batch, group.cursor.context, self.fresh, width, self.reader.rule.special, fates)
        self.corpus.put(rows)
        for name, n in counts(rows).items():
            self.totals[name] = self.totals.get(name, 0) + n
        self.totals["documents"] = max(self.totals.get("documents", 0), max(documents) + 1)
        compact = self.fresh.cumsum(0) - 1
        row = batch.context.cpu() - group.cursor.context
        chosen = (batch.mask.cpu() & self.fresh[row]).nonzero()[:, 0]
        at = compact[row[chosen]]
        where = Rows(first + at, batch.position.cpu()[chosen], rows["hash"][at], width)
        coded = rows["flags"][at, where.position] & (COUNTED | CODED) == COUNTED | CODED
        for d, tally, codes in zip(job.dictionaries.values(), self.tallies, self.codes, strict=True):
            self._encode(
                d, tally, codes, {s: batch.acts[s][chosen.to(batch.acts[s].device)] for s in d.reads}, where, coded
            )

    def _encode(
        self, d: Dictionary, tally: Tally, codes: Shelf, acts: Columns, where: Rows, coded: torch.Tensor
    ) -> None:
        entries = Entries.of(d.encode({s: x.to(d.device) for s, x in acts.items()}))
        there = where.to(d.device)
        tally.update(entries, there)
        kept = coded.to(d.device)[entries.row]
        columns = {"latent": entries.latent, "place": there.place[entries.row], "value": entries.value}
        codes.put({n: (t if n == "value" else t.int())[kept] for n, t in columns.items()})

    def _tally(self, d: Dictionary) -> Tally:
        keep = self.job.keep
        return Tally.empty(d.n_latents, keep.top, keep.samples, keep.window, self.job.seed, d.device)

    def _parts(self) -> Parts:
        own, job = self.reader.identity(), self.job
        head = {
            "harvest": self.key,
            "model": own["model"],
            "documents": own["documents"],
            "packing": own["packing"],
            "beginning": self.reader.packer.beginning,
            "width": self.reader.packer.packing.context,
            "masking": {n: v for n, v in self.reader.rule.as_dict().items() if n in ("masked", "thresholds")},
            "computed": self.reader.noted_kernels(),
            "asked": job.tokens,
            "keep": asdict(job.keep),
            "seed": self.job.seed,
            "counts": self.totals,
            "cost": self.cost,
            "part": list(self.part),
            "opened": None if job.model.made is None else job.model.made.flags.get(""),
            "dictionaries": [described(n, d) for n, d in self.job.dictionaries.items()],
        }
        return Parts(head, self.corpus, self.codes, self.tallies, tokenizer_text(self.job.model))

    def _note(self) -> None:
        """Note down all that is done."""
        tensors = {"seen": self.seen.tensor(), **self.corpus.tensors()}
        for i, (codes, tally) in enumerate(zip(self.codes, self.tallies, strict=True)):
            tensors |= codes.tensors() | {f"{i}:{n}": t for n, t in tally.tensors().items()}
        header = {
            "kind": "harvest",
            "harvest": self.key,
            "cursor": self.cursor.as_dict(),
            "finished": self.finished,
            "totals": self.totals,
            "cost": self.cost,
            "thresholds": self.reader.rule.thresholds,
            "way": self.reader.noted_kernels(),
            "files": [s.files for s in (self.corpus, *self.codes)],
        }
        write_tensors(self.out / NOTES, tensors, header)

    def _recall(self) -> None:
        tensors, h = recalled(self.out, self.key)
        self.cursor, self.finished, self.seen = Cursor(**h["cursor"]), h["finished"], Seen.of_tensor(tensors["seen"])
        self.totals, self.cost = h["totals"], h["cost"]
        self.reader.rule.thresholds = h["thresholds"]
        self.reader.restore_kernels(h["way"])
        for shelf, files in zip((self.corpus, *self.codes), h["files"], strict=True):
            shelf.restore(files, tensors)
        for i, d in enumerate(self.job.dictionaries.values()):
            own = {n.partition(":")[2]: t for n, t in tensors.items() if n.startswith(f"{i}:")}
            self.tallies[i] = Tally.of_tensors(own, self.job.seed, d.device)
