"""Adam and AdamW whose state takes few bytes: one function updates weights, masters and moments together.

Most updates are smaller than the rounding error of bf16, so a bf16 weight needs a master weight in fp32. The weight is
the upper half of its master, so only the lower half is stored besides (``split``):

    master, fp32    | sign, exponent, 7 bits | 16 bits |
    weight, bf16    |         rounded        |            the bf16 number that is nearest to the master
    low, int16                               | 16 bits |  the master's bits minus the weight's, -32768 to 32767

Where two bf16 numbers are equally near, the weight is the one that is farther from zero. torch would take the one whose
last bit is zero, but then the difference would need 17 bits. The two differ in one of 131,072 masters on average.

The moments are stored in fp32, in bf16, or in 8 bits. 8-bit moments are quantized in groups of GROUP elements:

    second   scale * (code / 255)^8                                uint8; scale: the largest of the group
    first    scale * code * |code| / 127^2 * root of the second    int8; scale: the largest ratio to this root

Three decisions keep the steps those of exact moments. Powers of the codes keep the relative precision of elements whose
gradients are thousands of times smaller than the largest of the group. The ratio of the moments has limits that follow
from beta1 and beta2, so however coarse a code is, no step is longer than exact moments allow. Codes are rounded up or
down at random, so that the mean of what is stored is the value: a code that is rounded to the nearest would stay
forever where the decay of a step is less than half the distance to the next code, and small elements would freeze. The
random numbers are a hash of gradient, master and step, so a repeated or resumed step gives the same bits.

    | bytes per weight    | fp32 weight | bf16 weight | fp16 weight |
    | master              | the weight  | 2           | 4           |
    | moments, fp32       | 8           | 8           | 8           |
    | moments, bf16       | 4           | 4           | 4           |
    | moments, 8-bit      | 2.03        | 2.03        | 2.03        |

A bf16 weight can also be trained without a master. Its step is then rounded to bf16 at random, with chances that make
the mean of many roundings the exact step. bf16 moments are rounded in the same way: the decay of a step is less than
their rounding error, so moments that are rounded to the nearest would stop to decay.

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
EXAMPLE = 2**20  # elements of a parameter whose state is measured
FP32, BF16, EIGHT_BIT = MOMENTS = ("fp32", "bf16", "8bit")
MASTER, LOW, FIRST, SECOND = "master", "low", "exp_avg", "exp_avg_sq"
WEIGHT = "weight"  # the upper bits of a master, which are not part of its state
SCALE = ".scale"  # after the name of a moment: the scales of its groups
FIRST_SCALE, SECOND_SCALE = f"{FIRST}{SCALE}", f"{SECOND}{SCALE}"
HALF, LOW_BITS, LOW_MASK = 1 << 15, 16, (1 << 16) - 1
MIXERS = 0x7FEB352D, 0x2C1B3C6D  # odd multipliers of a hash whose every output bit depends on every input bit
CODES_FIRST, CODES_SECOND = 127.0, 255.0  # the largest codes
SQUARE, EIGHTH = 1, 3  # a code of a first moment is squared, and one of a second moment three times
SMALLEST = 1e-38  # prevents divisions by zero; no normal fp32 number is smaller


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
        masters: Whether bf16 weights have masters; without them, steps are rounded at random.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    moments: str = FP32
    masters: bool = True

    def rounds_at_random(self, weight: torch.dtype) -> bool:
        """Returns whether steps of weights of a type are rounded at random, because they have no masters."""
        return weight == torch.bfloat16 and not self.masters

    def weight_is_master(self, weight: torch.dtype) -> bool:
        """Returns whether weights of a type have no master besides."""
        return weight == torch.float32 or self.rounds_at_random(weight)

    def state_types(self, weight: torch.dtype) -> dict[str, torch.dtype]:
        """Returns the type of each array of state by name, for weights of a type; scales have one number a group."""
        master: dict[torch.dtype, dict[str, torch.dtype]] = {
            torch.float32: {},
            torch.bfloat16: {} if self.rounds_at_random(torch.bfloat16) else {LOW: torch.int16},
            torch.float16: {MASTER: torch.float32},
        }
        if self.moments == EIGHT_BIT:
            codes = {FIRST: torch.int8, SECOND: torch.uint8}
            return master[weight] | codes | {f"{name}{SCALE}": torch.float32 for name in codes}
        return master[weight] | dict.fromkeys(
            (FIRST, SECOND), {FP32: torch.float32, BF16: torch.bfloat16}[self.moments]
        )

    def example_state(self, weight: torch.dtype) -> dict[str, Tensor]:
        """Returns the state of EXAMPLE weights of a type by name, on the meta device."""
        numbers = {name: EXAMPLE // (GROUP if name.endswith(SCALE) else 1) for name in self.state_types(weight)}
        return {n: torch.empty(numbers[n], dtype=t, device="meta") for n, t in self.state_types(weight).items()}

    def state_bytes(self, weight: torch.dtype) -> float:
        """Returns the bytes of state per weight of a type; with fp32, those of the moments."""
        return sum(tensor.nbytes for tensor in self.example_state(weight).values()) / EXAMPLE

    def scalars(self, lr: float, divisor: Tensor, skipped: Tensor, steps: Tensor) -> Tensor:
        """Returns what ``update`` needs of a step, (6,) fp32 on the device, without waiting for the device.

        Args:
            lr: The learning rate.
            divisor: Scalar by which gradients are divided: loss scale times clipping.
            skipped: Scalar, 1 if the step changes nothing, else 0.
            steps: Scalar fp64, the number of steps that changed something, including this one.
        """
        first, second = 1 - self.beta1**steps, (1 - self.beta2**steps).sqrt()
        decay = torch.full_like(steps, 1 - lr * self.weight_decay if self.decoupled else 1.0)
        return torch.stack([divisor.to(steps), decay, -lr / first, second, skipped.to(steps), steps]).float()


def adam_of(flags: OptimizerFlags) -> Adam | None:
    """Returns the settings of Adam that the flags select, or None if they select another optimizer."""
    if not is_adam(flags):
        return None
    values = flags.beta1, flags.beta2, flags.epsilon, flags.weight_decay
    beta1, beta2, eps, decay = (value or 0.0 for value in values)  # the flags of Adam have defaults
    moments = EIGHT_BIT if flags.use_8bit else BF16 if flags.use_bf16_moments else FP32
    return Adam(beta1, beta2, eps, decay, flags.kind == "adamw", moments, not flags.use_stochastic_rounding)


# -- masters -----------------------------------------------------------------------------------------------------------


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Splits finite fp32 masters into bf16 weights and their low bits, int16; ``join`` returns the same masters."""
    bits = master.view(torch.int32)
    upper = (bits + HALF) >> LOW_BITS
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << LOW_BITS)).to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """Returns the fp32 masters that ``split`` has split."""
    bits = weight.view(torch.int16).to(torch.int32)
    bits <<= LOW_BITS  # in place, because the system creates the pages of each new tensor, which takes longer
    bits += low
    return bits.view(torch.float32)


