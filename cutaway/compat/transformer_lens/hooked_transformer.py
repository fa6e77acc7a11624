"""HookedTransformer and TransformerBridge: TransformerLens' models, native or bridged to a house model."""

from __future__ import annotations

import logging
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cutaway.compat.transformer_lens import bridged, native, native_files, utils
from cutaway.compat.transformer_lens.activation_cache import ActivationCache
from cutaway.compat.transformer_lens.config import HookedTransformerConfig
from cutaway.compat.transformer_lens.generation import generate, prompt_mask
from cutaway.compat.transformer_lens.hook_points import HookPoint
from cutaway.compat.transformer_lens.loading import configuration, own_model
from cutaway.compat.transformer_lens.tokenisation import Tokenisation
from cutaway.compat.transformer_lens.weight_processing import STEPS
from cutaway.compat.transformer_lens.weights import Weights
from cutaway.core.refuse import Refused
from cutaway.models.tokens import Tokens

_SWITCHES = {
    "attn.hook_result": "use_attn_result", "hook_q_input": "use_split_qkv_input", "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input", "hook_mlp_in": "use_hook_mlp_in", "hook_attn_in": "use_attn_in",
}  # fmt: skip


class Output(NamedTuple):
    """Logits [batch pos d_vocab] and loss."""

    logits: Tensor
    loss: Tensor


