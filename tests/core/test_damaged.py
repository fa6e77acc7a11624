"""Damaged files: whatever stands in a header, a file opens to something valid or is refused; never another error."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import cutaway as ca
from cutaway.cli.inspect import open_file
from cutaway.core.files import read_json, read_tensors, write_json, write_tensors
from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates import BatchTopK, JumpRelu
from cutaway.dictionaries.norms import Scale
from cutaway.dictionaries.transforms import autoencoder
from cutaway.features import FeatureStore
from cutaway.models.sweep.cache import Ledger
from cutaway.streams import Shards
from cutaway.streams.folders import signed
from cutaway.training import checkpoints
from tests.conformance import subjects
from tests.features.common import made as features

OTHERS = (None, True, -1, 3, 0.5, float("nan"), "x", "", [], [5], {}, {"a": [1]}, 10**30)


def nodes(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside."""
    yield at
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from nodes(value, (*at, key))


def damaged(header: dict[str, Any], times: int = 60) -> Iterator[dict[str, Any]]:
    """Headers with one value replaced by one of any JSON type, or left out; the same ones every time."""
    rng = random.Random(0)
    ways = [w for w in nodes(header) if w]
    every = [(w, o) for w in ways for o in (*OTHERS, ...)]
    top = [e for e in every if len(e[0]) == 1]
    for way, other in [*top, *rng.sample(every, min(times, len(every)))]:
        made = copy.deepcopy(header)
        inner = made
        for key in way[:-1]:
            inner = inner[key]
        if other is not ...:
            inner[way[-1]] = other
        else:
            del inner[way[-1]]
        yield made


def held_to_it(headers: Iterator[Any], write: Callable[[Any], Path], read: Callable[[Path], None]) -> None:
    """Each file opens to something that can be used, or is refused in words."""
    seen = {"opened": 0, "refused": 0}
    for header in headers:
        path = write(header)
        try:
            read(path)
            seen["opened"] += 1
        except Refused:
            seen["refused"] += 1
    assert seen["refused"] > 10


@cache
def result() -> Any:
    """A result with everything in its record."""
    return ca.lenses.logit_lens(subjects.random_llama(), subjects.llama_task(), samples=1)


def test_a_result(tmp_path):
    tensors, header = read_tensors(result().save(tmp_path / "r.safetensors"))
    assert type(ca.open(tmp_path / "r.safetensors")) is type(result())

    def use(path: Path) -> None:
        found = ca.open(path)
        assert all(isinstance(getattr(found, n), dict) for n in ("labels", "units", "reasons", "record"))
        found.top(2)
        open_file(path).show(Console(file=StringIO(), width=80))

    held_to_it(damaged(header), lambda h: write_tensors(tmp_path / "d.safetensors", tensors, h), use)
    write_tensors(tmp_path / "less.safetensors", {n: t for n, t in tensors.items() if n != "interval"}, header)
    with pytest.raises(Refused, match=r"'interval' of .* is missing"):
        ca.open(tmp_path / "less.safetensors")


@pytest.mark.parametrize("part", ["labels", "units", "reasons"])
def test_words_that_are_none(tmp_path, part):
    tensors, header = read_tensors(result().save(tmp_path / "r.safetensors"))
    path = write_tensors(tmp_path / "d.safetensors", tensors, {**header, part: {"head": 5}})
    with pytest.raises(Refused, match=r"its header is damaged: .*'head'"):
        ca.open(path)


def test_a_file_that_ends_early(tmp_path):
    content = result().save(tmp_path / "r.safetensors").read_bytes()
    for size in (0, 4, 8, 30, 200, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:size])
        with pytest.raises(Refused, match=r"cut\.safetensors"):
            ca.open(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("gate", [BatchTopK(2, 0.5), JumpRelu(torch.full((6,), 0.1))])
def test_a_dictionary(tmp_path, gate):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 4, generator=g)
    norm = {"resid_post.1": Scale(2.0)}
    d = autoencoder("resid_post.1", rows, rows, torch.zeros(6), torch.zeros(4), gate, reading=norm, writing=norm,
                    about={"path": "x", "stream": {"model": "m"}})  # fmt: skip
    tensors, header = read_tensors(ca.dictionaries.save(d, tmp_path / "d.safetensors"))

    def use(path: Path) -> None:
        found = ca.dictionaries.load(path)
        assert found.forward(torch.ones(3, 4)).isfinite().all()
        assert isinstance(found.identity(), dict)

    held_to_it(damaged(header), lambda h: write_tensors(tmp_path / "d.safetensors", tensors, h), use)


def test_a_ledger_and_a_checkpoint(tmp_path):
    ledger = Ledger(2, 3, tmp_path / "l.safetensors", "key")
    ledger.put([0], [1], torch.ones(1, 1))
    ledger.write()
    tensors, header = read_tensors(tmp_path / "l.safetensors")
    held_to_it(damaged(header), lambda h: write_tensors(tmp_path / "l.safetensors", tensors, h),
               lambda p: Ledger(2, 3, p, "key").write())  # fmt: skip
    with pytest.raises(Refused, match="shapes"):
        Ledger(5, 3, write_tensors(tmp_path / "l.safetensors", tensors, header), "key")
    checkpoints.Checkpoints(tmp_path / "run", "training").write({"0/weight/x": torch.ones(2)}, {"tokens": 3})
    path = tmp_path / "run" / checkpoints.ALONE
    tensors, header = read_tensors(path)
    held_to_it(
        damaged(header),
        lambda h: write_tensors(path, tensors, h),
        lambda p: dict(checkpoints.Checkpoints(p.parent, "training").read()[1]) and None,
    )


def test_a_manifest_of_a_harvest(tmp_path):
    from cutaway.streams import Packing, from_texts, harvest

    texts = from_texts(["mary gave apples to john ."] * 8, "some texts")
    folder = tmp_path / "acts"
    harvest(subjects.random_llama(), texts, ["resid_post.1"], folder, tokens=40, packing=Packing(16))
    path, manifest = folder / "manifest.json", read_json(folder / "manifest.json")

    def use(_: Path) -> None:
        next(Shards(folder).stream(batch=4))

    held_to_it(damaged(manifest, 60), lambda m: write_json(path, m), use)
    held_to_it((signed(m) for m in damaged(manifest, 60)), lambda m: write_json(path, m), use)
    path.write_text("[" * 100_000)
    with pytest.raises(Refused):
        Shards(folder)


def test_a_manifest_of_features(tmp_path):
    store = features(tmp_path / "store")
    path, manifest = store.folder / "manifest.json", dict(store.manifest)
    latent = int(store.latents("some").count.argmax())

    def use(_: Path) -> None:
        found = FeatureStore(store.folder)
        known = found.latents(found.names[0])
        at = known.check(latent)
        assert found.texts(found.context(known.top(at)[0].context)["ids"])
        assert [*known.sampled(at), *known.partners(at), *known.codes(at)]
        assert found.identity()

    held_to_it(damaged(manifest), lambda m: write_json(path, m), use)
    held_to_it((signed(m) for m in damaged(manifest, 200)), lambda m: write_json(path, m), use)
    write_json(path, signed(manifest | {"corpus": [{**manifest["corpus"][0], "file": "../manifest.json"}]}))
    with pytest.raises(Refused, match="no name of a file"):
        FeatureStore(store.folder)
