"""Do two models hold the same geometry, layer by layer, on the same texts?

Both models read the same texts. A row is a word: each model's activation at the last token of it, so that their
tokenizers may differ. The first word of a text is left out, for its token often carries a huge norm.

* `cka[layer, other_layer]`: linear centred kernel alignment, without the bias of few rows (Kornblith et al. 2019,
  arXiv:1905.00414; Song et al. 2012): 1 for spaces that are equal up to a rotation and a scale. `interval`: 95 %,
  jackknife over eight groups of texts.
* `svcca`: the mean canonical correlation of the first `components` principal components (Raghu et al. 2017).
* `matched`: per dimension of the model its largest |correlation| with a dimension of the other, averaged: are single
  dimensions the same?
* Control: the rows of the other model shuffled (`null`, `svcca_null`, `matched_null`); for `matched` also the other
  model in a randomly rotated basis (`rotated_null`), which holds the same space but no units of its own.
* Assumption: words are what stands between spaces. The first 1,024 are read, and 64 must be there.
* Known failures: a few dimensions of large variance decide CKA. A pair of models can compute the same with other
  features (modular addition with other frequencies), and is then unlike here.
* Equivalences (tests): a model with itself has `cka` and `matched` 1 at equal layers; rotation changes `matched` only.
* Cost: one forward of each model per text, and products of rows for each pair of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Call, Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, rotation
from cutaway.geometry.texts import Texts
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

_BATCH = 8
_GROUPS = 8
_FEWEST, _MOST = 64, 1024  # words
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class Similarity(Result, kind="model_similarity"):
    """The likeness of two models' activations at each pair of layers.

    Attributes:
        cka: linear centred kernel alignment, debiased.
        interval: of `cka`, 95 %, over groups of texts.
        null: `cka` with the other model's rows shuffled.
        svcca: mean canonical correlation of the first principal components.
        svcca_null: with rows shuffled.
        matched: mean over the model's dimensions of the largest |correlation| with one of the other's.
        matched_null: with rows shuffled.
        rotated_null: `matched` with the other model in a random basis.
    """

    cka: Float[Tensor, "layer other_layer"]
    interval: Float[Tensor, "layer other_layer bound"]
    null: Float[Tensor, "layer other_layer sample"]
    svcca: Float[Tensor, "layer other_layer"]
    svcca_null: Float[Tensor, "layer other_layer sample"]
    matched: Float[Tensor, "layer other_layer"]
    matched_null: Float[Tensor, "layer other_layer sample"]
    rotated_null: Float[Tensor, "layer other_layer sample"]


@method(
    answers="Do two models hold the same geometry, layer by layer, on the same texts?",
    paper="Kornblith et al. 2019, arXiv:1905.00414",
    cost="2 * texts * F",
    control="shuffled_rows_and_rotated_bases",
    rung="observational",
)
def similarity(
    model: Model,
    other: Model,
    texts: Texts,
    /,
    *,
    site: str = "resid_post",
    layers: int = 4,
    components: int = 10,
    samples: int = 4,
    seed: int = 0,
) -> Similarity:
    """Compare the activations of two models on the same texts, word by word.

    Args:
        site: a site of vectors, such as resid_post or mlp_post.
        layers: number of layers of each model, at equal steps from first to last.
        components: number of principal components whose correlations are averaged.
        samples: number of shuffles and rotations.
        seed: seed of the shuffles and rotations.

    Raises:
        Refused: too few words, another site, no layer or component, or a tokenizer that gives no offsets.
    """
    for name, n in (("layers", layers), ("components", components)):
        if n < 1:
            raise Refused(Call("similarity", {name: n}), "nothing is compared", "ask for one or more")
    places = [_places(m, site, layers) for m in (model, other)]
    rows, group = _read((model, other), places, texts.texts)
    n = len(group)
    if n < _FEWEST:
        why = f"they have {n} words beyond the first of each"
        raise Refused("similarity on these texts", why, f"give texts with {_FEWEST} such words or more")
    one, two = ([_Space.of(x, min(components, n // 4)) for x in found] for found in rows)
    cells = [[_compare(a, b, group, samples, seed) for b in two] for a in one]
    found = {k: torch.stack([torch.stack([c[k] for c in row]) for row in cells]).float() for k in cells[0][0]}
    return Similarity(
        cka=found["cka"],
        interval=found["interval"],
        null=found["null"],
        svcca=found["svcca"],
        svcca_null=found["svcca_null"],
        matched=found["matched"],
        matched_null=found["matched_null"],
        rotated_null=found["rotated_null"],
        labels={"layer": [a.layer for a in places[0]], "other_layer": [a.layer for a in places[1]], "bound": BOUNDS},
        units=_UNITS,
        record={"words": n, "site": site, "row": "a word: its last token, without the first word of each text"},
    )


_UNITS = {"cka": "alignment", "svcca": "correlation", "matched": "correlation"}


def _places(model: Model, site: str, layers: int) -> list[Address]:
    found = [a for a in model.places(site) if a.layer is not None]
    if not found:
        raise Refused(Keyword("site", site), "it has no layers", "use a site such as resid_post")
    steps = torch.linspace(0, len(found) - 1, min(layers, len(found)), dtype=torch.double).round().long()
    return [found[i] for i in steps.tolist()]


def _read(
    models: Sequence[Model], places: Sequence[list[Address]], texts: Sequence[str]
) -> tuple[list[list[Tensor]], Tensor]:
    """Return rows [word, d] of each model and layer, and the group of texts that each row is from, in one pass."""
    rows: list[list[list[Tensor]]] = [[[] for _ in own] for own in places]
    group, left = list[int](), _MOST
    for first in range(0, len(texts), _BATCH):
        if left <= 0:
            break
        some = list(texts[first : first + _BATCH])
        tokens = [m.tokens(some) for m in models]
        both = [_last_tokens(t, s) for t, s in zip(tokens, [some] * len(models), strict=True)]
        shared = [sorted(set.intersection(*(set(ends[i]) for ends in both)))[1:] for i in range(len(some))]
        at = [(i, end) for i, ends in enumerate(shared) for end in ends][:left]
        left -= len(at)
        group += [(first + i) % _GROUPS for i, _ in at]
        for m, model in enumerate(models):
            acts = model.capture(tokens[m], places[m], logits=False)
            r = torch.tensor([i for i, _ in at], dtype=torch.long)
            c = torch.tensor([both[m][i][end] for i, end in at], dtype=torch.long)
            for k, place in enumerate(places[m]):
                x = acts[str(place)]
                if x.ndim != 3:
                    why = f"its activations are {list(x.shape)}, which is not [batch, position, width]"
                    raise Refused(Keyword("site", place.site), why, "use a site of vectors, such as resid_post")
                rows[m][k].append(x[r.to(x.device), c.to(x.device)].double().cpu())
    return [[torch.cat(parts) for parts in own] for own in rows], torch.tensor(group)


def _last_tokens(tokens: Tokens, texts: Sequence[str]) -> list[dict[int, int]]:
    """Return for each text the columns of the last tokens of its words, by the words' ends."""
    first = tokens.column(0).tolist()
    return [dict(_of_words(text, tokens.offsets[i], first[i])) for i, text in enumerate(texts)]


