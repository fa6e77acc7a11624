"""Whole runs: dictionaries trained, saved and judged; and the ones that ship with the miniworld, from their recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cutaway.core.files import write_json
from cutaway.core.refuse import Refused
from cutaway.dictionaries import training as tr
from cutaway.dictionaries.objectives import Spliced
from cutaway.dictionaries.store import save
from cutaway.dictionaries.training.endtoend import Answer
from cutaway.dictionaries.training.plan import Select
from cutaway.dictionaries.transforms import together
from cutaway.models.model import Model
from cutaway.streams import Documents, LiveStream, Packing
from cutaway.streams.packing import Cursor, Packer
from cutaway.suites.dictionary_cards import card
from cutaway.zoo.miniworld import dictionaries as shipped
from cutaway.zoo.miniworld.documents import WorldDocuments


@dataclass(frozen=True)
class Finished:
    """Outcome of a run.

    Attributes:
        files: the dictionaries that were saved.
        cards: the card of each dictionary; none where judging was refused.
        refusal: why they were not judged, or None.
    """

    files: tuple[Path, ...]
    cards: list[dict[str, Any]]
    refusal: Refused | None = None


def planned(tokens: int, select: Select = "auto") -> tr.Plan:
    """Plan a run whose card is made on a quarter as many tokens, at least 1,024 and at most 16,384."""
    return tr.Plan(tokens=tokens, select=select, card_tokens=min(16384, max(1024, tokens // 4)))


def shuffled_together(batch: int, tokens: int) -> int:
    """Return how many tokens of a stream are shuffled together: an eighth of the run, but four batches at least."""
    return max(4 * batch, min(1 << 16, tokens // 8))


def end_to_end(model: Model, answer: Answer = "kl") -> Spliced:
    """Return the end-to-end term of a run, in which a nat of divergence counts like the squared error of the whole."""
    return Spliced(tr.Divergence(model, answer), weight=float(model.shape.d_model))


def whole_contexts(
    model: Model, text: Documents, packing: Packing, sites: Sequence[str], batch: int, tokens: int
) -> tr.Whole:
    """Return whole contexts for objectives that run the model: as many as the tokens, or all that there are."""
    size = max(1, batch // packing.context)
    wanted, rows, held = -(-tokens // packing.context) + 2 * size, [], 0  # the last batches go over the tokens
    for c in Packer(text, model.tokenizer, packing).contexts(Cursor()):
        rows.append(c.ids[c.real.all(1)])
        held += len(rows[-1])
        if held >= wanted:
            break
    return tr.Whole(model, torch.cat(rows)[:wanted], tuple(sites), rows=size)


def finish(
    trained: Sequence[tr.Trained], names: Sequence[str], source: Any, out: str | Path, tokens: int = 16384
) -> Finished:
    """Save the dictionaries of a run in its folder, then judge them; a judgement that is refused loses nothing.

    Args:
        trained: results of the run.
        names: name of each file.
        source: what the run trained on; it is judged on the `tokens` that come next.
        out: folder of the run, which gets the cards too.
        tokens: tokens judged on.
    """
    files = tuple(save(t.dictionary, Path(out) / f"{n}.safetensors") for n, t in zip(names, trained, strict=True))
    try:
        cards = card(trained, source, tokens=tokens)
    except Refused as refusal:
        return Finished(files, [], refusal)
    write_json(Path(out) / "card.json", cards)
    return Finished(files, cards)


def train_shipped(
    model: Model,
    out: Path,
    tokens: int | None = None,
    *,
    resume: bool = True,
    progress: Callable[[tr.Progress], None] | None = None,
    card_tokens: int = 16384,
) -> Finished:
    """Train the dictionaries that ship with the miniworld again, all on one stream; one file per name, in float16."""
    tokens = tokens or shipped.TOKENS
    own: dict[str, Any] = {"rate": shipped.RATE, "seed": shipped.SEED}
    recipes = [
        tr.autoencoder(r.reads, r.latents, tr.TrainBatchTopK(r.k), **own)
        if r.reads == r.writes
        else tr.transcoder(r.reads, r.writes, r.latents, tr.TrainBatchTopK(r.k), **own)
        for r in shipped.RECIPE
    ]
    sites = tuple(dict.fromkeys(s for r in shipped.RECIPE for s in (r.reads, r.writes)))
    stream = LiveStream(
        model,
        WorldDocuments(model.world, shipped.SEED),
        sites,
        packing=Packing(context=shipped.CONTEXT),
        batch=shipped.BATCH,
        window=shipped.WINDOW,
    )
    plan = tr.Plan(tokens=tokens, card_tokens=card_tokens)
    done = tr.train(stream, recipes, plan, out=out, resume=resume, progress=progress)
    cards = card(done, stream, tokens=plan.card_tokens)
    files = []
    for name, file in shipped.shipped().items():
        parts = [t.dictionary for t, r in zip(done, shipped.RECIPE, strict=True) if r.file == name]
        files.append(save(parts[0] if len(parts) == 1 else together(parts), out / file.name, torch.float16))
    write_json(out / "dictionaries.json", {"cards": cards, "tokens": tokens})
    return Finished(tuple(files), cards)
