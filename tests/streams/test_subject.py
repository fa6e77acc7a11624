"""A harvest as the subject of a method: opened by a flag, read as often as wanted, named in the record."""

from __future__ import annotations

import gc
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import cutaway as ca
from cutaway.cli.method_commands import command
from cutaway.core.method import METHODS, method
from cutaway.core.refuse import Refused
from cutaway.core.result import KINDS, Result
from cutaway.core.subject import examples, open_subjects
from cutaway.models.model import Model
from cutaway.streams import Packing, Shards, from_texts, harvest
from tests.streams.common import lettered, texts


@pytest.fixture
def mean():
    """A method on a model and a harvest: the mean activation."""
    ca.methods()

    @dataclass(frozen=True, kw_only=True)
    class Mean(Result, kind="mean_of_tests"):
        mean: Float[Tensor, "d_model"]

    def mean(model: Model, stream: Shards, /) -> Mean:
        acts = [batch.acts["resid_post.1"] for batch in stream.stream(batch=32)]
        return Mean(mean=torch.cat(acts).mean(0), units={"mean": "activation"})

    mean.__annotations__ = {"model": Model, "stream": Shards, "return": Mean}
    mean.__module__ = "cutaway.tests.mean"
    yield method(answers="?", paper="none", cost="tokens", control="none", rung="observational")(mean)
    del METHODS["tests.mean"], KINDS["mean_of_tests"]


def test_a_method_takes_a_harvest(mean, tmp_path):
    model = ca.load("miniworld")
    made = harvest(model, from_texts(texts(12)), ["resid_post.1"], tmp_path / "acts", packing=Packing(12))
    flags = {"model": "miniworld", "stream": str(made.folder)}
    model, stream = open_subjects(["model", "stream"], flags)
    one, again = mean(model, stream), mean(model, stream)
    assert torch.equal(one.mean, again.mean), "a method begins at the beginning each time"
    torch.testing.assert_close(one.mean, made.moments()["resid_post.1"].mean.float(), atol=1e-5, rtol=1e-5)
    about = one.record["subjects"]["stream"]
    assert (about["hash"], about["tokens"], about["sites"]) == (made.content, made.tokens, ["resid_post.1"])
    assert one.record["command"] == f"cutaway tests mean --model miniworld --stream {tmp_path}/acts"
    assert f"stream = ca.streams.Shards('{tmp_path}/acts')" in one.record["python"]
    signature = inspect.signature(command(METHODS["tests.mean"]))
    assert signature.parameters["stream"].default is inspect.Parameter.empty
    with pytest.raises(Refused, match="it takes Model, Shards") as refusal:
        mean(model, str(made.folder))
    assert "stream = ca.streams.Shards(folder)" in refusal.value.instead


def test_activations_of_another_model_are_refused_where_a_method_takes_one(tmp_path):
    harvest(lettered(), from_texts(texts(4)), ["resid_post.1"], tmp_path / "acts", packing=Packing(12))
    assert open_subjects(["stream"], {"stream": str(tmp_path / "acts")})[0].tokens
    with pytest.raises(Refused, match="other config"):
        open_subjects(["model", "stream"], {"model": "miniworld", "stream": str(tmp_path / "acts")})
    with pytest.raises(Refused, match=r"there is no manifest.json"):
        open_subjects(["stream"], {"stream": str(tmp_path)})


def test_the_example_takes_its_folder_with_it():
    stream = examples(["stream"], {"model": lettered()})["stream"]
    folder = Path(stream.folder)
    assert folder.is_dir()
    del stream
    gc.collect()
    assert not folder.exists()
