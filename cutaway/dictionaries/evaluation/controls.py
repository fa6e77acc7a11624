"""Controls: what a dictionary is compared with.

* random: new random directions, decoder rows as long as those of the dictionary, as many active latents
* pca: as many principal components per token as the dictionary has latents active, those that matter most to the token
* pca first: the same number of leading components, the same ones on every token
* neurons: the coordinates of the site themselves, as many per token
* linear: where the output is another site, the best affine map
* mlp neurons: of a dictionary that writes `mlp_out`, the model's own neurons, as many per token (`mlp_neurons`)

Of a dictionary of several sites every site has its own, with as many per token as latents that write it are active: the
L0 of such a control counts all sites. What is fitted (means, components, the length of random encoders, the affine map)
is fitted on other tokens than those judged on. A dictionary of a model with random weights, and the model's own
neurons, are controls that only the caller has; see `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.scores import control_generator
from cutaway.dictionaries.gates import AbsTopK, BatchTopK, Gate, TopK
from cutaway.dictionaries.parts import decoder_norms
from cutaway.dictionaries.splice import needed
from cutaway.dictionaries.transforms import autoencoder, fold, one_block, subtracting, together
from cutaway.models.model import Model

WIDEST = 8192  # coordinates that an affine map is fitted from


@dataclass(frozen=True)
class Judged:
    """A dictionary on the part of the evidence that it is judged on, beside what it is compared with.

    Attributes:
        encoded: the dictionary.
        null: random dictionaries with the same norms and L0.
        control: the controls that fit it, by name.
    """

    encoded: EncodedEvidence
    null: list[EncodedEvidence]
    control: dict[str, EncodedEvidence]


@torch.no_grad()
def judge(dictionary: Dictionary, evidence: Evidence, samples: int, seed: int, fitted: bool = True) -> Judged:
    """Fit controls on a first quarter of the evidence, and run them and the dictionary over the rest.

    Args:
        dictionary: the dictionary judged.
        evidence: held-out activations.
        samples: number of random dictionaries.
        seed: seed of the first of them.
        fitted: also run the controls that fit the dictionary.

    Raises:
        Refused: evidence of other sites, or too little of it.
    """
    fit, rest = evidence.parted()
    encoded = encode_evidence(dictionary, rest)
    null = [encode_evidence(d, rest) for d in random_dictionaries(dictionary, fit, samples, seed, encoded.l0)]
    found = controls(dictionary, fit, encoded.l0) if fitted else {}
    return Judged(encoded, null, {n: encode_evidence(d, rest) for n, d in found.items()})


def random_dictionaries(
    dictionary: Dictionary, fit: Evidence, samples: int, seed: int, l0: float | None = None
) -> list[Dictionary]:
    """Make random dictionaries like another, with the L0 that it has on `fit` if none is given."""
    l0 = encode_evidence(dictionary, fit).l0 if l0 is None else l0
    return [random_dictionary(dictionary, fit, l0, seed=seed + i) for i in range(samples)]


def random_dictionary(dictionary: Dictionary, fit: Evidence, l0: float, *, seed: int = 0) -> Dictionary:
    """Make a dictionary of random directions with the decoder norms, biases and L0 of another.

    Encoder rows point along the new decoder rows of what is read (or anywhere, where something else is written) and are
    so long that the reconstruction of `fit` is as near as one factor can bring it. Top-k gates keep their k; others
    become one threshold that gives the same L0 on `fit`.
    """
    g = control_generator(seed)
    made = fold(dictionary)
    encoder, decoder = [], []
    for b, block in enumerate(made.blocks):
        norms = decoder_norms(made.decoder[b]).cpu()
        rows = {w: torch.randn(block.n_latents, made.width(w), generator=g) for w in block.writes}
        length = torch.stack([r.pow(2).sum(1) for r in rows.values()]).sum(0).sqrt()
        decoder.append({w: r / length[:, None] * norms[:, None] for w, r in rows.items()})
        rows |= {r: torch.randn(block.n_latents, made.width(r), generator=g) for r in block.reads if r not in rows}
        encoder.append({r: normalize(rows[r], dim=-1) for r in block.reads})
    share = [l0 * b.n_latents / made.n_latents for b in made.blocks]
    gates = tuple(_gate(old, k) for old, k in zip(made.gates, share, strict=True))
    made = replace(
        made,
        encoder=tuple(encoder),
        decoder=tuple(decoder),
        gates=gates,
        norm_aware=False,
        b_dec={w: b.cpu() for w, b in made.b_dec.items()},
        b_enc=tuple(torch.zeros(b.n_latents) for b in made.blocks),
        about={"control": "random", "seed": seed},
    )
    made = _to_length(made, fit)
    return _with_thresholds(made, fit).to(device=dictionary.device)


def _gate(old: Gate, l0: float) -> Gate:
    return old if old.sets_number else BatchTopK(max(1, round(l0)))


def _to_length(made: Dictionary, fit: Evidence) -> Dictionary:
    """Multiply encoders by the factor that brings the latents' part of the output nearest to what is left for it."""
    encoded = encode_evidence(made, fit.rows(torch.arange(min(len(fit), 4096))))
    zero = replace(made, decoder=tuple({w: torch.zeros_like(t) for w, t in d.items()} for d in made.decoder))
    base = encode_evidence(zero, encoded.evidence).output
    near, size = 0.0, 0.0
    for w, out in encoded.output.items():
        part, left = (out - base[w]).double(), (encoded.evidence.of(w) - base[w]).double()
        near, size = near + float((part * left).sum()), size + float((part**2).sum())
    factor = max(near / size, 1e-6) if size > 0 else 1.0  # never 0: the latents stay active
    return replace(made, encoder=tuple({r: t * factor for r, t in e.items()} for e in made.encoder))