class HookedTransformer(Tokenisation, Weights):
    """A language model with a hook point at every activation.

    Made from a configuration it is native: its own trainable parameters, named and shaped as TransformerLens names
    them. Made by `from_pretrained` it is bridged: a copy of a Hugging Face model whose taps call the hook points.

    Attributes:
        cfg: the configuration.
        tokenizer: the tokenizer, or None.
        house: the house model that a bridged one runs; None of a native one.
    """

    def __init__(self, cfg, tokenizer=None, move_to_device=True, default_padding_side=None, _house=None):
        super().__init__()
        if isinstance(cfg, str):
            raise ValueError("Please pass in a config dictionary or HookedTransformerConfig object")
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.tokenizer, self.dataset = None, None
        self.__dict__["house"] = _house
        if tokenizer is None and self.cfg.tokenizer_name is not None and _house is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.cfg.tokenizer_name)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side)
        elif self.cfg.d_vocab == -1:
            raise AssertionError("Must provide a tokenizer if d_vocab is not provided")
        self._grow()
        if _house is None and self.cfg.init_weights:
            self.init_weights()
        if _house is None and move_to_device:
            self.to(self.cfg.device)
        self.setup()

    def _grow(self) -> None:
        """Make the tree of components."""
        cfg = self.cfg
        if self.house is not None:
            self.original_model = self.house.hf
            for name, module in bridged.components(self.house, cfg).items():
                setattr(self, name, module)
        else:
            self.embed, self.hook_embed = native.Embed(cfg), HookPoint()
            if cfg.positional_embedding_type in ("standard", "shortformer"):
                self.pos_embed, self.hook_pos_embed = native.PosEmbed(cfg), HookPoint()
            self.blocks = nn.ModuleList(native.TransformerBlock(cfg, i) for i in range(cfg.n_layers))
            if cfg.normalization_type is not None:
                self.ln_final = native.norm(cfg, final=True)
            self.unembed = native.Unembed(cfg)
        if cfg.use_hook_tokens:
            self.hook_tokens = HookPoint()

    def setup(self) -> None:
        """Name every hook point, and find its place in the model."""
        super().setup()
        if self.house is not None:
            self.hook_dict = {n: p for n, p in self.hook_dict.items() if not n.startswith("original_model.")}
            self.mod_dict = {n: m for n, m in self.mod_dict.items() if not n.startswith("original_model")}
            found = bridged.places(self.house, self.cfg)
            self.__dict__["places"] = {n: p for n, p in found.items() if n in self.mod_dict}

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        *,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: Any = None,
        device: Any = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> Any:
        """Return a bridged model of a name, a folder, or the live model `hf_model`; folded and centred by default.

        `options` change `weight_processing.STEPS`. The weights are a copy: the user's model stays as it is.

        Raises:
            Refused: several devices, a checkpoint, or a model that is not here.
        """
        if n_devices != 1:
            raise Refused(f"n_devices={n_devices}", "one copy on one device is made here", "load it with cutaway.load")
        label = native_files.chosen(model_name, checkpoint_index, checkpoint_value)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or options.get("torch_dtype")
        given = {} if default_prepend_bos is None else {"default_prepend_bos": default_prepend_bos}
        if hf_model is None and (files := native_files.native_files(model_name)) is not None:
            model = native_files.loaded(cls, files, label, tokenizer, dtype, device=device, **given)
        else:
            name = model_name if label is None else f"{model_name}@step{label}"
            house = own_model(name, hf_model, tokenizer, dtype, device)
            cfg = configuration(house, model_name, **given)
            model = cls(cfg, tokenizer or house.tokenizer, default_padding_side=default_padding_side, _house=house)
        model._process(**{step: options[step] for step in STEPS if step in options})
        sys.stdout.write(f"Loaded pretrained model {model_name} into HookedTransformer\n")
        return model.eval()

    @classmethod
    def from_pretrained_no_processing(cls, model_name: str, **options: Any) -> Any:
        """Return a bridged model with the weights as they are."""
        return cls.from_pretrained(model_name, **{**dict.fromkeys(STEPS, False), **options})

    def check_hooks_to_add(self, hook_point: HookPoint, hook_point_name: str, hook: Any, **_: Any) -> None:
        """Refuse a hook on a point that its switch keeps from firing, or that this model does not pass.

        Raises:
            Refused: the hook would never fire.
        """
        switch = next((s for end, s in _SWITCHES.items() if hook_point_name.endswith(end)), None)
        if switch is not None and not getattr(self.cfg, switch):
            raise SilentHook(
                f"hook {hook_point_name!r}",
                f"cfg.{switch} is off, so it would never fire",
                f"call model.set_{switch}(True)",
            )
        first = hook_point_name.split(".hook_sae")[0]
        if self.house is not None and switch is None and first not in self.places and first != "hook_tokens":
            raise SilentHook(f"hook {hook_point_name!r}", "this model never passes there", "see model.places")

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Switch `attn.hook_result` on or off."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Switch `hook_q_input`, `hook_k_input` and `hook_v_input` on or off."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Switch `hook_mlp_in` on or off."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Switch `hook_attn_in` on or off."""
        if use_attn_in and self.cfg.n_key_value_heads is not None:
            raise AssertionError("Can't use attn_in with GQA")
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Give each head of a native model keys and values of its own in hooks, or not.

        Raises:
            Refused: a bridged model is asked to.
        """
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention and self.house is None
        if ungroup_grouped_query_attention and self.house is not None:
            raise Refused(
                "ungrouped key-value heads", "hooks see the keys that the model has", "repeat them in the hook"
            )

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Tensor | None = None,
        shortformer_pos_embed: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
    ) -> Any:
        """Run the model on a text, texts, token ids, or the stream [batch pos d_model] that enters `start_at_layer`.

        Returns logits, the "loss", "both" or None; with `stop_at_layer`, the stream that enters that layer.
        """
        mask = attention_mask
        if start_at_layer is None:
            tokens, mask = self._given(input, prepend_bos, padding_side, attention_mask, past_kv_cache)
        n = self.cfg.n_layers
        start = range(n)[start_at_layer] if start_at_layer is not None and start_at_layer != n else start_at_layer or 0
        stop = None if stop_at_layer is None else slice(None, stop_at_layer).indices(n)[1]
        given = (tokens, None) if start_at_layer is None else (None, input)
        want = return_type is not None
        run = self._run_native if self.house is None else self._run_bridged
        out = run(*given, want, start, stop, mask, shortformer_pos_embed, past_kv_cache)
        if stop is not None or not want or return_type == "logits":
            return out
        if tokens is None:
            raise AssertionError("tokens must be passed in if return_type is 'loss' or 'both'")
        loss = self.loss_fn(out, tokens, mask, loss_per_token)
        if return_type not in ("loss", "both"):
            logging.warning("Invalid return_type passed in: %s", return_type)
            return None
        return loss if return_type == "loss" else Output(out, loss)

    def _given(self, input: Any, prepend_bos: Any, padding_side: Any, mask: Any, cache: Any) -> tuple[Tensor, Any]:
        """Return the token ids [batch pos] of an input, and the mask of old and new columns where there is one."""
        side = self._side(padding_side)
        if isinstance(input, str | list):
            input = self.to_tokens(input, prepend_bos, side)
        tokens = (input[None] if input.ndim == 1 else input).to(self.cfg.device)
        if mask is None and (side == "left" or cache is not None):
            mask = prompt_mask(self, tokens, self._bos(prepend_bos), side)
            mask = torch.ones_like(tokens) if mask is None and cache is not None else mask
        mask = mask if cache is None else cache.append_attention_mask(mask)
        return (self.hook_tokens(tokens) if self.cfg.use_hook_tokens else tokens), mask

    def input_to_embed(
        self, input, prepend_bos=None, padding_side=None, attention_mask=None, past_kv_cache=None
    ) -> Any:
        """Return the first stream, the token ids, shortformer's positions (or None), and the attention mask."""
        tokens, mask = self._given(input, prepend_bos, padding_side, attention_mask, past_kv_cache)
        stream, pos = self._embedded(tokens, mask, past_kv_cache)
        return stream, tokens, pos, mask

    def _embedded(self, tokens: Tensor, mask: Any, cache: Any) -> tuple[Tensor, Tensor | None]:
        """Return the first stream, and positions that are not in it."""
        stream, pos = self.hook_embed(self.embed(tokens)), None
        if hasattr(self, "pos_embed"):
            pos = self.hook_pos_embed(self.pos_embed(tokens, 0 if cache is None else cache.length, mask))
        return (stream + pos, None) if self.cfg.positional_embedding_type == "standard" else (stream, pos)

    def _run_native(
        self, tokens: Any, stream: Any, want: bool, start: int, stop: int | None, mask: Any, pos: Any, cache: Any
    ) -> Any:
        if stream is None:
            stream, pos = self._embedded(tokens, mask, cache)
        for i in range(start, self.cfg.n_layers if stop is None else stop):
            stream = self.blocks[i](stream, pos, None if cache is None else cache[i], mask)
        if stop is not None:
            return stream
        if self.cfg.normalization_type is not None:
            stream = self.ln_final(stream)
        if not want:
            return None
        logits, cap = self.unembed(stream), self.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def _run_bridged(
        self, tokens: Any, stream: Any, want: bool, start: int, stop: int | None, mask: Any, pos: Any, cache: Any
    ) -> Any:
        ids = tokens if stream is None else torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)
        if cache is not None:
            if mask is None:
                mask = cache.append_attention_mask(torch.ones_like(ids))
            return bridged.run_cached(self, ids, mask, cache, start, stream)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        none = ((),) * len(ids)
        side = "left" if mask is not None and not bool(real[:, 0].all()) else "right"
        return bridged.run(self, Tokens(ids, real, ("",) * len(ids), none, none, side), want, start, stop, stream)

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Return the loss of predicting the next token."""
        return utils.lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def run_with_cache(
        self, *args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **options: Any
    ) -> Any:
        """Run the model and return its output and the activations, as an `ActivationCache` or a dictionary."""
        out, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **options)
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim) if return_cache_object else cache

    generate = generate

    def to(self, *args: Any, **options: Any) -> Any:
        """Move the model, or cast it."""
        super().to(*args, **options)
        first = next(self.parameters())
        self.cfg.device, self.cfg.dtype = str(first.device), first.dtype
        return self


class SilentHook(Refused, AssertionError):
    """Refusal of a hook that would never fire; TransformerLens asserts that, where it notices."""


class TransformerBridge(HookedTransformer):
    """TransformerLens 3's and 4's bridge: raw weights, until `enable_compatibility_mode` folds and centres them."""

    @classmethod
    def boot_transformers(cls, model_name, device=None, dtype=None, hf_model=None, tokenizer=None, **_) -> Any:
        """Return a bridged model with the weights as they are."""
        return cls.from_pretrained_no_processing(
            model_name, device=device, dtype=dtype, hf_model=hf_model, tokenizer=tokenizer
        )

    @classmethod
    def boot_native(cls, config: Any, tokenizer: Any = None, **_: Any) -> Any:
        """Return a native model of a configuration."""
        return cls(HookedTransformerConfig.unwrap(config), tokenizer)

    def enable_compatibility_mode(
        self, disable_warnings: bool = False, no_processing: bool = False, **which: bool
    ) -> None:
        """Fold and centre the weights, as `HookedTransformer.from_pretrained` does."""
        if not no_processing:
            self._process(**which)
