"""Which numbers of which parameter this process holds for its optimizer: the border between ZeRO and everything else.

A single process and DDP hold every parameter whole, ZeRO holds slices of their flattened forms. Checkpoints, weight
averages and exports are written in terms of fragments alone, so they work alike under every strategy and a checkpoint
of one fits any other and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from soratrain.models.tensor_file import Form
from soratrain.optim import shape_of


@dataclass(frozen=True, eq=False)
class Fragment:
    """Numbers `start` to `start + numel` of the flattened parameter `name`.

    Attributes:
        name: the parameter's name in the stage.
        shape: of the whole parameter.
        start, numel: which of its numbers these are.
        holder: the tensor that the optimizer updates, in which they lie.
        offset: where they lie in the flattened holder.
        trained: whether the optimizer updates them.
        replicated: whether every rank holds the same fragment.
    """

    name: str
    shape: torch.Size
    start: int
    numel: int
    holder: Tensor
    offset: int = 0
    trained: bool = True
    replicated: bool = True

    def read(self, tensor: Tensor | None = None) -> Tensor:
        """Return these numbers, flat, of the holder or of a `tensor` shaped like it (an optimizer's state)."""
        source = (self.holder if tensor is None else tensor).detach()
        return source.flatten()[self.offset : self.offset + self.numel]

    def write(self, values: Tensor, tensor: Tensor | None = None) -> None:
        """Set these numbers, in the holder or in a `tensor` shaped like it, from flat `values`."""
        target = (self.holder if tensor is None else tensor).detach()
        if target.numel() == self.numel:
            target.copy_(values.view(target.shape))
        else:
            target.view(-1)[self.offset : self.offset + self.numel].copy_(values)


def whole_fragments(named: Iterable[tuple[str, Tensor]]) -> list[Fragment]:
    """Return the fragments of parameters that every rank holds whole."""
    return [
        Fragment(name, param.shape, 0, param.numel(), param, trained=param.requires_grad)
        for name, param in named
        if not hasattr(param, "ds_id")
    ]


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to the module's state."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def optimizer_states(
    optimizers: Sequence[Optimizer], fragments: Iterable[Fragment]
) -> Iterator[tuple[str, Fragment, Tensor]]:
    """Yield `(key, fragment, state)` for every state of the optimizers; scalars of a parameter come as they are."""
    for fragment in fragments:
        for optimizer in optimizers:
            for key, value in optimizer.state.get(fragment.holder, {}).items():
                if isinstance(value, Tensor):
                    yield key, fragment, value


def forms_of(fragments: Iterable[Fragment], values: Iterable[Tensor]) -> dict[str, tuple[Form, bool]]:
    """Return form of every whole parameter, and whether ranks hold slices of it; collective.

    Args:
        fragments: this rank's.
        values: flat values of each.
    """
    own = {
        part.name: (Form(value.dtype, tuple(part.shape)), not part.replicated)
        for part, value in zip(fragments, values, strict=True)
    }
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return own
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return {name: form for known in everywhere for name, form in known.items()}


def assemble(
    fragments: Sequence[Fragment],
    values: Sequence[Tensor],
    device: torch.device,
    names: Iterable[str] | None = None,
    forms: Mapping[str, tuple[Form, bool]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, whole tensor on the CPU)` of parameters, one at a time; collective where ranks hold slices.

    Args:
        fragments: this rank's.
        values: flat values of each.
        device: on which slices are put together, one parameter at a time.
        names: of those that are asked for, the same on every rank; all by default.
        forms: what `forms_of` says, where it is known already.
    """
    forms = forms_of(fragments, values) if forms is None else forms
    mine: dict[str, list[tuple[Fragment, Tensor]]] = {}
    for fragment, value in zip(fragments, values, strict=True):
        mine.setdefault(fragment.name, []).append((fragment, value))
    for name in sorted(forms) if names is None else names:
        form, sliced = forms[name]
        if sliced:
            flat = torch.zeros(torch.Size(form.shape).numel(), dtype=form.dtype, device=device)
            for fragment, value in mine.get(name, []):
                flat[fragment.start : fragment.start + fragment.numel] = value
            dist.all_reduce(flat)
            yield name, flat.view(form.shape).cpu()
            del flat
        else:
            yield name, mine[name][0][1].reshape(form.shape).to("cpu", copy=True)


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    """Return the whole shape of every parameter and persistent buffer."""
    named: Mapping[str, Tensor] = {**dict(module.named_parameters()), **persistent_buffers(module)}
    return {name: list(shape_of(tensor)) for name, tensor in named.items()}
