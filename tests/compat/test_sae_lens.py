"""SAELens' façade: equal to SAELens 6, to the house's own splice, and tolerant of the words of all its versions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cutaway as ca
from bench.compat import sae_lens as peer
from cutaway.compat import MODELS, sae_lens
from cutaway.compat.sae_lens.training import recipe
from cutaway.compat.transformer_lens import HookedTransformerConfig
from cutaway.core.refuse import Refused
from cutaway.dictionaries import Splice, formats, gates
from cutaway.dictionaries.objectives import L1
from cutaway.streams import Packing, from_texts
from cutaway.streams.packing import Cursor, Packer

THERE = load_file(Path(__file__).parent / "reference" / "sae_lens.safetensors")


def parts(of):
    return {n.removeprefix(f"{of}/"): t for n, t in THERE.items() if n.startswith(f"{of}/")}


def assert_equal(found, there):
    assert found.keys() >= there.keys()  # here every hook point of every architecture is called
    for name, t in there.items():
        torch.testing.assert_close(found[name].detach(), t, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# --- equal to SAELens


@pytest.mark.parametrize("name", peer.SAES)
def test_every_architecture_has_the_values_of_saelens_at_each_hook_point(name, tmp_path):
    kind, words = peer.SAES[name]
    sae, there = peer.configured(sae_lens, kind, words), parts(name)
    assert_equal(peer.passed(sae, there["x"]), there)
    sae.use_error_term = False
    sae.cfg.metadata.update(hook_name="blocks.0.ln2.hook_normalized", hook_name_out="blocks.0.hook_mlp_out")
    sae.save_model(tmp_path)
    again = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(again).__name__ == type(sae).__name__
    torch.testing.assert_close(again(there["x"]), there["out"], atol=1e-5, rtol=1e-5)


def model():
    made = sae_lens.HookedSAETransformer(HookedTransformerConfig(**peer.SIZES))
    made.load_state_dict(parts("model/weights"), strict=False)
    return made


def test_saes_attached_to_a_model_give_what_they_give_there():
    there = {n: t for n, t in parts("model").items() if not n.startswith("weights/")}
    assert_equal(peer.attached(sae_lens, model()), there)


@pytest.mark.parametrize(
    ("policy", "bos"), [("True, True", "both"), ("True, False", "context"), ("False, False", "none")]
)
def test_contexts_are_those_of_saelens(policy, bos):
    class Tokenizer:
        bos_token_id, all_special_ids = peer.BOS, [peer.BOS]

    packer = Packer(from_texts(peer.DOCUMENTS), Tokenizer(), Packing(16, bos))
    rows = torch.cat([g.ids[g.real.all(1)] for g in packer.contexts(Cursor())])
    assert torch.equal(rows, THERE[f"contexts/{policy}"])


# --- the house


@pytest.fixture(scope="module")
def bridged():
    return sae_lens.HookedSAETransformer.from_pretrained_no_processing("miniworld")


@pytest.fixture(scope="module")
def dictionary():
    return ca.dictionaries.load("miniworld/resid_post.3")


@pytest.mark.parametrize("error", [False, True])
def test_an_attached_sae_is_the_house_splice(bridged, dictionary, error):
    sae, ids = sae_lens.SAE.load_from_disk(dictionary), bridged.to_tokens("the capital of this country is")
    there = bridged.house.run(ids, edits=Splice(dictionary, error=error))
    torch.testing.assert_close(bridged.run_with_saes(ids, saes=sae, use_error_term=error), there, atol=1e-4, rtol=1e-4)
    assert sae.use_error_term is False
    assert bridged.acts_to_saes == {}
    torch.testing.assert_close(bridged(ids), bridged.house.run(ids), atol=1e-4, rtol=1e-4)


def test_saes_attached_before_are_back_behind_a_block(bridged, dictionary):
    first, second = (sae_lens.SAE.load_from_disk(dictionary) for _ in range(2))
    bridged.add_sae(first, use_error_term=True)
    with bridged.saes([second]):
        assert list(bridged.acts_to_saes.values()) == [second]
    assert (bridged.acts_to_saes, first.use_error_term) == ({"blocks.3.hook_resid_post": first}, True)
    bridged.reset_saes("blocks.3.hook_resid_post")
    assert (bridged.acts_to_saes, first.use_error_term) == ({}, False)
    first.cfg.metadata.hook_name = "blocks.3.hook_resid_past"
    with pytest.raises(Refused, match=r"near: blocks\.3\.hook_resid_post"):
        bridged.add_sae(first)


def test_a_hook_that_steers_in_place_steers_generation(bridged, dictionary):
    sae = sae_lens.SAE.load_from_disk(dictionary).requires_grad_(False)

    def steer(stream, hook):
        stream[:, -1:] += 40 * sae.W_dec[7]

    how = {"max_new_tokens": 4, "do_sample": False, "verbose": False}
    plain = bridged.generate("the capital of", **how)
    with bridged.hooks([(sae.cfg.hook_name, steer)]):
        steered = bridged.generate("the capital of", **how)
    assert steered != plain
    assert bridged.generate("the capital of", **how) == plain


# --- words of all versions


def test_a_folder_of_versions_3_to_5_opens_with_its_flat_words_and_unpacks_as_a_triple(dictionary, tmp_path):
    formats.write(dictionary, tmp_path, "saelens_old")
    made = sae_lens.SAE.load_from_pretrained(tmp_path)
    MODELS["mine"] = tmp_path
    try:
        with pytest.warns(DeprecationWarning, match="returns the SAE alone"):
            sae, cfg, sparsity = sae_lens.SAE.from_pretrained("mine", device="cpu")
    finally:
        del MODELS["mine"]
    x = torch.randn(3, dictionary.width("resid_post.3"))
    assert torch.equal(sae(x), made(x))
    torch.testing.assert_close(sae(x), dictionary.forward(x), atol=1e-5, rtol=1e-5)
    assert (sae.cfg.hook_point, sae.cfg.hook_layer, sae.cfg.architecture) == ("blocks.3.hook_resid_post", 3, "jumprelu")
    assert (cfg["architecture"], cfg["metadata"]["hook_name"], sparsity) == (
        "jumprelu",
        sae.cfg.metadata.hook_name,
        None,
    )
    with pytest.raises(Refused, match="it is a JumpReLUSAE"):
        sae_lens.StandardSAE.load_from_disk(tmp_path)


def test_releases_are_those_of_the_table_or_refused():
    table = sae_lens.get_pretrained_saes_directory()["gpt2-small-res-jb"]
    assert (table.model, len(table.saes_map)) == ("gpt2-small", 13)
    with pytest.raises(Refused, match=r"near: .*gpt2-small-res-jb"):
        sae_lens.SAE.from_pretrained("gpt2-small-layer5-32x")
    with pytest.raises(Refused, match="hub cannot be reached"):
        sae_lens.SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")


def test_norms_of_the_decoder_fold_into_the_latents():
    for name in ("standard", "jumprelu", "gated", "topk, norms"):
        sae = peer.configured(sae_lens, *peer.SAES[name])
        x = torch.randn(4, peer.D)
        before = sae(x)
        sae.fold_W_dec_norm()
        torch.testing.assert_close(sae(x), before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(peer.F))
    with pytest.raises(Refused, match="other latents"):
        peer.configured(sae_lens, *peer.SAES["topk"]).fold_W_dec_norm()


FLAT = {"hook_point": "blocks.1.hook_mlp_out", "hook_point_layer": 1, "d_in": 8, "expansion_factor": 4, "lr": 1e-3,
        "l1_coefficient": 2.0, "total_training_tokens": 4000, "train_batch_size": 40,
        "log_to_wandb": False}  # fmt: skip


def test_flat_and_nested_configurations_are_one():
    flat = sae_lens.LanguageModelSAERunnerConfig(**FLAT)
    nested = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.StandardTrainingSAEConfig(d_in=8, d_sae=32, l1_coefficient=2.0), hook_name="blocks.1.hook_mlp_out",
        logger=sae_lens.LoggingConfig(log_to_wandb=False), lr=1e-3, training_tokens=4000, train_batch_size_tokens=40,
    )  # fmt: skip
    assert flat.to_dict() == nested.to_dict()
    assert (flat.hook_point, flat.d_sae, flat.log_to_wandb) == ("blocks.1.hook_mlp_out", 32, False)
    made = recipe(nested, 100)
    assert (made.reads, made.rate, made.gating, made.terms) == (
        ("mlp_out.1",),
        1e-3,
        gates.TrainRelu(),
        (L1(2.0, 0.0),),
    )
    topk = sae_lens.LanguageModelSAERunnerConfig(activation_fn="topk", activation_fn_kwargs={"k": 3}, d_in=8, d_sae=32)
    assert recipe(topk, 100).gating == gates.TrainTopK(3)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"hook_pont": "x"}, "no version has it.*near: hook_point"),
        (
            {"sae": sae_lens.TopKTrainingSAEConfig(d_in=8, d_sae=9), "d_in": 8},
            "a word of versions 0-5, and sae= one of",
        ),
    ],
)
def test_words_of_no_version_are_refused(words, why):
    with pytest.raises(Refused, match=why):
        sae_lens.LanguageModelSAERunnerConfig(**words)
    with pytest.raises(Refused, match="word of versions 0-5, and GatedSAEConfig does not take it"):
        sae_lens.GatedSAEConfig(d_in=2, d_sae=3, noise_scale=1.0)


def test_words_without_effect_are_said():
    with pytest.warns(UserWarning, match=r"use_ghost_grads \(versions 0-5\)"):
        sae_lens.LanguageModelSAERunnerConfig(**FLAT, use_ghost_grads=True)


# --- stores and training


def test_a_run_trains_on_the_contexts_of_its_store(bridged, tmp_path):
    texts = [{"text": f"the capital of country {n} is far away . " * 6} for n in range(40)]
    words = FLAT | {"hook_point": "blocks.1.hook_resid_post", "d_in": bridged.cfg.d_model, "output_path": tmp_path}
    cfg = sae_lens.LanguageModelSAERunnerConfig(**words, context_size=16, store_batch_size_prompts=4, prepend_bos=True)
    run = sae_lens.SAETrainingRunner(cfg, override_dataset=texts, override_model=bridged)
    tokens = run.activations_store.get_batch_tokens()
    assert tokens.shape == (4, 16)
    assert bool((tokens[:, 0] == bridged.tokenizer.bos_token_id).all())
    assert run.activations_store.get_activations(tokens).shape == (4, 16, bridged.cfg.d_model)
    assert run.activations_store.next_batch().shape == (40, bridged.cfg.d_model)
    sae = run.run().requires_grad_(False)
    x = run.activations_store.get_activations(tokens)[:, 1:].reshape(-1, bridged.cfg.d_model)
    assert float((sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()) < 0.9
    torch.testing.assert_close(sae_lens.SAE.load_from_disk(tmp_path)(x), sae(x))
    store = sae_lens.ActivationsStore.from_sae(bridged, sae, [{"tokens": list(range(20))}], store_batch_size_prompts=2)
    assert torch.equal(store.get_batch_tokens(), torch.arange(16).repeat(2, 1))


def test_a_store_refuses_what_gives_no_contexts(bridged, dictionary):
    with pytest.raises(Refused, match="none of the columns"):
        sae_lens.ActivationsStore(bridged, [{"words": "a"}], "blocks.1.hook_mlp_out", 8)
    with pytest.raises(Refused, match="do not fill 64 tokens"):
        sae_lens.ActivationsStore(bridged, [{"text": "a b c"}], "blocks.1.hook_mlp_out", 64).get_batch_tokens()
    with pytest.raises(Refused, match="made from a configuration"):
        sae_lens.ActivationsStore(model(), [{"tokens": [1] * 8}], "blocks.1.hook_mlp_out", 8).next_batch()