def _of_words(text: str, offsets: Sequence[tuple[int, int] | None], first: int) -> Iterator[tuple[int, int]]:
    ends = {o[1]: n for n, o in enumerate(offsets) if o is not None and o[0] < o[1]}
    for word in _WORD.finditer(text):
        if word.end() in ends:
            yield word.end(), first + ends[word.end()]


@dataclass(frozen=True)
class _Space:
    """Activations of one layer, ready for comparisons.

    Attributes:
        rows: centred.
        products: of rows with rows, without the diagonal.
        basis: orthonormal scores of the first principal components.
        units: columns of length 1.
    """

    rows: Float[Tensor, "row d"]
    products: Float[Tensor, "row row"]
    basis: Float[Tensor, "row component"]
    units: Float[Tensor, "row d"]

    @classmethod
    def of(cls, x: Float[Tensor, "row d"], components: int) -> _Space:
        x = x - x.mean(0)
        products = x @ x.T
        basis = torch.linalg.eigh(products)[1][:, -components:]
        return cls(x, products - products.diagonal().diag(), basis, normalize(x, dim=0))


def _compare(a: _Space, b: _Space, group: Tensor, samples: int, seed: int) -> dict[str, Tensor]:
    """Return every field of one cell."""
    g = generator(seed)
    orders = [torch.randperm(len(group), generator=g) for _ in range(samples)]
    turns = [rotation(b.rows.shape[1], g, dtype=torch.double) for _ in range(samples)]
    value = cka(a.products, b.products)
    kept = [(group != k).nonzero()[:, 0] for k in group.unique().tolist()]
    parts = torch.stack([cka(a.products[i][:, i], b.products[i][:, i]) for i in kept])
    pseudo = len(kept) * value - (len(kept) - 1) * parts
    return {
        "cka": value,
        "interval": mean_interval(value + pseudo - pseudo.mean(), within=(-1.0, 1.0)).double(),
        "null": torch.stack([cka(a.products, b.products[o][:, o]) for o in orders]),
        "svcca": _canonical(a.basis, b.basis),
        "svcca_null": torch.stack([_canonical(a.basis, b.basis[o]) for o in orders]),
        "matched": _matched(a.units, b.units),
        "matched_null": torch.stack([_matched(a.units, b.units[o]) for o in orders]),
        "rotated_null": torch.stack([_matched(a.units, normalize(b.rows @ t, dim=0)) for t in turns]),
    }


def cka(k: Float[Tensor, "row row"], m: Float[Tensor, "row row"]) -> Float[Tensor, ""]:
    """Return debiased linear CKA from two matrices of products of rows whose diagonals are 0."""
    return _dependence(k, m) / (_dependence(k, k) * _dependence(m, m)).clamp_min(1e-300).sqrt()


def _dependence(k: Tensor, m: Tensor) -> Tensor:
    """Return the unbiased Hilbert-Schmidt independence criterion of Song et al. 2012."""
    n = len(k)
    sums, others = k.sum(0), m.sum(0)
    whole = (k * m).sum() + sums.sum() * others.sum() / ((n - 1) * (n - 2)) - 2 * (sums @ others) / (n - 2)
    return whole / (n * (n - 3))


def _canonical(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.svdvals(a.T @ b).mean()


def _matched(a: Tensor, b: Tensor) -> Tensor:
    return (a.T @ b).abs().amax(1).mean()
