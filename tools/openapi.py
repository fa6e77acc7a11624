"""Write what the studio's server offers: `openapi.json`, and the types of its messages for the page (`types.d.ts`).

    python -m tools.openapi

Both are committed, and a test says when they are no longer what the server offers.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOM = Path(__file__).parents[1] / "cutaway" / "studio"
DOCUMENT, TYPES = ROOM / "openapi.json", ROOM / "static" / "types.d.ts"
_PLAIN = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}


def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    from cutaway.studio.folder import Folder
    from cutaway.studio.server import Studio, create

    with TemporaryDirectory() as folder:
        found = create(Studio(Folder.of(Path(folder)), {"model": "model"})).openapi()
    found["info"]["version"] = "1"  # of the document; the package's own changes with every release
    return found


def types(found: dict[str, Any]) -> str:
    """Return the messages of a document as TypeScript declarations."""
    out = ["// Written by tools/openapi.py from openapi.json; not to be edited.\n"]
    for name, schema in sorted(found["components"]["schemas"].items()):
        about = schema.get("description", "").strip().replace("\n", " ")
        lines = [
            f"  {field}{'' if field in schema.get('required', ()) else '?'}: {_type(part)};"
            for field, part in schema.get("properties", {}).items()
        ]
        out.append(f"/** {about} */\nexport interface {name} {{\n" + "\n".join(lines) + "\n}\n")
    return "\n".join(out)


def _type(part: dict[str, Any]) -> str:
    if "$ref" in part:
        return part["$ref"].rsplit("/", 1)[1]
    if "enum" in part:
        return " | ".join(map(json.dumps, part["enum"]))
    if "anyOf" in part:
        return " | ".join(map(_type, part["anyOf"]))
    match part.get("type"):
        case "array":
            inner = _type(part.get("items", {}))
            return f"({inner})[]" if "|" in inner else f"{inner}[]"
        case "object":
            more = part.get("additionalProperties")
            return f"Record<string, {_type(more) if isinstance(more, dict) else 'unknown'}>"
    return _PLAIN.get(part.get("type", ""), "unknown")


def written() -> dict[Path, str]:
    """Return both files as they should be."""
    found = document()
    return {DOCUMENT: json.dumps(found, indent=1, ensure_ascii=False) + "\n", TYPES: types(found)}


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOM.parents[1])}: {len(text):,} characters")
