"""The schema of graph files (`assets/graph.schema.json`), and the part of JSON Schema that it is written in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_LARGEST = 3.4e38  # of float32: what is larger, infinite or NaN does not count as a number


@cache
def graph_schema() -> dict[str, Any]:
    """Return the schema of a graph file."""
    return json.loads((Path(__file__).parent / "assets" / "graph.schema.json").read_text("utf-8"))


def faults(value: Any, schema: dict[str, Any], where: str = "the file") -> Iterator[str]:
    """Yield what is wrong with a value: types, missing entries, and texts that do not match their pattern."""
    allowed = schema.get("type", list(_TYPES))
    allowed = [allowed] if isinstance(allowed, str) else allowed
    if not any(_is(value, name) for name in allowed):
        yield f"{where} is {json.dumps(value, default=str)[:40]}, which is not of type {' or '.join(allowed)}"
        return
    if "pattern" in schema and isinstance(value, str) and not re.fullmatch(schema["pattern"], value):
        yield f"{where} is {value[:40]!r}, which does not match {schema['pattern']}"
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{where} has no {name!r}"
        for name, rule in schema.get("properties", {}).items():
            if name in value:
                yield from faults(value[name], rule, f"{name!r} of {where}")
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from faults(item, schema["items"], f"entry {i} of {where}")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name]) and (not isinstance(value, int | float) or abs(value) <= _LARGEST)
