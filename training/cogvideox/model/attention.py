"""Computes attention without a mask, forward and backward, with the fastest kernels that the device has.

    attend(q, k, v, backend) -> (o, lse)                              o = softmax(q k^T / sqrt(D)) v
    attend_backward(do, q, k, v, o, lse, backend) -> (dq, dk, dv)

Both are custom operators of torch, so torch.compile treats each one as a single node and does not trace into it.
``choose_backend`` chooses the kernels after comparing their gradients with plain fp32 arithmetic. docs/architecture.md
says how to add a backend.

q, k, v and o are (B, S, H, D), the layout that the linear layers write and read, so that nothing is transposed. lse,
(B, H, S) in fp32, is the log-sum-exp of each row of scores. The backward pass recomputes the attention weights P from
it, as in FlashAttention-2 (Dao 2023):

    s = q k^T / sqrt(D)        lse = log(sum(exp(s)))        P = exp(s - lse)        o = P v
    dv = P^T do        dP = do v^T        ds = P * (dP - sum(do * o)) / sqrt(D)        dq = ds k        dk = ds^T q

Shapes: B samples, S tokens, H heads, D channels of a head.
"""

import inspect
import warnings
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from cogvideox.errors import first_line

aten = torch.ops.aten

CUDNN, FLASH, FLASH_4, SAGE, CPU = "cudnn", "flash", "flash-4", "sage", "cpu"
# The backends of a GPU that may be chosen automatically, fastest first. Sage quantizes, so it is used only on request.
BACKENDS = (FLASH_4, CUDNN, FLASH)
HOPPER = (9, 0)
GRADIENT_TOLERANCE = 2e-2  # relative error of bf16 gradients against fp32; a wrong kernel has an error of 1 or more
QUANTIZED_TOLERANCE = 4.5e-2  # corresponds to a cosine of 0.999
# Messages of warnings that the libraries show at each start and that have no effect: that of torch is about the first
# product of its backward thread, and that of FlashAttention 4 about an argument that is not used.
HARMLESS = (
    "Attempting to run cuBLAS, but there was no current CUDA context",
    "Argument aux_data .* cannot be converted",
)
PROBE_SHAPE = (1, 353, 2, 64)  # (B, S, H, D); the odd number of tokens leaves the last tile incomplete


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Transposes (B, S, H, D) to (B, H, S, D), the layout of torch's kernels, without copying."""
    return [tensor.transpose(1, 2) for tensor in tensors]


@torch.library.custom_op("cogvideox::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Computes attention.

    Args:
        q: Queries, (B, S, H, D).
        k: Keys, (B, S, H, D).
        v: Values, (B, S, H, D).
        backend: The kernels, as ``choose_backend`` returns them.

    Returns:
        The attention output, (B, S, H, D), and lse, (B, H, S) in fp32. Both are contiguous.
    """
    if backend == FLASH_4:
        from flash_attn.cute.interface import _flash_attn_fwd

        o, lse = _flash_attn_fwd(q, k, v, return_lse=True)[:2]
        return o, lse
    if backend == SAGE:
        o, lse = import_module("sageattention").sageattn(q, k, v, tensor_layout="NHD", return_lse=True)
        return o.contiguous(), lse.float().contiguous()
    q, k, v = _heads_first(q, k, v)
    if backend == CUDNN:
        o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    elif backend == FLASH:
        o, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return o.transpose(1, 2).contiguous(), lse.reshape(q.shape[:3]).contiguous()


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("cogvideox::attend_backward", mutates_args=())
def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of attention. For sage, which has no backward pass, the flash kernels compute them.

    Args:
        do: Gradient of the attention output, (B, S, H, D).
        q: Queries, as given to ``attend``.
        k: Keys, as given to ``attend``.
        v: Values, as given to ``attend``.
        o: Attention output that ``attend`` returned.
        lse: The log-sum-exp that ``attend`` returned, (B, H, S).
        backend: The kernels that ``attend`` used.

    Returns:
        The gradients of q, k and v, (B, S, H, D) each.
    """
    if backend == FLASH_4:
        from flash_attn.cute.interface import _flash_attn_bwd

        deterministic = torch.are_deterministic_algorithms_enabled()
        dq, dk, dv = _flash_attn_bwd(q, k, v, o, do, lse, deterministic=deterministic)[:3]
        return dq, dk, dv
    length = q.shape[1]
    do, q, k, v, o = _heads_first(do, q, k, v, o)
    if backend == CPU:
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, False)
    else:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # required, but unused without dropout
        ends = (None, None, length, length)  # no packed sequences; the longest query and key sequence
        if backend == CUDNN:
            gradients = aten._scaled_dot_product_cudnn_attention_backward(
                do, q, k, v, o, lse.unsqueeze(-1), seed, seed, None, *ends, 0.0, False
            )
        else:
            gradients = aten._scaled_dot_product_flash_attention_backward(
                do, q, k, v, o, lse, *ends, 0.0, False, seed, seed
            )
    dq, dk, dv = (gradient.transpose(1, 2).contiguous() for gradient in gradients)
    return dq, dk, dv


