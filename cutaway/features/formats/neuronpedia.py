"""Neuronpedia's bulk export: a tree of JSON lines, gzipped in batches, written from a store and read back.

    MODEL/LAYER-SET/release.jsonl model.jsonl sourceset.jsonl source.jsonl
    MODEL/LAYER-SET/features/batch-0.jsonl.gz activations/batch-0.jsonl.gz explanations/batch-0.jsonl.gz

`SCHEMA` has every key of every file with its type; rows with missing, surplus or mistyped keys are neither written nor
read. What a store does not know is empty: neuron alignment, correlated neurons, direct feature attribution, losses.
Correlated features are the partners, with Pearson's correlation of firing or not. Histograms of activations are in half
octaves; `binMin` and `binMax` of random examples are the ends of their octave, and −1 of the largest examples.
"""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.files import new_folder, write_bytes
from cutaway.core.json_lines import numbered, parsed, written
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features import effects
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import Example, StoredLatents
from cutaway.features.store.tally import LEAST, OCTAVES, edges
from cutaway.models.anatomy.foreign_names import to_transformer_lens
from cutaway.models.model import Model

BATCH = 256  # latents of a file
_N, _S, _L, _B = (int, float), (str,), (list,), (bool,)
_OR = (type(None),)
Row = dict[str, Any]

#: every key of every kind of row, and the types that it may have
SCHEMA: dict[str, dict[str, tuple[type, ...]]] = {
    "release": {"name": _S, "description": _S, "creatorName": _S, "urls": _L, "createdAt": _S},
    "model": {
        "id": _S, "instruct": _B, "displayName": _S, "displayNameShort": _S, "tlensId": _S + _OR, "dimension": _N,
        "layers": _N, "neuronsPerLayer": _N, "createdAt": _S,
    },
    "sourceset": {"modelId": _S, "name": _S, "description": _S, "type": _S, "creatorName": _S, "createdAt": _S},
    "source": {
        "id": _S, "modelId": _S, "setName": _S, "creatorId": _S, "hasDashboards": _B, "inferenceEnabled": _B,
        "saelensConfig": (dict, type(None)), "saelensRelease": _S + _OR, "saelensSaeId": _S + _OR,
        "hfRepoId": _S + _OR, "hfFolderId": _S + _OR, "visibility": _S, "num_prompts": _N, "num_tokens_in_prompt": _N,
        "dataset": _S, "createdAt": _S,
    },
    "features": {
        "modelId": _S, "layer": _S, "index": _S, "creatorId": _S, "createdAt": _S, "maxActApprox": _N,
        "hasVector": _B, "vector": _L, "vectorLabel": _S + _OR, "vectorDefaultSteerStrength": _N, "hookName": _S,
        "topkCosSimIndices": _L, "topkCosSimValues": _L, "neuron_alignment_indices": _L,
        "neuron_alignment_values": _L, "neuron_alignment_l1": _L, "correlated_neurons_indices": _L,
        "correlated_neurons_pearson": _L, "correlated_neurons_l1": _L, "correlated_features_indices": _L,
        "correlated_features_pearson": _L, "correlated_features_l1": _L, "neg_str": _L, "neg_values": _L,
        "pos_str": _L, "pos_values": _L, "frac_nonzero": _N, "freq_hist_data_bar_heights": _L,
        "freq_hist_data_bar_values": _L, "logits_hist_data_bar_heights": _L, "logits_hist_data_bar_values": _L,
        "decoder_weights_dist": _L, "sourceSetName": _S,
    },
    "activations": {
        "id": _S, "tokens": _L, "index": _S, "layer": _S, "modelId": _S, "maxValue": _N, "maxValueTokenIndex": _N,
        "minValue": _N, "values": _L, "creatorId": _S, "createdAt": _S, "dataSource": _S + _OR, "dataIndex": _S + _OR,
        "dfaValues": _L, "dfaTargetIndex": _N + _OR, "dfaMaxValue": _N + _OR, "lossValues": _L,
        "logitContributions": _S + _OR, "binMin": _N, "binMax": _N, "binContains": _N, "qualifyingTokenIndex": _N,
        "zIndices": _L, "zValues": _L,
    },
    "explanations": {
        "id": _S, "modelId": _S, "layer": _S, "index": _S, "description": _S, "authorId": _S, "embedding": _L + _OR,
        "triggeredById": _S + _OR, "typeName": _S, "explanationModelName": _S, "notes": _S + _OR, "createdAt": _S,
    },
}  # fmt: skip
_WHOLE, _BATCHED = ("release", "model", "sourceset", "source"), ("features", "activations", "explanations")


