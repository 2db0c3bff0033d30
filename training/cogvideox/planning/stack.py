"""Runs all transformer blocks of a CogVideoX under an execution plan, in place of diffusers' own forward passes.

The idea: diffusers calls its blocks one after another. ``Stack.install`` makes the first block run all of them and the
others pass their inputs on, so that training and the pipeline's sampling use the plan without knowing it. Each block is
one autograd function (RunBlock) around two plain functions, blocks.forward and blocks.backward. The plan decides for
each block what happens between these two: which activations are saved and where, where the weights are stored, and
whether the functions are compiled.

    forward    weights(i): from the device, or from a slot of the Ring, which starts copying the next block
               x -> blocks.forward -> y, saved --> autograd's saved tensors, or HostStore.put to the host
    backward   weights(i), now in descending order; saved <-- autograd, or HostStore.take, which fetches one block ahead
               dy, saved -> blocks.backward -> dx and the gradients of the trained weights
                   of LoRAs and of weights on the device --> autograd, as usual
                   of weights on the host                --> HostGradients.add, which copies them to the host

The names and values of the parameters do not change, with one exception: a matrix that the plan quantizes is replaced
by an empty tensor in its module, so that no other code can compute with it. Either LoRAs are trained, which are always
on the device, or all weights are. The letters of the shapes are those of blocks.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from cogvideox.memory.buffers import Layout, fill, host_buffer, pin
from cogvideox.memory.graphs import allowing_graphs
from cogvideox.memory.shared import Neighbors, share_buffers
from cogvideox.memory.streaming import HostStore, Ring, TrainedBlocks
from cogvideox.model import blocks
from cogvideox.model.blocks import LORA_LAYERS, Block, Linear, Norm, Shared
from cogvideox.model.lora import SampleDropout
from cogvideox.model.quant import Quantized, Weight, quantize
from cogvideox.model.sequence import SequenceGroup, joined
from cogvideox.planning.plan import AUTO, DEVICE, HOST, ExecutionPlan

META = torch.device("meta")
SAMPLE_TOKENS = 256  # the sequence length in gradient_cosine; a fourth of it is text


def for_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps compiled blocks.forward or blocks.backward so that one graph serves every number of tokens.

    The token dimension of every argument is marked as dynamic before the call.
    """

    def call(x: Tensor, p: Block, shared: Shared, keep_or_kept: tuple[str, ...] | dict[str, Tensor]) -> Any:
        marked = [(x, 1), *((table, 0) for table in shared.rotary or ())]
        if isinstance(keep_or_kept, dict):  # backward gets saved tensors; forward gets the names of those to save
            marked += [(tensor, 2 if name == "lse" else 1) for name, tensor in keep_or_kept.items()]
        for tensor, dim in marked:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return function(x, p, shared, keep_or_kept)

    return call


