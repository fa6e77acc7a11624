"""Directions as objects: their edits against arithmetic by hand, files of three tools, and refusals."""

from dataclasses import dataclass, replace

import pytest
import torch
from gguf import GGUFReader, GGUFWriter

import cutaway as ca
from cutaway.core.result import open_result
from tests.conformance.subjects import random_llama

PROMPT = "Mary and John went to the store"


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture
def found(model):
    g = torch.Generator().manual_seed(0)
    vectors = {f"resid_post.{i}": torch.randn(model.shape.d_model, generator=g) for i in range(2)}
    return ca.directions.direction(vectors, "mood", "happy", "sad", "llama")


def changed(model, edits, address="resid_post.0"):
    before, after = (model.capture(PROMPT, address, e)[address] for e in ((), edits))
    return before, after


def test_edits_are_the_arithmetic_that_their_names_say(model, found):
    one = found.select(address="resid_post.0")
    v, unit = one.vector[0], one.vector[0] / one.vector[0].norm()
    x, added = changed(model, one.add(-2.0))
    torch.testing.assert_close(added, x - 2 * v)
    _, out = changed(model, one.project_out())
    torch.testing.assert_close(out, x - (x @ unit).unsqueeze(-1) * unit, atol=1e-5, rtol=1e-4)
    middle = float((x @ unit).median())
    for limits in ({"max": middle}, {"min": middle}, {"min": middle, "max": middle}):
        _, capped = changed(model, one.cap(**limits))
        torch.testing.assert_close(capped @ unit, (x @ unit).clamp(**limits), atol=1e-4, rtol=1e-4)
        off = capped - x
        torch.testing.assert_close(off, (off @ unit).unsqueeze(-1) * unit, atol=1e-4, rtol=1e-4)


def test_positions_and_several_addresses_are_edited_together(model, found):
    x, added = changed(model, found.add(1.0, positions=[-1]))
    assert torch.equal(added[:, :-1], x[:, :-1])
    torch.testing.assert_close(added[:, -1], x[:, -1] + found.vector[0])
    assert [str(e.where) for e in found.project_out()] == ["resid_post.0", "resid_post.1"]


def test_one_vector_can_stand_at_every_place_of_a_pattern(model, found):
    spread = found.select(address=["resid_post.1"]).at("attn_out", "mlp_out", model=model)
    assert spread.labels["address"] == ["attn_out.0", "attn_out.1", "mlp_out.0", "mlp_out.1"]
    assert all(torch.equal(v, found.vector[1]) for v in spread.vector)
    with pytest.raises(ca.Refused, match="it has 2 vectors"):
        found.at("attn_out", model=model)


def test_a_saved_direction_comes_back_whole_and_knows_its_file(tmp_path, found):
    kept = replace(found.unit(), midpoint=torch.tensor([0.5, -1.0]), record={"texts": 3})
    path = kept.save(tmp_path / "mood.safetensors")
    for back in (open_result(path), ca.directions.open(path)):
        assert torch.equal(back.vector, kept.vector)
        assert torch.equal(back.midpoint, kept.midpoint)
        assert (back.name, back.positive, back.negative, back.record) == ("mood", "happy", "sad", {"texts": 3})
        assert back.identity() == kept.identity()
    torch.testing.assert_close(kept.norm, torch.ones(2))
    assert str(path) in ca.directions.open(path).made.python


@dataclass
class SteeringVector:
    """The class of the library, whose objects people save whole."""

    layer_activations: dict
    layer_type: str = "decoder_block"


def test_control_vectors_are_written_and_read_as_repeng_and_llama_cpp_do(tmp_path, found):
    late = found.select(address="resid_post.1")
    path = ca.directions.write(late, tmp_path / "mood.gguf")
    reader = GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 1
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    (tensor,) = reader.tensors
    assert tensor.name == "direction.1"
    assert torch.equal(torch.tensor(tensor.data), late.vector[0])
    assert torch.equal(ca.directions.open(path).vector, late.vector)
    assert ca.directions.open(path).labels == {"address": ["resid_post.1"]}
    assert ca.directions.open(path).family == "llama"


def test_files_of_steering_vectors_are_read_without_running_code(tmp_path, found):
    layers = dict(enumerate(found.vector))
    torch.save(SteeringVector(layers, "mlp"), tmp_path / "whole.pt")
    whole = ca.directions.open(tmp_path / "whole.pt")
    assert whole.labels == {"address": ["mlp_out.0", "mlp_out.1"]}
    assert torch.equal(whole.vector, found.vector)
    path = ca.directions.write(found, tmp_path / "fields.pt")
    again = SteeringVector(**torch.load(path, weights_only=True))
    assert again.layer_type == "decoder_block"
    assert all(torch.equal(again.layer_activations[i], v) for i, v in layers.items())
    assert ca.directions.open(path).labels == found.labels


