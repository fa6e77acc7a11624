"""Recipes: what is trained. Plain data that a checkpoint, a log and a dictionary's `about` can keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from cutaway.core.address import parse
from cutaway.core.refuse import Keyword, Refused
from cutaway.dictionaries.gates import TrainGate, train_gate_of
from cutaway.dictionaries.objectives import Matryoshka, Term, term_of
from cutaway.dictionaries.parts import Block
from cutaway.dictionaries.training.adam import AdamSettings

Decoder = Literal["unit", "free", "norm_aware"]


@dataclass(frozen=True)
class Recipe:
    """Recipe of a dictionary to train.

    Args:
        blocks: what is read and written; see `autoencoder`, `transcoder`, `crosscoder`, `cross_layer`.
        gating: the gate in training.
        terms: the objective beside the squared error.
        decoder: rows kept at norm one, free, or free with latents compared in units of their norms.
        subtract: the encoder sees x − b_dec (only where all that is read is written).
        skip: linear maps from each read to each write of a block.
        scaled: activations are brought to the mean norm √width, site by site.
        rate: learning rate; None lets the probe choose around the customary one.
        seed: of the starting directions.
        squared: weight of the squared error; 0 leaves the terms alone (end-to-end).
    """

    blocks: tuple[Block, ...]
    gating: TrainGate
    terms: tuple[Term, ...] = ()
    decoder: Decoder = "unit"
    subtract: bool = True
    skip: bool = False
    scaled: bool = True
    rate: float | None = None
    seed: int = 0
    squared: float = 1.0
    adam: AdamSettings = field(default_factory=AdamSettings)

    def __post_init__(self) -> None:
        if not self.blocks or any(not b.reads or not b.writes for b in self.blocks):
            raise Refused("a recipe", "a block reads or writes nothing", "name the sites of every block")
        for site in (*self.reads, *self.writes):
            parse(site)
        least, k = min(b.n_latents for b in self.blocks), getattr(self.gating, "k", 1)
        if least < 1:
            raise Refused(f"a dictionary with {least} latents", "it needs at least one", "give more latents")
        if k < 1:
            raise Refused(f"k = {k}", "a token needs at least one active latent", "give a larger k")
        if k > least:
            raise Refused(f"k = {k} of {least} latents", "there are not so many", "give a smaller k, or more latents")
        if self.rate is not None and not 0 < self.rate < math.inf:
            why = "a learning rate is a positive number"
            raise Refused(f"learning rate {self.rate}", why, "give one such as 0.001, or none: three are tried")
        for block in self.blocks:
            self.gating.check(block.n_latents)
        if self.subtract and any(r not in self.writes for r in self.reads):
            raise Refused("subtract=True", "b_dec exists only for sites that are written", "use subtract=False")
        if self.decoder == "norm_aware" and not self.gating.fixed:
            what = f"norm-aware gating of {self.gating.name}"
            raise Refused(what, "its threshold already learns the unit", ("use ", Keyword("decoder", "free")))
        if not self.gating.encodes and (
            self.decoder != "unit"
            or not self.subtract
            or any(b.reads != b.writes or len(b.reads) > 1 for b in self.blocks)
        ):
            why = "it reads one site with the unit rows that write it"
            raise Refused(self.gating.name, why, "use it in an autoencoder, as it comes")
        for term in self.terms:
            self._check(term)
        for needed in self.gating.needs:
            if not any(isinstance(t, needed) for t in self.terms):
                why = f"its gate learns from {needed.__name__} alone"
                raise Refused(f"a {self.gating.name.lower()} dictionary", why, f"add {needed.__name__}(weight=…)")

    def _check(self, term: Term) -> None:
        kind, gate = type(term).__name__, self.gating.name
        if not 0 <= term.weight < math.inf:
            raise Refused(f"{kind} of weight {term.weight}", "it would reward what it is to punish", "give 0 or more")
        if term.needs is not None and term.needs not in self.gating.offers:
            raise Refused(f"{kind} with the gate {gate}", "the term reads what that gate does not have", "drop one")
        if isinstance(term, Matryoshka):
            least = min(b.n_latents for b in self.blocks)
            if not term.widths or list(term.widths) != sorted(set(term.widths)) or term.widths[-1] >= least:
                why = "prefixes must grow and end before the whole"
                raise Refused(f"Matryoshka{term.widths}", why, f"give increasing widths below {least}")

    @property
    def reads(self) -> tuple[str, ...]:
        """Every site that is read."""
        return tuple(dict.fromkeys(r for b in self.blocks for r in b.reads))

    @property
    def writes(self) -> tuple[str, ...]:
        """Every site that is written."""
        return tuple(dict.fromkeys(w for b in self.blocks for w in b.writes))

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Widths of the prefixes that the objective reads, without the whole."""
        return next((t.widths for t in self.terms if isinstance(t, Matryoshka)), ())

    def customary_rate(self, steps: int) -> float:
        """2e-4 / √(latents / 2¹⁴) (Gao et al. 2024), up to ten times that where the run is short."""
        size = max(b.n_latents for b in self.blocks) / 2**14
        return 2e-4 / size**0.5 * min(10.0, max(1.0, (50_000 / max(steps, 1)) ** 0.5))

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe ready for JSON."""
        plain = {n: getattr(self, n) for n in ("decoder", "subtract", "skip", "scaled", "rate", "seed", "squared")}
        return plain | {
            "blocks": [{"n_latents": b.n_latents, "reads": [*b.reads], "writes": [*b.writes]} for b in self.blocks],
            "gating": self.gating.as_dict(),
            "terms": [t.as_dict() for t in self.terms],
            "adam": asdict(self.adam),
        }


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `as_dict` described; what it leaves out is as in `Recipe`.

    Raises:
        Refused: parts that are missing or that no recipe has.
    """
    missing = [n for n in ("blocks", "gating") if n not in data]
    known = [f.name for f in fields(Recipe)]
    wrong = [n for n in data if n not in known]
    if missing or wrong:
        why = f"{missing[0]!r} is missing" if missing else f"it has no part {wrong[0]!r}"
        raise Refused("a recipe", why, f"its parts are {', '.join(known)}")
    try:
        given = dict(data) | {
            "blocks": tuple(Block(b["n_latents"], tuple(b["reads"]), tuple(b["writes"])) for b in data["blocks"]),
            "gating": train_gate_of(data["gating"]),
            "terms": tuple(term_of(t) for t in data.get("terms", ())),
            "adam": AdamSettings(**data.get("adam", {})),
        }
        return Recipe(**given)
    except (TypeError, KeyError, AttributeError) as error:
        raise Refused("a recipe", f"a part of it cannot be read: {error}", "write it as a card.json has it") from error


