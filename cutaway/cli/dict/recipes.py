"""Recipes that `cutaway dict train` trains, from flags (all combinations of repeated ones) or from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from cutaway.core.address import split_model
from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates import forms_of
from cutaway.dictionaries.gates import names as gate_names

if TYPE_CHECKING:
    from cutaway.dictionaries.gates import TrainGate
    from cutaway.dictionaries.objectives import Term
    from cutaway.dictionaries.training import Recipe

    Gate = str
else:
    Gate = Literal[tuple(gate_names())]

Kind = Literal["autoencoder", "transcoder", "crosscoder", "cross-layer"]
PenaltyKind = Literal["step", "tanh", "quadratic"]
DecoderKind = Literal["unit", "free", "norm-aware"]
Places = Callable[[Sequence[str]], list[str]]

WHAT, OBJECTIVE = Group("What is trained", sort_key=1), Group("Objective", sort_key=2)
LATENTS, K = 1024, 16


def _flag(text: str, group: Group = WHAT) -> Any:
    return Parameter(help=text, group=group, negative=())


@Parameter(name="*")
@dataclass(frozen=True)
class Asked:
    """Flags of which recipes are made."""

    site: Annotated[
        list[str] | None, _flag("address that is read, such as resid_post.3; may be repeated, or be a pattern")
    ] = None
    write: Annotated[list[str] | None, _flag("address that is written, if another; as many as sites")] = None
    kind: Annotated[
        Kind | None, _flag("what sites make together [default: autoencoder or transcoder; several: a block for each]")
    ] = None
    skip: Annotated[
        bool, Parameter(help="of a transcoder: a linear map beside it", group=WHAT, negative=(), show_default=False)
    ] = False
    latents: Annotated[list[int] | None, _flag(f"number of latents, of each block [default: {LATENTS}]")] = None
    gate: Annotated[Gate | None, _flag("how latents become active [default: batchtopk]")] = None
    k: Annotated[list[int] | None, _flag(f"active latents a token, for gates that set a number [default: {K}]")] = None
    wide: Annotated[int | None, _flag("of topk: so many more latents are decoded once again (Multi-TopK)")] = None
    nested: Annotated[list[int] | None, _flag("Matryoshka: widths of the prefixes, one option each")] = None
    decoder: Annotated[DecoderKind | None, _flag("norms of decoder rows [default: as is usual for the gate]")] = None
    seed: Annotated[list[int] | None, _flag("of the starting directions; several make several [default: 0]")] = None
    recipe: Annotated[
        Path | None, _flag("recipes as JSON, in place of these flags: one, a list, a card.json, or a dictionary's own")
    ] = None
    penalty: Annotated[float | None, _flag("weight of the sparsity penalty, for gates without a number", OBJECTIVE)] = (
        None
    )
    penalty_kind: Annotated[PenaltyKind | None, _flag("of jumprelu (tanh: of relu as well)", OBJECTIVE)] = None
    l0: Annotated[float | None, _flag("active latents a token that a quadratic penalty aims at", OBJECTIVE)] = None
    end_to_end: Annotated[
        Literal["kl", "ce"] | None, _flag("also what the model does with the reconstruction in place", OBJECTIVE)
    ] = None
    rate: Annotated[float | None, _flag("learning rate [default: three are tried]", OBJECTIVE)] = None


def recipes(asked: Asked, places: Places, extra: Sequence[Term] = ()) -> list[Recipe]:
    """Return the recipes that the flags mean, each once; `places` gives the addresses that patterns mean.

    Raises:
        Refused: flags that contradict each other, or two equal recipes.
    """
    if asked.recipe is not None:
        found = from_file(asked.recipe, asked)
    elif not asked.site:
        raise Refused("dict train", "no site was named", "give --site resid_post.3, or --recipe FILE.json")
    else:
        sides = places(asked.site), places(asked.write) if asked.write else None
        sweep = product(asked.latents or [LATENTS], asked.k or [K], asked.seed or [0])
        found = [_one(asked, sides, n, k, s, extra) for n, k, s in sweep]
    for i, recipe in enumerate(found):
        if recipe in found[:i]:
            what = f"--seed {recipe.seed}" if asked.recipe is None else f"recipe {i + 1} of {asked.recipe}"
            raise Refused(f"{what}, twice", "both dictionaries would be the same", "leave one out")
    return found


def names(made: Sequence[Recipe]) -> list[str]:
    """Return a file's name for each recipe, of what they differ in."""
    if len(made) == 1:
        return ["dictionary"]
    parts = [
        [_sites(r) for r in made],
        [r.gating.name.lower() for r in made],
        [f"latents{r.blocks[0].n_latents}" for r in made],
        [f"k{getattr(r.gating, 'k', '')}" for r in made],
        [f"seed{r.seed}" for r in made],
    ]
    told = ["-".join(["dictionary", *p]) for p in zip(*(c for c in parts if len(set(c)) > 1), strict=True)]
    if len(set(told)) == len(made):
        return told
    stems = told or ["dictionary"] * len(made)
    return [f"{name}-{i}" for i, name in enumerate(stems)]


