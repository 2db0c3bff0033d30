"""Compares the attention operators with those of torch, and tests the choice of kernels."""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cogvideox.model import attention
from cogvideox.model.attention import BACKENDS, CPU, SAGE, attend, attend_backward, choose_backend, gradient_error

SHAPES = [(2, 17, 3, 32), (1, 353, 2, 64), (1, 64 * 3, 2, 64)]


def inputs(shape: tuple[int, ...], device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for _ in range(4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_operators_are_torch_s_attention(shape: tuple[int, ...]) -> None:
    q, k, v, do = inputs(shape)
    o, lse = attend(q, k, v, CPU)
    gradients = attend_backward(do, q, k, v, o, lse, CPU)
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    right = scaled_dot_product_attention(*leaves)
    right.backward(do.transpose(1, 2))
    torch.testing.assert_close(o, right.transpose(1, 2))
    for found, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad.transpose(1, 2))


def test_operators_match_their_fake_implementations() -> None:
    q, k, v, do = inputs(SHAPES[0])
    o, lse = attend(q, k, v, CPU)
    for operator, arguments in ((attend, (q, k, v, CPU)), (attend_backward, (do, q, k, v, o, lse, CPU))):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_cpu_has_one_choice() -> None:
    assert choose_backend(torch.device("cpu"), torch.float32)[0] == CPU
    with pytest.raises(ValueError, match="flash-4 needs a GPU"):
        choose_backend(torch.device("cpu"), torch.float32, "flash-4")


def test_wrong_gradients_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradient_error(CPU, torch.device("cpu"), torch.float32) < 1e-5
    right = attention.attend_backward

    def wrong(*arguments: object) -> tuple[torch.Tensor, ...]:
        dq, dk, dv = right(*arguments)
        return dq, dk * 1.1, dv

    monkeypatch.setattr(attention, "attend_backward", wrong)
    assert gradient_error(CPU, torch.device("cpu"), torch.float32) == pytest.approx(0.1, rel=1e-3)


def sage(monkeypatch: pytest.MonkeyPatch, sageattn: object) -> None:
    module = ModuleType("sageattention")
    module.__spec__ = ModuleSpec("sageattention", None)
    module.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", module)


def test_sage_of_version_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert attention._problem(SAGE, torch.device("cpu"), torch.bfloat16) == "sageattention is not installed"
    monkeypatch.undo()
    sage(monkeypatch, lambda q, k, v, tensor_layout="HND", **kwargs: q)
    assert "returns no lse" in str(attention._problem(SAGE, torch.device("cpu"), torch.bfloat16))


def test_sage_is_asked_for_tokens_first_and_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature of version 2, whose kernels need a GPU."""

    def sageattn(q, k, v, tensor_layout="HND", return_lse=False):  # type: ignore[no-untyped-def]
        assert tensor_layout == "NHD"
        assert return_lse
        return attend(q, k, v, CPU)

    sage(monkeypatch, sageattn)
    q, k, v, _ = inputs(SHAPES[0])
    for found, right in zip(attend(q, k, v, SAGE), attend(q, k, v, CPU), strict=True):
        assert found.equal(right)
    assert SAGE not in BACKENDS
    assert attention._problem_of_sage() is None


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [353, 17 * 64, 1350 * 5 + 226])
@pytest.mark.fault("numbers: every attention backend on a GPU, compared with fp32")
def test_backends_of_a_gpu(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PROBE_SHAPE", (1, tokens, 2, 64))
    device = torch.device("cuda")
    chosen, _ = choose_backend(device, torch.bfloat16)
    for backend in BACKENDS[BACKENDS.index(chosen) :]:
        for dtype in (torch.bfloat16, torch.float16):
            assert gradient_error(backend, device, dtype) < attention.GRADIENT_TOLERANCE
    with pytest.raises(ValueError, match="it supports only bf16 and fp16"):
        choose_backend(device, torch.float32)


def test_harmless_warnings_of_the_kernels_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine with an H200 printed them at each start, also after the check; other warnings are shown."""
    messages = (
        "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context... "
        "(Triggered internally at /pytorch/aten/src/ATen/cuda/CublasHandlePool.cpp:335.)",
        "Argument aux_data (position 17) cannot be converted to a JitArgument for function 'x'. Its type `<class "
        "'flash_attn.cute.utils.AuxData'>` is not supported.",
        "The gradients are wrong",
    )

    def warns(*_: object) -> float:
        for message in messages:
            warnings.warn(message, stacklevel=1)
        return 0.0

    monkeypatch.setattr(attention, "gradient_error", warns)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert attention._problem(attention.FLASH, torch.device("cuda"), torch.bfloat16) is None
        warns()
    assert [str(warning.message) for warning in shown] == ["The gradients are wrong"] * 2