class BlockRunner:
    """What Stack and ModuleStack have in common: the plan, the block functions and the rotary tables.

    Args:
        transformer: A CogVideoX of diffusers for which ``is_supported`` is true.
        plan: Where weights, saved activations and optimizer state are stored, and what is saved, for each block.
        device: Where the blocks compute.
        group: The processes that divide the tokens of a sample in training. Passes without gradients are not divided,
            because each process makes them alone.
    """

    trained_blocks: TrainedBlocks | None = None

    def __init__(
        self, transformer: Any, plan: ExecutionPlan, device: torch.device, group: SequenceGroup | None = None
    ) -> None:
        self.plan, self.device, self.group = plan, device, group
        self.modules = list(transformer.transformer_blocks)
        self.heads = self.modules[0].attn1.heads
        self.store = HostStore(device)
        self._rotary: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # cosines given last, padded tables
        self.forward_block, self.backward_block = blocks.forward, blocks.backward
        if plan.compiled:
            functions: list[Callable[..., Any]] = [
                allowing_graphs(torch.compile(function, fullgraph=True, dynamic=False))
                for function in (blocks.forward, blocks.backward)
            ]
            self.forward_block, self.backward_block = map(for_any_length, functions) if plan.any_length else functions

    def weights(self, i: int, direction: int, trained: Sequence[Tensor]) -> Block:
        """Returns a block's weights, ready for the compute stream.

        Args:
            i: The block's number.
            direction: 1 in forward, -1 in backward; says which block is needed next.
            trained: The tensors that autograd trains, in place of the module's.
        """
        raise NotImplementedError

    def shared(self, temb: Tensor, rotary: tuple[Tensor, Tensor] | None, length: int) -> Shared:
        """Returns what all blocks get besides the tokens.

        Args:
            temb: The time embedding, (B, time embedding).
            rotary: Cosines and sines of the video tokens, (S - L, E) each, or None.
            length: L, the number of text tokens.
        """
        return Shared(temb.detach(), self._padded(rotary, length), length, self.heads, self.plan.attention)

    def divided(self, x: Tensor, shared: Shared) -> tuple[Tensor, Shared]:
        """Returns this process's tokens, and what the blocks get with them; all tokens if a sample is not divided.

        Args:
            x: All tokens, (B, S, D).
            shared: What the blocks get with all tokens.
        """
        if self.group is None or not torch.is_grad_enabled():
            return x, shared
        division = self.group.division_of(x.shape[1])
        own = division.own
        rotary = shared.rotary and (shared.rotary[0][own], shared.rotary[1][own])
        text = len(range(shared.text_length)[own])
        return x[:, own].contiguous(), shared._replace(rotary=rotary, text_length=text, division=division)

    def sample(self, samples: list[Tensor], i: int, trained: Sequence[Tensor], shared: Shared) -> list[Tensor]:
        """Runs a block without gradients, sample by sample, so that guidance needs the memory of one.

        Args:
            samples: The tokens of each sample, (1, S, D).
            i: The block's number.
            trained: The tensors of the block that autograd trains.
            shared: What ``shared`` returned for all samples together.
        """
        p = self.weights(i, 1, trained)
        # Saves what training saves, only to drop it: without it another graph would have to be compiled.
        keep = blocks.kept_at(self.plan.blocks[i].keep, p)
        conditions = [shared._replace(temb=temb) for temb in shared.temb.split(1)]
        pairs = zip(samples, conditions, strict=True)
        return [self.forward_block(sample, p, condition, keep)[0] for sample, condition in pairs]

    def _padded(self, rotary: tuple[Tensor, Tensor] | None, length: int) -> tuple[Tensor, Tensor] | None:
        """Prepends the identity rotation for text tokens to the rotary tables; caches the result for the last tables.

        Args:
            rotary: Cosines and sines of the video tokens, (S - L, E) each, or None.
            length: L, the number of text tokens.
        """
        if rotary is None:
            return None
        if self._rotary is None or self._rotary[0] is not rotary[0]:
            cos, sin = (table.to(self.device, torch.float32) for table in rotary)
            text = cos.new_ones(length, cos.shape[1])
            self._rotary = rotary[0], (torch.cat([text, cos]), torch.cat([torch.zeros_like(text), sin]))
        return self._rotary[1]


