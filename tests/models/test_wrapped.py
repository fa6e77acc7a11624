"""Adapted, compiled, quantised and patched models: every read is of the model as it is, or refused with the way out."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.linear import affine, bias, matrix
from cutaway.models.anatomy.residual import decompose, logit_contributions
from cutaway.models.edits.library import Ablate
from cutaway.models.loading.load import load
from cutaway.models.model import Model
from cutaway.models.self_check import checked, disabled_sites, self_check
from cutaway.models.sweep.executor import sweep
from tests.models.common import IDS, gap, noise, widely
from tests.models.tiny import build

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(*targets, **more):
    return peft.LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **more)


def adapted(kind, name="llama_gqa"):
    """A tiny model with an adapter of some kind, as transformers or PEFT puts it there."""
    torch.manual_seed(0)
    hf = build(name)
    more = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
    match kind:
        case "two":
            hf.add_adapter(lora("o_proj", "down_proj"), "one")
            hf.add_adapter(lora("v_proj", "o_proj"), "other")
            hf.set_adapter(["one", "other"])
        case "head":
            hf.add_adapter(lora("lm_head"))
        case "ia3":
            config = peft.IA3Config(
                target_modules=EVERYWHERE, feedforward_modules=["down_proj"], init_ia3_weights=False
            )
            hf = peft.get_peft_model(hf, config)
        case "peft" | "merged" | "disabled":
            hf = peft.get_peft_model(hf, lora(*EVERYWHERE, lora_dropout=0.5))
            if kind == "merged":
                hf.merge_adapter()
            if kind == "disabled":
                hf.base_model.disable_adapter_layers()
        case "lora_bias":
            hf = build("llama_mqa_bias_tied")
            hf.add_adapter(lora(*EVERYWHERE, lora_bias=True))
        case _:
            hf.add_adapter(lora(*EVERYWHERE, **more.get(kind, {})))
    return hf.requires_grad_(False).eval()


def plain(m):
    """The same function without adapters: every map's matrix written out."""
    hf = copy.deepcopy(m.hf)
    for name, module in list(hf.named_modules()):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            w, b = affine(module)
            whole = nn.Linear(*w.shape, bias=b is not None)
            whole.weight.data = w.T.clone()
            if b is not None:
                whole.bias.data = b.clone()
            parent, _, child = name.rpartition(".")
            setattr(hf.get_submodule(parent), child, whole)
    return Model(hf.requires_grad_(False).eval())


pytestmark = pytest.mark.filterwarnings(
    "ignore:::peft", "ignore::peft.utils.warning.PeftWarning", "ignore::FutureWarning", "ignore:Already found"
)
KINDS = ["lora", "dora", "rslora", "lora_bias", "two", "head", "ia3", "peft", "merged", "disabled"]


@pytest.mark.parametrize("kind", widely(KINDS, core=("lora", "two", "ia3", "peft", "merged")))
def test_reads_weights_edits_and_sums_are_with_the_adapter(kind):
    m = load(adapted(kind))
    assert m.disabled == {}
    other = plain(m)
    assert gap(m.run(IDS), other.run(IDS)) < 1e-5
    if kind not in ("disabled", "head", "lora_bias"):
        assert gap(m.run(IDS), Model(build("llama_gqa")).run(IDS)) > 1e-2
    sites = [s for s, can in m.sites().items() if can.startswith("read")]
    got, want = m.capture(IDS, sites), other.capture(IDS, sites)
    assert max(gap(got[str(a)], want[str(a)]) for a in m.places(sites)) < 2e-5
    for view in ("q", "k", "v", "o", "mlp_in", "mlp_gate", "mlp_out"):
        assert gap(getattr(m.weights, view)[1], getattr(other.weights, view)[1]) < 1e-5
    assert gap(m.weights.unembed, other.weights.unembed) < 1e-5
    edits = [[Ablate("head_out.1.2")], [Ablate("z.0.1")], [Ablate("mlp_post.2.5")]]
    measure = lambda logits, prompt: logits  # noqa: E731
    assert gap(sweep(m, IDS, edits, measure), sweep(other, IDS, edits, measure)) < 1e-5

    parts = decompose(m, IDS, neurons=[1])
    assert gap(parts.contribution.sum(1), parts.total) < 1e-5
    tokens = torch.tensor([3, 4])
    shares, rest = logit_contributions(m, parts, tokens)
    assert gap(shares.sum(1) + rest, m.run_last(IDS)[torch.arange(2), tokens]) < 1e-5


@pytest.mark.parametrize("first", ["base", "adapter"])
def test_neither_order_of_loading_lets_one_model_speak_for_another(first, tmp_path):
    base, tuned, broken = Model(build("llama_gqa")), Model(adapted("lora")), Model(quantised("llama_gqa"))
    order = [base, tuned, broken] if first == "base" else [broken, tuned, base]
    for m in (*order, *order):
        m.disabled = checked(m, tmp_path)
    assert base.disabled == tuned.disabled == {}
    assert "head_out" in broken.disabled
    assert len({m.fingerprint() for m in order}) == 3