@dataclass(frozen=True)
class Export:
    """Names under which a store is exported, and when.

    Attributes:
        model: Neuronpedia's name of the model.
        set: name of the set of sources, such as `res-16k`.
        creator: who made it.
        created: date and time, ISO 8601.
        logits: number of raised and of lowered tokens.
        bars: number of bars of the histogram of logits.
    """

    model: str
    set: str
    creator: str = "cutaway"
    created: str = "1970-01-01T00:00:00Z"
    logits: int = 10
    bars: int = 50


@dataclass(frozen=True)
class Bulk:
    """A bulk export that was read.

    Attributes:
        rows: the rows of each kind, in order.
    """

    rows: Mapping[str, list[Row]] = field(default_factory=dict)

    def feature(self, index: int) -> Row:
        """Return the row of a latent.

        Raises:
            Refused: there is none.
        """
        found = next((r for r in self.rows["features"] if r["index"] == str(index)), None)
        if found is None:
            raise Refused(f"latent {index} of the export", "there is none", "look at rows['features']")
        return found

    def activations(self, index: int) -> list[Row]:
        """Return the examples of a latent."""
        return [r for r in self.rows["activations"] if r["index"] == str(index)]


@torch.no_grad()
def write_neuronpedia(
    store: FeatureStore,
    out: str | Path,
    export: Export,
    model: Model,
    source: Dictionary,
    *,
    dictionary: str | None = None,
) -> Path:
    """Write a store as a bulk export, and return the folder of its source.

    Raises:
        Refused: a folder that exists, another model or dictionary than was harvested, or one of several sites.
    """
    known = store.latents(dictionary)
    store.check(known, model, source)
    writer = Writer(store, known, export, model, source)
    folder = new_folder(Path(out) / export.model / writer.layer)
    for kind, row in writer.whole().items():
        _write(folder / f"{kind}.jsonl", kind, [row])
    for number, first in enumerate(range(0, len(known), BATCH)):
        latents = range(first, min(first + BATCH, len(known)))
        for kind, rows in writer.batch(latents).items():
            _write(folder / kind / f"batch-{number}.jsonl.gz", kind, rows)
    return folder


def read_neuronpedia(folder: str | Path) -> Bulk:
    """Read the folder of one source of a bulk export.

    Raises:
        Refused: files that are missing or damaged, or rows that do not keep to the schema.
    """
    where, rows = Path(folder), dict[str, list[Row]]()
    for kind in _WHOLE:
        rows[kind] = list(_read(where / f"{kind}.jsonl", kind))
    for kind in _BATCHED:
        files = sorted((where / kind).glob("batch-*.jsonl.gz"), key=lambda p: int(p.name[6:].partition(".")[0]))
        if not files and kind != "explanations":
            raise Refused(f"export {str(folder)!r}", f"it has no {kind}", "give the folder of a source")
        rows[kind] = [row for f in files for row in _read(f, kind)]
    return Bulk(rows)


def check_row(kind: str, row: Any, where: str) -> Row:
    """Return a row that keeps to the schema of its kind.

    Raises:
        Refused: keys are missing or surplus, or a value has another type.
    """
    schema, said = SCHEMA[kind], f"{where} of {kind}"
    if not isinstance(row, dict):
        raise Refused(said, "it is not an object", "give one JSON object a line")
    missing, surplus = [n for n in schema if n not in row], [n for n in row if n not in schema]
    if missing or surplus:
        why = f"it lacks {missing[0]!r}" if missing else f"it has {surplus[0]!r}"
        raise Refused(said, why, f"its keys are {', '.join(schema)}")
    for name, kinds in schema.items():
        if not isinstance(row[name], kinds) or (isinstance(row[name], bool) and bool not in kinds):
            raise Refused(said, f"{name!r} is {row[name]!r:.60}", f"give {' or '.join(k.__name__ for k in kinds)}")
    return row


def shown(store: FeatureStore, example: Example) -> tuple[Tensor, list[float], int]:
    """Return the tokens of an example's window, its activations there, and its place in the window."""
    ids = store.context(example.context)["ids"]
    there = int((ids >= 0).sum())
    first = max(0, example.position - example.before)
    last = min(there, example.position - example.before + len(example.window))
    values = example.window[
        first - example.position + example.before : last - example.position + example.before
    ].tolist()
    values[example.position - first] = example.value
    return ids[first:last], values, example.position - first


