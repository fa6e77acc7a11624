"""Subjects of methods as flags of commands, from the table in `core.subject`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cutaway.core.subject import REQUIRED, SUBJECTS, Flag, subject, with_needs
from cutaway.zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    from cutaway.models.model import Model


def parameters(takes: Sequence[Sequence[str]]) -> list[inspect.Parameter]:
    """Return the flags of a method's subjects as parameters of its command's signature.

    Args:
        takes: the subjects that each positional argument takes.
    """
    others = {n: [m for m in names if m != n] for names in takes for n in names}
    order = with_needs([n for names in takes for n in names])
    return [_parameter(name, flag, others.get(name, [])) for name in order for flag in subject(name).flags]


def _parameter(name: str, flag: Flag, others: Sequence[str]) -> inspect.Parameter:
    negative, kind, text, default = "" if flag.type is bool else None, flag.type, flag.help, flag.default
    if flag.default is REQUIRED:
        default = None if others else inspect.Parameter.empty
    if flag.default is REQUIRED and others:
        kind, text = kind | None, f"{text} [this or {', '.join(f'--{n}' for n in others)}]"
    hint = Annotated[kind, Parameter(help=text, group=name.capitalize(), negative=negative)]
    return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def flag_names() -> set[str]:
    """Return the names of the flags of all subjects."""
    return {flag.name for row in SUBJECTS.values() for flag in row.flags}


def load_model(
    model: str = DEFAULT_MODEL,
    model_dtype: str | None = None,
    model_device: str | None = None,
    model_attention: str | None = None,
) -> Model:
    """Load the model that the flags mean."""
    from cutaway.zoo.load import from_flags

    return from_flags(model, model_dtype, model_device, model_attention)


__all__ = ["DEFAULT_MODEL", "flag_names", "load_model", "parameters"]
