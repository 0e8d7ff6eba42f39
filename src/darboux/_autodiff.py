"""Derivatives of batched functions, cheap in eager mode and right under every transform.

A function here maps ``(..., d)`` to ``(..., *out)`` and treats leading dimensions alike, so
the derivatives along ``d`` directions are one forward-mode pass over a batch ``d`` times as
large: no vmap, no loop.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darboux._checks import in_transform

Field = Callable[[Tensor], Tensor]


def directional(f: Field, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``f(x)`` and its derivative along ``v``, by one forward-mode pass."""
    v = v.expand_as(x)
    if x.dim() == 1:
        # Forward mode promotes float32 scalars to float64: leave no tensor without dimensions.
        y, dy = directional(f, x[None], v[None])
        return y[0], dy[0]
    # Forward mode refuses tangents and primals that share memory with themselves.
    return _jvp(f, _own(x), _own(v))


def _jvp(f: Callable[[Tensor], Any], x: Tensor, v: Tensor) -> tuple[Any, Any]:
    y, dy, *_ = torch.func.jvp(f, (x,), (v,))
    return y, dy


def _own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format) if 0 in x.stride() else x.contiguous()


def _basis(x: Tensor, rows: Tensor) -> Tensor:
    # rows (n, d) -> (n, ..., d), one direction per copy of x
    n = rows.shape[0]
    return rows.reshape(n, *[1] * (x.dim() - 1), x.shape[-1]).expand(n, *x.shape).contiguous()


def jacobian(f: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``f(x) (..., *out)`` and ``df (..., *out, d)``, all directions in one pass."""
    d = x.shape[-1]
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    y, dy = directional(f, x.expand(d, *x.shape), _basis(x, eye))
    return y[0], dy.movedim(0, -1)


def jet(f: Field, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``f``, ``df (..., *out, d)`` and ``d2f (..., *out, d, d)`` by one nested pass.

    Only the ``d (d + 1)/2`` pairs of directions are evaluated; the Hessian is symmetric to
    the last bit.
    """
    d = x.shape[-1]
    i, j = torch.triu_indices(d, d, device=x.device)
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    first, second = _basis(x, eye[i]), _basis(x, eye[j])

    def along_first(z: Tensor) -> tuple[Tensor, Tensor]:
        return _jvp(f, z, first)

    copies = x.expand(i.numel(), *x.shape).contiguous()
    (y, dy), (_, d2y) = _jvp(along_first, copies, second)
    position = torch.empty(d, d, dtype=torch.long, device=x.device)
    position[i, j] = position[j, i] = torch.arange(i.numel(), device=x.device)
    diagonal = position.diagonal()
    d2 = d2y[position.flatten()].movedim(0, -1).unflatten(-1, (d, d))
    return y[0], dy[diagonal].movedim(0, -1), d2


def pullback(
    f: Callable[[Tensor], Tensor], x: Tensor, cotangent: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return ``y = f(x)`` and the reverse-mode derivative of ``y`` paired with ``cotangent(y)``.

    Differentiable again in ``x``, in the cotangent and in whatever ``f`` depends on. Outside
    ``torch.func`` plain autograd does it at about half the cost.
    """
    if in_transform():
        y, pull, *_ = torch.func.vjp(f, x)
        return y, pull(cotangent(y))[0]
    # Inference mode records nothing, so leave it for the one pass that has to be recorded.
    with torch.inference_mode(False):
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            z = x if graph and x.requires_grad else x.clone().detach().requires_grad_()
            y = f(z)
        if graph and z is not x and not _needs_grad_beyond(y, z):
            w = cotangent(y.detach())
            graph = w.requires_grad
        elif graph:
            w = cotangent(y)
        else:
            w = cotangent(y.detach())
        return (y if graph else y.detach()), _vjp(y, z, w, graph)


def _needs_grad_beyond(y: Tensor, leaf: Tensor) -> bool:
    # Whether the graph of y ends in any leaf but this one: then somebody trains it.
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf:
            return True
        todo.extend(n for n, _ in node.next_functions)
    return False


def _vjp(y: Tensor, z: Tensor, w: Tensor, create_graph: bool) -> Tensor:
    if not y.requires_grad:  # y does not depend on z
        return torch.zeros_like(z)
    return torch.autograd.grad(y, z, w, create_graph=create_graph, materialize_grads=True)[0]


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the derivative ``(..., d)`` of a scalar function ``(..., d) -> (...)``."""
    return pullback(f, x, torch.ones_like)[1]
