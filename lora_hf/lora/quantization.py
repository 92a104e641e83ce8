"""Frozen projections in 8 or 4 bits: packed once, and unpacked for each multiplication.

`int8` has a scale for each output feature (LLM.int8(), arXiv 2208.07339, section 2.1, without its outliers) and needs
only torch. `nf4` is QLoRA's NormalFloat (arXiv 2305.14314, section 3): 64 weights share a scale, and the scales are
quantized to 8 bits themselves; bitsandbytes packs and unpacks it, on the CPU as on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lora_hf.core.errors import ConfigError, ModelError, how_to_install
from lora_hf.lora.adapter_dict import modules_of_base

logger = logging.getLogger(__name__)

SCHEMES = ("int8", "nf4")
INT8_LARGEST = 127
NF4_BLOCK = 64  # weights that share a scale
SCALES_BLOCK = 256  # scales that share a scale of their own

Packed = dict[str, Tensor]


class QuantisedLinear(nn.Module):
    """A frozen `nn.Linear` or `Conv1D` with a packed weight; `(..., in)` to `(..., out)` in the precision of x.

    It multiplies the dequantized weight, which gets no gradient. With `dynamic` it also rounds x to 8 bits, with a
    scale for each token, and multiplies integers: for inference with int8 on a CPU, without gradients.
    """

    def __init__(self, layer: nn.Module, scheme: str, dynamic: bool = False) -> None:
        super().__init__()
        weight: Any = layer.weight
        self.transposed = isinstance(layer, Conv1D)
        self.out_features, self.in_features = weight.shape[::-1] if self.transposed else weight.shape
        self.scheme = scheme
        self.dynamic = dynamic
        self.training = layer.training
        self.bias: Any = layer.bias
        self.requantise(weight.detach().T if self.transposed else weight.detach())

    def packed(self) -> Packed:
        """The tensors that represent the weight, by name."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def requantise(self, weight: Tensor) -> None:
        """Replaces the weight with another, `(out, in)`; the tensors of the old one are not changed."""
        for name, tensor in pack(weight, self.scheme).items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in fp32, a copy in the layout of the original layer, for models that read it."""
        return self.dequantise().T if self.transposed else self.dequantise()

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(out, in)`, also where the layer was a Conv1D."""
        return self.unpacker()(dtype)

    def unpacker(self) -> Callable[[torch.dtype], Tensor]:
        """`dequantise` of the current weight, even if it is called after another has replaced it."""
        return partial(unpack, self.packed(), self.scheme, (self.out_features, self.in_features))

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A frozen layer of the original kind with the dequantized weight."""
        with torch.device("meta"):
            if self.transposed:
                layer: Any = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.dequantise(dtype)
        layer.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        # Only the bias is cast; the scales move to the device and stay exact.
        def move(tensor: Tensor) -> Tensor:
            return fn(tensor) if tensor is self.bias else tensor.to(fn(tensor).device)

        return super()._apply(move, recurse)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.dynamic and not torch.is_grad_enabled():
            return multiply_integers(x, self.packed(), bias)
        return _MultiplyPacked.apply(x, self.unpacker(), bias)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        kind = f"{self.scheme}, dynamic" if self.dynamic else self.scheme
        return f"{kind}, in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack(weight: Tensor, scheme: str) -> Packed:
    """The tensors that represent an `(out, in)` weight in a scheme.

    Raises:
        ConfigError: nf4 without bitsandbytes.
    """
    weight = weight.float().contiguous()
    if scheme == "int8":
        scales = weight.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / INT8_LARGEST
        return {"values": (weight / scales[:, None]).round_().to(torch.int8), "scales": scales}
    # As one row: bitsandbytes' CPU kernel gives wrong weights if the length of a row is not a multiple of the block.
    values, state = _bitsandbytes().quantize_4bit(
        weight.reshape(-1), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
    )
    return {
        "values": values,
        "scales": state.absmax,
        "scales_of_scales": state.state2.absmax,
        "offset": state.offset,
        "code": state.state2.code,
    }


def unpack(packed: Mapping[str, Tensor], scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The `(out, in)` weight that `pack` packed, rounded to `dtype` at the end."""
    if scheme == "int8":
        return (packed["values"] * packed["scales"][:, None]).to(dtype)
    library = _bitsandbytes()
    scales = library.dequantize_blockwise(
        packed["scales"], absmax=packed["scales_of_scales"], code=packed["code"], blocksize=SCALES_BLOCK
    )
    state = library.QuantState(
        absmax=scales + packed["offset"],
        shape=torch.Size([shape[0] * shape[1]]),
        dtype=dtype,
        blocksize=NF4_BLOCK,
        quant_type="nf4",
    )
    return library.dequantize_4bit(packed["values"], state).reshape(shape)