def test_a_direction_of_another_model_is_refused(model, found):
    found.check(model)
    narrow = ca.directions.direction({"resid_post.0": torch.ones(5)})
    with pytest.raises(ca.Refused, match="5 wide"):
        narrow.check(model)
    for edits in (narrow.add(), narrow.project_out(), narrow.cap(max=0.0)):
        with pytest.raises(ca.Refused, match="do not fit"):
            model.run_last(PROMPT, edits=edits)
    with pytest.raises(ca.Refused, match="layer 7 is outside"):
        ca.directions.direction({"resid_post.7": torch.ones(32)}).check(model)


@pytest.mark.parametrize(
    ("vectors", "why"),
    [
        ({}, "no vector"),
        ({"resid_post.0": torch.ones(3), "resid_post.1": torch.ones(4)}, "shapes"),
        ({"residual.0": torch.ones(3)}, "no site has that name"),
        ({"pattern.0": torch.ones(3)}, "use a site of vectors"),
        ({"router.0": torch.ones(3)}, "use a site of vectors"),
        ({"resid_post.0": torch.tensor([1.0, torch.nan])}, "undefined"),
        ({"resid_post.0": torch.zeros(3)}, "it is zero"),
    ],
)
def test_vectors_that_are_no_direction_are_refused(vectors, why):
    with pytest.raises(ca.Refused, match=why):
        ca.directions.direction(vectors)


def test_limits_that_cannot_hold_are_refused(found):
    with pytest.raises(ca.Refused, match="no limit"):
        found.cap()
    with pytest.raises(ca.Refused, match="above"):
        found.cap(min=1.0, max=0.0)


def test_files_that_hold_no_direction_are_refused(tmp_path, found, model):
    other = model.capture(PROMPT, "resid_post.0").result("resid_post.0").save(tmp_path / "other.safetensors")
    with pytest.raises(ca.Refused, match="it holds a activation"):
        ca.directions.open(other)
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ca.Refused, match="architecture is 'llama'"):
        ca.directions.open(tmp_path / "model.gguf")
    torch.save({"layers": 3}, tmp_path / "some.pt")
    with pytest.raises(ca.Refused, match="it is no steering vector"):
        ca.directions.open(tmp_path / "some.pt")
    with pytest.raises(ca.Refused, match="blocks 1 and later"):
        ca.directions.write(found, tmp_path / "first.gguf")
    with pytest.raises(ca.Refused, match="one of resid_post"):
        ca.directions.write(ca.directions.direction({"z.0.1": torch.ones(8)}), tmp_path / "z.pt")
    with pytest.raises(ca.Refused, match="no form"):
        ca.directions.write(found, tmp_path / "x.npz")


def test_gguf_files_need_their_package(tmp_path, found, monkeypatch):
    monkeypatch.setattr("cutaway.directions.formats.repeng.find_spec", lambda name: None)
    for attempt in (lambda p: ca.directions.write(found, p), ca.directions.open):
        with pytest.raises(ca.Refused, match="pip install"):
            attempt(tmp_path / "x.gguf")


def test_rows_of_a_persona_vector_are_hidden_states(tmp_path):
    """Row ℓ + 1 of such a file is the output of block ℓ, and the last row, behind the final norm, is no stream."""
    model, text = random_llama(), "Mary and John went to the store"
    with torch.no_grad():
        hidden = model.hf(model.tokens(text).ids, output_hidden_states=True).hidden_states
    torch.save(torch.stack([h[0, -1] for h in hidden]), tmp_path / "evil_response_avg_diff.pt")
    found = ca.directions.open(tmp_path / "evil_response_avg_diff.pt")
    assert found.labels["address"] == ["resid_pre.0", "resid_post.0"]
    acts = model.capture(text, found.places)
    torch.testing.assert_close(found.vector, torch.stack([acts[f"{a}@-1"][0] for a in found.places]))
    torch.save(torch.ones(4), tmp_path / "row.pt")
    with pytest.raises(ca.Refused, match="persona vectors are"):
        ca.directions.open(tmp_path / "row.pt")


def test_components_are_along_the_unit_vector():
    found = ca.directions.direction({"resid_post.0": torch.tensor([3.0, 4.0]), "resid_post.1": torch.tensor([0.0, -2])})
    x = torch.tensor([[[5.0, 0.0], [3.0, 4.0]], [[1.0, 2.0], [0.0, 0.0]]])  # [address, row, width]
    torch.testing.assert_close(found.component(x), torch.tensor([[3.0, 5.0], [-2.0, 0.0]]))
