"""The dictionaries that ship are trained by their recipe: one file per name, several rows of a name in one file."""

import torch

from cutaway.dictionaries import open as open_dictionary
from cutaway.suites.dictionary_runs import end_to_end, planned, shuffled_together, train_shipped
from cutaway.zoo.miniworld import dictionaries as shipped
from tests.conformance.subjects import miniworld


def test_imports_of_one_name_share_a_file(tmp_path, monkeypatch):
    both = [shipped.Row("both", f"mlp_in.{i}", f"mlp_out.{i}", 24, 3) for i in (0, 1)]
    monkeypatch.setattr(shipped, "RECIPE", (shipped.Row("one", "resid_post.0", "resid_post.0", 24, 3), *both))
    monkeypatch.setattr(shipped, "BATCH", 256)
    monkeypatch.setattr(shipped, "WINDOW", 512)
    done = train_shipped(miniworld(), tmp_path, 512, card_tokens=512)
    one, two = map(open_dictionary, done.files)
    assert (one.writes, two.writes) == (("resid_post.0",), ("mlp_out.0", "mlp_out.1"))
    assert open_dictionary(done.files[0], torch.float16).dtype == torch.float16
    assert len(done.cards) == 3
    assert (tmp_path / "dictionaries.json").exists()


def test_sizes_of_a_run_follow_from_its_tokens():
    assert [planned(n).card_tokens for n in (100, 40_000, 10**6)] == [1024, 10_000, 16384]
    assert [shuffled_together(1000, n) for n in (8000, 100_000, 10**7)] == [4000, 12_500, 1 << 16]
    assert end_to_end(miniworld(), "ce").weight == miniworld().shape.d_model