def test_an_adapter_switched_off_is_another_model():
    hf = adapted("lora")
    m = load(hf)
    acts, on = m.capture(IDS, ["z.1", "head_out.1"]), m.fingerprint()
    hf.disable_adapters()
    assert m.fingerprint() != on
    with pytest.raises(Refused, match="changed since it was captured"):
        _ = acts["head_out.1"]
    hf.enable_adapters()
    assert m.fingerprint() == on


def test_adapted_embeddings_are_not_shown_as_stored():
    hf = build("llama_gqa")
    hf.add_adapter(lora("embed_tokens"))
    m = load(hf.eval())
    assert m.disabled == {}
    with pytest.raises(Refused, match="adapter stands on it") as refusal:
        _ = m.weights.embed
    assert "merge_and_unload" in refusal.value.instead
    saved = peft.get_peft_model(build("llama_gqa"), lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]))
    m = load(saved)
    m.hf.requires_grad_(False)
    assert torch.equal(m.weights.embed, m.hf.get_input_embeddings().weight)
    assert gap(decompose(m, IDS).contribution.sum(1), decompose(m, IDS).total) < 1e-5


def test_prompts_of_an_adapter_are_refused():
    tuned = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(Refused, match="PromptTuning"):
        load(tuned)


def quantised(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(build(name), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt_neox_parallel", "opt"])
def test_int8_maps_disable_what_they_cannot_show(name):
    m = load(quantised(name))
    assert "no linear map" in m.disabled["head_out"]
    acts = m.capture(IDS, [s for s, can in m.sites().items() if can.startswith("read")])
    assert torch.equal(acts["logits"], m.run(IDS))
    for read in (lambda: m.capture(IDS, "head_out.1"), lambda: m.weights.o[1], lambda: m.weights.v[1]):
        with pytest.raises(Refused):
            read()
    with pytest.raises(Refused, match="no linear map"):
        decompose(m, IDS)
    assert m.fingerprint() != Model(build(name)).fingerprint()


class Packed(nn.Module):
    """A map whose weight is stored in another form, as weight-only quantisation does: linear, but not as it lies."""

    def __init__(self, plain):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = nn.Parameter((plain.weight * 64).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(1 / 64))

    def forward(self, x):
        return x @ (self.weight * self.scale).T


def test_weights_in_another_form_are_read_by_what_they_do():
    hf = build("llama_gqa")
    for layer in hf.model.layers:
        layer.self_attn.o_proj, layer.mlp.down_proj = Packed(layer.self_attn.o_proj), Packed(layer.mlp.down_proj)
    m = load(hf)
    assert m.disabled == {}
    stored = m.hf.model.layers[1].self_attn.o_proj
    assert gap(m.weights.o[1].flatten(0, 1), stored.weight.T * stored.scale) < 1e-6
    assert gap(decompose(m, IDS).contribution.sum(1), decompose(m, IDS).total) < 1e-5


def test_a_forward_put_on_one_map_is_part_of_it_or_refused():
    hf = build("llama_gqa").requires_grad_(False)
    o, plain = hf.model.layers[1].self_attn.o_proj, hf.model.layers[1].self_attn.o_proj.forward
    o.forward = lambda x: 3 * plain(x)
    m = load(hf)
    assert m.disabled == {}
    assert gap(m.weights.o[1].flatten(0, 1), 3 * o.weight.T) < 1e-6
    assert gap(decompose(m, IDS).contribution.sum(1), decompose(m, IDS).total) < 1e-5
    o.forward = lambda x: plain(x).tanh()
    with pytest.raises(Refused, match="no linear map"):
        m.weights.o[1]
    assert "head_out" in load(hf).disabled


def test_a_hook_that_changes_a_map_disables_its_parts():
    hf = build("llama_gqa")
    hf.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, out: out * 2)
    m = load(hf)
    assert "head_out" in m.disabled
    with pytest.raises(Refused):
        decompose(m, IDS)


def test_compiled_models():
    hf = build("llama")
    assert load(torch.compile(hf, backend="eager")).hf is hf
    part = build("llama")
    part.model.layers[1] = torch.compile(part.model.layers[1], backend="eager")
    whole, forward = build("llama"), build("llama")
    whole.compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    for x, where in ((part, r"model\.layers\.1"), (whole, "the whole"), (forward, "the whole")):
        with pytest.raises(Refused, match=f"compiled part.*{where}"):
            load(x)


def test_data_parallel_and_peft_wrappers_are_taken_off():
    hf = build("llama")
    assert load(nn.DataParallel(torch.compile(hf, backend="eager"))).hf is hf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_of_ordinary_maps_are_views_of_what_is_stored(dtype):
    own = nn.Linear(5, 3, dtype=dtype).requires_grad_(False)
    assert matrix(own).data_ptr() == own.weight.data_ptr()
    assert torch.equal(bias(own), own.bias)

    class Subclassed(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    other = Subclassed(5, 3, dtype=dtype).requires_grad_(False)
    assert matrix(other).data_ptr() == other.weight.data_ptr()
    x = noise(4, 5).to(dtype)
    assert gap(x @ matrix(other) + bias(other), other(x)) < 1e-2


def test_every_identity_holds_with_an_adapter_in_half_precision():
    hf = adapted("lora").to(torch.bfloat16)
    assert disabled_sites(self_check(Model(hf.eval()))) == {}
