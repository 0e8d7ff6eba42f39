"""From a function of tensors to C++: trace it, unroll it to scalars, differentiate, print.

A force is traced to ATen operations and then evaluated on tensors of *expression numbers*, so that
an operation which only moves data is simply applied to those numbers. What comes out is, for each
component, an expression in the components of one trajectory and in captured constants. That the
trajectories of a batch do not mix, and are all treated alike, is seen from the expressions.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from darboux.integrators._kernels import HEADER

aten = torch.ops.aten

# Beyond this many expressions the C++ compiler takes longer than users wait.
MOST_EXPRESSIONS = 12_000


class Unsupported(Exception):
    """The function cannot become a native kernel; the message says why."""


class Expressions:
    """Scalar expressions, each stored once and known by its number.

    Rewrites keep values to a rounding or two: a division by something that is the same for all
    trajectories is a product with its reciprocal, one by a root is a product with ``rsqrt``.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple] = []
        self.known: dict[tuple, int] = {}

    def new(self, *node: Any) -> int:
        if node not in self.known:
            if len(self.nodes) > 8 * MOST_EXPRESSIONS:
                raise Unsupported(f"it has more than {MOST_EXPRESSIONS} scalar operations")
            self.known[node] = len(self.nodes)
            self.nodes.append(node)
        return self.known[node]

    def literal(self, value: float | bool) -> int:
        # 0.0 == -0.0 and 1 == True, but they are not the same literal.
        kind = "true" if value is True else "false" if value is False else float(value).hex()
        return self.new("literal", kind)

    def value(self, i: int) -> float | None:
        op, *args = self.nodes[i]
        if op != "literal" or args[0] in ("true", "false"):
            return None
        return float.fromhex(args[0])

    def truth(self, i: int) -> bool | None:
        node = self.nodes[i]
        return node[1] == "true" if node in (("literal", "true"), ("literal", "false")) else None

    def is_op(self, i: int, op: str) -> bool:
        return self.nodes[i][0] == op

    def uniform(self, i: int) -> bool:
        """Say whether ``i`` is the same for all trajectories, without operations."""
        return self.nodes[i][0] in ("literal", "constant")

    def add(self, a: int, b: int) -> int:
        x, y = self.value(a), self.value(b)
        if x is not None and y is not None:
            return self.literal(x + y)
        if x == 0:
            return b
        if y == 0:
            return a
        if self.is_op(b, "neg"):
            return self.sub(a, self.nodes[b][1])
        if self.is_op(a, "neg"):
            return self.sub(b, self.nodes[a][1])
        return self.new("add", min(a, b), max(a, b))

    def sub(self, a: int, b: int) -> int:
        x, y = self.value(a), self.value(b)
        if x is not None and y is not None:
            return self.literal(x - y)
        if x == 0:
            return self.neg(b)
        if y == 0:
            return a
        if self.is_op(b, "neg"):
            return self.add(a, self.nodes[b][1])
        return self.new("sub", a, b)

    def neg(self, a: int) -> int:
        x = self.value(a)
        if x is not None:
            return self.literal(-x)
        op, *args = self.nodes[a]
        if op == "neg":
            return args[0]
        return self.sub(args[1], args[0]) if op == "sub" else self.new("neg", a)

    def mul(self, a: int, b: int) -> int:
        x, y = self.value(a), self.value(b)
        if x is not None and y is not None:
            return self.literal(x * y)
        for u, other in ((x, b), (y, a)):
            if u == 1:
                return other
            if u == -1:
                return self.neg(other)
        if self.is_op(a, "neg"):
            return self.neg(self.mul(self.nodes[a][1], b))
        if self.is_op(b, "neg"):
            return self.neg(self.mul(a, self.nodes[b][1]))
        for u, v in ((x, b), (y, a)):
            # Neighbouring factors become one: 2 (q/2).
            if u is not None and self.is_op(v, "mul"):
                for factor, rest in (self.nodes[v][1:], self.nodes[v][:0:-1]):
                    w = self.value(factor)
                    if w is not None:
                        return self.mul(self.literal(u * w), rest)
        if a == b and self.is_op(a, "abs"):
            return self.mul(self.nodes[a][1], self.nodes[a][1])
        return self.new("mul", min(a, b), max(a, b))

    def div(self, a: int, b: int) -> int:
        x, y = self.value(a), self.value(b)
        if x is not None and y is not None and y != 0:
            return self.literal(x / y)
        if y is not None and y != 0:
            return self.mul(a, self.literal(1 / y))
        if self.is_op(b, "neg"):
            return self.neg(self.div(a, self.nodes[b][1]))
        if self.is_op(b, "sqrt"):
            return self.mul(a, self.new("rsqrt", self.nodes[b][1]))
        if self.uniform(b):
            return self.mul(a, self.new("div", self.literal(1.0), b))
        return self.new("div", a, b)

    def pow(self, a: int, b: int) -> int:
        y = self.value(b)
        if y is None or 2 * y != round(2 * y) or abs(y) > 32:
            return self.new("pow", a, b)
        whole = self.integer_power(a, math.floor(abs(y)))
        if y == int(y):
            return whole if y >= 0 else self.div(self.literal(1.0), whole)
        if y > 0:
            return self.mul(whole, self.new("sqrt", a))
        # x^(-n-1/2) from powers of rsqrt alone: no division.
        return self.integer_power(self.new("rsqrt", a), round(-2 * y))

    def integer_power(self, a: int, n: int) -> int:
        if n == 0:
            return self.literal(1.0)
        half = self.integer_power(a, n // 2)
        square = self.mul(half, half)
        return self.mul(square, a) if n % 2 else square

    def where(self, c: int, a: int, b: int) -> int:
        truth = self.truth(c)
        if truth is not None:
            return a if truth else b
        return a if a == b else self.new("where", c, a, b)

    def compare(self, op: str, a: int, b: int) -> int:
        # Whether a root is zero is known before it is taken.
        if op in ("eq", "ne") and self.is_op(a, "sqrt") and self.value(b) == 0:
            a = self.nodes[a][1]
        x, y = self.value(a), self.value(b)
        if x is not None and y is not None:
            return self.literal(_COMPARISONS[op](x, y))
        return self.new(op, a, b)

    def logical(self, op: str, *args: int) -> int:
        truths = [self.truth(a) for a in args]
        if op == "not":
            return self.new("not", *args) if truths[0] is None else self.literal(not truths[0])
        decisive = op == "or"
        if decisive in truths:
            return self.literal(decisive)
        rest = [a for a, t in zip(args, truths, strict=True) if t is None]
        return self.new(op, *rest) if len(rest) == 2 else rest[0] if rest else args[0]

    def apply(self, op: str, *args: int) -> int:
        """Return the expression ``op(*args)``, simplified."""
        if op in _COMPARISONS:
            return self.compare(op, *args)
        if op in ("and", "or", "not"):
            return self.logical(op, *args)
        if op in ("add", "sub", "mul", "div", "neg", "pow", "where"):
            return getattr(self, op)(*args)
        if op == "abs" and self.is_op(args[0], "abs"):
            return args[0]
        return self.new(op, *args)

    def children(self, i: int) -> tuple[int, ...]:
        op, *args = self.nodes[i]
        return () if op in ("literal", "constant", "input") else tuple(args)

    def reachable(self, roots: Iterable[int]) -> list[int]:
        """Return the numbers that ``roots`` rest on, each soon after its arguments."""
        done: dict[int, None] = {}
        todo = [(i, False) for i in reversed(list(roots))]
        while todo:
            i, ready = todo.pop()
            if ready:
                done[i] = None
            elif i not in done:
                todo.append((i, True))
                todo.extend((c, False) for c in reversed(self.children(i)))
        return list(done)

    def pull_back(self, outputs: Sequence[int], weights: Sequence[int]) -> dict[int, int]:
        """Return the derivative of ``sum_i weights_i outputs_i`` by each expression below."""
        bars: dict[int, int] = {}

        def give(i: int, bar: int) -> None:
            bars[i] = self.add(bars[i], bar) if i in bars else bar

        order = self.reachable(outputs)
        for i, w in zip(outputs, weights, strict=True):
            give(i, w)
        for i in reversed(order):
            if i in bars and self.value(bars[i]) != 0:
                for child, bar in self._derivatives(i, bars[i]):
                    give(child, bar)
        return bars

    def _derivatives(self, i: int, w: int) -> list[tuple[int, int]]:
        op, *a = self.nodes[i]
        apply, number = self.apply, self.literal
        if op in ("literal", "constant", "input") or op in _COMPARISONS:
            return []
        if op in ("and", "or", "not", "sign"):
            return []
        if op == "add":
            return [(a[0], w), (a[1], w)]
        if op == "sub":
            return [(a[0], w), (a[1], self.neg(w))]
        if op == "mul":
            return [(a[0], self.mul(w, a[1])), (a[1], self.mul(w, a[0]))]
        if op == "div":
            first = self.div(w, a[1])
            return [(a[0], first), (a[1], self.neg(self.mul(first, i)))]
        if op == "where":
            zero = number(0.0)
            return [(a[1], self.where(a[0], w, zero)), (a[2], self.where(a[0], zero, w))]
        if op in ("max", "min"):
            # Like torch: the larger one takes all, equals take half each.
            half, tie = self.mul(w, number(0.5)), self.compare("eq", a[0], a[1])
            over = self.compare("gt" if op == "max" else "lt", a[0], a[1])
            zero = number(0.0)
            first = self.where(tie, half, self.where(over, w, zero))
            return [(a[0], first), (a[1], self.where(tie, half, self.where(over, zero, w)))]
        if op == "pow":
            lower = self.pow(a[0], self.sub(a[1], number(1.0)))
            first = self.mul(self.mul(w, a[1]), lower)
            if self.value(a[1]) is not None:
                return [(a[0], first)]
            return [(a[0], first), (a[1], self.mul(self.mul(w, i), apply("log", a[0])))]
        if op == "atan2":
            r2 = self.add(self.mul(a[0], a[0]), self.mul(a[1], a[1]))
            w = self.div(w, r2)
            return [(a[0], self.mul(w, a[1])), (a[1], self.neg(self.mul(w, a[0])))]
        return [(a[0], self._unary_derivative(op, a[0], i, w))]

    def _unary_derivative(self, op: str, x: int, y: int, w: int) -> int:
        # w dy/dx for y = op(x)
        one = self.literal(1.0)
        mul, apply = self.mul, self.apply
        square = mul(x, x)
        if op == "neg":
            return self.neg(w)
        if op in ("tan", "tanh"):
            slope = (self.add if op == "tan" else self.sub)(one, mul(y, y))
            return mul(w, slope)
        if op in ("asin", "acos"):
            w = mul(w, apply("rsqrt", self.sub(one, square)))
            return w if op == "asin" else self.neg(w)
        if op == "sqrt":
            return mul(w, mul(self.literal(0.5), apply("rsqrt", x)))
        if op == "rsqrt":
            return mul(w, mul(self.literal(-0.5), mul(mul(y, y), y)))
        if op in ("log", "log1p", "atan"):
            below = {"log": x, "log1p": self.add(one, x), "atan": self.add(one, square)}[op]
            return self.div(w, below)
        if op == "erf":
            bell = apply("exp", self.neg(square))
            return mul(w, mul(self.literal(2 / math.sqrt(math.pi)), bell))
        slopes: dict[str, Callable[[], int]] = {
            "exp": lambda: y,
            "expm1": lambda: self.add(y, one),
            "sin": lambda: apply("cos", x),
            "cos": lambda: self.neg(apply("sin", x)),
            "sinh": lambda: apply("cosh", x),
            "cosh": lambda: apply("sinh", x),
            "sigmoid": lambda: mul(y, self.sub(one, y)),
            "abs": lambda: apply("sign", x),
        }
        return mul(w, slopes[op]())


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


# ---------------------------------------------------------------- tracing


@dataclass
class Trace:
    """Force and velocity of one trajectory as expressions, and where their constants come from.

    ``constants()`` gives their present values, differentiable in what they were computed from.
    """

    e: Expressions
    force: list[int]
    velocity: list[int]
    sizes: list[int]
    sources: list[Callable[[], Tensor]]
    q_width: int
    p_width: int
    captured: list[Tensor] = field(default_factory=list)
    known: "dict[int, _Constant]" = field(default_factory=dict)

    def constants(self) -> list[Tensor]:
        return [source() for source in self.sources]

    def slots(self, outputs: Iterable[int]) -> set[int]:
        """Return the slots of the constants that ``outputs`` use."""
        nodes = (self.e.nodes[i] for i in self.e.reachable(outputs))
        return {node[1] for node in nodes if node[0] == "constant"}


Function = Callable[[Tensor], Tensor]


def trace(force: Function, velocity: Function, q: Tensor, p: Tensor, event: int) -> Trace:
    """Trace both functions for states like ``q, p`` with ``event`` event dimensions."""
    out = Trace(Expressions(), [], [], [], [], 0, 0)
    out.q_width, out.p_width = (math.prod(x.shape[x.dim() - event :]) for x in (q, p))
    out.force = _trace_one(out, force, q, "q", p, event)
    out.velocity = _trace_one(out, velocity, p, "p", q, event)
    return _checked(out)


def trace_field(field: Function, z: Tensor, event: int) -> Trace:
    """Trace ``dz/dt = field(z)``: as the velocity, of inputs ``z``, of a state without force."""
    out = Trace(Expressions(), [], [], [], [], 0, 0)
    out.velocity = _trace_one(out, field, z, "z", z, event)
    return _checked(out)


def _checked(out: Trace) -> Trace:
    size = len(out.e.reachable([*out.force, *out.velocity]))
    if size > MOST_EXPRESSIONS:
        raise Unsupported(f"it has {size} scalar operations, more than {MOST_EXPRESSIONS}")
    return out


def _trace_one(
    out: Trace, f: Function, x: Tensor, name: str, like: Tensor, event: int
) -> list[int]:
    batched = x.dim() > event
    lead = (2, *[1] * (x.dim() - event - 1)) if batched else ()
    first = x.detach().reshape(-1, *x.shape[x.dim() - event :])[:1].clone()
    example = (
        first.repeat(2, *[1] * event).reshape(*lead, *first.shape[1:]) if batched else first[0]
    )
    expected = (*lead, *like.shape[like.dim() - event :])
    graph = _graph(f, example)
    width = example[0].numel() if batched else example.numel()
    numbers = torch.tensor(
        [out.e.new("input", name, k, b) for b in range(2 if batched else 1) for k in range(width)]
    )
    result = _Evaluation(graph, out).run_on(numbers.reshape(example.shape), example)
    if result.shape != expected:
        raise Unsupported(
            f"it gives shape {tuple(result.shape)} for a state of shape {tuple(example.shape)}, "
            f"expected {expected}"
        )
    flat = result.reshape(2 if batched else 1, -1).tolist()
    if batched and flat[1] != _renamed(out.e, flat[0]):
        raise Unsupported("the trajectories of a batch mix, or are not treated alike")
    if any(out.e.nodes[i][0] == "input" and out.e.nodes[i][3] for i in out.e.reachable(flat[0])):
        raise Unsupported("the trajectories of a batch mix")
    return flat[0]


def _graph(f: Function, example: Tensor) -> GraphModule:
    with torch.no_grad():
        table: Any = core_aten_decompositions()
        # The lambda hides signatures that make_fx reads wrongly: bound methods, defaults.
        graph = make_fx(lambda x: f(x), decomposition_table=table)(example)
    _cut_at_shapes(graph)
    return graph


def lifted(f: Function, example: Tensor) -> tuple[GraphModule, list[Tensor]]:
    """Trace ``f`` to a graph that takes the tensors it captured as further arguments."""
    graph = _graph(f, example)
    tensors = []
    state = next(n for n in graph.graph.nodes if n.op == "placeholder")
    last = state
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        tensors.append(getattr(graph, str(node.target)))
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"captured{len(tensors)}")
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, tensors


