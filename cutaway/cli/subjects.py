"""Subjects of methods as flags of commands, from the table in `core.subject`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cutaway.core.subject import REQUIRED, SUBJECTS, Flag, subject
from cutaway.zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    from cutaway.models.model import Model


def parameters(name: str) -> list[inspect.Parameter]:
    """Return the flags of a subject as parameters of a command's signature."""
    return [_parameter(name, flag) for flag in subject(name).flags]


def _parameter(name: str, flag: Flag) -> inspect.Parameter:
    negative = "" if flag.type is bool else None
    hint = Annotated[flag.type, Parameter(help=flag.help, group=name.capitalize(), negative=negative)]
    default = inspect.Parameter.empty if flag.default is REQUIRED else flag.default
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