def autoencoder(
    site: str, n_latents: int, gating: TrainGate, terms: Sequence[Term] | None = None, **more: Any
) -> Recipe:
    """Make the recipe of a sparse autoencoder of one site; `terms` defaults to the usual objective of its gate."""
    return autoencoders([site], n_latents, gating, terms, **more)


def autoencoders(
    sites: Sequence[str], n_latents: int, gating: TrainGate, terms: Sequence[Term] | None = None, **more: Any
) -> Recipe:
    """Make the recipe of a set of sparse autoencoders, a block for each site."""
    free = not gating.fixed
    chosen = gating.customary() if terms is None else tuple(terms)
    blocks = tuple(Block(n_latents, (site,), (site,)) for site in sites)
    return Recipe(blocks, gating, chosen, **({"decoder": "free" if free else "unit", "subtract": not free} | more))


def transcoder(
    read: str, write: str, n_latents: int, gating: TrainGate, terms: Sequence[Term] | None = None, **more: Any
) -> Recipe:
    """Make the recipe of a transcoder from one site to another; `skip=True` adds a linear map beside it."""
    return transcoders([read], [write], n_latents, gating, terms, **more)


def transcoders(
    reads: Sequence[str],
    writes: Sequence[str],
    n_latents: int,
    gating: TrainGate,
    terms: Sequence[Term] | None = None,
    **more: Any,
) -> Recipe:
    """Make the recipe of a set of transcoders: block l reads `reads[l]` and writes `writes[l]`."""
    if len(reads) != len(writes):
        raise Refused("a set of transcoders", f"{len(reads)} reads and {len(writes)} writes", "give as many of each")
    chosen = gating.customary() if terms is None else tuple(terms)
    blocks = tuple(Block(n_latents, (read,), (write,)) for read, write in zip(reads, writes, strict=True))
    return Recipe(blocks, gating, chosen, **(_APART | more))


def crosscoder(
    reads: Sequence[str],
    n_latents: int,
    gating: TrainGate,
    terms: Sequence[Term] | None = None,
    writes: Sequence[str] | None = None,
    **more: Any,
) -> Recipe:
    """Make the recipe of a crosscoder: one block that reads several sites and writes them, or others."""
    chosen = gating.customary() if terms is None else tuple(terms)
    block = Block(n_latents, tuple(reads), tuple(reads if writes is None else writes))
    return Recipe((block,), gating, chosen, **({"decoder": "free", "subtract": False} | more))


def cross_layer(
    reads: Sequence[str],
    writes: Sequence[str],
    n_latents: int,
    gating: TrainGate,
    terms: Sequence[Term] | None = None,
    **more: Any,
) -> Recipe:
    """Make the recipe of a cross-layer transcoder: block l reads `reads[l]` and writes `writes[l:]`."""
    if len(reads) != len(writes):
        raise Refused(
            "a cross-layer transcoder", f"{len(reads)} reads and {len(writes)} writes", "give as many of each"
        )
    chosen = gating.customary() if terms is None else tuple(terms)
    blocks = tuple(Block(n_latents, (read,), tuple(writes[i:])) for i, read in enumerate(reads))
    return Recipe(blocks, gating, chosen, **(_APART | more))


_APART: dict[str, Any] = {"decoder": "free", "subtract": False}
