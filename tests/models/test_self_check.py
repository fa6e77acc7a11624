"""The self-check: it passes on every family, sees planted faults, and disables what fails with its reason."""

import json
import sys
from functools import cache

import pytest
import torch

from cutaway.core.record import versions
from cutaway.core.refuse import Refused
from cutaway.models.access import ports
from cutaway.models.model import Model
from cutaway.models.self_check import checked, disabled_sites, self_check
from tests.meta.tree import ROOT
from tests.models.common import ALL, IDS, KINDS, bare, gap, model, sites
from tests.models.tiny import STATE_SPACE, build
from tools import families as table
from tools.docs import GENERATED

checks = sys.modules[self_check.__module__]  # the package's own attribute of that name is the function


PAGE = ROOT / "docs" / "families.md"


@cache
def row(name):
    """A family's row of the page, which the check finds without changing the model."""
    before = model(name).fingerprint()
    found = table.row(name, model(name))
    assert model(name).fingerprint() == before
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_identity_holds_and_the_model_stays(name):
    assert row(name).passed == row(name).tried > 40
    assert not [s for s, can in row(name).sites.items() if can.startswith("disabled")]
    line = next(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| `{name}` |"))
    assert line.endswith(f"| {row(name).passed} of {row(name).tried} |"), "run `make docs`"


@pytest.mark.wide
def test_the_committed_page_is_what_the_check_finds():
    """Every family is there with the number of its identities, and all of them hold."""
    rows = [row(name) for name in [*ALL, *STATE_SPACE]]
    assert all(r.passed == r.tried > 40 for r in rows)
    page = table.page(rows, GENERATED)  # test_every.py holds the last table
    assert PAGE.read_text("utf-8").startswith(page.rstrip()), "run `make docs`"


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gpt2", HALF), ("llama_gqa", HALF), ("falcon_40b", HALF), ("gpt2", torch.float16), ("llama_gqa", torch.float64)],
    ids=str,
)
def test_it_holds_in_other_precisions(name, dtype):
    assert disabled_sites(self_check(model(name, dtype))) == {}


def test_a_failed_identity_disables_its_site_and_nothing_else_runs_otherwise(monkeypatch):
    plain = ports._port
    deaf = lambda p: ports.Port(p.module, p.side, p.read, lambda new, x, y: y, p.derived)  # noqa: E731
    monkeypatch.setattr(
        ports, "_port", lambda anatomy, a: deaf(plain(anatomy, a)) if a.site == "mlp_out" else plain(anatomy, a)
    )
    m = Model(build("llama_gqa"))
    m.disabled.update(disabled_sites(self_check(m)))
    assert m.sites()["mlp_out"].startswith("disabled: self-check failed")
    with pytest.raises(Refused, match="self-check failed"):
        m.capture(IDS, "mlp_out")
    assert torch.equal(m.run(IDS), bare(m.hf))


def test_the_outcome_is_kept_by_what_the_model_is_and_by_versions(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(checks, "self_check", lambda m: ran.append(m.name) or [])
    one, same, other = (
        Model(build("gpt2"), name="a"),
        Model(build("gpt2", seed=9), name="b"),
        Model(build("llama"), name="c"),
    )
    hooked = Model(build("gpt2"), name="hooked")
    hooked.hf.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    for m in (one, same, other, hooked, one, hooked):
        assert checked(m, tmp_path) == {}
    assert ran == ["a", "c", "hooked"]
    for file in tmp_path.glob("*.json"):
        assert json.loads(file.read_text()) == {}
        file.write_text("{")  # a broken file is written anew
    checked(one, tmp_path)
    monkeypatch.setattr(checks, "versions", lambda: dict.fromkeys(versions(), "other"))
    checked(one, tmp_path)
    checked(one, None)
    assert ran == ["a", "c", "hooked", "a", "a", "a"]


def test_a_kept_failure_disables_these_weights_alone(tmp_path, monkeypatch):
    failed = [checks.CheckOutcome("planted", ("z",), None, False, "why")]
    one, same = Model(build("gpt2")), Model(build("gpt2", seed=9))
    with monkeypatch.context() as m:
        m.setattr(checks, "self_check", lambda m: failed)
        assert checked(one, tmp_path) == {"z": "self-check failed: planted (why)"}
        m.setattr(checks, "self_check", lambda m: [])
        assert checked(one, tmp_path) == {"z": "self-check failed: planted (why)"}
        assert checked(same, tmp_path) == {}


def test_a_model_that_does_not_run_is_refused(monkeypatch):
    m = Model(build("gpt2"))
    m.hf.transformer.h[0].forward = lambda *args, **kw: 1 / 0
    m.hf.transformer.forward = lambda *args, **kw: (_ for _ in ()).throw(ValueError("no"))
    with pytest.raises(Refused, match="does not run"):
        self_check(m)
    assert gap(bare(model("gpt2").hf), bare(build("gpt2"))) < 1e-6  # of the same weights elsewhere in memory
    assert sites(model("gpt2"))
