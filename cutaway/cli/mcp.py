"""`cutaway mcp`: the method table as tools for agents."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cutaway.cli.studio import FOLDER, sources
from cutaway.core.refuse import Refused
from cutaway.zoo import DEFAULT_MODEL


def mcp(
    *,
    model: Annotated[str, Parameter(help="zoo name, folder, GGUF file or id")] = DEFAULT_MODEL,
    open: Annotated[list[Path] | None, Parameter(help="a file or folder that tools may open; again for more")] = None,
    folder: Annotated[Path, Parameter(help="where jobs and results are kept")] = FOLDER,
) -> None:
    """Offer all methods as tools of the Model Context Protocol, on standard input and output."""
    if find_spec("mcp") is None:
        raise Refused("cutaway mcp", "the package mcp is not installed", "pip install 'cutaway[mcp]'")
    import asyncio

    from cutaway.studio.folder import Folder
    from cutaway.studio.server import Studio
    from cutaway.studio.tools import serve

    asyncio.run(serve(Studio(Folder.of(folder, open or ()), sources([model]))))
