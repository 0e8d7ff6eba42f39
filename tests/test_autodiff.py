"""The derivatives below everything else, in eager mode and inside transforms."""

import pytest
import torch
from torch.func import vmap

from darboux import _autodiff

F64 = torch.float64
W = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
X, V, U = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
COTANGENT = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=F64)


def field(x):
    return torch.sin(x @ W.mT) + 1


def slope(x, v):
    return torch.cos(x @ W.mT) * (v @ W.mT)


def bend(x, v, u):
    return -torch.sin(x @ W.mT) * (v @ W.mT) * (u @ W.mT)


def one_at_a_time(call, *tensors):
    return vmap(call)(*tensors)


@pytest.mark.parametrize("inside", [False, True])
def test_derivatives_of_a_known_field(inside):
    run = one_at_a_time if inside else lambda call, *t: call(*t)
    y, dy, d2y = run(lambda x, v, u: _autodiff.second(field, x, v, u), X, V, U)
    torch.testing.assert_close(y, field(X))
    torch.testing.assert_close(dy, slope(X, V))
    torch.testing.assert_close(d2y, bend(X, V, U))
    pulled = (torch.cos(X @ W.mT) * COTANGENT) @ W
    y, dy, back = run(lambda x, v, c: _autodiff.push_pull(field, x, v, c), X, V, COTANGENT)
    torch.testing.assert_close((y, dy, back), (field(X), slope(X, V), pulled))
    y, df, d2f = run(lambda x: _autodiff.jet(field, x), X)
    torch.testing.assert_close(df @ V[..., None], slope(X, V)[..., None])
    form = torch.einsum("...kij,...i,...j->...k", d2f, V, U)
    torch.testing.assert_close(form, bend(X, V, U))


def test_derivatives_are_differentiable_in_everything():
    def every(x, v, c, w):
        def f(z):
            return torch.sin(z @ w.mT) + w.sum()

        y, dy, back = _autodiff.push_pull(f, x, v, c)
        return y, dy, back, *_autodiff.second(f, x, v, v)[1:], _autodiff.directional(f, x, v)[1]

    tensors = [t.clone().requires_grad_() for t in (X[:2], V[:2], COTANGENT[:2], W)]
    assert torch.autograd.gradcheck(every, tensors)
    # each alone, so that none is differentiated only because another is
    for i in range(4):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        assert torch.autograd.gradcheck(every, alone)


def test_what_a_field_holds_is_not_what_it_is_differentiated_by():
    x = X.clone().requires_grad_()
    _, dy = _autodiff.directional(lambda z: z * x, x, V)
    torch.testing.assert_close(dy, V * x)
    _, back = _autodiff.pullback(lambda z: z * x, x, torch.ones_like)
    torch.testing.assert_close(back, x)
    (grad,) = torch.autograd.grad(dy.sum(), x)
    torch.testing.assert_close(grad, V)


def test_nothing_is_recorded_that_nobody_asked_for():
    for tensors in (_autodiff.second(field, X, V, U), _autodiff.push_pull(field, X, V, COTANGENT)):
        assert not any(t.requires_grad for t in tensors)
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not any(t.requires_grad for t in _autodiff.second(field, x, V, U))
    with torch.inference_mode():
        inside = X.clone(), V.clone(), U.clone()
        torch.testing.assert_close(_autodiff.second(field, *inside)[2], bend(X, V, U))


@pytest.mark.parametrize("shape", [(2,), (0, 2), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_constant_and_linear_fields_in_every_shape(shape, dtype):
    x, v = torch.ones(shape, dtype=dtype), torch.full(shape, 2.0, dtype=dtype)
    y, dy, d2y = _autodiff.second(lambda z: torch.ones_like(z), x, v, v)
    assert not dy.any()
    assert not d2y.any()
    y, dy, d2y = _autodiff.second(lambda z: 3 * z, x, v, v)
    torch.testing.assert_close((y, dy, d2y), (3 * x, 3 * v, 0 * x))
    assert {t.dtype for t in (y, dy, d2y)} == {dtype}


def test_parameters_of_a_linear_field_keep_their_gradient():
    shift = torch.zeros(2, dtype=F64, requires_grad=True)
    y, _, _ = _autodiff.second(lambda z: 3 * z + shift, X, V, U)
    (grad,) = torch.autograd.grad(y.sum(), shift)
    torch.testing.assert_close(grad, torch.full((2,), 5.0, dtype=F64))