def _cut_at_shapes(graph: GraphModule) -> None:
    # What only gives a shape need not be evaluated: a potential whose gradient is taken.
    for node in graph.graph.nodes:
        if node.target in _SHAPES and isinstance(node.args[0], Node):
            meta = node.args[0].meta["tensor_meta"]
            with graph.graph.inserting_before(node):
                stand_in = graph.graph.call_function(
                    aten.zeros.default, (list(meta.shape),), {"dtype": meta.dtype}
                )
            node.replace_input_with(node.args[0], stand_in)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _renamed(e: Expressions, roots: list[int]) -> list[int]:
    # The same expressions for the second trajectory of the batch.
    new: dict[int, int] = {}
    for i in e.reachable(roots):
        node = e.nodes[i]
        if node[0] == "input":
            new[i] = e.new(*node[:3], 1)
        elif node[0] in ("literal", "constant"):
            new[i] = i
        else:
            new[i] = e.apply(node[0], *(new[a] for a in node[1:]))
    return [new[i] for i in roots]


_POINTWISE = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.neg.default: "neg",
    aten.pow.Tensor_Scalar: "pow",
    aten.pow.Tensor_Tensor: "pow",
    aten.pow.Scalar: "pow",
    aten.maximum.default: "max",
    aten.minimum.default: "min",
    aten.where.self: "where",
    aten.where.ScalarSelf: "where",
    aten.where.ScalarOther: "where",
    aten.atan2.default: "atan2",
    aten.logical_and.default: "and",
    aten.logical_or.default: "or",
    aten.logical_not.default: "not",
    aten.bitwise_and.Tensor: "and",
    aten.bitwise_or.Tensor: "or",
    aten.bitwise_not.default: "not",
    aten.sgn.default: "sign",
}
for _name in "sqrt rsqrt exp expm1 log log1p sin cos tan asin acos atan sinh cosh tanh".split():
    _POINTWISE[getattr(aten, _name).default] = _name
