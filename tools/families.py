"""The generated page docs/families.md: what the self-check finds on a tiny model of every family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cutaway.core.sites import SITES
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.model import Model
from cutaway.models.self_check import disabled_sites, self_check


@dataclass(frozen=True)
class Row:
    """One tiny model: its configuration, what it offers, and how many identities held on it."""

    name: str
    kind: str
    sites: dict[str, str]
    passed: int
    tried: int


def row(name: str, model: Model) -> Row:
    """Run the self-check on one model."""
    outcomes = self_check(model)
    offered = {**model.sites(), **{s: f"disabled: {why}" for s, why in disabled_sites(outcomes).items()}}
    return Row(name, type(model.hf.config).__name__, offered, sum(o.passed for o in outcomes), len(outcomes))


def page(rows: Iterable[Row], generated: str, probed: Iterable[str] = ()) -> str:
    """The page as Markdown; `probed` are the lines of families without a row."""
    rows = list(rows)
    states = [r for r in rows if any(s.startswith("ssm.") for s in _names(r))]
    attention = [r for r in rows if r not in states]
    return f"""{generated}# Families

Every architecture below has a row of data in `cutaway/models/anatomy/families.py`; its tiny random model, in the
variants that matter (attention with all, some or one key-value head, parallel blocks, tied embeddings …), passes every
identity of the self-check that applies to it.

An architecture without a row is probed: the self-check then says which sites were found, and disables the others with
their reasons, or the model is refused (last table). `cutaway sites --model M` shows the outcome for one model.

## Transformers

{_table(attention)}

## State-space models

They have no attention and no MLP: those sites are refused, and so are the methods that need them. Their own sites are
tapped inside the functions that transformers calls for convolution and scan. `ssm.dt` is one number a channel in the
first generation and one a head in the second. An edit of `ssm.state` at a position runs on into all later states.

{_table(states)}

## Found by probing

Every other architecture with which transformers continues text, on a tiny random model with an odd value for each
multiplier of its configuration. What is not named under "disabled" or "not there" agrees with hooks written by hand, in
runs, sweeps, padding and generation (`tests/models/test_every.py`). "Disabled" names the identity that failed: the
sites, paddings and circuits before the colon are refused with it, and sweeps go round what their batches get wrong.

| model | sites | not there | disabled, or refused |
|---|---|---|---|
{chr(10).join(probed)}
"""


def probed_line(kind: str) -> str:
    """What becomes of one family without a row."""
    from tests.models.every import found

    there = found(kind)
    if there.model is None:
        return f"| `{kind}` | – | – | {there.why.replace('|', '/')} |"
    can = there.model.sites()
    right = [s for s, text in can.items() if _offered(text)]
    absent = [s for s, text in can.items() if text.startswith("absent") and not s.startswith("ssm.")]
    why: dict[str, list[str]] = {}
    for name in there.model.disabled:
        first = next(o.name for o in there.outcomes if not o.passed and name in o.sites)
        why.setdefault(first, []).append(name)
    wrong = [f"{_and(names)}: {check}" for check, names in why.items()]
    way = unembedding(there.model.anatomy)
    wrong += [f"lens and shares: {way.why}"] if way.why else [] if way.linear else ["shares: its head is not linear"]
    return f"| `{kind}` | {len(right)} | {_and(absent)} | {'; '.join(wrong) or 'nothing'} |"


def probed() -> list[str]:
    """One line for each family without a row."""
    from tests.models.every import KINDS

    return [probed_line(kind) for kind in KINDS]


def _table(rows: list[Row]) -> str:
    here = [s.name for s in SITES if any(_offered(r.sites[s.name]) for r in rows)]
    always = [n for n in here if all(_offered(r.sites[n]) for r in rows)]
    lines = ["| " + " | ".join(_cells(r, here, always)) + " |" for r in rows]
    return f"""Sites that all of them have: {_and(always)}.

| model | configuration | sites | besides | not there | identities held |
|---|---|---|---|---|---|
{chr(10).join(lines)}"""


def tiny() -> list[Row]:
    """One row for each tiny model of the tests."""
    from tests.models.tiny import CONFIGS, STATE_SPACE, build

    return [row(name, Model(build(name))) for name in CONFIGS | STATE_SPACE]


def _cells(r: Row, here: list[str], always: list[str]) -> list[str]:
    others = _and(s for s in _names(r) if s not in always)
    missing = _and(s for s in here if not _offered(r.sites[s]))
    return [f"`{r.name}`", r.kind, str(len(_names(r))), others, missing, f"{r.passed} of {r.tried}"]


def _offered(can: str) -> bool:
    return can.startswith("read")


def _names(r: Row) -> list[str]:
    return [s for s, can in r.sites.items() if _offered(can)]


def _and(names: Iterable[str]) -> str:
    return " ".join(f"`{n}`" for n in names) or "none"
