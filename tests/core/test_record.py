"""Records: counters nest, hashes see values, shapes, types and names."""

import threading

import pytest
import torch

from cutaway.core.record import count, counting, hash_tensors, hash_text, machine, versions


def test_counters_nest_and_each_sees_what_is_inside():
    count(100)  # nobody listens
    with counting() as outer:
        count(1)
        with counting() as inner:
            count(2, backwards=0.5)
        count(forwards=4)
    count(100)
    assert (outer.forwards, outer.backwards) == (7, 0.5)
    assert (inner.forwards, inner.backwards) == (2, 0.5)
    assert outer.seconds >= inner.seconds > 0


def test_a_counter_closes_after_an_exception():
    opened = []

    def fail():
        with counting() as cost:
            opened.append(cost)
            count(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    count(1)
    assert opened[0].forwards == 1


def test_counters_of_other_threads_are_their_own():
    with counting() as here:
        thread = threading.Thread(target=count, args=(5,))
        thread.start()
        thread.join()
    assert here.forwards == 0


def test_tensor_hash_sees_every_difference_that_matters():
    base = {"a": torch.arange(6.0), "b": torch.ones(2)}
    key = hash_tensors(base)
    assert key == hash_tensors({"b": torch.ones(2), "a": torch.arange(6.0)})
    changed = torch.arange(6.0)
    changed[3] += 1e-6 * 4
    for other in (
        {**base, "a": changed},
        {**base, "a": torch.arange(6.0).reshape(2, 3)},
        {**base, "a": torch.arange(6.0).double()},
        {"c": base["a"], "b": base["b"]},
    ):
        assert hash_tensors(other) != key
    assert hash_tensors({"a": torch.empty(3, device="meta")}) == hash_tensors({"a": torch.empty(3, device="meta")})
    assert len(hash_tensors({"big": torch.zeros((1 << 24) + 64)})) == 16


def test_text_hash_keeps_boundaries():
    assert hash_text("ab", "c") != hash_text("a", "bc")
    assert hash_text("ab") == hash_text("ab")


def test_versions_and_machine_are_json_ready():
    said, own = (v.split("+")[0] for v in (versions()["torch"], torch.__version__))
    assert said == own  # a wheel for an accelerator names its build in one of the two only
    assert {"python", "transformers", "cutaway"} <= set(versions())
    assert machine()["threads"] >= 1
