"""Wrappers around a live model: the transformers model inside is taken, or the wrapper is refused by its name."""

from __future__ import annotations

from typing import Any

from torch import nn

from cutaway.core.refuse import Refused

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def inner(x: nn.Module) -> Any:
    """Return the transformers model that a wrapper (torch.compile, PEFT, DataParallel, DDP, DeepSpeed) stands around;
    itself if none.

    An adapter's layers are live inside that model and belong to it.

    Raises:
        Refused: no transformers model, or a wrapper without which the model would be another.
    """
    from transformers import PreTrainedModel

    while True:
        if "_orig_mod" in x._modules:  # torch.compile
            x = x._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(x, _PARALLEL) or (_foreign(x, "deepspeed") and isinstance(x._modules.get("module"), nn.Module)):
            x = x._modules["module"]  # type: ignore[assignment]
        elif _foreign(x, "peft") and hasattr(x, "get_base_model"):
            _check_adapter(x)
            x = x.get_base_model()  # type: ignore[operator]
        else:
            break
    if not isinstance(x, PreTrainedModel):
        inside = next((n for n, m in x.named_modules() if n and isinstance(m, PreTrainedModel)), None)
        way = f"give the model inside it ({inside})" if inside else "give a PreTrainedModel"
        raise Refused(f"a live {type(x).__name__}", "it is not a transformers model", way)
    if "_original_forward" in x.__dict__:
        why = "accelerate runs it in another precision than its weights have (mixed_precision)"
        way = "load accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        raise Refused("a model prepared by accelerate", why, way)
    if any(hasattr(p, "ds_id") for p in x.parameters()):
        why = "each process holds a part of its weights only"
        raise Refused("a model partitioned by DeepSpeed", why, "save it whole (save_16bit_model) and load the folder")
    for name, module in x.named_modules():
        _check_part(name or "the whole", module)
    return x


def _foreign(module: nn.Module, package: str) -> bool:
    return type(module).__module__.split(".")[0] == package


def _check_adapter(x: Any) -> None:
    """Refuse adapters that are not inside the model: prompts and prefixes, which PEFT adds at every call."""
    active = getattr(x, "active_peft_config", None)
    if getattr(active, "is_prompt_learning", False):
        kind = type(active).__name__.removesuffix("Config")
        raise Refused(
            f"a PEFT model with {kind}",
            "its prompts are added outside the model, whose sites would be those of another",
            "load the inner model (get_base_model()) and write the prompt as text, or use an adapter on weights",
        )


def _check_part(name: str, module: nn.Module) -> None:
    """Refuse parts whose sites cannot be tapped: compiled ones, sharded ones, attention of another library."""
    forward: Any = module.__dict__.get("forward")
    compiled = "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None
    if compiled or hasattr(forward, "_torchdynamo_orig_callable"):
        what, why = f"a model with a compiled part ({name})", "torch.compile leaves out what is read inside"
        raise Refused(what, why, "load the model before you compile it; a whole model in torch.compile(model) is fine")
    if type(module).__name__ == "FullyShardedDataParallel" or ".fsdp." in type(module).__module__:
        why = "each process holds a part of its weights only"
        raise Refused(f"a model sharded by FSDP ({name})", why, "gather it (full_state_dict), or use device='auto'")
    if _foreign(module, "peft") and type(module).__name__.startswith("Adapted"):
        why = f"{type(module).__name__} stands in the place of attention at {name}"
        raise Refused("a model with an adaption prompt", why, "take it off, or use an adapter on weights (LoRA)")
