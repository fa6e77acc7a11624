"""Feature pages of circuit-tracer's viewer: one JSON object a feature, written from a store and read back.

Loose pages are `NUMBER.json`, the number pairing layer and feature (Cantor's); circuit-tracer's local server has them
from its data folder for graphs whose `scan` is `./data/FOLDER`. A bundle is what the viewer fetches from a hub:
`index.json.gz` with a file name and offsets for each layer, and `layer_LAYER.bin`, where each page is its length in
four bytes (little end first) and as many bytes of gzipped JSON. Angle brackets and ampersands are escaped in the JSON,
so that the text of tokens is never read as markup, wherever a page is put.

`SCHEMA` has every key of a page, of its quantiles and of their examples. Pages of other tools may lack what the viewer
does without (`OPTIONAL`) and have more. The examples named "Top" are the largest, the others random ones of each octave
of |value|; one that stands in an earlier quantile is marked as repeated. `histogram` counts 40 equal bins from
`act_min` to `act_max`, and `quantile_values` are percentiles 1 to 99, both of the active tokens whose codes the store
keeps (of its examples for a latent without any); `act_min` is 0, or the smallest value below.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.cantor import cantor, from_cantor
from cutaway.core.files import new_folder, write_bytes
from cutaway.core.json_lines import parsed, written
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary, place_of
from cutaway.features.formats.neuronpedia import BATCH, Export, Row, Words, raised, shown
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import StoredLatents
from cutaway.models.model import Model

BARS = 40
_N, _S, _L, _B = (int, float), (str,), (list,), (bool,)
#: every key of a page, of a quantile and of an example, and the types that it may have
SCHEMA: dict[str, dict[str, tuple[type, ...]]] = {
    "page": {
        "transcoder_id": _S, "index": (int,), "examples_quantiles": _L, "top_logits": _L, "bottom_logits": _L,
        "act_min": _N, "act_max": _N, "quantile_values": _L, "histogram": _L, "activation_frequency": _N,
    },
    "quantile": {"quantile_name": _S, "examples": _L},
    "example": {"tokens": _L, "tokens_acts_list": _L, "train_token_ind": (int,), "is_repeated_datapoint": _B},
}  # fmt: skip
#: what pages of other tools may lack
OPTIONAL = {
    "page": set(SCHEMA["page"]) - {"index", "examples_quantiles"},
    "quantile": set[str](),
    "example": {"train_token_ind", "is_repeated_datapoint"},
}
_ITEMS = {"tokens": _S, "tokens_acts_list": _N, "top_logits": _S, "bottom_logits": _S, "quantile_values": _N,
          "histogram": _N}  # fmt: skip
_ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}

Place = tuple[int, int]  # layer and feature


@torch.no_grad()
def write_pages(
    store: FeatureStore,
    out: str | Path,
    export: Export,
    model: Model,
    source: Dictionary,
    *,
    dictionary: str | None = None,
) -> Path:
    """Write a store as loose pages, and return their folder.

    Raises:
        Refused: a folder that holds something, another model or dictionary than was harvested, or blocks that are not
            one for each layer.
    """
    folder = new_folder(out)
    for (layer, index), page in _pages(store, export, model, source, dictionary):
        write_bytes(folder / f"{cantor(layer, index)}.json", _encoded(page))
    return folder


@torch.no_grad()
def write_bundle(
    store: FeatureStore,
    out: str | Path,
    export: Export,
    model: Model,
    source: Dictionary,
    *,
    dictionary: str | None = None,
) -> Path:
    """Write a store as a bundle, and return its folder; `write_pages` says what is refused."""
    folder, held = new_folder(out), dict[int, bytearray]()
    index = dict[int, Row]()
    for (layer, _), page in _pages(store, export, model, source, dictionary):
        packed = gzip.compress(_encoded(page), mtime=0)  # the same pages give the same bytes
        own = held.setdefault(layer, bytearray())
        own += len(packed).to_bytes(4, "little") + packed
        index.setdefault(layer, {"filename": f"layer_{layer}.bin", "offsets": [0]})["offsets"].append(len(own))
    for layer, content in held.items():
        write_bytes(folder / f"layer_{layer}.bin", bytes(content))
    write_bytes(folder / "index.json.gz", gzip.compress(json.dumps(index).encode(), mtime=0))
    return folder


def read_pages(folder: str | Path) -> dict[Place, Row]:
    """Read a folder of loose pages or of a bundle: the page of each layer and feature, in order.

    Raises:
        Refused: a folder without pages, a damaged file, or a page that the viewer would not show.
    """
    root = Path(folder)
    found = dict(_bundled(root) if (root / "index.json.gz").exists() else _loose(root))
    if not found:
        raise Refused(f"folder {str(folder)!r}", "it holds no pages", "give a folder of NUMBER.json or index.json.gz")
    return dict(sorted(found.items()))


def check_page(page: Any, where: str, *, own: bool = False) -> Row:
    """Return a page that keeps to the schema; one of our own has every key and no other.

    Raises:
        Refused: a key that is missing or of another type, or an example whose numbers do not fit its tokens.
    """
    row = _check("page", page, where, own)
    for quantile in row["examples_quantiles"]:
        for example in _check("quantile", quantile, f"a quantile of {where}", own)["examples"]:
            said = f"an example of {where}"
            tokens, values = _check("example", example, said, own)["tokens"], example["tokens_acts_list"]
            at = example.get("train_token_ind", 0)
            if len(tokens) != len(values) or not 0 <= at < max(len(tokens), 1):
                why = f"it has {len(tokens)} tokens, {len(values)} activations and its own token at {at}"
                raise Refused(said, why, "give an activation for each token")
    return row


def _check(kind: str, row: Any, where: str, own: bool) -> Row:
    schema = SCHEMA[kind]
    if not isinstance(row, dict):
        raise Refused(where, "it is not an object", "give one JSON object")
    needed = set(schema) if own else set(schema) - OPTIONAL[kind]
    missing, surplus = [n for n in schema if n in needed and n not in row], [n for n in row if own and n not in schema]
    if missing or surplus:
        raise Refused(
            where,
            f"it lacks {missing[0]!r}" if missing else f"it has {surplus[0]!r}",
            f"its keys are {', '.join(schema)}",
        )
    for name, kinds in schema.items():
        if name in row and not _is(row[name], kinds):
            raise Refused(where, f"{name!r} is {row[name]!r:.60}", f"give {' or '.join(k.__name__ for k in kinds)}")
        if name in row and name in _ITEMS and not all(_is(v, _ITEMS[name]) for v in row[name]):
            raise Refused(where, f"{name!r} holds something else than {_ITEMS[name][0].__name__}", "write it again")
    return row


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


# --- out


def _encoded(page: Row) -> bytes:
    return written(check_page(page, "a page", own=True)).translate(_ESCAPED).encode()


def _pages(
    store: FeatureStore, export: Export, model: Model, source: Dictionary, dictionary: str | None
) -> Iterator[tuple[Place, Row]]:
    """Yield the page of each latent."""
    known, words = store.latents(dictionary), Words(model)
    store.check(known, model, source)
    layers = _layers(source)
    for first in range(0, len(known), BATCH):
        latents = range(first, min(first + BATCH, len(known)))
        logits = raised(model, source, latents)
        for latent in latents:
            block, index = place_of(source, latent)
            most = [list[str](), list[str]()]
            if logits is not None:
                own = logits[latent - first]
                most = [words(own.topk(export.logits, largest=largest).indices) for largest in (True, False)]
            yield (
                (layers[block], index),
                {
                    "transcoder_id": f"{export.model}/{layers[block]}-{export.set}",
                    "index": index,
                    "examples_quantiles": _quantiles(store, known, words, latent),
                    **dict(zip(("top_logits", "bottom_logits"), most, strict=True)),
                    **_distribution(known, latent),
                    "activation_frequency": float(known.density[latent]),
                },
            )


def _layers(source: Dictionary) -> list[int]:
    """Return the layer of each block.

    Raises:
        Refused: a block that reads no layer or several, or a layer that two blocks read.
    """
    found = [{parse(site).layer for site in block.reads} for block in source.blocks]
    layers = [next(iter(one)) for one in found if len(one) == 1]
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(found) or len(set(known)) < len(known):
        why = f"its blocks read {', '.join(source.reads[:4])}"
        raise Refused(f"feature pages of {source!r}", why, "export dictionaries with one block for each layer")
    return known


def _quantiles(store: FeatureStore, known: StoredLatents, words: Words, latent: int) -> list[Row]:
    """Return the largest examples, then the random ones of each octave."""
    if not int(known.count[latent]):
        return []
    found, seen = dict[str, list[Row]](), set[Place]()
    for e in [*known.top(latent), *known.sampled(latent)]:
        ids, values, at = shown(store, e)
        name = "Top"
        if e.octave is not None:
            low, high = known.band(latent, e.octave)
            name = f"Random, {100 * low:.3g} to {100 * high:.3g} % of active tokens"
        row = {"tokens": words(ids), "tokens_acts_list": values, "train_token_ind": at}
        found.setdefault(name, []).append(row | {"is_repeated_datapoint": (e.context, e.position) in seen})
        seen.add((e.context, e.position))
    return [{"quantile_name": name, "examples": rows} for name, rows in found.items()]


def _distribution(known: StoredLatents, latent: int) -> Row:
    """Return the range of activations, their percentiles and their histogram."""
    values = known.codes(latent)[1].float()
    if not len(values) and int(known.count[latent]):
        values = torch.tensor([e.value for e in [*known.top(latent), *known.sampled(latent)]])
    if not len(values):
        return {"act_min": 0.0, "act_max": 0.0, "quantile_values": [], "histogram": [0] * BARS}
    low, high = min(0.0, float(values.min())), float(values.max())
    return {
        "act_min": low,
        "act_max": high,
        "quantile_values": _percentiles(values),
        "histogram": torch.histc(values, BARS, low, high).long().tolist(),
    }


def _percentiles(values: Tensor) -> list[float]:
    """Return percentiles 1 to 99: of sorted values, the first at or behind each share."""
    rank = (torch.arange(1, 100) * len(values) + 99) // 100 - 1
    return values.sort().values[rank].tolist()


# --- in


def _loose(root: Path) -> Iterator[tuple[Place, Row]]:
    for file in root.glob("*.json"):
        if file.stem.isascii() and file.stem.isdigit():
            try:
                text = file.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise _damaged(file, error) from error
            yield from_cantor(int(file.stem)), _page(text, file.name)


def _bundled(root: Path) -> Iterator[tuple[Place, Row]]:
    for layer, about in _index(root / "index.json.gz").items():
        file = root / about["filename"]
        try:
            content = file.read_bytes()
            for index, (start, end) in enumerate(zip(about["offsets"], about["offsets"][1:], strict=False)):
                size = int.from_bytes(content[start : start + 4], "little")
                if start + 4 + size > end or end > len(content):
                    raise ValueError(f"feature {index} does not end where the index says")
                text = gzip.decompress(content[start + 4 : start + 4 + size]).decode()
                yield (layer, index), _page(text, f"feature {index} of {file.name}")
        except (OSError, EOFError, ValueError) as error:
            raise _damaged(file, error) from error


def _index(file: Path) -> dict[int, Row]:
    """Return the file name and the offsets of each layer."""
    try:
        held = json.loads(gzip.decompress(file.read_bytes()))
        rows: Mapping[Any, Any] = dict(enumerate(held)) if isinstance(held, list) else held
        found = {int(layer): row for layer, row in rows.items() if row}
        for row in found.values():
            name, offsets = row["filename"], row["offsets"]
            if (
                Path(name).name != name
                or offsets != sorted(offsets)
                or not all(_is(n, (int,)) and n >= 0 for n in offsets)
            ):
                raise ValueError(f"{name!r:.60} with its offsets is no file of this folder")
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(file, error) from error
    return found


def _page(text: str, where: str) -> Row:
    return check_page(parsed(text, where, "write it again"), where)


def _damaged(file: Path, error: Exception) -> Refused:
    return Refused(f"file {str(file)!r}", f"it cannot be read: {error}", "write the pages again")