def from_file(path: Path, asked: Asked) -> list[Recipe]:
    """Return the recipes from JSON, from the cards of a run, or from a dictionary that says how it was made.

    Raises:
        Refused: no recipe there, or flags that would say it otherwise.
    """
    from cutaway.core.files import read_json
    from cutaway.dictionaries import open as open_dictionary
    from cutaway.dictionaries.training import recipe_of

    given = [f.name for f in fields(Asked) if f.name != "recipe" and getattr(asked, f.name)]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise Refused(f"--recipe {path} with {flag}", "the file says it all", "change the file, or leave one out")
    data = open_dictionary(path).about if path.suffix == ".safetensors" else read_json(path)
    found = [recipe_of(_bare(row, path)) for row in (data if isinstance(data, list) else [data])]
    if not found:
        raise Refused(f"--recipe {path}", "it holds no recipe", "give one, or a list of them")
    return found


def _bare(row: Any, path: Path) -> Mapping[str, Any]:
    """Return the recipe itself, which a card or a dictionary's `about` calls `recipe`."""
    found = row.get("recipe", row) if isinstance(row, Mapping) else row
    if not isinstance(found, Mapping):
        raise Refused(f"--recipe {path}", f"{str(found)[:40]!r} is no recipe", "give what a card.json calls recipe")
    return found


def _one(asked: Asked, sides: tuple[list[str], list[str] | None], n: int, k: int, seed: int, extra: Any) -> Recipe:
    from cutaway.dictionaries import training as tr

    reads, writes = sides
    gating, terms = objective(asked, k)
    more: dict[str, Any] = {"rate": asked.rate, "seed": seed}
    if asked.decoder is not None:
        more["decoder"] = asked.decoder.replace("-", "_")
    kind = asked.kind or _kind(reads, writes)
    if asked.skip and kind not in ("transcoder", "cross-layer"):
        raise Refused("--skip", f"an {kind} has nothing to skip", "name another site with --write")
    given, terms = len(writes or ()), (*terms, *extra)
    if kind in ("transcoder", "cross-layer") and given != len(reads):
        what = f"--kind {kind} of {len(reads)} sites and {given} with --write"
        raise Refused(what, "each site that is read needs one that is written", "give as many --write as --site")
    if kind == "autoencoder" and writes is not None:
        raise Refused("--kind autoencoder with --write", "it writes what it reads", "leave one out")
    match kind:
        case "autoencoder":
            return tr.autoencoders(reads, n, gating, terms, **more)
        case "transcoder":
            assert writes is not None
            return tr.transcoders(reads, writes, n, gating, terms, skip=asked.skip, **more)
        case "crosscoder":
            return tr.crosscoder(reads, n, gating, terms, writes, **more)
        case "cross-layer":
            assert writes is not None
            return tr.cross_layer(reads, writes, n, gating, terms, skip=asked.skip, **more)


def objective(asked: Asked, k: int) -> tuple[TrainGate, tuple[Term, ...]]:
    """Return the gate and the terms that the flags mean.

    Raises:
        Refused: a flag that the gate does not have.
    """
    from cutaway.dictionaries import objectives as ob
    from cutaway.dictionaries.gates import Flags

    name = asked.gate or "batchtopk"
    gate = forms_of(name).train
    given: dict[str, Any] = {f.name: getattr(asked, f.name) for f in fields(Flags)} | {"k": k if asked.k else None}
    for flag, value in given.items():
        if value is not None and flag not in gate.flags:
            own = ", ".join(_spelled(f) for f in gate.flags) or "none"
            others = ", ".join(other for other in gate_names() if flag in forms_of(other).train.flags)
            what, why = f"{_spelled(flag)} with --gate {name}", f"the flags of that gate are {own}"
            raise Refused(what, why, f"use those, or --gate {others}")
    kind = asked.penalty_kind
    if kind is not None and kind not in gate.penalties:
        what, own = f"--penalty-kind {kind} with --gate {name}", ", ".join(gate.penalties)
        raise Refused(what, "its penalty is another", f"use one of {own}, or --gate jumprelu")
    given["k"] = k
    gating, terms = gate.of_flags(Flags(**given))
    return gating, (*terms, ob.Matryoshka(tuple(asked.nested))) if asked.nested else terms


def _spelled(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _kind(reads: Sequence[str], writes: Sequence[str] | None) -> Kind:
    if any(split_model(site)[0] for site in reads):
        return "crosscoder"
    return "autoencoder" if writes is None else "transcoder"


def _sites(recipe: Recipe) -> str:
    """Reads and writes, short enough for a file's name."""

    def side(all_of: tuple[str, ...]) -> str:
        return (all_of[0] if len(all_of) == 1 else f"{all_of[0]}..{all_of[-1]}").replace(":", "_")

    reads, writes = side(recipe.reads), side(recipe.writes)
    return reads if reads == writes else f"{reads}-to-{writes}"
