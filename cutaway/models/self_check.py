"""Self-check: the identities that reads and edits of a model must satisfy, run on the model itself.

Each row of the table is one identity with the sites it vouches for. A site whose identity fails on this model is
disabled with its reason, never left wrong. The outcome is kept by what the model is, never by its configuration alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cutaway.core.files import read_json, write_json
from cutaway.core.record import hash_text, versions
from cutaway.core.refuse import Refused
from cutaway.models.access.forward import alone
from cutaway.models.checks.identities import CHECKS, Kind
from cutaway.models.checks.trial import FAULTS, Trial, fault_text
from cutaway.models.loading.identity import REWRITES, structure
from cutaway.models.model import Model

# By kind of identity. Most families norm in float32 even where everything else is float64.
_TOLERANCE: dict[torch.dtype, dict[Kind, float]] = {
    torch.float32: {"same": 1e-4, "sum": 1e-4, "run": 1e-4},
    torch.float64: {"same": 1e-5, "sum": 1e-5, "run": 1e-5},
    torch.bfloat16: {"same": 1e-3, "sum": 0.03, "run": 0.06},
    torch.float16: {"same": 1e-4, "sum": 0.004, "run": 0.01},
}


@dataclass(frozen=True)
class CheckOutcome:
    """Outcome of one check.

    Attributes:
        name: name of the check.
        sites: the sites that a failure disables.
        error: relative error; None if the check does not apply.
        passed: True if it passed.
        why: the reason, if it failed.
    """

    name: str
    sites: tuple[str, ...]
    error: float | None
    passed: bool
    why: str = ""


def self_check(model: Model) -> list[CheckOutcome]:
    """Run every identity that applies; the model is left as it was.

    Raises:
        Refused: the model does not even run.
    """
    with alone(model.hf), _short_chunks(model), torch.no_grad():
        return _outcomes(model)


def _outcomes(model: Model) -> list[CheckOutcome]:
    trial = Trial(model)
    tolerances = _TOLERANCE.get(model.dtype, _TOLERANCE[torch.float32])
    outcomes = [CheckOutcome(f"{s} can be captured", (s,), None, False, why) for s, why in trial.broken.items()]
    for check in CHECKS:
        try:
            error = check.error(trial)
        except FAULTS as fault:
            outcomes.append(CheckOutcome(check.name, check.sites, None, False, fault_text(fault)))
            continue
        if error is not None:
            tolerance = tolerances[check.kind]
            passed = error <= tolerance
            why = "" if passed else f"relative error {error:.2g} exceeds {tolerance:.0e}"
            outcomes.append(CheckOutcome(check.name, check.sites, error, passed, why))
    return outcomes


@contextmanager
def _short_chunks(model: Model) -> Iterator[None]:
    """Within the block, a scan in chunks takes short ones.

    It costs the square of a chunk however short the prompt, minutes where everything else takes seconds; no identity
    depends on the length, and with four positions there are several.
    """
    layers = [model.anatomy.part(i, "ssm") for i in range(model.shape.n_layers)]
    kept = [(m, m.__dict__["chunk_size"]) for m in layers if m is not None and "chunk_size" in m.__dict__]
    try:
        for m, _ in kept:
            m.__dict__["chunk_size"] = 4
        yield
    finally:
        for m, size in kept:
            m.__dict__["chunk_size"] = size


def disabled_sites(outcomes: list[CheckOutcome]) -> dict[str, str]:
    """Site → reason, for every failed identity."""
    return {s: f"self-check failed: {o.name} ({o.why})" for o in outcomes if not o.passed for s in o.sites}


def checked(model: Model, cache: Path | None) -> dict[str, str]:
    """Return the sites to disable on this model; the outcome is kept in `cache`, so that it is found out once.

    Success is kept by what the model is (`identity.structure`) and by the versions of what ran it. A failure is
    kept for these very weights alone. Nothing is kept of a model with something attached that cannot be read, or while
    its weights are rewritten: zeros in a rewritten weight could hide what fails on the model itself.
    """
    text, unread = structure(model.hf)
    if cache is None or unread or REWRITES.get(model.hf):
        return disabled_sites(self_check(model))
    sort = hash_text(text, *sorted(f"{k} {v}" for k, v in _versions(model).items()), _source())
    own = hash_text(sort, model.fingerprint())
    for key in (sort, own):
        if (cache / f"{key}.json").exists():
            with suppress(Refused):  # an unreadable file is written again
                return read_json(cache / f"{key}.json")
    disabled = disabled_sites(self_check(model))
    with suppress(OSError, Refused):  # a read-only home only costs the next load its seconds of checking
        write_json(cache / f"{own if disabled else sort}.json", disabled)
    return disabled


def _versions(model: Model) -> dict[str, str]:
    """Return the versions of the packages that the model's modules are from, and of what else ran it."""
    known = versions()
    out = {name: known[name] for name in ("cutaway", "torch", "transformers")}
    for package in {type(m).__module__.partition(".")[0] for m in model.hf.modules()} - {*out}:
        with suppress(PackageNotFoundError):
            out[package] = version(package)
    return out


def _source() -> str:
    """Return the checks' and taps' own text: a changed tap must be checked again."""
    return hash_text(*(p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.rglob("*.py"))))
