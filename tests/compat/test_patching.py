"""Patching against TransformerLens 3.9's values: one sweep of the house, or a loop of runs, with the same numbers."""

import pytest
import torch

from bench.compat import helpers
from cutaway.compat.transformer_lens import patching
from cutaway.compat.transformer_lens.utils import Mismatch
from cutaway.core.record import counting
from tests.compat.helpers import REFERENCE, model, same


@pytest.mark.parametrize("name", helpers.PATCHED)
def test_every_helper_equals_transformer_lens(name):
    same(helpers.patched(model(name), patching, helpers.PATCHED[name]), REFERENCE[f"patching of {name}"])


def test_hooks_on_the_model_stay_in_every_cell():
    m, metric = model("gpt2"), helpers.METRICS["last"]
    _, clean = m.run_with_cache(helpers.CLEAN)
    plain = patching.get_act_patch_attn_out(m, helpers.CORRUPT, clean, metric)
    seen = []
    with m.hooks([("blocks.1.hook_mlp_out", lambda x, hook: seen.append(1) or x * 0)]):
        hooked = patching.get_act_patch_attn_out(m, helpers.CORRUPT, clean, metric)
    assert len(seen) == plain.numel()
    assert not torch.allclose(hooked, plain, atol=1e-3)


def test_cells_that_change_nothing_are_not_run_and_others_begin_at_their_layer():
    m = model("gpt2")
    _, clean = m.run_with_cache(helpers.CLEAN)
    with counting() as spent:
        found = patching.get_act_patch_resid_pre(m, helpers.CORRUPT, clean, helpers.METRICS["last"])
    assert torch.equal(found[:, :3], found[:1, :1].expand(2, 3))  # before the token that differs
    assert spent.forwards < 2 * 3 * 2  # of two prompts in six cells, half a model each on average
    before = m.run_with_cache(helpers.CLEAN)[1]
    assert all(torch.equal(clean[name], before[name]) for name in clean)


def test_a_metric_gets_whole_logits_if_it_asks_for_them():
    m, shapes = model("gpt2"), set()
    _, clean = m.run_with_cache(helpers.CLEAN)

    def early(logits):
        shapes.add(tuple(logits.shape))
        return logits[:, 3, 5].mean()

    def late_and_early(logits):
        return logits[:, -1, 5].mean() + (logits[:, 4, 5].mean() if logits[:, -1, 5].mean() < 100 else 0)

    corrupt, run = helpers.CORRUPT, patching.get_act_patch_resid_pre
    forms = (
        lambda x: x[..., -1, 5].mean(),
        lambda x: x[:, -1:, 5].mean(),
        lambda x: x[1, 5, 3],
        lambda x: x[..., 5].max(),
    )
    for metric in (early, late_and_early, *forms):
        assert torch.allclose(run(m, corrupt, clean, metric), run(m, corrupt, clean, lambda x, f=metric: f(x + 0)))
    assert shapes == {(2, 6, 32)}


def test_rows_of_a_frame_are_the_cells():
    import pandas as pd

    m, frame = model("gpt2"), pd.DataFrame([(1, 4), (0, 3)], columns=["layer", "pos"])
    _, clean = m.run_with_cache(helpers.CLEAN)
    given = (m, helpers.CORRUPT, clean, helpers.METRICS["last"], patching.layer_pos_patch_setter, "resid_mid")
    some, back = patching.generic_activation_patch(*given, index_df=frame, return_index_df=True)
    whole = patching.get_act_patch_resid_mid(*given[:4])
    torch.testing.assert_close(some, whole[[1, 0], [4, 3]])
    assert back is frame
    for how in ({}, {"index_df": frame, "index_axis_names": ["layer", "pos"]}):
        with pytest.raises(Mismatch, match="index_axis_names"):
            patching.generic_activation_patch(*given, **how)
