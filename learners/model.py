r"""A sequence model: embedding, blocks of any mixer, head; its stream and its saved state.

.. math:: x \leftarrow x + \mathrm{mixer}(\mathrm{norm}\,x), \qquad
    x \leftarrow x + \mathrm{MLP}(\mathrm{norm}\,x)
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from darboux import _checks
from darboux.learners import base, checkpoints

Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """A pre-norm residual block: any ``mixer`` with the layer interface, then an MLP.

    ``hidden`` is the width inside the MLP, four times ``width`` unless given; 0 leaves the MLP out.
    ``norm`` makes a normalisation from a width (``nn.RMSNorm``, say). The state is the mixer's.
    """

    def __init__(
        self, width: int, mixer: nn.Module, *, hidden: int | None = None, norm: Norm = nn.LayerNorm
    ):
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        if width < 1 or hidden < 0:
            raise ValueError(f"Block: width {width} and hidden {hidden}, expected > 0 and >= 0")
        inner = getattr(mixer, "width", width)
        if inner != width:
            raise ValueError(f"Block: width {width}, but that of its mixer is {inner}")
        self.width = width
        self.norm, self.mixer = norm(width), mixer
        self.mlp = None
        if hidden:
            up, down = nn.Linear(width, hidden), nn.Linear(hidden, width)
            self.mlp = nn.Sequential(norm(width), up, nn.GELU(), down)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return ``(batch, time, width)`` and the mixer's state."""
        base.check_input("Block", x, self.width)
        base.check_dtype("Block", x, next(self.parameters(), x))
        y, state = self.mixer(self.norm(x), state)
        x = x + y
        return (x if self.mlp is None else x + self.mlp(x)), state


class SequenceModel(nn.Module):
    """Embed token ids, pass them through ``layers``, read logits: ``model(tokens, state)``.

    ``layers`` are modules with the layer interface, most often :class:`Block`. ``head`` is what
    reads ``(batch, time, width)``: a number of classes, a module, or ``None`` for as many classes
    as tokens; ``tie=True`` reads with the embedding itself. ``norm`` comes before the head,
    ``None`` for none. The embedding starts with rows of length about one. The state is a tuple of
    those of the layers.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: Iterable[nn.Module],
        *,
        head: int | nn.Module | None = None,
        tie: bool = False,
        norm: Norm | None = nn.LayerNorm,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        classes = vocabulary if head is None else head
        if min(vocabulary, width, len(self.layers), classes if isinstance(classes, int) else 1) < 1:
            raise ValueError(
                f"SequenceModel: vocabulary {vocabulary}, width {width}, "
                f"{len(self.layers)} layers, head {head}, expected at least one of each"
            )
        if tie and head is not None:
            raise ValueError("SequenceModel: tie=True has its own head, expected head=None")
        for i, layer in enumerate(self.layers):
            if getattr(layer, "width", width) != width:
                raise ValueError(
                    f"SequenceModel: layer {i} has width {layer.width}, expected {width}"
                )
        self.vocabulary, self.width = vocabulary, width
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.norm = nn.Identity() if norm is None else norm(width)
        self.head = nn.Linear(width, classes, bias=not tie) if isinstance(classes, int) else classes
        if tie:
            assert isinstance(self.head, nn.Linear)
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, state: tuple[Any, ...] | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Return logits ``(batch, time, classes)`` and the state after the last token."""
        check_tokens("SequenceModel", tokens, self.vocabulary)
        if state is None:
            state = (None,) * len(self.layers)
        if not isinstance(state, tuple) or len(state) != len(self.layers):
            raise ValueError(
                f"SequenceModel: state is a {type(state).__name__} of "
                f"{len(state) if hasattr(state, '__len__') else 'no'} parts, expected a tuple of "
                f"{len(self.layers)}: the state of another model"
            )
        x = self.embedding(tokens)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, part = layer(x, before)
            after.append(part)
        return self.head(self.norm(x)), tuple(after)


