"""Derivatives of batched functions, cheap in eager mode and right under every transform.

A function here maps ``(..., d)`` to ``(..., *out)`` and treats leading dimensions alike, so
the derivatives along ``d`` directions are one pass over a batch ``d`` times as large: no vmap,
no loop. That pass is two in reverse, ``J v`` being the derivative of ``J^T u`` in ``u``: with
small tensors forward mode costs several times as much.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from darboux._checks import in_transform

Field = Callable[[Tensor], Tensor]


def directional(f: Field, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``f(x)`` and its derivative along ``v``."""
    (y,), _, dy = _reversed(lambda z: (f(z),), x, v)
    return y, dy


def second(f: Field, x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``f(x)``, its derivative along ``v``, and that of the latter along ``w``."""
    (y, dy), _, d2y = _reversed(lambda z: directional(f, z, v), x, w)
    return y, dy, d2y


def push_pull(f: Field, x: Tensor, v: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``f(x)``, its derivative along ``v``, and its reverse derivative of ``cotangent``."""
    (y,), back, dy = _reversed(lambda z: (f(z),), x, v, cotangent)
    return y, dy, back


def _reversed(
    f: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, v: Tensor, cotangent: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Return ``f(x)`` and, of its last part, ``J^T u`` of the cotangent ``u`` and ``J v``."""
    v = v.expand_as(x)
    if in_transform():
        y, pull, *rest = torch.func.vjp(lambda z: _last_first(f(z)), x, has_aux=True)
        u = torch.zeros_like(y) if cotangent is None else cotangent.expand_as(y)
        back, push = torch.func.vjp(lambda u: pull(u)[0], u)[:2]
        return (*rest[0], y), back, push(v)[0]
    graph = torch.is_grad_enabled()
    # Inference mode records nothing, so leave it for the passes that have to be recorded.
    with torch.inference_mode(False), torch.enable_grad():
        z = _leaf(x, graph)
        parts = f(z)
        y = parts[-1]
        given = (x, v) if cotangent is None else (x, v, cotangent)
        graph = graph and (
            any(t.requires_grad for t in given) or any(_needs_grad_beyond(y, z) for y in parts)
        )
        if cotangent is None:
            u = torch.zeros_like(y, requires_grad=True)
        else:
            u = _leaf(cotangent.expand_as(y), graph)
        back = _vjp(y, z, u, True)
        dy = _vjp(back, u, v.clone() if v.is_inference() else v, graph)
    return (parts, back, dy) if graph else (tuple(y.detach() for y in parts), back.detach(), dy)


def _last_first(parts: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    return parts[-1], parts[:-1]


def _leaf(x: Tensor, graph: bool) -> Tensor:
    # Never x itself: f may hold x as a parameter too, and that is another derivative.
    return x.view_as(x) if graph and x.requires_grad else x.clone().detach().requires_grad_()


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
    copies = x.expand(i.numel(), *x.shape)
    y, dy, d2y = second(f, copies, _basis(x, eye[i]), _basis(x, eye[j]))
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
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        z = _leaf(x, graph)
        y = f(z)
        if graph and not x.requires_grad and not _needs_grad_beyond(y, z):
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
