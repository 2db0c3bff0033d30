"""Adam and AdamW whose state takes few bytes: one function updates weights, masters and moments together.

Most updates are smaller than the rounding error of bf16, so a bf16 weight needs a master weight in fp32. The weight is
the upper half of its master, so only the lower half is stored besides (``split``):

    master, fp32    | sign, exponent, 7 bits | 16 bits |
    weight, bf16    |         rounded        |            the bf16 number that is nearest to the master
    low, int16                               | 16 bits |  the master's bits minus the weight's, -32768 to 32767

Where two bf16 numbers are equally near, the weight is the one that is farther from zero. torch would take the one whose
last bit is zero, but then the difference would need 17 bits. The two differ in one of 131,072 masters on average.

The moments are stored in fp32, in bf16, or in 8 bits. 8-bit moments are quantized in groups of GROUP elements, each
with the largest absolute value as its scale. Their codes are not linear, so that small values keep their relative
precision: a first moment is stored as its square root, and a second moment, which spans twice as many orders of
magnitude, as its fourth root.

    | bytes per weight    | fp32 weight | bf16 weight | fp16 weight |
    | master              | the weight  | 2           | 4           |
    | moments, fp32       | 8           | 8           | 8           |
    | moments, bf16       | 4           | 4           | 4           |
    | moments, 8-bit      | 2.03        | 2.03        | 2.03        |

On a GPU ``update`` is compiled to one kernel. The arrays are (groups, GROUP), and the same numbers give the same bits
wherever they are stored and however they are divided into arrays.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from cogvideox.config.flags import OptimizerFlags
from cogvideox.config.optimizers import is_adam
from cogvideox.memory.graphs import allowing_graphs

GROUP = 256  # elements that share a scale
FP32, BF16, EIGHT_BIT = MOMENTS = ("fp32", "bf16", "8bit")
MASTER, LOW, FIRST, SECOND = "master", "low", "exp_avg", "exp_avg_sq"
WEIGHT = "weight"  # the upper bits of a master, which are not part of its state
SCALE = ".scale"  # after the name of a moment: the scales of its groups
HALF, LOW_BITS = 1 << 15, 16
CODES_FIRST, CODES_SECOND = 127.0, 255.0  # the largest codes
SMALLEST_SCALE = 1e-38  # prevents a division by zero; any scale of a group with a nonzero element is larger


@dataclass(frozen=True)
class Adam:
    """Holds the settings of Adam.

    Attributes:
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to the square root of the second moment.
        weight_decay: The decay rate of weights.
        decoupled: Whether weights decay by themselves, as in AdamW, or through their gradients, as in Adam.
        moments: The format of the moments, one of MOMENTS.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    moments: str = FP32

    def state_types(self, weight: torch.dtype) -> dict[str, torch.dtype]:
        """Returns the type of each array of state by name, for weights of a type; scales have one number a group."""
        master: dict[torch.dtype, dict[str, torch.dtype]] = {
            torch.float32: {},
            torch.bfloat16: {LOW: torch.int16},
            torch.float16: {MASTER: torch.float32},
        }
        if self.moments == EIGHT_BIT:
            codes = {FIRST: torch.int8, SECOND: torch.uint8}
            return master[weight] | codes | {f"{name}{SCALE}": torch.float32 for name in codes}
        return master[weight] | dict.fromkeys(
            (FIRST, SECOND), {FP32: torch.float32, BF16: torch.bfloat16}[self.moments]
        )

    def state_bytes(self, weight: torch.dtype) -> float:
        """Returns the bytes of state per weight of a type; with fp32, those of the moments."""
        types = self.state_types(weight).items()
        return sum(dtype.itemsize / (GROUP if name.endswith(SCALE) else 1) for name, dtype in types)

    def scalars(self, lr: float, divisor: Tensor, skipped: Tensor, steps: Tensor) -> Tensor:
        """Returns what ``update`` needs of a step, (5,) fp32 on the device, without waiting for the device.

        Args:
            lr: The learning rate.
            divisor: Scalar by which gradients are divided: loss scale times clipping.
            skipped: Scalar, 1 if the step changes nothing, else 0.
            steps: Scalar fp64, the number of steps that changed something, including this one.
        """
        first, second = 1 - self.beta1**steps, (1 - self.beta2**steps).sqrt()
        decay = torch.full_like(steps, 1 - lr * self.weight_decay if self.decoupled else 1.0)
        return torch.stack([divisor.to(steps), decay, -lr / first, second, skipped.to(steps)]).float()


