"""`cutaway studio`: a local web page on one or more models."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cutaway.cli import stdio
from cutaway.core.refuse import Refused
from cutaway.zoo import DEFAULT_MODEL

_ONCE = "The address lets one browser in. Ctrl-C ends the studio; jobs that run go on at the next start."
FOLDER = Path("~/.cache/cutaway/studio")


def studio(
    *,
    model: Annotated[
        list[str] | None, Parameter(help="zoo name, folder, GGUF file or id; NAME=PLACE names it; again for more")
    ] = None,
    open: Annotated[
        list[Path] | None, Parameter(help="a file or folder that the page may open, by its name; again for more")
    ] = None,
    folder: Annotated[Path, Parameter(help="where jobs and results are kept")] = FOLDER,
    host: Annotated[str, Parameter(help="address to bind; others than 127.0.0.1 let other machines ask")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="port; 0 takes a free one")] = 0,
    browser: Annotated[bool, Parameter(help="open the page in the browser")] = True,
) -> None:
    """Open a local web page on a model; it asks nothing of any network."""
    from cutaway.studio.folder import Folder
    from cutaway.studio.serve import is_local, serve

    places = Folder.of(folder, open or ())

    def ready(address: str) -> None:
        stdio.tell(f"studio: {address}\n{_ONCE}\n")
        if browser:
            webbrowser.open(address)

    if not is_local(host):
        stdio.tell(f"warning: {host} can be reached by other machines; whoever has the address can use your models\n")
    serve(places, sources(model or [DEFAULT_MODEL]), host, port, ready)


def sources(given: list[str]) -> dict[str, str]:
    """Return the models by the names that they have on the page.

    Raises:
        Refused: two of one name.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, source = text.rpartition("=")
        name = name or Path(source).name or source
        if name in found:
            raise Refused(f"--model {text}", f"another model is called {name!r}", "name it: --model NAME=PLACE")
        found[name] = str(Path(source).absolute()) if Path(source).exists() else source
    return found