def _with_thresholds(made: Dictionary, fit: Evidence) -> Dictionary:
    """Give batch top-k gates the smallest value that they kept as their threshold, so that tokens are on their own."""
    code = encode_evidence(made, fit).code
    codes = [code.select(torch.arange(a, z)) for a, z in pairwise(made.starts)]
    kept = [c.value[c.value > 0] for c in codes]
    gates = [
        g.with_threshold(float(v.min()) * (1 - 1e-6)) if g.whole_batch and len(v) else g
        for g, v in zip(made.gates, kept, strict=True)
    ]
    return replace(made, gates=tuple(gates))


def principal(x: Float[Tensor, "token d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "component d"]]:
    """Return the mean and the principal components of activations, largest first (float64)."""
    wide = x.double()
    mean = wide.mean(0)
    return mean.float(), torch.linalg.eigh((wide - mean).T @ (wide - mean)).eigenvectors.flip(1).T.float()


def pca_dictionary(
    x: Float[Tensor, "token d"], k: int, *, site: str = "resid_post.0", first: bool = False
) -> Dictionary:
    """Make a dictionary of principal components: the k that matter most on each token, or always the `first` k."""
    mean, rows = principal(x)
    rows = rows[:k].contiguous() if first else rows
    return _orthonormal(site, rows, mean, k, "pca first" if first else "pca")


def neurons(x: Float[Tensor, "token d"], k: int, *, site: str = "resid_post.0") -> Dictionary:
    """Make a dictionary of the coordinates of a site: the k farthest from their mean on each token."""
    return _orthonormal(site, torch.eye(x.shape[1]), x.double().mean(0).float(), k, "neurons")


def _orthonormal(site: str, rows: Tensor, mean: Tensor, k: int, name: str) -> Dictionary:
    k = min(max(1, k), len(rows))
    zero = torch.zeros(len(rows))
    return autoencoder(site, rows, rows, zero, mean, AbsTopK(k), subtract_b_dec=True, about={"control": name, "k": k})


def linear_map(
    x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], *, reads: str, writes: str, ridge: float = 1e-4
) -> Dictionary:
    """Fit the best affine map from one site to another, as the skip of a dictionary whose one latent writes nothing.

    `ridge` is relative to the mean variance of a coordinate.
    """
    return _affine({reads: x}, y, writes, ridge)


def _affine(reads: Mapping[str, Tensor], y: Tensor, write: str, ridge: float = 1e-4) -> Dictionary:
    """Fit the best affine map from some sites together to another."""
    x = torch.cat([t.double() for t in reads.values()], 1)
    mx, my = x.mean(0), y.double().mean(0)
    a, b = x - mx, y.double() - my
    gram = a.T @ a
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    matrix = torch.linalg.solve(gram, a.T @ b).T
    parts = matrix.float().split([t.shape[1] for t in reads.values()], 1)
    zeros = {s: torch.zeros(1, t.shape[1]) for s, t in reads.items()}
    return one_block(
        zeros,
        {write: torch.zeros(1, y.shape[1])},
        torch.zeros(1),
        {write: (my - matrix @ mx).float()},
        TopK(1),
        skip={(s, write): m.contiguous() for s, m in zip(reads, parts, strict=True)},
        about={"control": "linear"},
    )


def mlp_neurons(model: Model, dictionary: Dictionary, fit: Evidence, l0: float) -> Dictionary | None:
    """Make a dictionary of the neurons behind each `mlp_out` that another writes, as many active per token.

    Those whose values are farthest from their mean, counted in the length of what they write; the others stay at their
    mean on `fit`, which has to hold the sites of `neuron_sites`. None where it has none of them.
    """
    sites = neuron_sites(model, dictionary)
    if not sites or set(dictionary.writes) != set(sites):
        return None
    made = []
    for (write, read), k in zip(sites.items(), _active(dictionary, tuple(sites), l0), strict=True):
        layer, values = parse(write).layer, fit.of(read).double().cpu()
        assert layer is not None
        rows, bias = (
            t.detach().double().cpu() for t in (model.weights.mlp_out[layer], model.weights.mlp_out_bias[layer])
        )
        y = fit.of(write).double().cpu()
        if float((values @ rows + bias - y).norm()) > 0.05 * float((y - y.mean(0)).norm()):
            return None  # a norm or a scale follows the neurons
        mean = values.mean(0)
        gate, settings = AbsTopK(min(k, len(rows))), {"norm_aware": True, "about": {"control": "mlp neurons"}}
        made.append(
            one_block(
                {read: torch.eye(len(rows))},
                {write: rows.float()},
                -mean.float(),
                {write: (bias + mean @ rows).float()},
                gate,
                **settings,
            )
        )
    return _together(made).to(device=dictionary.device)


def neuron_sites(model: Model, dictionary: Dictionary) -> dict[str, str]:
    """Find the `mlp_post` site behind each `mlp_out` that a dictionary writes, where neurons can be read."""
    found = {}
    for write in dictionary.writes:
        a = parse(write)
        if a.model or a.site != "mlp_out" or a.layer is None or not model.sites()["mlp_post"].startswith("read"):
            continue
        try:
            model.weights.mlp_out[a.layer]
        except Refused:  # experts, or another shape of the way out: no neurons that stand for the layer
            continue
        found[write] = f"mlp_post.{a.layer}"
    return found


def controls(dictionary: Dictionary, fit: Evidence, l0: float) -> dict[str, Dictionary]:
    """Fit the controls that suit a dictionary, by name; random ones apart.

    Sites that are read and written are compared with their components and coordinates, others that are written with
    affine maps from all that they follow from; of a dictionary with both kinds, components and maps make one control.

    Raises:
        Refused: one token, on which nothing can be fitted.
    """
    if len(fit) < 2:
        raise Refused("controls fitted on one token", "nothing can be fitted", "give more evidence")
    found: dict[str, Dictionary] = {}
    own = [w for w in dictionary.writes if w in dictionary.reads]
    parts = [_at(s, fit.of(s).cpu(), k) for s, k in zip(own, _active(dictionary, own, l0), strict=True)]
    maps = [_affine(_near(dictionary, fit, w), fit.of(w).cpu(), w) for w in dictionary.writes if w not in own]
    if not maps:
        found = {n: _together([p[n] for p in parts]) for n in parts[0]}
    elif not parts:
        found = {"linear": _together(maps)}
    else:
        found = {"pca, linear": _together([*(subtracting(p["pca"], False) for p in parts), *maps])}
    return {n: d.to(device=dictionary.device) for n, d in found.items()}


def _together(parts: Sequence[Dictionary]) -> Dictionary:
    return parts[0] if len(parts) == 1 else together(parts)


def _at(site: str, x: Tensor, k: int) -> dict[str, Dictionary]:
    return {
        "pca": pca_dictionary(x, k, site=site),
        "pca first": pca_dictionary(x, k, site=site, first=True),
        "neurons": neurons(x, k, site=site),
    }


def _active(d: Dictionary, sites: Sequence[str], l0: float) -> list[int]:
    """Count the active latents that write each site, if all blocks are equally active."""
    writing = [sum(b.n_latents for b in d.blocks if s in b.writes) for s in sites]
    return [max(1, round(l0 * n / d.n_latents)) for n in writing]


def _near(d: Dictionary, fit: Evidence, write: str) -> dict[str, Tensor]:
    """Return what a written site follows from; of too many coordinates, those of the site that was read last."""
    reads = needed(d, write)
    kept = reads if sum(d.width(r) for r in reads) <= WIDEST else reads[-1:]
    return {r: fit.of(r).cpu() for r in kept}