def raised(model: Model, source: Dictionary, latents: range) -> Tensor | None:
    """Return the direct effects of latents on all logits; None where they write no residual stream."""
    try:
        rows = torch.stack([effects.writes_to_logits(model, source, i) for i in latents])
    except Refused:
        return None
    return effects.direct_effects(model, rows).cpu()


class Words:
    """The texts of tokens, each looked up once."""

    def __init__(self, model: Model):
        self._model, self._known = model, dict[int, str]()

    def __call__(self, ids: Tensor) -> list[str]:
        """Return the text of each token."""
        for i in ids.tolist():
            if i not in self._known:
                self._known[i] = self._model.text.token_texts([i])[0]
        return [self._known[i] for i in ids.tolist()]


class Writer:
    """Rows of an export; what all latents share is computed once, so use one for all batches."""

    def __init__(self, store: FeatureStore, known: StoredLatents, export: Export, model: Model, source: Dictionary):
        if len(source.writes) != 1 or len(source.blocks) != 1:
            raise Refused(f"export of {source!r}", "a source has one site", "export dictionaries of one site")
        self.store, self.known, self.export, self.model, self.source = store, known, export, model, source
        address = parse(source.reads[0])
        self.layer = f"{address.layer or 0}-{export.set}"
        try:
            self.hook = to_transformer_lens(address)
        except Refused:
            self.hook = str(address)
        self.common = {"modelId": export.model, "layer": self.layer}
        self.made = {"creatorId": export.creator, "createdAt": export.created}
        self.rows, _ = effects.decoder_rows(source, 0)
        self.words = Words(model)

    def whole(self) -> dict[str, Row]:
        """Return the single rows of release, model, set and source."""
        e, m, shape = self.export, self.store.manifest, self.model.shape
        about = {"creatorName": e.creator, "createdAt": e.created}
        name = str(m["model"]["name"])
        return {
            "release": {"name": e.set, "description": f"{self.known.name} of {name}", "urls": [], **about},
            "model": {
                "id": e.model,
                "instruct": False,
                "displayName": name,
                "displayNameShort": name,
                "tlensId": None,
                "dimension": shape.d_model,
                "layers": shape.n_layers,
                "neuronsPerLayer": shape.d_mlp or 0,
                "createdAt": e.created,
            },
            "sourceset": {"modelId": e.model, "name": e.set, "description": self.known.name, "type": "SAEs", **about},
            "source": {
                "id": self.layer,
                "modelId": e.model,
                "setName": e.set,
                "creatorId": e.creator,
                "hasDashboards": True,
                "inferenceEnabled": False,
                "saelensConfig": None,
                "saelensRelease": None,
                "saelensSaeId": None,
                "hfRepoId": None,
                "hfFolderId": None,
                "visibility": "PRIVATE",
                "num_prompts": m["counts"]["contexts"],
                "num_tokens_in_prompt": self.store.width,
                "dataset": str(m["documents"].get("name") or m["documents"].get("kind")),
                "createdAt": e.created,
            },
        }

    def batch(self, latents: range) -> dict[str, list[Row]]:
        """Return the rows of some latents."""
        logits = raised(self.model, self.source, latents)
        found: dict[str, list[Row]] = {kind: [] for kind in _BATCHED}
        for i in latents:
            found["features"].append(self._feature(i, None if logits is None else logits[i - latents.start]))
            found["activations"] += self._activations(i)
            found["explanations"] += self._explanations(i)
        return found

    def _feature(self, latent: int, logits: Tensor | None) -> Row:
        known, site = self.known, self.source.writes[0]
        cosine = self.rows @ self.rows[latent]
        cosine[latent] = -2
        near = cosine.topk(min(10, len(self.rows) - 1))
        partners = known.partners(latent)
        empty = {f"{n}_{k}": [] for n in ("neuron_alignment", "correlated_neurons") for k in _OF[n]}
        return (
            self.common
            | self.made
            | empty
            | self._histogram(latent)
            | self._promoted(logits)
            | {
                "index": str(latent),
                "maxActApprox": float(known.tensors["largest"][latent]),
                "hasVector": True,
                "vector": self.source.direction(latent, site).tolist(),
                "vectorLabel": None,
                "vectorDefaultSteerStrength": 10,
                "hookName": self.hook,
                "topkCosSimIndices": near.indices.tolist(),
                "topkCosSimValues": near.values.tolist(),
                "correlated_features_indices": [j for j, *_ in partners],
                "correlated_features_pearson": [self._phi(latent, *p) for p in partners],
                "correlated_features_l1": [],
                "frac_nonzero": float(known.density[latent]),
                "decoder_weights_dist": [],
                "sourceSetName": self.export.set,
            }
        )

    def _phi(self, latent: int, _: int, together: int, other: int) -> float:
        own, all_ = self.known.paired(latent), self.known.paired_tokens
        spread = math.sqrt(own * (all_ - own) * other * (all_ - other))
        return (together * all_ - own * other) / spread if spread else 0.0

    def _histogram(self, latent: int) -> Row:
        counts, ends = self.known.tensors["histogram"][latent], edges()
        at = counts.nonzero()[:, 0]
        centres = (ends[at].clamp_min(2.0**LEAST / 2) * ends[at + 1].clamp_max(2.0**16)).sqrt()
        return {"freq_hist_data_bar_heights": counts[at].tolist(), "freq_hist_data_bar_values": centres.tolist()}

    def _promoted(self, logits: Tensor | None) -> Row:
        names = (
            "neg_str",
            "neg_values",
            "pos_str",
            "pos_values",
            "logits_hist_data_bar_heights",
            "logits_hist_data_bar_values",
        )
        if logits is None:
            return {n: [] for n in names}
        low, high = (logits.topk(self.export.logits, largest=largest) for largest in (False, True))
        counts, ends = torch.histogram(logits, self.export.bars)
        values = (
            self.words(low.indices),
            low.values.tolist(),
            self.words(high.indices),
            high.values.tolist(),
            counts.long().tolist(),
            ((ends[1:] + ends[:-1]) / 2).tolist(),
        )
        return dict(zip(names, values, strict=True))

    def _activations(self, latent: int) -> Iterator[Row]:
        examples = [*self.known.top(latent), *self.known.sampled(latent)] if int(self.known.count[latent]) else []
        for n, e in enumerate(examples):
            yield self._activation(latent, n, e)

    def _activation(self, latent: int, number: int, e: Example) -> Row:
        ids, values, at = shown(self.store, e)
        low, high, share = -1.0, -1.0, -1.0
        if e.octave is not None:
            low = 2.0 ** (e.octave + LEAST) if e.octave else 0.0
            high = 2.0 ** (e.octave + LEAST + 1) if e.octave < OCTAVES - 1 else math.inf
            a, b = self.known.band(latent, e.octave)
            share = b - a
        largest = max(range(len(values)), key=values.__getitem__)
        return (
            self.common
            | self.made
            | {
                "id": f"{self.export.model}-{self.layer}-{latent}-{number}",
                "index": str(latent),
                "tokens": self.words(ids),
                "values": values,
                "maxValue": values[largest],
                "maxValueTokenIndex": largest,
                "minValue": min(values),
                "dataSource": None,
                "dataIndex": str(e.context),
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "lossValues": [],
                "logitContributions": None,
                "binMin": low,
                "binMax": min(high, 2.0 ** (LEAST + OCTAVES)),
                "binContains": share,
                "qualifyingTokenIndex": at,
                "zIndices": [],
                "zValues": [],
            }
        )

    def _explanations(self, latent: int) -> Iterator[Row]:
        for n, x in enumerate(self.store.meta.labels(self.known.name, latent)):
            yield self.common | {
                "id": f"{self.export.model}-{self.layer}-{latent}-label-{n}",
                "index": str(latent),
                "description": x.text,
                "authorId": self.export.creator,
                "embedding": None,
                "triggeredById": None,
                "typeName": x.source,
                "explanationModelName": "cutaway",
                "notes": json.dumps(dict(x.scores)),
                "createdAt": self.export.created,
            }


_OF = {"neuron_alignment": ("indices", "values", "l1"), "correlated_neurons": ("indices", "pearson", "l1")}


def _write(path: Path, kind: str, rows: Iterable[Row]) -> None:
    lines = [written({n: check_row(kind, row, "a row")[n] for n in SCHEMA[kind]}) for row in rows]
    content = ("\n".join(lines) + "\n" if lines else "").encode()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as f:  # the same rows give the same bytes
            f.write(content)
        content = packed.getvalue()
    write_bytes(path, content)


def _read(path: Path, kind: str) -> Iterator[Row]:
    try:
        if path.suffix == ".gz":
            lines = enumerate(gzip.decompress(path.read_bytes()).decode().splitlines(), 1)
        else:
            lines = numbered(path)
        for number, line in lines:
            where = f"line {number} of {path.name}"
            yield check_row(kind, parsed(line, where, "write it again"), where)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise Refused(f"file {str(path)!r}", f"it cannot be read: {error}", "write the export again") from error