for _name in "sigmoid erf abs sign".split():
    _POINTWISE[getattr(aten, _name).default] = _name
for _name in "eq ne lt le gt ge".split():
    _POINTWISE[getattr(aten, _name).Tensor] = _name
    _POINTWISE[getattr(aten, _name).Scalar] = _name

# These only move data, so they move expression numbers just as well.
_MOVES = {
    getattr(aten, name)
    for name in """view _unsafe_view reshape expand permute transpose t unsqueeze squeeze select
    slice diagonal cat stack index index_select flip roll repeat split split_with_sizes unbind
    select_scatter slice_scatter diagonal_scatter gather unfold movedim clone""".split()
}
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
# They depend on the shape of the state only.
_SHAPES = {
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}


_OUT_OF_PLACE: dict[Any, Any] = {aten.copy_.default: aten.copy.default}
for _plain in list(_POINTWISE):
    _packet = getattr(aten, f"{_plain.overloadpacket.__name__}_", None)
    _same = getattr(_packet, _plain._overloadname, None) if _packet else None
    if _same is not None:
        _OUT_OF_PLACE[_same] = _plain


class _Evaluation(Interpreter):
    """Evaluate a traced graph on expression numbers.

    A value is one of: numbers (int64 tensor, marked by ``_Numbers``), what does not depend on
    the state nor on captured floats (a tensor, known now), or a constant (a tensor computed
    anew in every run, from captured ones).
    """

    def __init__(self, graph: GraphModule, out: Trace):
        super().__init__(graph)
        self.out = out
        self.e = out.e
        self.known = out.known

    def run_on(self, numbers: Tensor, example: Tensor) -> Tensor:
        self.dtype = example.dtype
        result = self._number(self.run(_Numbers(numbers)))
        return result

    def run_node(self, n: Node) -> Any:
        if n.op == "get_attr":
            value = super().run_node(n)
            if not isinstance(value, Tensor):
                raise Unsupported(f"it captures a {type(value).__name__}")
            if not value.is_floating_point():
                return value
            if id(value) not in self.known:
                self.out.captured.append(value)
                self.known[id(value)] = _Constant(lambda: value)
            return self.known[id(value)]
        target: Any = n.target
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        flat = [x for a in (*args, *kwargs.values()) for x in (a if _is_list(a) else [a])]
        if any(isinstance(x, _Numbers) for x in flat):
            plain = _OUT_OF_PLACE.get(target)
            if plain is None:
                return self._on_numbers(target, args, kwargs)
            return self._overwrite(n, self._on_numbers(plain, args, kwargs))
        if any(isinstance(x, _Constant) for x in flat):
            if self._may_be_batched(target, flat):
                return self._on_numbers(target, args, kwargs)
            return self._on_constants(target, args, kwargs)
        return target(*args, **kwargs)

    def _overwrite(self, n: Node, value: Any) -> Any:
        # Whoever asks for the overwritten tensor from now on gets the new value.
        while True:
            n = cast(Node, n.args[0])
            target: Any = n.target
            if n.op == "call_function" and target.overloadpacket in _MOVES - {aten.clone}:
                raise Unsupported(f"it overwrites a view, the result of {target}")
            self.env[n] = value
            if n.op != "call_function" or target not in _OUT_OF_PLACE:
                return value

    def _may_be_batched(self, target: Any, values: list) -> bool:
        # Ones in the shape of a batch of energies start a reverse pass: what is computed from
        # them and captured tensors is not to be computed for every trajectory.
        filled = any(
            isinstance(x, Tensor) and x.dim() > 0 and x.is_floating_point() for x in values
        )
        return (filled and (target in _POINTWISE or target in _SPECIAL)) or (
            target.overloadpacket in _MOVES
        )

    def _on_constants(self, target: Any, args: tuple, kwargs: dict) -> "_Constant":
        if target in (aten._local_scalar_dense.default, aten.copy_.default):
            raise Unsupported("it reads a captured tensor as a number")
        if target in _SAME:
            return args[0]

        def evaluate() -> Tensor:
            return target(*_present(args), **{k: _present(v) for k, v in kwargs.items()})

        if not isinstance(evaluate(), Tensor):
            raise Unsupported(f"{target} on captured tensors")
        return _Constant(evaluate)

    def _number(self, x: Any) -> Tensor:
        """Return the expression numbers of any value."""
        if isinstance(x, _Numbers):
            return x.numbers
        if isinstance(x, _Constant):
            return self._slot(x)
        values = torch.as_tensor(x, dtype=torch.float64 if isinstance(x, float) else None)
        flat = values.reshape(-1).tolist()
        numbers = [self.e.literal(v if isinstance(v, bool) else float(v)) for v in flat]
        return torch.tensor(numbers, dtype=torch.int64).reshape(values.shape)

    def _slot(self, x: "_Constant") -> Tensor:
        if x.numbers is None:
            value = x.evaluate()
            slot = len(self.out.sources)
            self.out.sources.append(x.evaluate)
            self.out.sizes.append(value.numel())
            if not value.is_floating_point():
                raise Unsupported("it compares captured tensors")
            x.numbers = torch.tensor(
                [self.e.new("constant", slot, k) for k in range(value.numel())],
                dtype=torch.int64,
            ).reshape(value.shape)
        return x.numbers

    def _on_numbers(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in _SAME:
            return args[0]
        if target is aten._to_copy.default:
            return self._convert(args[0], kwargs.get("dtype"))
        if target is aten.copy.default:
            return args[1]
        if target.overloadpacket in _MOVES:
            moved = target(*self._numbers_inside(args), **kwargs)
            return [_Numbers(x) for x in moved] if _is_list(moved) else _Numbers(moved)
        if target in _POINTWISE:
            return _Numbers(self._pointwise(_POINTWISE[target], args, kwargs))
        special = _SPECIAL.get(target)
        if special is None:
            raise Unsupported(f"it uses {target}")
        return _Numbers(special(self, *args, **kwargs))

    def _convert(self, x: "_Numbers", dtype: torch.dtype | None) -> "_Numbers":
        boolean = self._is_boolean(x.numbers)
        if dtype == torch.bool and not boolean:
            return _Numbers(self._pointwise("ne", (x, 0.0), {}))
        if dtype not in (None, self.dtype, torch.bool):
            raise Unsupported(f"it converts the state to {dtype}")
        if boolean and dtype == self.dtype:
            return _Numbers(self._pointwise("where", (x, 1.0, 0.0), {}))
        return x

    def _is_boolean(self, numbers: Tensor) -> bool:
        node = self.e.nodes[int(numbers.reshape(-1)[0])] if numbers.numel() else ("literal", "")
        return (
            node[0] in _COMPARISONS
            or node[0] in ("and", "or", "not")
            or node[1:]
            in (
                ("true",),
                ("false",),
            )
        )

    def _numbers_inside(self, args: tuple) -> list:
        # Index arguments (integer tensors) stay what they are.
        out = []
        for a in args:
            if isinstance(a, _Numbers):
                out.append(a.numbers)
            elif isinstance(a, _Constant) or (isinstance(a, Tensor) and a.is_floating_point()):
                out.append(self._number(a))
            elif _is_list(a) and any(isinstance(x, _Numbers) for x in a):
                out.append([self._number(x) for x in a])
            else:
                out.append(a)
        return out

    def _pointwise(self, op: str, args: tuple, kwargs: dict) -> Tensor:
        alpha = kwargs.get("alpha", 1)
        tensors = [self._number(a) for a in args[: _ARITY.get(op, len(args))]]
        if op in ("add", "sub", "mul"):
            for i, x in enumerate(tensors):
                if self._is_boolean(x):
                    tensors[i] = self._pointwise("where", (_Numbers(x), 1.0, 0.0), {})
        if alpha != 1:
            tensors[1] = self._pointwise("mul", (_Numbers(tensors[1]), float(alpha)), {})
        shaped = torch.broadcast_tensors(*tensors)
        columns = [x.reshape(-1).tolist() for x in shaped]
        if len(columns[0]) > 8 * MOST_EXPRESSIONS:
            raise Unsupported(f"it has more than {MOST_EXPRESSIONS} scalar operations")
        values = [self.e.apply(op, *x) for x in zip(*columns, strict=True)]
        return torch.tensor(values, dtype=torch.int64).reshape(shaped[0].shape)

    def fold(self, op: str, x: Tensor) -> Tensor:
        """Combine the entries along the last axis."""
        rows = x.reshape(-1, x.shape[-1]).tolist()
        start = {"add": 0.0, "mul": 1.0}.get(op)
        values = []
        for row in rows:
            total = row[0] if row else self.e.literal(start or 0.0)
            for other in row[1:]:
                total = self.e.apply(op, total, other)
            values.append(total)
        return torch.tensor(values, dtype=torch.int64).reshape(x.shape[:-1])


_ARITY = {"where": 3, "add": 2, "sub": 2, "mul": 2, "div": 2}


class _Numbers:
    """Expression numbers in the shape of the tensor they stand for."""

    def __init__(self, numbers: Tensor):
        self.numbers = numbers


class _Constant:
    """A tensor computed from captured ones, with the slot it is passed in once it has one."""

    def __init__(self, evaluate: Callable[[], Tensor]):
        self.evaluate = evaluate
        self.numbers: Tensor | None = None


def _present(x: Any) -> Any:
    if isinstance(x, _Constant):
        return x.evaluate()
    if isinstance(x, tuple | list):
        return type(x)(_present(y) for y in x)
    return x


def _is_list(x: Any) -> bool:
    return isinstance(x, list | tuple)


def _along(run: _Evaluation, op: str, x: Any, dims: Any, keepdim: bool) -> Tensor:
    n = run._number(x)
    if op == "add" and run._is_boolean(n):
        n = run._pointwise("where", (_Numbers(n), 1.0, 0.0), {})
    dims = (
        range(n.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    )
    dims = sorted(d % n.dim() for d in dims) if n.dim() else []
    kept = [d for d in range(n.dim()) if d not in dims]
    flat = n.permute(*kept, *dims).reshape(*(n.shape[d] for d in kept), -1)
    out = run.fold(op, flat)
    if keepdim:
        out = out.reshape([1 if d in dims else n.shape[d] for d in range(n.dim())])
    return out


def _sum(run: _Evaluation, x: Any, dims: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return _along(run, "add", x, dims, keepdim)


def _mean(run: _Evaluation, x: Any, dims: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    total = _along(run, "add", x, dims, keepdim)
    count = x.numbers.numel() / max(total.numel(), 1)
    return run._pointwise("mul", (_Numbers(total), 1 / count), {})


def _amax(run: _Evaluation, x: Any, dims: Any = (), keepdim: bool = False) -> Tensor:
    return _along(run, "max", x, list(dims), keepdim)


def _amin(run: _Evaluation, x: Any, dims: Any = (), keepdim: bool = False) -> Tensor:
    return _along(run, "min", x, list(dims), keepdim)


def _prod(run: _Evaluation, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return _along(run, "mul", x, dim, keepdim)


def _matmul(run: _Evaluation, a: Any, b: Any) -> Tensor:
    x, y = run._number(a), run._number(b)
    left = x[None] if x.dim() == 1 else x
    right = y[:, None] if y.dim() == 1 else y
    terms = run._pointwise(
        "mul", (_Numbers(left.unsqueeze(-2)), _Numbers(right.mT.unsqueeze(-3))), {}
    )
    out = run.fold("add", terms)
    out = out.squeeze(-1) if y.dim() == 1 else out
    return out.squeeze(0 if y.dim() == 1 else -2) if x.dim() == 1 else out


def _addmm(
    run: _Evaluation, start: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = run._pointwise("mul", (_Numbers(_matmul(run, a, b)), float(alpha)), {})
    scaled = run._pointwise("mul", (start, float(beta)), {})
    return run._pointwise("add", (_Numbers(scaled), _Numbers(product)), {})


def _square(run: _Evaluation, x: Any) -> Tensor:
    return run._pointwise("mul", (x, x), {})


def _reciprocal(run: _Evaluation, x: Any) -> Tensor:
    return run._pointwise("div", (1.0, x), {})


def _rsub(run: _Evaluation, a: Any, b: Any, alpha: float = 1) -> Tensor:
    return run._pointwise("sub", (b, a), {}) if alpha == 1 else _no("rsub with alpha")


def _clamp(run: _Evaluation, x: Any, low: Any = None, high: Any = None) -> Tensor:
    n = _Numbers(run._number(x))
    if low is not None:
        n = _Numbers(run._pointwise("max", (n, low), {}))
    return (n if high is None else _Numbers(run._pointwise("min", (n, high), {}))).numbers


def _relu(run: _Evaluation, x: Any) -> Tensor:
    return run._pointwise("where", (_Numbers(run._pointwise("gt", (x, 0.0), {})), x, 0.0), {})


def _norm(
    run: _Evaluation, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Tensor:
    if ord != 2:
        _no(f"a norm of order {ord}")
    return run._pointwise(
        "sqrt", (_Numbers(_along(run, "add", _Numbers(_square(run, x)), dim, keepdim)),), {}
    )


def _index_put(
    run: _Evaluation, x: Any, indices: list, values: Any, accumulate: bool = False
) -> Tensor:
    into = run._number(x).clone()
    places = torch.arange(into.numel()).reshape(into.shape)[tuple(_slices(indices))]
    flat, new = into.reshape(-1), run._number(values).expand(places.shape).reshape(-1)
    for place, n in zip(places.reshape(-1).tolist(), new.tolist(), strict=True):
        flat[place] = run.e.add(int(flat[place]), n) if accumulate else n
    return flat.reshape(into.shape)


def _slices(indices: list) -> list:
    return [slice(None) if i is None else i for i in indices]


def _masked_fill(run: _Evaluation, x: Any, mask: Any, value: Any) -> Tensor:
    return run._pointwise("where", (mask, value, x), {})


def _no(what: str) -> Any:
    raise Unsupported(f"it uses {what}")


_SPECIAL: dict[Any, Callable[..., Tensor]] = {
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.amax.default: _amax,
    aten.amin.default: _amin,
    aten.prod.default: _prod,
    aten.prod.dim_int: _prod,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mv.default: _matmul,
    aten.dot.default: _matmul,
    aten.addmm.default: _addmm,
    aten.addmv.default: _addmm,
    aten.square.default: _square,
    aten.reciprocal.default: _reciprocal,
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp,
    aten.relu.default: _relu,
    aten.linalg_vector_norm.default: _norm,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
}


# ---------------------------------------------------------------- C++

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_INFIX_MASKS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_MASKS = {*_INFIX_MASKS, "and", "or", "not"}

# More captured numbers than this are read from memory at each use, not kept in registers.
_MOST_IN_REGISTERS = 16


# More calls of these than this are not expanded in place.
_LARGE = ("exp", "log", "log1p", "expm1", "sigmoid", "tanh", "sin", "cos")
_MOST_INLINE = 24


class Printer:
    # Statements for one group of `packs` packs of trajectories.

    def __init__(self, t: Trace, packs: int, inputs: dict[str, str]):
        self.e, self.packs, self.inputs = t.e, packs, inputs
        self.lines: list[str] = []
        # Which expressions differ between trajectories; arguments have smaller numbers.
        self.lane: list[bool] = []
        for i, (op, *_) in enumerate(self.e.nodes):
            below = any(self.lane[c] for c in self.e.children(i))
            self.lane.append(op == "input" or op in _MASKS or below)

    def name(self, i: int, pack: int) -> str:
        op, *args = self.e.nodes[i]
        if op == "literal":
            return args[0] if args[0] in ("true", "false") else _number(args[0])
        if op == "constant":
            return f"c{args[0]}[{args[1]}]"
        if op == "input":
            return f"{self.inputs[args[0]]}{args[1]}_{pack}"
        return f"t{i}_{pack}" if self.lane[i] else f"t{i}"

    def expression(self, i: int, pack: int) -> str:
        op, *args = self.e.nodes[i]
        names = [self.name(a, pack) for a in args]
        if op in _INFIX:
            return f"{names[0]} {_INFIX[op]} {names[1]}"
        if op == "neg":
            return f"-{names[0]}"
        if op in _INFIX_MASKS:
            return f"splat({names[0]}) {_INFIX_MASKS[op]} splat({names[1]})"
        if op in ("and", "or"):
            return f"{names[0]} {'&' if op == 'and' else '|'} {names[1]}"
        if op == "not":
            return f"~{names[0]}"
        if op == "where":
            return f"sel({names[0]}, splat({names[1]}), splat({names[2]}))"
        if op in ("max", "min", "pow", "atan2"):
            return f"f_{op}(splat({names[0]}), splat({names[1]}))"
        if op == "sign":
            return f"f_sign(splat({names[0]}))"
        return f"f_{op}({names[0]})"

    def uniform(self, roots: Iterable[int]) -> None:
        """Print what is the same for all trajectories: once, before the loops."""
        for i in self.e.reachable(roots):
            if not self.lane[i] and self.e.children(i):
                # Two-argument functions and selections exist for packs only.
                pack = self.e.nodes[i][0] in ("where", "max", "min", "pow", "atan2", "sign")
                self.lines.append(f"const T t{i} = ({self.expression(i, 0)}){'[0]' * pack};")

    def body(self, roots: Iterable[int]) -> list[str]:
        lines = []
        for i in self.e.reachable(roots):
            if self.lane[i] and self.e.nodes[i][0] != "input":
                kind = "M" if self.e.nodes[i][0] in _MASKS else "V"
                for u in range(self.packs):
                    lines.append(f"const {kind} t{i}_{u} = {self.expression(i, u)};")
        return lines

    def each(self, template: str, count: int) -> list[str]:
        """Print ``template`` for each component ``{k}`` and pack ``{u}``."""
        return [template.format(k=k, u=u) for k in range(count) for u in range(self.packs)]


def _number(hexadecimal: str) -> str:
    value = float.fromhex(hexadecimal)
    if math.isinf(value):
        return f"T({'-' if value < 0 else ''}__builtin_inf())"
    return 'T(__builtin_nan(""))' if math.isnan(value) else f"T({hexadecimal})"


def packs_of(t: Trace) -> int:
    """Return how many packs are moved together, so that the processor has enough to do."""
    size = len(t.e.reachable([*t.force, *t.velocity]))
    state = t.q_width + t.p_width
    return 4 if size <= 24 and state <= 4 else 2 if size <= 80 and state <= 12 else 1


def forward_source(t: Trace, scalar: str, compensated: bool) -> str:
    """Return the kernel that moves ``q`` and ``p`` in place."""
    packs = packs_of(t)
    groups = [_forward_group(t, n, compensated) for n in sorted({1, packs})]
    call = "(q, p, lost_q, lost_p, c, *plan, b, end)"
    signature = "T *q, T *p, T *lost_q, T *lost_p, const T *const *c, const Plan *plan"
    return library(scalar, groups, signature, call, packs)


def backward_source(t: Trace, scalar: str, slots: Sequence[int], rate: bool) -> str:
    """Return the kernel that undoes a run and pulls cotangents back through it.

    Gradients of the constants in ``slots`` come one after the other, that of the step last.
    """
    packs = max(1, packs_of(t) // 2)
    backward = _Backward(t, slots, rate)
    groups = [_backward_group(backward, n) for n in sorted({1, packs})]
    call = "(q, p, qb, pb, bars, c, *plan, b, end)"
    signature = "T *q, T *p, T *qb, T *pb, double *bars, const T *const *c, const Plan *plan"
    return library(scalar, groups, signature, call, packs)


def library(scalar: str, groups: list[str], signature: str, call: str, packs: int) -> str:
    calls = sum(text.count(f"= f_{f}(") for text in groups for f in _LARGE)
    many = "#define MANY_CALLS\n" if calls > _MOST_INLINE else ""
    main = f"  for (; b + {packs} * L <= end; b += {packs} * L) group{packs}{call};\n"
    return (
        f"#define T {scalar}\n{many}{HEADER}\n{''.join(groups)}"
        f'extern "C" void run({signature}, long begin, long end) {{\n  long b = begin;\n'
        f"{main if packs > 1 else ''}  for (; b < end; b += L) group1{call};\n}}\n"
    )


def opening(t: Trace, printer: Printer, roots: Sequence[int]) -> list[str]:
    slots = sorted(t.slots(roots))
    lines = [f"const T *const c{s} = c[{s}];" for s in slots]
    # Trajectories of the last pack that do not exist repeat the last one.
    lines += [f"const long v{u} = end - b - {u} * L;" for u in range(printer.packs)]
    for name, width in (("q", t.q_width), ("p", t.p_width)):
        lines += printer.each(f"V {name}{{k}}_{{u}} = {access('load', name, width)};", width)
    printer.uniform(roots)
    return [*lines, *printer.lines]


def access(function: str, name: str, width: int, value: str = "") -> str:
    return f"{function}({name} + (b + {{u}} * L) * {width} + {{k}}, {value}{width}, COUNT({{u}}))"


_COUNT = "#define COUNT(u) (v##u < L ? v##u : L)\n"


def barrier(t: Trace, roots: Sequence[int]) -> list[str]:
    used = sum(t.e.nodes[i][0] == "constant" for i in t.e.reachable(roots))
    return ["BARRIER;"] if used > _MOST_IN_REGISTERS else []


def _forward_group(t: Trace, packs: int, compensated: bool) -> str:
    printer = Printer(t, packs, {"q": "q", "p": "p"})
    roots = [*t.force, *t.velocity]
    lines = opening(t, printer, roots)
    states = (("q", t.q_width), ("p", t.p_width))
    if compensated:
        for name, width in states:
            load = access("load", f"lost_{name}", width)
            lines += printer.each(f"V l{name}{{k}}_{{u}} = {load};", width)

    def move(name: str, outputs: list[int], column: int) -> list[str]:
        out = [f"{{ const T h = row[{column}];", *printer.body(outputs)]
        for k, i in enumerate(outputs):
            for u in range(packs):
                x, slope = f"{name}{k}_{u}", printer.name(i, u)
                out.append(
                    f"kahan({x}, splat(h * {slope}), l{x});"
                    if compensated
                    else f"{x} += h * {slope};"
                )
        return [*out, "}"]

    drift = move("q", t.velocity, 1)
    lines += ["const double *row = plan.rows;", "if (plan.head) {", *drift, "}"]
    lines += ["long left = plan.repeats;", "for (long i = 1; i < plan.count;) {"]
    lines += [*barrier(t, roots), "row = plan.rows + 4 * i;", *move("p", t.force, 0), *drift]
    lines += ["if (++i == plan.end_mid && --left > 0) i = plan.mid;", "}"]
    for name, width in states:
        lines += printer.each(f"{access('store', name, width, f'{name}{{k}}_{{u}}, ')};", width)
        if compensated:
            out = access("store", f"lost_{name}", width, f"l{name}{{k}}_{{u}}, ")
            lines += printer.each(f"{out};", width)
    head = (
        f"__attribute__((noinline)) static void group{packs}(T *q, T *p, T *lost_q, T *lost_p, "
        "const T *const *c, const Plan &plan, long b, long end) {"
    )
    return "\n".join([head, _COUNT + "\n  ".join(lines), "#undef COUNT", "}\n"])


class _Backward:
    """The derivative expressions of kick and drift, contracted with the cotangents ``w``."""

    def __init__(self, t: Trace, slots: Sequence[int], rate: bool):
        self.t, self.rate = t, rate
        self.offsets: dict[int, int] = {}
        self.count = 0
        for slot in slots:
            self.offsets[slot] = self.count
            self.count += t.sizes[slot]
        self.kick = self._contract(t.force, "q", t.q_width)
        self.drift = self._contract(t.velocity, "p", t.p_width)

    def _contract(self, outputs: list[int], name: str, width: int) -> "_Contraction":
        e = self.t.e
        weights = [e.new("input", "w", k, 0) for k in range(len(outputs))]
        bars = e.pull_back(outputs, weights)
        zero = e.literal(0.0)
        state = [bars.get(e.new("input", name, k, 0), zero) for k in range(width)]
        constants = {}
        for i, bar in bars.items():
            op, *args = e.nodes[i]
            if op == "constant" and args[0] in self.offsets and e.value(bar) != 0:
                constants[self.offsets[args[0]] + args[1]] = bar
        power = zero
        if self.rate:
            for f, w in zip(outputs, weights, strict=True):
                power = e.add(power, e.mul(f, w))
        return _Contraction(outputs, state, constants, power)


@dataclass
class _Contraction:
    outputs: list[int]  # f
    state: list[int]  # w . df/dstate
    constants: dict[int, int]  # w . df/dconstant, by the place of its gradient
    power: int  # w . f

    @property
    def roots(self) -> list[int]:
        return [*self.outputs, *self.state, *self.constants.values(), self.power]


def _backward_group(b: _Backward, packs: int) -> str:
    t = b.t
    printer = Printer(t, packs, {"q": "q", "p": "p", "w": "w"})
    roots = [*b.kick.roots, *b.drift.roots]
    lines = opening(t, printer, roots)
    states = (("q", t.q_width), ("p", t.p_width))
    for name, width in states:
        # Trajectories that do not exist have no cotangents, and so no gradients.
        load = access("load_or_zero", f"{name}b", width)
        lines += printer.each(f"V {name}b{{k}}_{{u}} = {load};", width)
    size = max(1, b.count + b.rate)
    lines += [f"V g_{u}[{size}] = {{}};" for u in range(packs)]

    def undo(part: _Contraction, moved: str, other: str, column: int) -> list[str]:
        # moved -= h f(other); other_bar += h J^T moved_bar
        printer.inputs["w"] = f"{moved}b"
        out = [f"{{ const T h = row[{column}];", *printer.body(part.roots)]
        for u in range(packs):
            for k, i in enumerate(part.outputs):
                out.append(f"{moved}{k}_{u} -= h * {printer.name(i, u)};")
            for place, i in part.constants.items():
                out.append(f"g_{u}[{place}] += h * {printer.name(i, u)};")
            if b.rate:
                out.append(
                    f"g_{u}[{b.count}] += T(row[{column + 2}]) * {printer.name(part.power, u)};"
                )
            # Last, for the weights of a drift are read above.
            for k, i in enumerate(part.state):
                if t.e.value(i) != 0:
                    out.append(f"{other}b{k}_{u} += h * {printer.name(i, u)};")
        return [*out, "}"]

    drift = undo(b.drift, "q", "p", 1)
    lines += ["const double *row;", "long left = plan.repeats;"]
    lines += ["for (long i = plan.count; i > 1;) {", *barrier(t, roots)]
    lines += ["row = plan.rows + 4 * --i;", *drift, *undo(b.kick, "p", "q", 0)]
    lines += ["if (i == plan.mid && --left > 0) i = plan.end_mid;", "}"]
    lines += ["row = plan.rows;", "if (plan.head) {", *drift, "}"]
    for name, width in states:
        for x in (name, f"{name}b"):
            lines += printer.each(f"{access('store', x, width, f'{x}{{k}}_{{u}}, ')};", width)
    if b.count + b.rate:
        lines.append(f"for (long k = 0; k < {size}; ++k) {{")
        lines += [f"collect(bars + k, g_{u}[k], COUNT({u}));" for u in range(packs)]
        lines.append("}")
    head = (
        f"__attribute__((noinline)) static void group{packs}(T *q, T *p, T *qb, T *pb, "
        "double *bars, const T *const *c, const Plan &plan, long b, long end) {"
    )
    return "\n".join([head, _COUNT + "\n  ".join(lines), "#undef COUNT", "}\n"])
