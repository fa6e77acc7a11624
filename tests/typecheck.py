"""The checker that the import hook of `conftest` puts on every function of the package: jaxtyping and beartype.

Shapes are followed where a signature names them, or an alias of one; other functions get beartype alone, and private
and inner functions without shapes nothing: following costs more than most of them do, and the static checker reads
them. What jaxtyping's own decorator does beside (binding the arguments, and checking them once more with the result)
only words its message.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, Self

import jaxtyping
import jaxtyping._storage as memory
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a fine float
_SHAPES = ("Float[", "Int[", "Bool[", "Shaped[", "Num[", "Integer[", "UInt[")
_followed = jaxtyping.jaxtyped


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its types checked at every call; `Self`, which means nothing outside a class, is left out."""
    hints = getattr(function, "__annotations__", {})
    if any(hint in (Self, "Self") for hint in hints.values()):
        function.__annotations__ = {name: hint for name, hint in hints.items() if hint not in (Self, "Self")}
    return beartype(function, conf=_CONF)


def install(package: str) -> None:
    """Check every function of a package that is imported from now on."""
    jaxtyping.jaxtyped = _jaxtyped
    install_import_hook(package, "tests.typecheck.checked")


def _jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    def decorate(what: Any) -> Any:
        if dataclasses.is_dataclass(what) and _can_be_read(what.__init__):
            what.__init__ = decorate(what.__init__)
            return what
        if (inspect.isfunction(what) and not what.__annotations__) or _is_inner(what):
            return what
        if not inspect.isfunction(what) or "TYPE_CHECKING" in what.__globals__:
            return _followed(what, typechecker=typechecker)  # it also knows names that are never imported
        if _names_shapes(what):
            if inspect.isgeneratorfunction(what):  # beartype looks at its arguments only when it is first asked
                return _followed(what, typechecker=typechecker)
            return _remembering(typechecker(what))
        return typechecker(what)

    return decorate


def _is_inner(what: Any) -> bool:
    """Return True for private and local functions without shapes, which the static checker reads as well."""
    inner = inspect.isfunction(what) and ("<locals>" in what.__qualname__ or what.__name__.startswith("_"))
    return inner and not what.__name__.startswith("__") and not _names_shapes(what)


def _remembering(typed: Any) -> Any:
    """`typed` in a call that has its own sizes: those that arguments give a name are those of the result."""

    @wraps(typed)
    def followed(*args: Any, **kwargs: Any) -> Any:
        memory.push_shape_memo({})
        try:
            return typed(*args, **kwargs)
        finally:
            memory.pop_shape_memo()

    return followed


def _can_be_read(function: Any) -> bool:
    """Whether every type is known where the function is; fields of a dataclass may be inherited from elsewhere."""
    try:
        inspect.get_annotations(function, eval_str=True)
    except NameError:
        return False
    return True


def _names_shapes(function: Callable[..., Any]) -> bool:
    hints = [str(hint) for hint in function.__annotations__.values()]
    aliases = (function.__globals__.get(name) for hint in hints for name in re.findall(r"[A-Za-z_]\w*", hint))
    return any(word in hint for hint in hints for word in _SHAPES) or any("jaxtyping" in repr(a) for a in aliases)
