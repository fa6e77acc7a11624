"""A store of features on disk: what a harvest found about the latents of dictionaries, opened in an instant.

A folder holds `manifest.json` (model, dictionaries, tokenizer, documents, what was counted, the SHA-256 of every file),
the corpus `corpus-00000.safetensors` …, per dictionary `latents-0.safetensors` (statistics and examples, which refer to
the corpus by place), `codes-0-00000.safetensors` … and `partners-0.safetensors`, the tokenizer, and `meta.sqlite` with
what people and programs say about latents. Numbers never change after the harvest, and are mapped into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.files import held, read_tensors
from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused, nearest
from cutaway.core.repeat import Made
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features.store.latents import StoredLatents
from cutaway.features.store.meta import Meta
from cutaway.features.store.shelf import Columns
from cutaway.features.store.tokenizer import StoredTokenizer
from cutaway.models.model import Model
from cutaway.models.tokens import running_texts
from cutaway.streams.folders import check_model, check_sum, read_manifest

META, TOKENIZER, KIND, VERSION = "meta.sqlite", "tokenizer.json", "features", 1
_FORM = (("harvest", str), ("model", dict), ("dictionaries", list), ("documents", dict), ("masking", dict),
         ("counts", dict), ("keep", dict), ("seed", int), ("corpus", list), ("width", int))  # fmt: skip
_ROW = (("name", str), ("hash", str), ("latents", int), ("codes", list), ("tables", dict))


class FeatureStore:
    """A folder of features; use it to read pages of latents, their codes and the corpus, and to write labels.

    Attributes:
        folder: where it lies.
        manifest: what it holds.
        made: how it is opened again.

    Raises:
        Refused: no manifest, one that was changed, files missing or of other sizes, or features of another model.
    """

    def __init__(self, folder: str | Path, model: Model | None = None):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, KIND, VERSION, _files)
        if model is not None:
            self.check_model(model)
        whole = str(self.folder.absolute())
        self.made: Made | None = Made(f"ca.features.FeatureStore({whole!r})", {"": whole})
        self._map = lru_cache(64)(lambda name: read_tensors(self.folder / name)[0])

    # --- what there is

    @property
    def names(self) -> list[str]:
        """Names of the dictionaries."""
        return [row["name"] for row in self.manifest["dictionaries"]]

    @property
    def width(self) -> int:
        """Positions of a context."""
        return self.manifest["width"]

    @property
    def counted(self) -> int:
        """Number of tokens that count."""
        return self.manifest["counts"]["counted"]

    @cached_property
    def meta(self) -> Meta:
        """Labels, scores, lists and notes."""
        return Meta(self.folder / META, self.manifest["key"])

    def latents(self, dictionary: str | None = None) -> StoredLatents:
        """Return what is known of the latents of a dictionary, by its name; the only one if None.

        Raises:
            Refused: no such dictionary, or none named where there are several.
        """
        if dictionary is None and len(self.names) == 1:
            return self._latents(0)
        if dictionary not in self.names:
            near = nearest(str(dictionary), self.names)
            why = "the store has several" if dictionary is None else "it has no such one"
            why += f"; near: {near}" if near and dictionary is not None else ""
            raise Refused(f"dictionary {dictionary!r} of a store", why, f"name one of {', '.join(self.names)}")
        return self._latents(self.names.index(dictionary))

    def identity(self) -> dict[str, Any]:
        """Return what the store is, for records."""
        own = {n: self.manifest[n] for n in ("model", "documents", "counts")}
        return {"hash": self.manifest["key"], "dictionaries": self.names, **own}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"tokens": self.counted}

    # --- the corpus

    def corpus(self) -> Iterator[Columns]:
        """Yield the files of the corpus."""
        for row in self.manifest["corpus"]:
            yield self._map(row["file"])

    def column(self, name: str) -> Tensor:
        """Return a column of the whole corpus: `ids`, `document` or `flags`, [context position]; `hash`, [context]."""
        found = [part[name] for part in self.corpus()]
        return torch.cat(found)

    def context(self, number: int) -> dict[str, Int[Tensor, "position"]]:
        """Return the ids, documents and flags of a context.

        Raises:
            Refused: the corpus has fewer contexts.
        """
        if not 0 <= number < self._firsts[-1]:
            why = f"the corpus has {self._firsts[-1]:,} contexts"
            raise Refused(
                f"context {number} of features in {str(self.folder)!r}", why, "harvest again, or name another"
            )
        file = max(i for i, first in enumerate(self._firsts[:-1]) if first <= number)
        part = self._map(self.manifest["corpus"][file]["file"])
        return {n: part[n][number - self._firsts[file]] for n in ("ids", "document", "flags")}

    def texts(self, ids: Int[Tensor, "position"]) -> list[str]:
        """Return the running text of token ids, a part for each; numbers where the tokenizer is not in the store."""
        items = ids.tolist()
        return [str(i) for i in items] if self._tokenizer is None else running_texts(self._tokenizer, items)

    def vocabulary(self, size: int) -> list[str]:
        """Return the texts of the first token ids; numbers where the tokenizer is not in the store."""
        own = self._tokenizer
        return [str(i) if own is None else own.decode([i]) for i in range(size)]

    def token_ids(self, text: str) -> list[int]:
        """Return the tokens of a text.

        Raises:
            Refused: the tokenizer is not in the store.
        """
        if self._tokenizer is None:
            raise Refused(f"text {text!r}", "the store has no tokenizer", "use a model with a fast tokenizer")
        return self._tokenizer.ids(text)

    # --- checks

    def verify(self) -> None:
        """Check every file against its sum.

        Raises:
            Refused: a file was changed.
        """
        for row in self.files():
            check_sum(self.folder / row["file"], row["sha256"])

    def check_model(self, model: Model) -> None:
        """Refuse another model than the one whose activations were harvested.

        Raises:
            Refused: another configuration, or other weights.
        """
        check_model(self.folder, self.manifest, model)

    def check_dictionary(self, dictionary: Dictionary, name: str | None = None) -> None:
        """Refuse another dictionary than the one that was harvested.

        Raises:
            Refused: a dictionary with another hash.
        """
        row = self.latents(name).row
        if dictionary.fingerprint() != row["hash"]:
            why = f"{row['name']} there has the hash {row['hash']}, and this one {dictionary.fingerprint()}"
            raise Refused(
                f"{dictionary!r} for features in {str(self.folder)!r}", why, "give the one that was harvested"
            )

    def check(self, known: StoredLatents, model: Model | None, source: Dictionary | None) -> None:
        """Refuse another model or dictionary, where they are given.

        Raises:
            Refused: either is another than was harvested.
        """
        if model is not None:
            self.check_model(model)
        if source is not None:
            self.check_dictionary(source, known.name)

    def files(self) -> list[dict[str, Any]]:
        """Return the name, bytes and SHA-256 of every file of numbers."""
        return _files(self.manifest)

    def _latents(self, number: int) -> StoredLatents:
        row = self.manifest["dictionaries"][number]
        return StoredLatents(row, self._map, self.width, self.counted)

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of the first context in each file of the corpus."""
        return list(accumulate((row["rows"] for row in self.manifest["corpus"]), initial=0))

    @cached_property
    def _tokenizer(self) -> StoredTokenizer | None:
        path = self.folder / TOKENIZER
        if self.manifest["tokenizer"] is None:
            return None
        if not path.is_file() or hash_text(path.read_text("utf-8")) != self.manifest["tokenizer"]:
            raise Refused(f"file {str(path)!r}", "it is missing or was changed", "copy the folder anew")
        return StoredTokenizer(path)


def _files(m: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the files that a manifest names, after checking all entries that are read, even if its key is valid."""
    for name, kind in _FORM:
        held(m, name, kind)
    for name in ("contexts", "counted", "coded", "documents"):
        held(m["counts"], name, int)
    if m["width"] < 1 or not m["dictionaries"]:
        raise ValueError(f"it has {len(m['dictionaries'])} dictionaries and contexts of {m['width']} positions")
    rows = list(m["corpus"])
    if any(held(row, "rows", int) < 1 for row in rows) or sum(row["rows"] for row in rows) != m["counts"]["contexts"]:
        raise ValueError(f"its corpus does not hold the {m['counts']['contexts']} contexts that it counts")
    for row in m["dictionaries"]:
        for name, kind in _ROW:
            held(row, name, kind)
        held(row["tables"], "latents", dict)
        rows += [*row["codes"], *row["tables"].values()]
    for name, entry in [("tokenizer", m), *(("opened", x) for x in (m, *m["dictionaries"]))]:
        if not isinstance(entry[name], str | None):
            raise ValueError(f"{name!r} is {entry[name]!r:.60}, and not a text")
    return rows
