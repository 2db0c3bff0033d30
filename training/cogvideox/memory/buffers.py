"""Flat buffers: host memory that the device can copy, and where tensors are in such a buffer."""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from weakref import finalize

import torch
from torch import Tensor

# In elements, so at least as many bytes. Kernels read 16 bytes at once, and host and device share one layout.
ALIGNMENT = 256
ADVICE = ("MADV_DONTFORK", "MADV_HUGEPAGE")  # huge pages: fewer pages to create and to register


def host_buffer(num_bytes: int) -> Tensor:
    """Returns zeroed host memory for ``pin``.

    torch's pinned allocator rounds sizes up to powers of two, which would waste gigabytes here, so each buffer is a
    separate memory mapping. The data loader's worker processes do not inherit it, because a fork copies pinned pages
    immediately.

    Whatever the host writes into a buffer should be written before ``pin``. Writing creates the pages of the buffer
    with all cores, but pinning creates missing pages one after another, which takes several times longer.

    Args:
        num_bytes: Size of the buffer.

    Returns:
        A uint8 tensor of shape (num_bytes,). Its memory is freed with its last view.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(1, num_bytes), flags=flags)  # a page belongs to one buffer only
    for name in ADVICE:
        with suppress(AttributeError, OSError):  # advice that this system or kernel does not know
            memory.madvise(getattr(mmap, name))
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]  # the system zeroes new pages


def pinned(num_bytes: int) -> Tensor:
    """Returns a pinned ``host_buffer``, for data that only the device writes.

    Raises:
        MemoryError: The system does not allow that much memory to be pinned.
    """
    buffer = host_buffer(num_bytes)
    pin(buffer)
    return buffer


def fill(target: Tensor, source: Tensor) -> None:
    """Copies a tensor into host memory that is not pinned yet, or into any other memory.

    The driver would copy from a device to such memory on one core. So the device copies to a pinned buffer of torch,
    which the next call uses again, and all cores copy from there.
    """
    if source.is_cuda and target.device.type == "cpu":
        source = torch.empty_like(source, device=target.device, pin_memory=True).copy_(source)
    target.copy_(source)


def pin(buffer: Tensor) -> None:
    """Page-locks host memory, so that the device can copy it asynchronously; without a GPU, does nothing.

    The memory must be a memory mapping, such as a ``host_buffer``. It stays page-locked until its last view is dropped.

    Raises:
        MemoryError: The system does not allow that much memory to be pinned.
    """
    if not torch.cuda.is_available():
        return
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if int(status) != 0:
        raise MemoryError(
            f"the system does not allow {buffer.nbytes / 2**30:.1f} GiB more to be pinned (CUDA: {status})"
        )
    # Unregister when the memory is freed, or the driver refuses the next buffer at the same address. Whoever drops the
    # last view must have waited for its copies: the device would go on reading and writing freed memory.
    finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False


class Layout:
    """Describes where tensors of given shapes and types are stored in one flat byte buffer.

    If all tensors have one type, tensors of the same shapes and another type start at the same element offsets.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.entries: list[tuple[int, int, torch.Size, torch.dtype]] = []
        self.num_bytes = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            self.entries.append((self.num_bytes, size, tensor.shape, tensor.dtype))
            self.num_bytes += aligned(tensor.numel()) * tensor.element_size()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns the tensors as views of a byte buffer of at least ``num_bytes`` bytes."""
        memory = buffer.view(torch.uint8)
        return [memory[start : start + size].view(dtype).view(shape) for start, size, shape, dtype in self.entries]

    def flat(self, buffer: Tensor) -> Tensor:
        """Returns a buffer as one vector with its padding, (numbers,); requires that all tensors have one type."""
        return buffer[: self.num_bytes].view(self._dtype)

    def views_of(self, array: Tensor) -> list[Tensor]:
        """Returns the tensors as views of a vector of any type with ``numbers`` elements; requires one type in all."""
        pieces = zip(self.starts, (shape for _, _, shape, _ in self.entries), strict=True)
        return [array[start : start + shape.numel()].view(shape) for start, shape in pieces]

    @property
    def numbers(self) -> int:
        """Returns the number of elements in ``flat``, padding included."""
        return self.num_bytes // self._dtype.itemsize

    @cached_property
    def starts(self) -> list[int]:
        """Returns the index of each tensor's first element in ``flat``."""
        return [start // self._dtype.itemsize for start, *_ in self.entries]

    @cached_property
    def _dtype(self) -> torch.dtype:
        (dtype,) = {dtype for *_, dtype in self.entries}
        return dtype


def aligned(size: int) -> int:
    """Rounds a size in elements or bytes up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
