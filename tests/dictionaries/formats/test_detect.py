"""Detection by content, ambiguity, and files that would run code."""

import pickle
import re
from typing import get_type_hints

import pytest
import torch
from safetensors.torch import save_file

from cutaway import dictionaries
from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from cutaway.models.anatomy import foreign_names as names
from tests.dictionaries.common import dictionary
from tests.dictionaries.formats.common import D, F, acts, draw
from tests.meta.tree import ROOT

SITE = "resid_post.1"


class Hostile:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return (open, ("stolen", "w"))


def made(kind="jump", **settings):
    return dictionary([(F, [SITE], [SITE])], {SITE: D}, kind, dtype=torch.float32, **settings)


def test_what_is_written_is_found_again_whatever_the_folder_is_called(tmp_path):
    written = {
        "house": "d.safetensors", "saelens": "a", "saelens_old": "b", "gemma_scope": "c", "gemma_scope_2": "e",
        "dictionary_learning": "f", "llamascopium": "g",
    }  # fmt: skip
    x = acts()
    for name, place in written.items():
        d = made()
        formats.write(d, tmp_path / place, name)
        assert formats.detect(tmp_path / place) == [name]
        again = dictionaries.load(tmp_path / place, **({"site": SITE} if name == "gemma_scope" else {}))
        assert torch.allclose(again.forward(x), d.forward(x), atol=1e-4)
    assert set(written) < set(formats.names())


def test_the_page_names_every_format_and_what_it_may_ask_for():
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", (ROOT / "docs/dictionaries.md").read_text("utf-8"), re.MULTILINE)
    told = {name: re.findall(r"`(\w+)`", asks) for name, asks in rows}
    assert told == {name: list(get_type_hints(formats.module(name).read))[1:-1] for name in formats.names()}


def test_nothing_known_and_nothing_there_are_refused(tmp_path):
    with pytest.raises(Refused, match="there is nothing"):
        dictionaries.load(tmp_path / "absent")
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(Refused, match=r"no known format fits \(x.safetensors\)"):
        dictionaries.load(tmp_path)
    with pytest.raises(Refused, match="near: saelens"):
        dictionaries.load(tmp_path, format="saelense")
    with pytest.raises(Refused, match="it is not known"):
        formats.write(made(), tmp_path / "y", "pickle")


def test_what_fits_two_formats_is_asked_for(tmp_path):
    formats.write(made(), tmp_path, "saelens")
    formats.write(made(), tmp_path, "gemma_scope")
    with pytest.raises(Refused, match="gemma_scope or saelens"):
        dictionaries.load(tmp_path)
    assert dictionaries.load(tmp_path, format="saelens").reads == (SITE,)


def test_sites_in_other_tools_words():
    hooks = {
        "blocks.3.hook_resid_post": ("resid_post.3", False), "blocks.3.ln2.hook_normalized": ("mlp_in.3", True),
        "blocks.3.ln1.hook_normalized": ("attn_in.3", True), "blocks.0.mlp.hook_in": ("mlp_in.0", False),
        "blocks.0.hook_mlp_in": ("mlp_in.0", False), "blocks.1.mlp.hook_out": ("mlp_out.1", False),
        "hook_embed": ("embed", False), "blocks.7.attn.hook_z": ("z.7", False),
    }  # fmt: skip
    assert {h: (str(a), b) for h in hooks for a, b in [names.site_of_hook(h)]} == hooks
    assert names.hook_of_site("z.3.5") == names.hook_in_layer(3, "attn.hook_z")
    modules = {"layers.4": "resid_post.4", "model.layers.4.mlp": "mlp_out.4", "h.0.attn": "attn_out.0"}
    assert {m: str(names.site_of_module(m)) for m in modules} == modules
    for name in ("layers.4.norm", "embed", "blocks.x"):
        with pytest.raises(Refused, match="give site="):
            names.site_of_module(name)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(legacy, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    content = {"encoder.weight": torch.ones(2, 2), "x": Hostile()}
    if legacy:
        (tmp_path / "ae.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "ae.pt")
    with pytest.raises(Refused, match="never run") as refused:
        dictionaries.load(tmp_path / "ae.pt")
    assert "weights_only" not in str(refused.value), "torch's advice to run it after all"
    assert legacy or "io.open" in str(refused.value)
    assert not recwarn.list
    assert not (tmp_path / "stolen").exists()


def test_broken_files_are_refused(tmp_path):
    for name in ("a.safetensors", "params.npz", "x.pt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"not at all")
        with pytest.raises(Refused):
            dictionaries.load(folder)
    (tmp_path / "y").mkdir()
    torch.save([torch.ones(2)], tmp_path / "y" / "ae.pt")
    with pytest.raises(Refused, match="holds a list"):
        dictionaries.load(tmp_path / "y")
    formats.write(made(), tmp_path / "z", "saelens")
    (tmp_path / "z" / "cfg.json").write_text("{")
    with pytest.raises(Refused, match="JSON"):
        dictionaries.load(tmp_path / "z")
    (tmp_path / "t").mkdir()
    save_file(
        {n: draw(2, 2, seed=0) for n in ("W_enc", "W_dec", "b_enc", "b_dec")}, tmp_path / "t" / "layer_0.safetensors"
    )
    (tmp_path / "t" / "config.yaml").write_text("a: [")
    with pytest.raises(Refused, match="YAML"):
        dictionaries.load(tmp_path / "t")


def test_npz_files_with_objects_in_them_are_refused(tmp_path):
    import numpy as np

    np.savez(tmp_path / "params.npz", W_enc=np.array([Hostile()], dtype=object))
    with pytest.raises(Refused, match="plain npz"):
        dictionaries.load(tmp_path)