class Stack(BlockRunner):
    """Runs all blocks of a transformer under a plan; the module docstring explains how.

    Args:
        transformer: A CogVideoX of diffusers for which ``is_supported`` is true: either all of it is trained, or only
            plain LoRAs on attention and feed-forward layers are. It is moved to where the plan wants it.
        plan: The plan, which says for each block which activations are saved, and where weights, saved activations and
            optimizer state are stored.
        device: The device on which the blocks compute.
        neighbors: The ranks of this machine, if there are several. They share the frozen weights of streamed blocks.
        group: The processes that divide the tokens of a sample in training.
    """

    def __init__(
        self,
        transformer: Any,
        plan: ExecutionPlan,
        device: torch.device,
        neighbors: Neighbors | None = None,
        group: SequenceGroup | None = None,
    ) -> None:
        super().__init__(transformer, plan, device, group)
        self.trains_all = base_parameters(self.modules[0])[0].requires_grad
        self._move_to_plan(transformer, None if self.trains_all else neighbors)

    def _move_to_plan(self, transformer: Any, neighbors: Neighbors | None) -> None:
        """Moves everything to where the plan wants it, block by block, each into one flat buffer.

        All blocks share one layout, on the host and on the device, because on a CPU the rounding of a matrix product
        depends on the alignment of its factors. Padding is zero, because moments of 8 bits have scales in common with
        it (optimizer/adam_groups.py).

        Args:
            transformer: The transformer.
            neighbors: The ranks that share the weights of streamed blocks; None if each has its own. Ranks that share
                but do not fill the memory never read these weights, so if they are loaded lazily, not from disk either.
        """
        precision = self.plan.base_precision
        own = [base_parameters(module) for module in self.modules]
        like = stored_weights(self.modules[0], precision, META)  # shapes and types only; allocates nothing
        layout = Layout(flatten(like))
        hosts: dict[int, Tensor] = {}
        streamed = sum(block.weights == HOST for block in self.plan.blocks)
        shared = share_buffers(streamed, layout.num_bytes, neighbors) if neighbors is not None and streamed else None
        self.resident: dict[int, list[Weight]] = {}
        buffers: dict[int, Tensor] = {}
        for i, (block, parameters) in enumerate(zip(self.plan.blocks, own, strict=True)):
            if block.weights == HOST:
                buffer = hosts[i] = shared.buffers[len(hosts)] if shared else host_buffer(layout.num_bytes)
            else:
                buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=self.device)
            buffers[i] = buffer
            forms = unflatten(like, layout.views(buffer))
            if shared is None or shared.filled_here or block.weights == DEVICE:
                weights = flatten(stored_weights(self.modules[i], precision, self.device))
                for view, tensor in zip(flatten(forms), weights, strict=True):
                    fill(view, tensor)
            for parameter, form in zip(parameters, forms, strict=True):
                nothing = torch.empty(0, dtype=parameter.dtype, device=self.device)
                parameter.data = form if isinstance(form, Tensor) else nothing
            if block.weights == DEVICE:
                self.resident[i] = forms
        self.shares = shared is not None
        if shared is not None:
            shared.publish()
        else:
            for buffer in hosts.values():
                pin(buffer)
        placed = {id(p) for parameters in own for p in parameters}
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            if id(tensor) not in placed:
                tensor.data = tensor.data.to(self.device)
        self.ring = Ring(hosts, self.device) if hosts else None
        self.slots = [unflatten(like, layout.views(slot)) for slot in self.ring.slots] if self.ring else []
        self.order = [{id(p): k for k, p in enumerate(parameters)} for parameters in own]
        if self.trains_all:
            away = frozenset(i for i, block in enumerate(self.plan.blocks) if (block.state or self.plan.state) == HOST)
            flat = {i: layout.flat(buffer) for i, buffer in buffers.items()}
            self.trained_blocks = TrainedBlocks(dict(enumerate(own)), flat, self.ring, away, self.device)

    def install(self) -> None:
        """Replaces the forward passes: the first block runs all blocks, and the others return their inputs."""
        self.modules[0].forward = self.run
        for module in self.modules[1:]:
            module.forward = lambda hidden_states, encoder_hidden_states, **_: (hidden_states, encoder_hidden_states)

    def run(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs all blocks; has the signature of a diffusers block.

        Args:
            hidden_states: The video tokens, (B, S - L, D).
            encoder_hidden_states: The text tokens, (B, L, D).
            temb: The time embedding, (B, time embedding).
            image_rotary_emb: Cosines and sines for the video tokens, (S - L, E) each.
            attention_kwargs: This argument of diffusers is ignored.

        Returns:
            The new video and text tokens, in the same shapes.
        """
        length = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x, shared = self.divided(x, self.shared(temb, image_rotary_emb, length))
        if self.trained_blocks and self.ring:
            # The weights on the host may have changed since the last pass, so the slots may be out of date.
            self.ring.invalidate()
        if torch.is_grad_enabled():
            for i in range(len(self.modules)):
                x = RunBlock.apply(x, temb, i, self, shared, *self._trained(i))
        else:
            samples = list(x.split(1))
            for i in range(len(self.modules)):
                samples = self.sample(samples, i, self._trained(i), shared)
            x = torch.cat(samples)
        x = joined(x, shared.division)
        return x[:, length:], x[:, :length]

    def _trained(self, i: int) -> Sequence[Tensor]:
        """Returns the tensors of a block that autograd returns gradients for, in the order of blocks.Block."""
        if self.trains_all:
            return base_parameters(self.modules[i]) if i in self.resident else []
        return lora_matrices(self.modules[i], self.device)

    def weights(self, i: int, direction: int, trained: Sequence[Tensor]) -> Block:
        """Returns a block's weights, ready for the compute stream, and starts copying the next streamed block.

        Args:
            i: The block's number.
            direction: 1 in forward and -1 in backward, the direction in which the next block is looked up.
            trained: The tensors that autograd trains, in place of the module's.
        """
        forms, order = self.resident.get(i), self.order[i]
        if self.trained_blocks and forms is not None:
            self.trained_blocks.use(i)
        if self.ring is not None:
            ahead = self.ring.next_block(i, direction)
            # ``get`` comes first and makes the compute stream wait for this block's copy. It also marks the slot as the
            # most recently used one; otherwise the copy ahead could replace weights that are about to be read.
            forms = self.slots[self.ring.get(i)] if forms is None else forms
            if ahead is not None:
                self.ring.fetch(ahead)
        assert forms is not None
        return block_weights(self.modules[i], trained, lambda p: forms[order[id(p)]])


class ModuleStack(BlockRunner):
    """Runs each block in its own module with the module's own parameters, which something else may place.

    A library that hooks into modules or replaces the memory of parameters, as FSDP2 and DeepSpeed do, works with it.
    All base parameters of the blocks are on the device when their block runs. Text and video stay one sequence between
    blocks.

    Args:
        transformer: A CogVideoX of diffusers for which ``is_supported`` is true. It is not moved.
        plan: The plan, which says for each block which activations are saved and where.
        device: The device on which the blocks compute.
        group: The processes that divide the tokens of a sample in training.
    """

    common: Shared  # what the blocks of the current forward pass get; the first block sets it

    def __init__(
        self, transformer: Any, plan: ExecutionPlan, device: torch.device, group: SequenceGroup | None = None
    ) -> None:
        super().__init__(transformer, plan, device, group)
        self.trains_all = base_parameters(self.modules[0])[0].requires_grad
        for i, module in enumerate(self.modules):
            module.forward = partial(self.run, i)

    def run(
        self,
        i: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs one block; the arguments after the first are those of a diffusers block.

        The first block joins text and video to one sequence. Until the last block splits it again, the sequence, or the
        part of it that this process has, takes the place of the video tokens, and the text tokens are only passed on
        for their length.

        Args:
            i: The block's number.
            hidden_states: The video tokens, (B, S - L, D); between blocks all of this process's tokens.
            encoder_hidden_states: The text tokens, (B, L, D).
            temb: The time embedding, (B, time embedding).
            image_rotary_emb: Cosines and sines for the video tokens, (S - L, E) each.
            attention_kwargs: Ignored.
        """
        length, text = encoder_hidden_states.shape[1], encoder_hidden_states.detach()
        x = hidden_states
        if i == 0:
            x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            x, self.common = self.divided(x, self.shared(temb, image_rotary_emb, length))
        shared, module = self.common, self.modules[i]
        trained = base_parameters(module) if self.trains_all else lora_matrices(module, self.device)
        if torch.is_grad_enabled():
            y = RunBlock.apply(x, temb, i, self, shared, *trained)
        else:
            y = torch.cat(self.sample(list(x.split(1)), i, trained, shared))
        if i < len(self.modules) - 1:
            return y, text
        y = joined(y, shared.division)
        return y[:, length:], y[:, :length]

    def weights(self, i: int, direction: int, trained: Sequence[Tensor]) -> Block:
        """Returns a block's weights, which are on the device.

        Args:
            i: The block's number.
            direction: Ignored: what places the weights decides what comes next.
            trained: The tensors that autograd trains, in place of the module's.
        """
        return block_weights(self.modules[i], None if self.trains_all else trained, Tensor.detach)


class RunBlock(torch.autograd.Function):
    """Runs one block of a BlockRunner as an autograd function.

    Inputs are x (B, S, D), the time embedding, the block's number, the stack, what all blocks share and the block's
    tensors that autograd trains; the output is y (B, S, D).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _temb: Tensor, i: int, stack: BlockRunner, shared: Shared, *trained: Tensor
    ) -> Tensor:
        plan = stack.plan.blocks[i]
        if not any(ctx.needs_input_grad):
            # No input needs a gradient, as in blocks before the first LoRA, so no backward pass would take saved
            # tensors.
            return stack.forward_block(x, stack.weights(i, 1, list(trained)), shared, ())[0]
        # Without this, the first block, whose x needs no gradient, would be compiled to a separate graph.
        x = x.detach()
        p = stack.weights(i, 1, list(trained))
        y, kept = stack.forward_block(x, p, shared, blocks.kept_at(plan.keep, p))
        kept["x"] = x
        ctx.i, ctx.stack, ctx.shared, ctx.names = i, stack, shared, tuple(kept)
        if plan.kept == HOST:
            ctx.save_for_backward(*trained)
            stack.store.put(i, kept)
        else:
            ctx.save_for_backward(*trained, *kept.values())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        i, stack = ctx.i, ctx.stack
        here = stack.plan.blocks[i].kept == DEVICE
        count = len(ctx.saved_tensors) - (len(ctx.names) if here else 0)
        trained = list(ctx.saved_tensors[:count])
        saved = [tensor.detach() for tensor in ctx.saved_tensors[count:]]
        kept = dict(zip(ctx.names, saved, strict=True)) if here else stack.store.take(i)
        # The saved tensors of the block that backward runs next are fetched before this block's kernels are issued, so
        # that the copy waits only for earlier compute and overlaps with these kernels.
        stack.store.fetch_next()
        dx, dtemb, found = stack.backward_block(dy.contiguous(), stack.weights(i, -1, trained), ctx.shared, kept)
        gradients = [gradient for name in Block._fields for gradient in found.get(name, ())]
        if gradients and not trained:  # the block's weights are on the host, so autograd has no tensor for them
            stack.trained_blocks.gradients.add(i, gradients)
            gradients = []
        return dx, dtemb, None, None, None, *gradients


# -- a block's weights -------------------------------------------------------------------------------------------------


def base_parameters(module: Any) -> list[Parameter]:
    """Returns the parameters of a block without its LoRAs, in the order of blocks.Block."""
    layers = map(base_layer_of, block_layers(module).values())
    return [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]


def stored_weights(module: Any, precision: str, device: torch.device) -> list[Weight]:
    """Returns ``base_parameters`` in the form in which a plan stores them.

    Args:
        module: A block of diffusers.
        precision: The precision of the matrices of linear layers, one of quant.KINDS; AUTO leaves them unchanged.
        device: The device on which matrices are quantized.
    """
    kinds = quantization_kinds(module, precision) if precision != AUTO else {}
    return [quantize(p.detach().to(device), kinds[p]) if p in kinds else p.detach() for p in base_parameters(module)]


def quantization_kinds(module: Any, precision: str) -> dict[Tensor, str]:
    """Returns the quantization kind of each matrix of a block's linear layers.

    The matrices of the adaptive layer norms are always int8. In nf4 they would save another 4 % of the bf16 size, but
    would change gradients by as much as the quantization of all other matrices does.
    """
    kinds = {base_layer_of(layer).weight: precision for layer in lora_target_layers(module).values()}
    return kinds | {layer.weight: "int8" for layer in (module.norm1.linear, module.norm2.linear)}


def flatten(forms: list[Weight]) -> list[Tensor]:
    """Returns all tensors that make up weights: one for a plain weight, three for a quantized one."""
    return [tensor for form in forms for tensor in ((form,) if isinstance(form, Tensor) else form)]


def unflatten(forms: list[Weight], tensors: list[Tensor]) -> list[Weight]:
    """Returns weights of the same forms as ``forms``, made of other tensors; the inverse of ``flatten``."""
    left = iter(tensors)
    return [next(left) if isinstance(f, Tensor) else Quantized(next(left), next(left), next(left)) for f in forms]


def base_bytes(module: Any, precision: str = AUTO) -> int:
    """Returns the bytes that ``stored_weights`` take in a flat buffer."""
    return Layout(flatten(stored_weights(module, precision, META))).num_bytes


def unquantized_matrix_bytes(module: Any) -> int:
    """Returns the bytes of the matrices that may be quantized, in their original type."""
    return sum(matrix.nbytes for matrix in quantization_kinds(module, AUTO))


def block_layers(module: Any) -> dict[str, Any]:
    """Returns the layers of a block by their names in blocks.Block, in its order."""
    attention, feed_forward = module.attn1, module.ff.net
    pieces = {
        "modulation1": module.norm1.linear,
        "norm1": module.norm1.norm,
        "q": attention.to_q,
        "k": attention.to_k,
        "v": attention.to_v,
        "norm_q": attention.norm_q,
        "norm_k": attention.norm_k,
        "out": attention.to_out[0],
        "modulation2": module.norm2.linear,
        "norm2": module.norm2.norm,
        "ff1": feed_forward[0].proj,
        "ff2": feed_forward[2],
    }
    return {name: pieces[name] for name in Block._fields}


def lora_target_layers(module: Any) -> dict[str, Any]:
    """Returns the linear layers that may have a plain LoRA, by their names in blocks.Block."""
    pieces = block_layers(module)
    return {name: pieces[name] for name in LORA_LAYERS}


def active_lora(layer: Any) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor] | None] | None:
    """Returns (A, B, scale, dropout) of a layer's active adapter, or None. Dropout is None if it drops nothing now."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or not layer.active_adapters:
        return None
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A:  # it was loaded from a file that has nothing for this layer
        return None
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    matrices = (m.concatenated() if hasattr(m, "concatenated") else m.weight for m in (a, b))
    dropout = layer.lora_dropout[adapter]
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    return *matrices, torch.tensor(layer.scaling[adapter]), dropout if drops else None


def base_layer_of(layer: Any) -> Any:
    """Returns the linear layer that PEFT wrapped, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def lora_matrices(module: Any, device: torch.device) -> list[Tensor]:
    """Returns a block's LoRA matrices on a device; PEFT loads them next to the base layer, which may be on the host."""
    pairs = (active_lora(layer) for layer in lora_target_layers(module).values())
    return [matrix.to(device) for pair in pairs if pair is not None for matrix in pair[:2]]


def block_weights(
    module: Any, matrices: Sequence[Tensor] | None = None, weight_of: Callable[[Tensor], Weight] = lambda p: p
) -> Block:
    """Collects a block's weights from its module.

    Args:
        module: A block of diffusers.
        matrices: The LoRA matrices to use, in the order of blocks.Block. By default those of the module are used.
        weight_of: A function that returns the tensor or quantized matrix that is used for a parameter.
    """
    given = iter(matrices) if matrices is not None else None

    def own(layer: Any) -> tuple[Any, Any]:
        weight, bias = (None if p is None else weight_of(p) for p in (layer.weight, layer.bias))
        return weight, bias

    def piece(name: str, layer: Any) -> Linear | Norm:
        base = base_layer_of(layer)
        trained = base.weight is not None and base.weight.requires_grad
        if not isinstance(base, nn.Linear):
            return Norm(*own(base), base.eps, trained)
        found = active_lora(layer) if name in LORA_LAYERS else None
        if found is None:
            return Linear(*own(base), trained=trained)
        a, b = (next(given), next(given)) if given is not None else found[:2]
        return Linear(*own(base), a.detach(), b.detach(), *found[2:])

    return Block(*(piece(name, layer) for name, layer in block_layers(module).items()))  # type: ignore[arg-type]


def lora_layers(transformer: nn.Module) -> list[Any]:
    """Returns all layers that have a LoRA of PEFT."""
    return [module for module in transformer.modules() if hasattr(module, "lora_A")]


def is_supported(transformer: nn.Module) -> bool:
    """Returns whether a Stack can run a transformer: all of it is trained, or only plain LoRAs of its blocks are."""
    layers = lora_layers(transformer)
    return plain_lora(transformer) if layers else all(p.requires_grad for p in transformer.parameters())


def plain_lora(transformer: Any) -> bool:
    """Returns whether only LoRA matrices on the layers that a Stack supports are trained, without DoRA."""
    own = {
        id(m)
        for module in transformer.transformer_blocks
        for layer in lora_target_layers(module).values()
        for m in layer.parameters()
        if hasattr(layer, "lora_A")
    }
    odd = any(any(layer.use_dora.values()) or not _drops_alike(layer) for layer in lora_layers(transformer))
    return not odd and all(id(p) in own for p in transformer.parameters() if p.requires_grad)


def _drops_alike(layer: Any) -> bool:
    """Returns whether dropout, if any, draws the same mask when a block is recomputed."""
    return all(isinstance(dropout, (nn.Identity, SampleDropout)) for dropout in layer.lora_dropout.values())


# -- error of quantization ---------------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_cosine(module: Any, precision: str, device: torch.device, backend: str) -> float:
    """Returns the cosine of a block's LoRA gradients with and without quantized weights, on random inputs."""
    generator = torch.Generator().manual_seed(0)
    heads, dtype = module.attn1.heads, module.norm1.linear.weight.dtype
    sizes = ((1, SAMPLE_TOKENS, module.attn1.inner_dim),) * 2 + ((1, module.norm1.linear.in_features),)
    x, dy, temb = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    shared = Shared(temb, None, SAMPLE_TOKENS // 4, heads, backend)
    found = []
    for kind in (AUTO, precision):
        p = block_weights_on(module, kind, device)
        kept = blocks.forward(x, p, shared, blocks.KEPT["attention"])[1]
        gradients = blocks.backward(dy, p, shared, {"x": x, **kept})[2]
        found.append(torch.cat([matrix.flatten() for pair in gradients.values() for matrix in pair]).double())
    unquantized, quantized = found
    return torch.cosine_similarity(unquantized, quantized, dim=0).item()


def block_weights_on(module: Any, precision: str, device: torch.device) -> Block:
    """Returns a copy of a block's weights on a device in a precision."""
    stored = stored_weights(module, precision, device)
    forms: dict[Tensor, Weight] = dict(zip(base_parameters(module), stored, strict=True))

    def weight_of(p: Tensor) -> Weight:
        form = forms[p]
        return form.to(device) if isinstance(form, Tensor) else form

    return block_weights(module, lora_matrices(module, device), weight_of)