def is_torchao(weight: object) -> bool:
    """Whether torchao has packed this tensor; its `shape` and `dtype` are those of the original all the same."""
    kind = type(weight)
    if kind is nn.Parameter or kind is Tensor:  # torch.compile cannot trace the name of a module
        return False
    return kind.__module__.partition(".")[0] == "torchao"


def unpack_quantized(module: nn.Module) -> nn.Module:
    """The module with plain weights where transformers has packed them (`BitsAndBytesConfig`, `TorchAoConfig`)."""
    keep_input_gradients(module)
    for path, layer in list(module.named_modules()):
        packed: Any = layer
        if is_torchao(getattr(packed, "weight", None)):
            packed.weight = nn.Parameter(packed.weight.dequantize())
        if type(getattr(packed, "weight", None)).__name__ not in ("Params4bit", "Int8Params"):
            continue
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        weight = dequantize_bnb_weight(packed.weight, getattr(packed, "state", None))
        plain: Any = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.float() if packed.bias is None else weight.to(packed.bias.dtype))
        plain.bias = packed.bias
        plain.train(packed.training)
        if not path:
            return plain
        module.set_submodule(path, plain)
    return module


def keep_input_gradients(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for its CPU kernel, through which the input gets no gradient.

    On processors with AVX512-BF16 it does so at the first call in evaluation mode, and the next epoch would not train
    what lies below. A weight that is already repacked is restored.
    """
    for module in model.modules():
        packed: Any = module
        if getattr(packed, "support_avx512bf16_for_cpu", False):
            packed.state_dict()  # restores the weight, in place
            packed.support_avx512bf16_for_cpu = False


def check_torchao_gradients(model: nn.Module) -> None:
    """Raises ModelError if a projection that torchao has quantized gives its input no gradient.

    Kinds that quantize the input as well lose it without an error, and some 4-bit kernels have no derivative.
    """
    tried = set()
    for path, module in modules_of_base(model):
        if not isinstance(module, nn.Linear) or not is_torchao(module.weight):
            continue
        weight: Any = module.weight
        kind = (type(weight), weight.shape, repr(weight.__tensor_flatten__()[1]))
        if kind not in tried and (reason := _lost_gradient(module)):
            raise ModelError(
                f"{path}: torchao has quantized this weight ({type(weight).__name__}) for inference only: {reason}. "
                "Load the base with a weight-only config, such as Int8WeightOnlyConfig or Float8WeightOnlyConfig, or "
                "with BitsAndBytesConfig; or load it without one and call lora_hf.quantise on it"
            )
        tried.add(kind)


def _lost_gradient(layer: nn.Linear) -> str:
    """Why the input of a layer gets no gradient; empty if it gets one."""
    weight: Any = layer.weight
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, layer.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
        try:
            y = linear(x, weight)
            if y.requires_grad:
                y.sum().backward()
        except (RuntimeError, NotImplementedError) as error:
            return str(error).partition("\n")[0]
    return "" if x.grad is not None else "its input gets no gradient"


def multiply_integers(x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """`x W^T + bias` of an int8 weight, with x rounded to 8 bits for each token; `(..., in)` to `(..., out)`."""
    rows = x.reshape(-1, x.shape[-1]).float()
    scales = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).div_(INT8_LARGEST)
    integers, transposed = (rows / scales).round_(), packed["values"].T
    if _integer_products_are_exact(x.device):
        product = _multiply_int8(integers.to(torch.int8), transposed)
    else:
        product = integers @ transposed.float()
    y = product.mul(scales).mul_(packed["scales"]).to(x.dtype)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], y.shape[-1])


# torch's only product of 8-bit integers; torchao and bitsandbytes use it too.
_multiply_int8 = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]


@functools.cache
def _integer_products_are_exact(device: torch.device) -> bool:
    """Whether this machine multiplies int8 matrices without error.

    On processors without VNNI, oneDNN adds two products of 8 bits in 16 bits, which saturate.
    """
    x = torch.arange(64 * 64, device=device).mul_(37).remainder_(255).sub_(127).view(64, 64).to(torch.int8)
    exact = torch.equal(_multiply_int8(x, x.T).double(), x.double() @ x.T.double())
    if not exact:
        logger.warning("this processor does not multiply int8 matrices exactly, so int8 inference computes in fp32")
    return exact


class _MultiplyPacked(torch.autograd.Function):
    """`x W^T + bias` that saves neither x nor W for the backward pass, which unpacks W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpacker: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> Tensor:
        ctx.unpacker = unpacker
        return linear(x, unpacker(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        dx = dy @ ctx.unpacker(dy.dtype) if ctx.needs_input_grad[0] else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias


def _bitsandbytes() -> Any:
    # On import it warns about a missing inference kernel, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ConfigError(
            f"nf4 needs bitsandbytes, which cannot be imported ({error}): {how_to_install('quantised')}, or use int8"
        ) from error
