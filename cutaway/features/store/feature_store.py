"""A store of features on disk: what a harvest found about the latents of dictionaries, opened in an instant.

A folder holds `manifest.json` (model, dictionaries, tokenizer, documents, what was counted, the SHA-256 of every file),
the corpus `corpus-00000.safetensors` …, per dictionary `latents-0.safetensors` (statistics and examples, which refer to
the corpus by place), `codes-0-00000.safetensors` … and `partners-0.safetensors`, the tokenizer, and `meta.sqlite` with
what people and programs say about latents. Numbers never change after the harvest, and are mapped into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.files import held, read_json, read_tensors, reading
from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused, nearest
from cutaway.core.repeat import Made
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features.store.latents import StoredLatents
from cutaway.features.store.meta import Meta
from cutaway.features.store.shelf import Columns
from cutaway.models.model import Model
from cutaway.models.tokens import running_texts
from cutaway.streams.shards import file_hash, manifest_key

MANIFEST, META, TOKENIZER, KIND, VERSION = "manifest.json", "meta.sqlite", "tokenizer.json", "features", 1
_FORM = (("model", dict), ("dictionaries", list), ("documents", dict), ("counts", dict), ("keep", dict),
         ("corpus", list), ("width", int))  # fmt: skip


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
        path = self.folder / MANIFEST
        if not path.is_file():
            why = f"there is no {MANIFEST}: no harvest has finished there"
            raise Refused(f"features in {str(folder)!r}", why, "give the folder of `cutaway features harvest`")
        self.manifest: dict[str, Any] = read_json(path)
        self._check(path)
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
        """Return the ids, documents and flags of a context."""
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
            path = self.folder / row["file"]
            if file_hash(path) != row["sha256"]:
                why = "its content is not what was written (its SHA-256 is another)"
                raise Refused(f"file {str(path)!r}", why, "harvest again, or copy the folder anew")

    def check_model(self, model: Model) -> None:
        """Refuse another model than the one whose activations were harvested.

        Raises:
            Refused: another configuration, or other weights.
        """
        theirs, own = self.manifest["model"], model.identity()
        for what in ("config", "weights"):
            if theirs.get(what) != own[what]:
                why = f"they are of {theirs['name']} with other {what} than {own['name']}"
                raise Refused(f"features in {str(self.folder)!r}", why, "harvest from this model")

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

    def files(self) -> Iterator[dict[str, Any]]:
        """Yield the name, bytes and SHA-256 of every file of numbers."""
        yield from self.manifest["corpus"]
        for row in self.manifest["dictionaries"]:
            yield from (*row["codes"], *row["tables"].values())

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

    def _check(self, path: Path) -> None:
        m, whole = self.manifest, f"features in {str(self.folder)!r}"
        if not isinstance(m, dict) or m.get("kind") != KIND:
            raise Refused(whole, f"{path.name} is not of features", "give the folder of `cutaway features harvest`")
        if m.get("version") != VERSION:
            why = f"they are of version {m.get('version')}, and {VERSION} is read here"
            raise Refused(whole, why, "harvest them again, or use another release")
        if m.get("key") != manifest_key(m):
            raise Refused(whole, f"{path.name} was changed", "harvest them again")
        with reading(path):
            for name, kind in _FORM:
                held(m, name, kind)
            expected = [(held(row, "file", str), held(row, "bytes", int)) for row in self.files()]
        for name, size in expected:
            file = self.folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                why = "it is missing" if found is None else f"it has {found} bytes instead of {size}"
                raise Refused(f"file {str(file)!r}", why, "harvest again, or copy the folder anew")


class StoredTokenizer:
    """The tokenizer of a store, without the model."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_file(str(path))

    def decode(self, ids: list[int], **options: Any) -> str:
        """Return the text of token ids."""
        return self.inner.decode(ids, skip_special_tokens=False)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return self.inner.encode(text, add_special_tokens=False).ids


def tokenizer_text(model: Model) -> str | None:
    """Return a model's tokenizer as the text of `tokenizer.json`; None if it is of another kind, or there is none."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


def named(dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary]) -> dict[str, Dictionary]:
    """Return dictionaries by name: the given ones, else the sites that each reads and writes.

    Raises:
        Refused: none, two of one name, or a gate under which a token's code depends on other tokens of the batch.
    """
    if isinstance(dictionaries, Mapping):
        out = dict(dictionaries)
    else:
        each = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
        names = [_sites(d) for d in each]
        out = {n if names.count(n) == 1 else f"{n} {i}": d for i, (n, d) in enumerate(zip(names, each, strict=True), 1)}
    if not out:
        raise Refused("features of no dictionary", "there is nothing to harvest", "give at least one")
    for name, d in out.items():
        if any(g.whole_batch for g in d.gates):
            why = "its gate chooses among all tokens of a batch, so that a token's code depends on the others"
            raise Refused(f"features of {name}", why, "use a dictionary with thresholds")
    return out


def described(name: str, d: Dictionary) -> dict[str, Any]:
    """Return the entry of a dictionary in the manifest, without its files."""
    own, made = d.identity(), d.made
    opened = None if made is None or made.no_flags else made.flags.get("")
    return own | {"name": name, "source": own["name"], "opened": opened}


def _sites(d: Dictionary) -> str:
    reads, writes = (s[0] if len(s) == 1 else f"{s[0]}…{s[-1]}" for s in (d.reads, d.writes))
    return reads if reads == writes else f"{reads}>{writes}"
