"""Sources of activations for `cutaway dict train`: a model on text, several models on the same text, or a harvest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from cutaway.cli.harvest import Bos, documents_of
from cutaway.cli.subjects import DEFAULT_MODEL, load_model
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from cutaway.dictionaries.training import Whole
    from cutaway.models.model import Model
    from cutaway.streams import Documents, Packing, Shards

FROM = Group("Activations", sort_key=3)


def _flag(text: str) -> Any:
    return Parameter(help=text, group=FROM, negative=())


@Parameter(name="*")
@dataclass(frozen=True)
class From:
    """Flags that say where activations come from."""

    model: Annotated[
        list[str] | None,
        _flag(
            f"as elsewhere (zoo name, folder, file, id) [default: {DEFAULT_MODEL}]; NAME=MODEL, repeated: a crosscoder"
        ),
    ] = None
    model_dtype: Annotated[str | None, _flag("dtype of the weights and of computing")] = None
    model_device: Annotated[str | None, _flag("device, such as cuda:0")] = None
    text: Annotated[
        str | None,
        _flag("a text file, a folder, .jsonl, ids (.npy, .safetensors) or hub:org/name; a zoo world has its own"),
    ] = None
    field: Annotated[str, _flag("field with the text, in JSON lines and data sets")] = "text"
    acts: Annotated[Path | None, _flag("folder of `cutaway harvest`: no model is run")] = None
    context: Annotated[int, _flag("tokens a context")] = 96
    bos: Annotated[Bos, _flag("where a beginning-of-text token is put")] = "auto"
    sinks: Annotated[float, _flag("leave out norms above so many medians; 0 leaves out none")] = 10.0


@dataclass(frozen=True)
class Origin:
    """An opened source of activations.

    Attributes:
        flags: the flags that name it.
        shards: the harvest, if it is one.
        models: the models by name; one alone has the empty name.
    """

    flags: From
    shards: Shards | None = None
    models: Mapping[str, Model] = field(default_factory=dict)

    def places(self, patterns: Sequence[str]) -> list[str]:
        """Return the addresses that patterns mean; of several models, each of them in every model that is not named.

        Raises:
            Refused: no such address here.
        """
        found = [a for p in patterns for a in self._places(p)]
        return list(dict.fromkeys(found))

    def stream(self, sites: Sequence[str], batch: int, tokens: int) -> Any:
        """Return batches of activations, with a cursor; they begin again where the text or the harvest ends."""
        if self.shards is not None:
            return self.shards.stream(list(sites), batch=batch, epochs=None)
        from cutaway.streams import LiveStream, Masking
        from cutaway.suites.dictionary_runs import shuffled_together

        subject = self.models if self.named else self.model
        return LiveStream(
            subject,
            self.documents,
            list(sites),
            packing=self.packing,
            masking=Masking(sinks=self.flags.sinks or None),
            batch=batch,
            window=shuffled_together(batch, tokens),
            epochs=None,
        )

    def whole(self, sites: Sequence[str], batch: int, tokens: int) -> Whole:
        """Return whole contexts, for objectives that run the model: as many as the tokens, or all of them.

        Raises:
            Refused: the source has no single model, or too little text for a batch.
        """
        from cutaway.suites.dictionary_runs import whole_contexts

        if self.shards is not None or self.named:
            raise Refused("--end-to-end", "the model itself must run, and be one", "give --model alone")
        return whole_contexts(self.model, self.documents, self.packing, sites, batch, tokens)

    @property
    def pinned(self) -> From:
        """The flags, each model by a name that means the same for good."""
        pairs = [(n, str(m.made.flags[""])) for n, m in self.models.items() if m.made is not None]
        models = [f"{n}={source}" if n else source for n, source in pairs]
        return replace(self.flags, model=models if models != [DEFAULT_MODEL] else None)

    @property
    def named(self) -> bool:
        """True if models have names."""
        return "" not in self.models

    @property
    def model(self) -> Model:
        """The model, or the first of them."""
        return next(iter(self.models.values()))

    @property
    def packing(self) -> Packing:
        """Packing of documents into contexts."""
        from cutaway.streams import Packing

        return Packing(self.flags.context, self.flags.bos)

    @cached_property
    def documents(self) -> Documents:
        """The text."""
        return documents_of(self.model, self.flags.text, self.flags.field, "training")

    def _places(self, pattern: str) -> list[str]:
        if self.shards is not None:
            there = list(self.shards.widths)
            found = [a for a in there if a == pattern or a.startswith(f"{pattern}.") or fnmatchcase(a, pattern)]
            if not found:
                raise Refused(f"site {pattern}", "it was not harvested", f"there are {', '.join(there)}")
            return found
        if not self.named:
            return [str(a) for a in self.model.places(pattern)]
        from cutaway.streams.reader import models_of

        names, rest = models_of(pattern, self.models)
        return [f"{n}:{a}" for n in names for a in self.models[n].places(rest)]


def open_origin(flags: From) -> Origin:
    """Load the models, or open the harvest.

    Raises:
        Refused: flags that contradict each other, or nothing there.
    """
    if flags.acts is not None:
        beside = [n for n in ("model", "text", "model_dtype", "model_device") if getattr(flags, n) is not None]
        if beside:
            flag = "--" + beside[0].replace("_", "-")
            raise Refused(f"--acts with {flag}", "the harvest says which model and text", f"leave out {flag}")
        from cutaway.streams import Shards

        return Origin(flags, Shards(flags.acts))
    ids = dict[str, str]()
    for given in flags.model or [DEFAULT_MODEL]:
        name, _, rest = given.rpartition("=")
        if name in ids:
            why = f"two models are called {name}" if name else "they have no names"
            raise Refused(f"--model {given}", why, "give --model base=ID --model tuned=ID")
        ids[name] = rest
    if len(ids) > 1 and "" in ids:
        raise Refused(f"--model {ids['']}", "it has no name beside others", "give --model base=ID --model tuned=ID")
    return Origin(flags, None, {n: load_model(i, flags.model_dtype, flags.model_device) for n, i in ids.items()})
