"""What attention looks at: the maps of any model, and scores of two kinds of heads."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def attention_maps(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Return what each layer attends to, ``(batch, heads, n, m)``, by the name of its module.

    Watches the calls of ``scaled_dot_product_attention`` while the model runs, so any model will
    do; a module that calls twice has its second map under its name and ``#2``.
    """
    stack: list[str] = []
    found: dict[str, Tensor] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is functional.scaled_dot_product_attention:
                name = stack[-1] if stack else ""
                count = 1 + sum(key.split("#")[0] == name for key in found)
                found[name if count == 1 else f"{name}#{count}"] = weights(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), track(model, stack), Watch():
        model(*inputs)
    return found


@contextlib.contextmanager
def track(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep in ``stack`` the names of the modules that are running."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: (stack.pop(), None)[1]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Return the softmax that ``scaled_dot_product_attention`` of these would apply to ``v``."""
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)


def previous_token_score(maps: Tensor) -> Tensor:
    """Return the mean weight ``(heads,)`` that tokens give to the one before them."""
    if maps.dim() != 4 or maps.shape[-1] != maps.shape[-2] or maps.shape[-1] < 2:
        raise ValueError(
            f"previous_token_score: maps has shape {tuple(maps.shape)}, expected "
            "(batch, heads, time, time) with time > 1"
        )
    return maps.diagonal(-1, -2, -1).mean((0, -1))


def induction_score(maps: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean weight ``(heads,)`` on what followed earlier occurrences of the token.

    Over those positions whose token occurred before; raises ``ValueError`` where none did.
    """
    n = tokens.shape[-1]
    if maps.dim() != 4 or maps.shape[0] != len(tokens) or maps.shape[-2:] != (n, n):
        raise ValueError(
            f"induction_score: maps has shape {tuple(maps.shape)} and tokens "
            f"{tuple(tokens.shape)}, expected (batch, heads, time, time) and (batch, time)"
        )
    follows = torch.zeros(len(tokens), n, n, dtype=torch.bool, device=tokens.device)
    follows[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    follows = follows.tril()  # column j: what stood at j - 1 is the token of the row
    rows = follows.any(-1)
    if not rows.any():
        raise ValueError("induction_score: no token occurs twice, expected repeated ones")
    weight = (maps * follows[:, None]).sum(-1)
    return (weight * rows[:, None]).sum((0, -1)) / rows.sum()


def repeated_tokens(
    batch: int, period: int, vocabulary: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return random words of distinct tokens, said twice, ``(batch, 2 period)``."""
    if not 1 <= period <= vocabulary:
        raise ValueError(f"repeated_tokens: period is {period}, expected 1 to {vocabulary}")
    word = torch.rand(batch, vocabulary, generator=generator).argsort(-1)[:, :period]
    return word.repeat(1, 2)