@attend_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# -- choice ------------------------------------------------------------------------------------------------------------


def choose_backend(device: torch.device, dtype: torch.dtype, wanted: str = "auto") -> tuple[str, str]:
    """Chooses the fastest available backend whose gradients are correct.

    Args:
        device: The device on which attention is computed.
        dtype: The type of q, k and v.
        wanted: Either "auto" or the name of the only backend to consider.

    Returns:
        The name of the backend, and the reason for the choice.

    Raises:
        ValueError: No backend is available; the message says why.
    """
    if device.type != "cuda":
        if wanted not in ("auto", CPU):
            raise ValueError(f"{wanted} needs a GPU; leave it out")
        return CPU, "there is no GPU"
    reasons: list[str] = []
    for backend in BACKENDS if wanted == "auto" else (wanted,):
        problem = _problem(backend, device, dtype)
        if problem is None:
            return backend, "; ".join(reasons) or "the fastest, its gradients checked"
        reasons.append(f"not {backend}: {problem}")
    raise ValueError("; ".join(reasons))


def _problem(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why a backend cannot be used, or None."""
    if dtype == torch.float32:
        return "it supports only bf16 and fp16"
    if backend == FLASH_4 and not is_installed("flash_attn", "cute"):
        return "flash-attn-4 is not installed"
    if backend in (FLASH_4, CUDNN) and torch.cuda.get_device_capability(device) < HOPPER:
        return "the device is older than Hopper"
    if backend == SAGE and (problem := _problem_of_sage()):
        return problem
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    try:
        worst = gradient_error(backend, device, dtype)
    except Exception as error:  # after any failure of a kernel or its compiler, the next backend is tried
        return f"it fails ({first_line(error)})"
    allowed = QUANTIZED_TOLERANCE if backend == SAGE else GRADIENT_TOLERANCE
    return None if worst < allowed else f"its gradients have a relative error of {worst:.2g}"


def _problem_of_sage() -> str | None:
    """Returns why SageAttention cannot be used, or None.

    The backward pass needs lse, which version 1, the version on PyPI, does not return.
    """
    if find_spec("sageattention") is None:
        return "sageattention is not installed"
    known = inspect.signature(import_module("sageattention").sageattn).parameters
    return None if "return_lse" in known else "this sageattention returns no lse; version 2 does"


def is_installed(package: str, part: str) -> bool:
    """Returns whether a package is installed with this module, which other packages of the same name lack."""
    return find_spec(package) is not None and find_spec(f"{package}.{part}") is not None


def gradient_error(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the largest relative error of output and gradients against plain fp32 arithmetic on random inputs."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(PROBE_SHAPE, generator=generator, device=device).to(dtype) for _ in range(4))
    o, lse = attend(q, k, v, backend)
    found = (o, *attend_backward(do, q, k, v, o, lse, backend))
    exact = [x.float().transpose(1, 2).requires_grad_() for x in (q, k, v)]  # (B, H, S, D)
    weights = (exact[0] @ exact[1].mT * PROBE_SHAPE[-1] ** -0.5).softmax(-1)  # softmax(q k^T / sqrt(D)), (B, H, S, S)
    expected = weights @ exact[2]
    right = (expected.detach(), *torch.autograd.grad(expected, exact, do.float().transpose(1, 2)))
    return max(float((a.float() - b.transpose(1, 2)).norm() / b.norm()) for a, b in zip(found, right, strict=True))