def adam_of(flags: OptimizerFlags) -> Adam | None:
    """Returns the settings of Adam that the flags select, or None if they select another optimizer."""
    if not is_adam(flags):
        return None
    values = flags.beta1, flags.beta2, flags.epsilon, flags.weight_decay
    beta1, beta2, eps, decay = (value or 0.0 for value in values)  # the flags of Adam have defaults
    return Adam(beta1, beta2, eps, decay, flags.kind == "adamw", EIGHT_BIT if flags.use_8bit else FP32)


# -- masters -----------------------------------------------------------------------------------------------------------


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Splits finite fp32 masters into bf16 weights and their low bits, int16; ``join`` returns the same masters."""
    bits = master.view(torch.int32)
    upper = (bits + HALF) >> LOW_BITS
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << LOW_BITS)).to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """Returns the fp32 masters that ``split`` has split."""
    return ((weight.view(torch.int16).to(torch.int32) << LOW_BITS) + low.to(torch.int32)).view(torch.float32)


def read_master(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Returns the fp32 masters of weights, of the same shape; for fp32 weights these themselves."""
    if LOW in state:
        return join(weight, state[LOW])
    return state.get(MASTER, weight)


def write_master(master: Tensor, weight: Tensor, state: Mapping[str, Tensor]) -> None:
    """Stores fp32 masters, and rounds them into the weights."""
    if LOW in state:
        upper, low = split(master)
        weight.copy_(upper)
        state[LOW].copy_(low)
        return
    if MASTER in state:
        state[MASTER].copy_(master)
    weight.copy_(master)


# -- moments -----------------------------------------------------------------------------------------------------------


def read_moment(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns a moment in fp32, (groups, GROUP)."""
    stored = state[name]
    if f"{name}{SCALE}" not in state:
        return stored.float()
    scale, codes = state[f"{name}{SCALE}"].unsqueeze(-1), stored.float()
    if name == FIRST:
        return codes * codes.abs() * (scale / CODES_FIRST**2)
    root = codes / CODES_SECOND
    return (root * root) * (root * root) * scale


def stored_moment(value: Tensor, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns a moment, (groups, GROUP) fp32, as the arrays of a type store it, by name."""
    if dtype.is_floating_point:
        return {name: value.to(dtype)}
    scale = value.abs().amax(dim=-1, keepdim=True)
    share = value.abs() / scale.clamp(min=SMALLEST_SCALE)
    if name == FIRST:
        codes = torch.round(share.sqrt() * CODES_FIRST) * value.sign()
    else:
        # A second moment of zero beside a first moment that is not would make a huge step, so the least code is 1.
        codes = torch.round(share.sqrt().sqrt() * CODES_SECOND).clamp(min=1.0)
    return {name: codes.to(dtype), f"{name}{SCALE}": scale.squeeze(-1)}


# -- the step ----------------------------------------------------------------------------------------------------------


def update(weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], scalars: Tensor, adam: Adam) -> None:
    """Makes one step of weights in place. The operations are those of torch.optim.AdamW and Adam, in their order.

    Args:
        weight: (groups, GROUP), in the compute type.
        gradient: The same shape, in the compute type or in fp32.
        state: Arrays of the same shape by name, as ``Adam.state_types`` lists them; of scales, (groups,).
        scalars: What ``Adam.scalars`` returned for this step.
        adam: The settings.
    """
    divisor, decay, rate, bias, skipped = scalars.unbind()
    master, first, second = read_master(weight, state), read_moment(state, FIRST), read_moment(state, SECOND)
    found = gradient.float() / divisor
    if not adam.decoupled:
        found = found.add(master, alpha=adam.weight_decay)
    new_first = first.lerp(found, 1 - adam.beta1)
    new_second = (second * adam.beta2).addcmul(found, found, value=1 - adam.beta2)
    new = master * decay + rate * new_first / (new_second.sqrt() / bias + adam.eps)
    keeps = skipped > 0
    write_master(torch.where(keeps, master, new), weight, state)
    for name, value in ((FIRST, new_first), (SECOND, new_second)):
        for part, tensor in stored_moment(value, name, state[name].dtype).items():
            state[part].copy_(torch.where(keeps, state[part], tensor))


def is_compiled(device: str) -> bool:
    """Returns whether ``update_on`` compiles the update for a type of device: on a GPU, if Triton is installed."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None


@cache
def update_on(device: str, adam: Adam) -> Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor], None]:
    """Returns ``update`` with these settings for a type of device, compiled to one kernel where that is possible."""
    if not is_compiled(device):
        return partial(update, adam=adam)
    compiled = allowing_graphs(torch.compile(partial(update, adam=adam), fullgraph=True, dynamic=False))

    def call(weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], scalars: Tensor) -> None:
        for tensor in (weight, gradient, *state.values()):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one graph for arrays of any length
        compiled(weight, gradient, state, scalars)

    return call
