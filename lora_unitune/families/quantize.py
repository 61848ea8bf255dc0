"""Quantization of a base's linear layers, so that a fit needs less GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_unitune.errors import SettingError

_SMALLEST = 4096  # elements of a weight; quantizing smaller ones saves nothing
_FLAGS = {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}
"""Quantization -> the attribute by which PEFT recognizes a quantized module."""


def place(module: nn.Module, device: torch.device, dtype: torch.dtype, quantize: str) -> nn.Module:
    """Freezes a module, quantizes its linear layers, casts the rest, and moves it to a device.

    Args:
        module: The module, float32, on the CPU.
        device: Device to move it to.
        dtype: Dtype of all other layers, and of the computation in quantized ones.
        quantize: Quantization: "none", "int8" (LLM.int8(), arXiv 2208.07339) or "nf4" (QLoRA, arXiv 2305.14314).

    Raises:
        SettingError: bitsandbytes is needed and can't be imported.
    """
    module.eval().requires_grad_(False)
    if quantize != "none":
        make = _maker(quantize, dtype)
        for name, child in list(module.named_modules()):
            if type(child) is nn.Linear and child.weight.numel() >= _SMALLEST:
                parent, _, last = name.rpartition(".")
                setattr(module.get_submodule(parent), last, make(child))
        module.eval()
    module.to(device, dtype)
    if quantize != "none":
        setattr(module, _FLAGS[quantize], True)
    return module


def _maker(quantize: str, dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    """Returns a function that replaces a linear layer by bitsandbytes'; moving it to a device quantizes it."""
    try:
        from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    except (ImportError, OSError, RuntimeError) as error:
        raise SettingError(
            f"fit.quantize = '{quantize}' needs bitsandbytes, which can't be imported "
            f"({type(error).__name__}); install the extra 8bit or use fit.quantize=none"
        ) from error

    def make(linear: nn.Linear) -> nn.Module:
        shape, bias, layer = (linear.in_features, linear.out_features), linear.bias is not None, None
        with torch.device("meta"):
            if quantize == "int8":
                layer = Linear8bitLt(*shape, bias, has_fp16_weights=False)
            else:
                layer = Linear4bit(*shape, bias, compute_dtype=dtype, quant_type="nf4")
        if quantize == "int8":
            layer.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            layer.support_avx512bf16_for_cpu = (
                False  # it repacks weights, after which gradients can't be computed
            )
        layer.bias = linear.bias
        frozen: Any = layer.requires_grad_(False)
        return frozen  # type: ignore[no-any-return]

    return make