def check_tokens(where: str, tokens: object, vocabulary: int) -> None:
    """Raise unless ``tokens`` are integers ``(batch, time)`` in ``0 .. vocabulary - 1``."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{where}: tokens are {kind}, expected a tensor of int64 or int32")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"{where}: tokens have shape {tuple(tokens.shape)}, expected (batch, time) with "
            "time > 0"
        )
    if _checks.checks_values():
        plain = _checks.values(tokens)
        wrong = ((plain < 0) | (plain >= vocabulary)).nonzero()
        if len(wrong):
            b, t = wrong[0].tolist()
            raise ValueError(
                f"{where}: token {int(plain[b, t])} at batch {b}, time {t}, expected 0 to "
                f"{vocabulary - 1} ({len(wrong)} of {plain.numel()})"
            )


class Generated(NamedTuple):
    """New ``tokens (batch, steps)`` and the ``state`` before the last of them was read."""

    tokens: Tensor
    state: Any


def generate(
    model: nn.Module,
    prompt: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    state: Any = None,
) -> Generated:
    """Sample ``steps`` tokens after ``prompt (batch, time)``, one at a time through the state.

    ``temperature=0`` takes the likeliest; ``top_k`` samples among that many. To go on, pass the
    last token and the state: ``generate(model, g.tokens[:, -1:], n, state=g.state)``.
    """
    if steps < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"generate: steps {steps}, temperature {temperature}, top_k {top_k}, "
            "expected > 0, >= 0, > 0 or None"
        )
    found, tokens = [], prompt
    with evaluating(model):
        for _ in range(steps):
            logits, state = model(tokens, state)
            tokens = _sample(logits[:, -1], temperature, top_k, generator).unsqueeze(1)
            found.append(tokens)
    return Generated(torch.cat(found, 1), state)


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Return one token for each row of ``logits (batch, classes)``."""
    _checks.check_that(
        "generate", logits.isfinite, "logits are NaN or infinite", _checks.GeometryError
    )
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # the largest becomes zero first: a small temperature would overflow
    share = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    return torch.multinomial(share, 1, generator=generator).squeeze(-1)


def stream(
    model: nn.Module, tokens: Tensor | Iterable[Tensor], *, chunk: int = 4096
) -> Iterator[Tensor]:
    """Yield the logits of ``tokens (batch, time)`` chunk by chunk, through the state.

    Memory does not grow with time where the state does not. ``tokens`` may also be the chunks
    themselves.
    """
    if chunk < 1:
        raise ValueError(f"stream: chunk {chunk}, expected a positive number")
    parts = tokens.split(chunk, 1) if isinstance(tokens, Tensor) else tokens
    state, device = None, next(model.parameters()).device
    for part in parts:
        with evaluating(model):
            logits, state = model(part.to(device), state)
        yield logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and in evaluation mode, then put each module back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable numbers; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors of a ``state``, for its whole batch."""
    leaves = checkpoints.flatten(state).values()
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def save_state(path: str | Path, model: nn.Module, state: Any) -> None:
    """Write a ``state`` of ``model`` to a safetensors file, with the fingerprint of the model."""
    leaves = checkpoints.flatten(state)
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    rest = {name: leaf for name, leaf in leaves.items() if name not in tensors}
    about = {"kind": "state", "model": checkpoints.fingerprint(model), "rest": rest}
    checkpoints.write(path, tensors, about)


def load_state(path: str | Path, model: nn.Module) -> Any:
    """Return the state that :func:`save_state` wrote for this very ``model``.

    ``CheckpointError`` where the file is damaged, or its model has other modules or other numbers.
    """
    device = next(model.parameters()).device
    tensors, about = checkpoints.read(path, device)
    if about.get("kind") != "state":
        raise checkpoints.CheckpointError(f"{path} holds a {about.get('kind')}, expected a state")
    if about["model"] != checkpoints.fingerprint(model):
        raise checkpoints.CheckpointError(
            f"{path} holds the state of another model: its fingerprint is {about['model'][:12]}, "
            f"that of this model {checkpoints.fingerprint(model)[:12]}"
        )
    with evaluating(model):
        like = model(torch.zeros(1, 1, dtype=torch.int64, device=device))[1]
    return checkpoints.unflatten(like, {**tensors, **about["rest"]})
