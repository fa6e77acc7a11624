"""The end of a harvest: tables, partners and the manifest of a store; and one store made of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.files import new_folder, read_tensors, write_json, write_tensors, write_text
from cutaway.core.record import hash_text, machine, versions
from cutaway.core.refuse import Refused
from cutaway.features.store.corpus import rows_of
from cutaway.features.store.feature_store import KIND, TOKENIZER, VERSION, FeatureStore
from cutaway.features.store.partners import partners
from cutaway.features.store.shelf import Columns, Shelf
from cutaway.features.store.tally import Tally
from cutaway.streams.folders import MANIFEST, about, signed

_SAME = ("model", "packing", "masking", "width", "keep", "seed")  # in the manifests of stores that can be merged


@dataclass
class Parts:
    """Everything that a store is assembled from.

    Attributes:
        head: the manifest without its files.
        corpus: the files of the corpus.
        codes: the files of each dictionary's codes.
        tallies: the statistics of each dictionary.
        tokenizer: the tokenizer as text.
    """

    head: dict[str, Any]
    corpus: Shelf
    codes: list[Shelf]
    tallies: list[Tally]
    tokenizer: str | None


def assemble(parts: Parts, out: Path) -> None:
    """Write the rest of a store, its manifest last."""
    for shelf in (parts.corpus, *parts.codes):
        shelf.flush()
    rows = list[dict[str, Any]]()
    for i, (row, codes, tally) in enumerate(zip(parts.head["dictionaries"], parts.codes, parts.tallies, strict=True)):
        tally.settle()
        tables = {"latents": write_tensors(out / f"latents-{i}.safetensors", tally.tensors(), {"kind": "latents"})}
        if parts.head["part"][1] == 1:  # what fires together is known when all parts are together
            files, tokens = [out / f["file"] for f in codes.files], parts.head["counts"]["coded"]
            found = partners(files, row["latents"], tokens, parts.head["keep"]["partners"])
            tables["partners"] = write_tensors(out / f"partners-{i}.safetensors", found, {"kind": "partners"})
        rows.append(row | {"codes": codes.files, "tables": {n: about(p) for n, p in tables.items()}})
    if parts.tokenizer is not None:
        write_text(out / TOKENIZER, parts.tokenizer)
    manifest = {
        "kind": KIND,
        "version": VERSION,
        **parts.head,
        "corpus": parts.corpus.files,
        "dictionaries": rows,
        "tokenizer": None if parts.tokenizer is None else hash_text(parts.tokenizer),
        "versions": versions(),
        "machine": machine(),
    }
    write_json(out / MANIFEST, signed(manifest))


def merge(stores: Sequence[FeatureStore], out: str | Path) -> FeatureStore:
    """Make one store of several: features of the same dictionaries on different documents.

    It is the store that one harvest of all documents would have made, if no context goes across the ends of the parts.

    Raises:
        Refused: one store, stores of other models, dictionaries, options or thresholds, or with contexts in common.
    """
    folder = new_folder(out)
    if len(stores) < 2:
        raise Refused("merging one store", "there is nothing to merge it with", "give at least two")
    return joined(stores, folder)


def joined(stores: Sequence[FeatureStore], out: Path, interleaved: bool = False) -> FeatureStore:
    """Join stores; `interleaved` parts are of one harvest, whose contexts have numbers of their own.

    Raises:
        Refused: as `merge`.
    """
    _check(stores, interleaved)
    for store in stores:
        store.verify()
    moved = _numbers(stores, interleaved)
    corpus = Shelf(out, "corpus", rows_of(stores[0].width))
    for rows in _rows(stores, moved, interleaved):
        corpus.put(rows)
    first, rows = stores[0].manifest, stores[0].manifest["dictionaries"]
    codes = [Shelf(out, f"codes-{i}", 1) for i in range(len(rows))]
    tallies = [_tally(stores, moved, i, first["seed"]) for i in range(len(rows))]
    for store, new in zip(stores, moved, strict=True):
        for shelf, row in zip(codes, store.manifest["dictionaries"], strict=True):
            for file in row["codes"]:
                shelf.put(_moved(read_tensors(store.folder / file["file"])[0], new, store.width))
    own = {n: v for n, v in first.items() if n not in ("key", "corpus", "tokenizer", "versions", "machine")}
    head = own | {
        "counts": _counts(stores, interleaved),
        "cost": {n: sum(s.manifest["cost"][n] for s in stores) for n in first["cost"]},
        "part": [0, 1],
        "dictionaries": [{n: v for n, v in row.items() if n not in ("codes", "tables")} for row in rows],
    }
    if not interleaved:
        head |= {"documents": {"kind": "merged", "of": [s.manifest["documents"] for s in stores]}}
        head |= {"harvest": hash_text(*(s.manifest["harvest"] for s in stores)), "asked": None}
    text = stores[0].folder / TOKENIZER
    assemble(Parts(head, corpus, codes, tallies, text.read_text("utf-8") if text.is_file() else None), out)
    return FeatureStore(out)


def _check(stores: Sequence[FeatureStore], interleaved: bool) -> None:
    first = stores[0].manifest
    for store in stores[1:]:
        m = store.manifest
        other = [n for n in _SAME if m[n] != first[n]]
        hashes = [[(row["name"], row["hash"]) for row in x["dictionaries"]] for x in (first, m)]
        if other or hashes[0] != hashes[1]:
            why = f"their {other[0] if other else 'dictionaries'} differ"
            instead = "harvest the second with like=FIRST" if other == ["masking"] else "harvest them alike"
            raise Refused(f"{str(stores[0].folder)!r} and {str(store.folder)!r} as one store", why, instead)
    hashes = torch.cat([part["hash"] for store in stores for part in store.corpus()])
    twice = len(hashes) - len(hashes.unique())
    if twice and not interleaved:
        why = f"{twice} of their {len(hashes)} contexts are in several of them, and would count twice"
        raise Refused("stores of the same documents", why, "merge stores of different documents")


def _numbers(stores: Sequence[FeatureStore], interleaved: bool) -> list[Int[Tensor, "context"]]:
    """Return the new number of every context of every store."""
    sizes = [s.manifest["counts"]["contexts"] for s in stores]
    if not interleaved:
        return list(torch.arange(sum(sizes)).split(sizes))
    order = torch.cat([part["number"] for s in stores for part in s.corpus()]).argsort()
    new = torch.empty_like(order)
    new[order] = torch.arange(len(order))
    return list(new.split(sizes))


def _rows(stores: Sequence[FeatureStore], moved: Sequence[Tensor], interleaved: bool) -> Iterator[Columns]:
    """Yield the rows of the corpora in their new order, a few thousand at a time."""
    number = document = 0
    offsets = list[tuple[int, int]]()
    for store in stores:
        offsets.append((number, document))
        if not interleaved:
            number += 1 + max((int(part["number"].max()) for part in store.corpus()), default=-1)
            document += store.manifest["counts"]["documents"]
    where = torch.cat([torch.stack([torch.full_like(m, i), torch.arange(len(m))], 1) for i, m in enumerate(moved)])
    for some in where[torch.cat(list(moved)).argsort()].split(rows_of(stores[0].width)):
        yield _gathered(stores, some, offsets)


def _gathered(stores: Sequence[FeatureStore], some: Tensor, offsets: Sequence[tuple[int, int]]) -> Columns:
    """Return some rows, each given by its store and its number there."""
    out: Columns = {}
    for i, store in enumerate(stores):
        mine, first = some[:, 0] == i, 0
        for part in store.corpus():
            n = len(part["hash"])
            here = mine & (some[:, 1] >= first) & (some[:, 1] < first + n)
            rows = {name: t[some[here, 1] - first] for name, t in part.items()}
            rows["number"] = rows["number"] + offsets[i][0]
            rows["document"] = torch.where(rows["document"] < 0, -1, rows["document"] + offsets[i][1])
            for name, t in rows.items():
                out.setdefault(name, t.new_empty(len(some), *t.shape[1:]))[here] = t
            first += n
    return out


def _tally(stores: Sequence[FeatureStore], moved: Sequence[Tensor], number: int, seed: int) -> Tally:
    total: Tally | None = None
    for store, new in zip(stores, moved, strict=True):
        name = store.names[number]
        own = Tally.of_tensors(store.latents(name).tensors, seed)
        own.moved(new, store.width)
        if total is None:
            total = own
        else:
            total.merge(own)
    assert total is not None
    return total


def _moved(part: Columns, new: Int[Tensor, "context"], width: int) -> Columns:
    place = part["place"].long()
    place = (new[place // width] * width + place % width).int()
    size = part["first"].diff()
    latent = torch.arange(len(size)).repeat_interleave(size)
    order = (latent << 32 | place).argsort()
    return {"first": part["first"], "place": place[order], "value": part["value"][order]}


def _counts(stores: Sequence[FeatureStore], interleaved: bool) -> dict[str, int]:
    found = [s.manifest["counts"] for s in stores]
    total = {n: sum(f[n] for f in found) for n in found[0]}
    if interleaved:  # every process reads all documents and all contexts
        total |= {n: max(f[n] for f in found) for n in ("documents", "read")}
    return total
