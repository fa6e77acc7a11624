"""Features: stores, tables of latents, searches, pages of latents, and latents on a text."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cutaway import zoo
from cutaway.core.refuse import Refused
from cutaway.core.result import open_result
from cutaway.dictionaries.dictionary import Dictionary, place_of
from cutaway.directions.direction import direction
from cutaway.features import FeatureCard, FeatureStore, card, search
from cutaway.features.reading import ReadText, read_text
from cutaway.features.store.dictionaries import dictionary_of
from cutaway.features.store.table import LatentTable
from cutaway.studio import feature_messages as m
from cutaway.studio.actions.methods import result_id
from cutaway.studio.actions.prompts import apart
from cutaway.studio.actions.results import shown
from cutaway.studio.folder import shipped
from cutaway.studio.messages import Request, Values
from cutaway.studio.session import Session

_DRAWN = ["histogram", "quantile", "raises", "lowers", "neighbour", "together"]


def stores(session: Session, request: Request) -> m.Stores:
    """Return the stores of the studio, and what could be harvested."""
    found = [_store_card(name, feature_store(session, name)) for name in session.folder.store_names()]
    known = zoo.dictionaries(session.source) if zoo.find(session.source) is not None else []
    return m.Stores(stores=found, dictionaries=known if session.model.world is not None else [])


def latents(session: Session, request: m.LatentsOf) -> m.LatentPage:
    """Return a page of the table of latents."""
    table = _table(session, request)
    asked = {"only": request.only, "text": request.text, "after": request.after, "most": request.most}
    page = table.page(request.sort, request.descending, **asked)
    return m.LatentPage(rows=page.rows, total=page.total, next=page.next)


def find(session: Session, request: m.Search) -> m.Hits:
    """Search among the latents of a store.

    Raises:
        Refused: what the search refuses, or a latent without a number.
    """
    store, name = opened_store(session, request)
    kind, colon, words = request.query.partition(":")
    by = kind.strip() if colon and kind.strip() in _WAYS else "label"
    words = _unquoted(words if by != "label" else request.query)
    hits = _WAYS[by](session, store, words, name, request.most)
    label = _labels(store)
    return m.Hits(
        by=by,
        hits=[
            m.Hit(dictionary=h.dictionary, latent=h.latent, why=h.why, label=label(h.dictionary, h.latent))
            for h in hits
        ],
    )


def feature(session: Session, request: m.LatentOf) -> m.FeaturePage:
    """Return the page of a latent: what the store knows, and what the weights say."""
    store, name = opened_store(session, request)
    key = ("page", request.store, store.manifest["key"], name, request.latent, store.meta.stamp())
    return session.keep(key, lambda: _page(session, request, store, name))


def _page(session: Session, request: m.LatentOf, store: FeatureStore, name: str) -> m.FeaturePage:
    row = _table(session, request).row(request.latent)
    if "dead" in row.flags:
        why = f"it is active on none of {store.counted:,} tokens"
        raise Refused(f"latent {request.latent}", why, "harvest more tokens, or look at another")
    result, found = carded(session, request, {"contexts": 0})
    labels = store.meta.labels(name, request.latent)
    return m.FeaturePage(
        row=row,
        store=request.store,
        dictionary=name,
        labels=[m.LabelCard(source=x.source, text=x.text, scores=dict(x.scores)) for x in labels],
        strips=_strips(found),
        shown=shown(result, found, [f for f in _DRAWN if f in found.tensors()]),
    )


def carded(session: Session, request: m.LatentOf, options: dict[str, Any]) -> tuple[str, FeatureCard]:
    """Return the card of a latent with its id; one that was made before is opened again."""
    store, name = opened_store(session, request)
    values = {"store": store.manifest["key"], "dictionary": name, "latent": request.latent, **options}
    result = result_id(session, Values(method="features.card", values=values))
    if (file := session.folder.new_result(result)).exists():
        found = open_result(file)
        assert isinstance(found, FeatureCard)
        return result, found
    model, source = session.model, dictionary_of_store(session, store, name)
    found = card(store, request.latent, model, source, dictionary=name, **options)
    found = replace(found, record=found.record | _again(session, store, name, request.latent, options))
    found.save(file)
    return result, found


def read(session: Session, request: m.ReadText) -> m.ReadingOf:
    """Return the strongest latents on every token of a text, and the activations of one of them.

    Of two texts the second is read as well, and then the latents whose activations differ most are returned too.
    """
    store, name = opened_store(session, request)
    source, known, label = dictionary_of_store(session, store, name), store.latents(name), _labels(store)
    if request.latent is not None:
        known.check(request.latent)
    table = _Known(name, known.density, known.tensors["largest"].clamp_min(1e-30), label)
    first = read_text(session.model, source, request.text)
    opened = _loaded(session, store, name)
    found = {
        "tokens": _read_tokens(request, table, first),
        "largest": None if request.latent is None else float(known.tensors["largest"][request.latent]),
        "python": f"from cutaway.features.reading import read_text\nread_text({opened}, {request.text!r})",
    }
    if not request.other:
        return m.ReadingOf(**found)
    second = read_text(session.model, source, request.other)
    why = apart(first.words, second.words)
    difference = () if why else tuple(_changed_tokens(request, table, first, second))
    return m.ReadingOf(**found, other=tuple(_read_tokens(request, table, second)), difference=difference, apart=why)


@dataclass(frozen=True)
class _Known:
    """Facts of a store about all latents of a dictionary: how often they are active, their largest, and labels."""

    name: str
    density: Float[Tensor, "latent"]
    largest: Float[Tensor, "latent"]
    label: Callable[[str, int], str]

    def strongest(self, request: m.ReadText, code: Float[Tensor, "token latent"]) -> list[list[int]]:
        """Return the latents of each token that are largest as a share of their largest, the dense ones left out."""
        ranked = (code.abs() / self.largest).masked_fill((self.density > request.dense) | (code == 0), 0)
        best = ranked.topk(min(request.top, len(self.density)), 1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[i for i, v in zip(*row, strict=True) if v > 0] for row in rows]

    def said(self, latent: int, value: float) -> dict[str, Any]:
        """Return what is said of a latent beside its value."""
        share = abs(value) / float(self.largest[latent])
        said = {"density": float(self.density[latent]), "label": self.label(self.name, latent)}
        return {"latent": latent, "share": share, **said}


def _read_tokens(request: m.ReadText, known: _Known, found: ReadText) -> list[m.ReadToken]:
    code = found.code.dense()
    return [
        m.ReadToken(
            text=word,
            special=bool(found.special[t]),
            error=float(found.error[t]),
            active=int((code[t] != 0).sum()),
            value=None if request.latent is None else float(code[t, request.latent]),
            top=[m.Active(value=float(code[t, i]), **known.said(i, float(code[t, i]))) for i in best],
        )
        for t, (word, best) in enumerate(zip(found.words, known.strongest(request, code), strict=True))
    ]


def _changed_tokens(request: m.ReadText, known: _Known, first: ReadText, second: ReadText) -> list[m.ChangedRead]:
    a, b = first.code.dense(), second.code.dense()
    change = a - b

    def changed(t: int, i: int) -> m.Changed:
        by = float(change[t, i])
        return m.Changed(value=float(a[t, i]), other=float(b[t, i]), change=by, **known.said(i, by))

    words = zip(first.words, second.words, known.strongest(request, change), strict=True)
    return [
        m.ChangedRead(
            text=one,
            other=two,
            special=bool(first.special[t] | second.special[t]),
            value=None if request.latent is None else float(change[t, request.latent]),
            top=[changed(t, i) for i in best],
        )
        for t, (one, two, best) in enumerate(words)
    ]


def saved_direction(session: Session, request: m.LatentOf) -> m.DirectionOf:
    """Save what a latent writes at its mean activation as a direction, to steer with."""
    store, name = opened_store(session, request)
    known, source = store.latents(name), dictionary_of_store(session, store, name)
    step = float(known.mean()[known.check(request.latent)])
    sites = source.blocks[place_of(source, request.latent)[0]].writes
    vectors = {s: source.direction(request.latent, s) * step for s in sites}
    made = direction(vectors, f"latent {request.latent} of {name}", positive="active", family=session.model.family.name)
    values = {"store": store.manifest["key"], "dictionary": name, "latent": request.latent}
    found = result_id(session, Values(method="direction", values=values))
    record = {"answers": f"What does {made.name} write at its mean activation?", "mean activation": step}
    replace(made, record=record).save(session.folder.new_result(found))
    return m.DirectionOf(id=found, sites=list(sites), step=step)


# --- what is opened


def feature_store(session: Session, name: str) -> FeatureStore:
    """Return a store by its id, opened once."""
    folder = session.folder.store(name)
    return session.keep(("store", name, (folder / "manifest.json").stat().st_mtime_ns), lambda: FeatureStore(folder))


def opened_store(session: Session, request: m.InStore) -> tuple[FeatureStore, str]:
    """Return a store and the name of the dictionary that is meant in it."""
    store = feature_store(session, request.store)
    return store, store.latents(request.dictionary or None).name


def _table(session: Session, request: m.InStore) -> LatentTable:
    store, name = opened_store(session, request)
    return session.keep(("table", store.manifest["key"], name), lambda: LatentTable(store, name))


def dictionary_of_store(session: Session, store: FeatureStore, name: str) -> Dictionary:
    """Return the dictionary of a store, after a check that it and the model are those that were harvested."""
    key = ("dictionary of", store.manifest["key"], name)

    def opened() -> Dictionary:
        store.check_model(session.model)
        found = dictionary_of(store, name).to(session.model.device)
        store.check_dictionary(found, name)
        return found

    return session.keep(key, opened)


# --- what is said


def _store_card(name: str, store: FeatureStore) -> m.StoreCard:
    row = {d: store.latents(d).row["opened"] for d in store.names}
    return m.StoreCard(
        id=name,
        name=store.folder.name,
        model=str(store.manifest["model"]["name"]),
        dictionaries={d: len(store.latents(d)) for d in store.names},
        opened={d: word if word and shipped(word) else None for d, word in row.items()},
        tokens=store.counted,
        held_out=store.manifest["counts"]["score"],
        labels=sum(store.meta.count(d) for d in store.names),
    )


def _labels(store: FeatureStore) -> Callable[[str, int], str]:
    return lambda name, latent: next((x.text for x in store.meta.labels(name, latent)), "")


def _strips(found: FeatureCard) -> list[m.Strip]:
    labels, peak = found.labels, found.labels["offset"].index("0")
    return [
        m.Strip(
            value=value,
            place=name.partition(" ")[2].removesuffix("*"),
            held_out=name.endswith("*"),
            peak=peak,
            tokens=[m.StripToken(text=w, value=None if v != v else v) for w, v in zip(words, values, strict=True)],
        )
        for value, name, words, values in zip(
            found.activation.tolist(), labels["example"], labels["window"], found.window.tolist(), strict=True
        )
    ]


def _again(session: Session, store: FeatureStore, name: str, latent: int, options: dict[str, Any]) -> dict[str, str]:
    """Return the call of a card in Python and on the command line."""
    folder, said = str(store.folder), "".join(f", {k}={v!r}" for k, v in options.items())
    opened = f"ca.features.FeatureStore({folder!r}), {latent}"
    flags = "".join(f" --{k} {v}" for k, v in options.items())
    return {
        "python": f"ca.features.card({opened}, {_loaded(session, store, name)}, dictionary={name!r}{said})",
        "command": f"cutaway features card {shlex.quote(folder)} {latent} --name {shlex.quote(name)}{flags}",
    }


def _loaded(session: Session, store: FeatureStore, name: str) -> str:
    return f"ca.load({session.source!r}), ca.dictionaries.load({store.latents(name).row['opened']!r})"


def _unquoted(text: str) -> str:
    """Return what a search looks for: inside quotes a text keeps its spaces."""
    bare = text.strip()
    return bare[1:-1] if len(bare) > 1 and bare[0] == bare[-1] == '"' else bare


def _number(text: str) -> int:
    digits = text.strip().rpartition("/")[2]
    if not digits.isdecimal():
        raise Refused(f"like:{text}", "that is no number of a latent", "write like:17")
    return int(digits)


Way = Callable[[Session, FeatureStore, str, str, int], list[search.Hit]]
_WAYS: dict[str, Way] = {
    "label": lambda session, store, words, name, most: search.by_label(store, words, most),
    "token": lambda session, store, words, name, most: search.by_peak_token(store, words, name, most),
    "phrase": lambda session, store, words, name, most: search.by_phrase(store, words, name, most),
    "fires-on": lambda session, store, words, name, most: search.by_text(
        store, words, session.model, dictionary_of_store(session, store, name), name, most
    ),
    "raises": lambda session, store, words, name, most: search.by_raised_word(
        store, words, session.model, dictionary_of_store(session, store, name), name, most
    ),
    "like": lambda session, store, words, name, most: search.by_likeness(
        store, _number(words), dictionary_of_store(session, store, name), name, most
    ),
}
