"""Jobs about features: a harvest with rules, the card of a latent with its ablation, and two dictionaries matched."""

from __future__ import annotations

from dataclasses import replace

from cutaway import zoo
from cutaway.core.refuse import Refused
from cutaway.core.result import Result, open_result
from cutaway.dictionaries.opening import open_dictionary
from cutaway.features import compare, explain, harvest
from cutaway.features.store.dictionaries import named
from cutaway.studio import feature_messages as m
from cutaway.studio.actions.features import carded, opened_store
from cutaway.studio.actions.methods import result_id
from cutaway.studio.actions.results import shown
from cutaway.studio.messages import Request, Shown, Values
from cutaway.studio.session import Session
from cutaway.zoo.miniworld.documents import WorldDocuments


def harvested(session: Session, request: m.Harvest) -> Shown:
    """Harvest a dictionary that ships with the model, look for rules, and show their scores on held-out documents.

    Raises:
        Refused: a dictionary that does not ship with the model, or a model without text of its own.
    """
    model = session.model
    if request.dictionary not in zoo.dictionaries(session.source) or model.world is None:
        why = "only dictionaries that ship with a model are harvested here, on the model's own text"
        raise Refused(f"dictionary {request.dictionary!r}", why, "harvest it: cutaway features harvest; then --open it")
    name = _name(session, "features.explain", request)
    file = session.folder.new_result(name)
    if file.exists():
        return shown(name, open_result(file))
    of = {n: d.to(model.device) for n, d in named(open_dictionary(request.dictionary)).items()}
    folder = session.folder.new_store(name.replace("features-explain", "store"))
    store = harvest(model, of, WorldDocuments(model.world), folder, tokens=request.tokens, seed=request.seed)
    (of_store,) = store.names
    python = f"ca.features.explain(ca.features.FeatureStore({str(folder)!r}), dictionary={of_store!r}, samples=1)"
    return _saved(session, name, explain(store, dictionary=of_store, samples=1, seed=request.seed), python)


def causal(session: Session, request: m.CausalCard) -> Shown:
    """Show what ablating a latent changes, and what exchanging its peak token does."""
    options = {"contexts": request.contexts, "samples": request.samples, "seed": request.seed}
    name, found = carded(session, request, options)
    return shown(name, found, [f for f in ("change", "swap") if f in found.tensors()])


def compared(session: Session, request: m.ComparedStores) -> Shown:
    """Match the latents of two dictionaries by the tokens on which they are active."""
    name = _name(session, "features.compare", request)
    file = session.folder.new_result(name)
    if file.exists():
        return shown(name, open_result(file))
    first, one = opened_store(session, request)
    other = m.InStore(model=request.model, store=request.second_store, dictionary=request.second_dictionary)
    second, two = opened_store(session, other)
    options = {"names": (one, two), "samples": request.samples, "seed": request.seed}
    said = "".join(f", {k}={v!r}" for k, v in options.items())
    places = ", ".join(f"ca.features.FeatureStore({str(s.folder)!r})" for s in (first, second))
    return _saved(session, name, compare(first, second, **options), f"ca.features.compare({places}{said})")


def _name(session: Session, method: str, request: Request) -> str:
    return result_id(session, Values(method=method, values=request.model_dump(exclude={"model"})))


def _saved(session: Session, name: str, found: Result, python: str) -> Shown:
    found = replace(found, record=found.record | {"python": python})
    found.save(session.folder.new_result(name))
    return shown(name, found)