def read_master(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Returns the fp32 masters of weights, of the same shape: the weights themselves where no state belongs to them."""
    if LOW in state:
        return join(weight, state[LOW])
    return state.get(MASTER, weight).float()


def write_master(master: Tensor, weight: Tensor, state: Mapping[str, Tensor], noise: Tensor | None = None) -> None:
    """Stores fp32 masters, and rounds them into the weights: to the nearest, or at random if there is noise.

    Args:
        master: The masters, fp32.
        weight: The weights, of the same shape.
        state: The state, by name.
        noise: Random bits, int32, for bf16 weights without masters.
    """
    if LOW in state:
        upper, low = split(master)
        weight.copy_(upper)
        state[LOW].copy_(low)
        return
    if MASTER in state:
        state[MASTER].copy_(master)
    weight.copy_(master if noise is None else rounded_at_random(master, noise))


def rounded_at_random(values: Tensor, noise: Tensor) -> Tensor:
    """Returns finite fp32 values in bf16: one of the two nearest numbers, so that the mean over the noise is the value.

    Args:
        values: fp32.
        noise: int32 of the same shape, whose low 16 bits are used.
    """
    bits = values.view(torch.int32) + (noise & LOW_MASK)
    return (bits >> LOW_BITS).to(torch.int16).view(torch.bfloat16)


# -- moments -----------------------------------------------------------------------------------------------------------


def read_moments(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the first and the second moment in fp32, (groups, GROUP)."""
    first, second = state[FIRST].float(), state[SECOND].float()
    if FIRST_SCALE not in state:
        return first, second
    second = power(second / CODES_SECOND, EIGHTH) * state[SECOND_SCALE].unsqueeze(-1)
    ratio = power(first / CODES_FIRST, SQUARE) * first.sign() * state[FIRST_SCALE].unsqueeze(-1)
    return ratio * second.sqrt(), second


def stored_moments(first: Tensor, second: Tensor, dtype: torch.dtype, noise: Tensor | None) -> dict[str, Tensor]:
    """Returns moments, (groups, GROUP) fp32, as arrays of state store them, by name.

    Args:
        first: The first moment.
        second: The second moment.
        dtype: The type of the array of the first moment.
        noise: (groups, GROUP) int32, random bits that decide how numbers are rounded; needed for bf16 and 8 bits.
    """
    if dtype == torch.float32:
        return {FIRST: first, SECOND: second}
    assert noise is not None
    if dtype == torch.bfloat16:
        return {FIRST: rounded_at_random(first, noise), SECOND: rounded_at_random(second, noise >> LOW_BITS)}
    ratio = first / second.sqrt().clamp(min=SMALLEST**0.5)
    largest_ratio, largest = ratio.abs().amax(dim=-1, keepdim=True), second.amax(dim=-1, keepdim=True)
    share, share_of_ratio = (second / largest.clamp(min=SMALLEST), ratio.abs() / largest_ratio.clamp(min=SMALLEST))
    return {
        FIRST: (rounded_root(share_of_ratio, SQUARE, CODES_FIRST, noise) * ratio.sign()).to(torch.int8),
        SECOND: rounded_root(share, EIGHTH, CODES_SECOND, noise >> LOW_BITS).to(torch.uint8),
        FIRST_SCALE: largest_ratio.squeeze(-1),
        SECOND_SCALE: largest.squeeze(-1),
    }


def power(value: Tensor, squarings: int) -> Tensor:
    """Squares a value several times."""
    for _ in range(squarings):
        value = value * value
    return value


def rounded_root(share: Tensor, roots: int, codes: float, noise: Tensor) -> Tensor:
    """Returns codes whose powers have the mean ``share`` if the noise is uniform.

    Args:
        share: Values from 0 to 1.
        roots: How many square roots are taken.
        codes: The largest code, which stands for 1.
        noise: int32, whose low 16 bits are used.
    """
    root = share
    for _ in range(roots):
        root = root.sqrt()
    below = (root * codes).floor()
    lower, upper = power(below / codes, roots), power((below + 1) / codes, roots)
    chance = ((noise & LOW_MASK) + 0.5) / (1 << LOW_BITS)
    return torch.where(share > lower + chance * (upper - lower), below + 1, below).clamp(max=codes)


def hashed(step: Tensor, *values: Tensor) -> Tensor:
    """Returns random bits, int32, that depend on a step and on all bits of fp32 values."""
    bits = step.to(torch.int32)
    for value in values:
        bits = (bits ^ value.view(torch.int32)) * MIXERS[0]
        bits = (bits ^ ((bits >> LOW_BITS) & LOW_MASK)) * MIXERS[1]
        bits = bits ^ ((bits >> LOW_BITS) & LOW_MASK)
    return bits


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
    divisor, decay, rate, bias, skipped, step = scalars.unbind()
    master, (first, second) = read_master(weight, state), read_moments(state)
    # A gradient of -0 stays -0 on the host, but becomes 0 on the device, where it is added to zeros.
    found = torch.where(gradient == 0, 0.0, gradient.float() / divisor)
    if not adam.decoupled:
        found = found.add(master, alpha=adam.weight_decay)
    new_first = first.lerp(found, 1 - adam.beta1)
    new_second = (second * adam.beta2).addcmul(found, found, value=1 - adam.beta2)
    new = master * decay + rate * new_first / (new_second.sqrt() / bias + adam.eps)
    keeps = skipped > 0
    noise = hashed(step, found, master) if adam.moments != FP32 else None
    noise_of_weights = hashed(step, master, found) if adam.rounds_at_random(weight.dtype) else None
    write_master(torch.where(keeps, master, new), weight, state, noise_of_weights)
    for name, tensor in stored_moments(new_first, new_second, state[FIRST].dtype, noise).items():
        state[name].copy_(torch.where(keeps, state[name], tensor))


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
