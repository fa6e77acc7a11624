"""Intervene: changes inside a run of a prompt, and what the model says instead, beside the same changes elsewhere."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from cutaway.core.stats import null_band
from cutaway.dictionaries.dictionary import place_of
from cutaway.dictionaries.opening import open_named
from cutaway.directions.direction import direction
from cutaway.patching.intervene import Intervention
from cutaway.studio.folder import PREFIX
from cutaway.studio.messages import ChangedToken, EditEntry, Effect, Intervene, Intervened
from cutaway.studio.session import Session
from cutaway.views.html import computed

METHOD = "patching.intervene"


def intervene(session: Session, request: Intervene) -> Intervened:
    """Make the changes and return the next tokens before and after.

    Raises:
        Refused: a change that cannot be made, or a prompt of which no task can be made.
    """
    values = _values(session, request)
    row = session.method(METHOD)
    subjects, options = session.opened(row, values)
    found: Intervention = row.function(*subjects, **options)
    task = subjects[1]
    effect, divergence = (
        _effects(found.effect[None], found.null[None]),
        _effects(found.divergence[None], found.divergence_null[None]),
    )
    changes, logits = _effects(found.change, found.change_null), _effects(found.logit_change, found.logit_change_null)
    texts: list[str] = list(found.labels["token"])
    ids: Any = found.record["tokens"]
    return Intervened(
        effect=effect[0],
        unit=found.units["effect"],
        target=task.pairs[0].answer,
        foil=task.pairs[0].foil,
        divergence=divergence[0],
        tokens=[
            ChangedToken(id=i, text=t, probability=p, logit=v, change=a, logit_change=b)
            for i, t, p, v, a, b in zip(
                ids, texts, found.probability.T.tolist(), found.logit.T.tolist(), changes, logits, strict=True
            )
        ],
        text=found.text,
        edited_text=found.edited_text,
        band=f"of the same changes at {request.samples} random other places, or along as many random directions",
        how=computed([found]),
        python=str(found.record.get("python", "")),
        command=str(found.record.get("command", "")),
        values=values,
    )


def _values(session: Session, request: Intervene) -> dict[str, Any]:
    """Return the form of the method that means the request."""
    patched = any(e.kind == "patch" for e in request.edits)
    other = request.other or ("" if patched else request.prompt)  # a corrupt prompt is sought only where it is read
    said = {"target": request.target, "foil": request.foil, "corrupt": other}
    return {
        "task": "sentence",
        "task_sentence": request.prompt,
        **{f"task_{n}": v for n, v in said.items() if v},
        "edits": [text for e in request.edits for text in _texts(session, e)],
        "top": request.top,
        "words": request.words,
        "samples": request.samples,
        "seed": request.seed,
    }


def _texts(session: Session, e: EditEntry) -> list[str]:
    """Return a change as the method reads it: a text for each position, or one for all."""
    file = _latent(session, e) if e.kind == "latent" else e.file
    rest = {"scale": [f"{e.number:g}"], "steer": [f"{e.number:g}", file], "latent": [f"{e.number:g}", file]}
    kind = "steer" if e.kind == "latent" else e.kind
    address = e.address.strip()
    places = [f"{address}@{p}" for p in e.positions] or [address]
    return [" ".join([kind, place, *rest.get(e.kind, [])]) for place in places]


def _latent(session: Session, e: EditEntry) -> str:
    """Save what one unit of a latent adds to the site that it writes, as a direction, and return its id.

    Raises:
        Refused: no such dictionary, latent or site.
    """
    name = f"latent-{hashlib.sha256(e.file.encode()).hexdigest()[:8]}-{e.latent}"
    file = session.folder.new_result(name)
    if not file.exists():
        d = open_named({"dictionary": session.meant("dictionary", e.file)}, {})
        sites = d.blocks[place_of(d, e.latent)[0]].writes
        direction({s: d.direction(e.latent, s).float() for s in sites}, f"latent {e.latent}").save(file)
    return PREFIX + name


def _effects(values: Tensor, null: Tensor) -> list[Effect]:
    """Return changes, each beside its band."""
    band, _, _ = null_band(null)
    rows = zip(values.tolist(), band.tolist(), strict=True)
    return [Effect(value=v, low=low, high=high, marked=not low <= v <= high) for v, (low, high) in rows]
