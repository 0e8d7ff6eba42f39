"""Training: kills and resumes to the last bit, several processes, what the loop reports."""

import csv
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from typing import Any

import geoopt
import pytest
import torch
from torch import nn

from darboux import ConvergenceError
from darboux.learners import baselines as b, checkpoints, tasks, training
from darboux.learners.model import Block, SequenceModel
from darboux.learners.training import evaluate, fit

FORK = multiprocessing.get_context("fork")  # a new interpreter costs seconds


class Dropping(nn.Module):
    """A mixer that needs the global random state."""

    def __init__(self):
        super().__init__()
        self.mixer, self.drop = b.GRU(8), nn.Dropout(0.3)

    def forward(self, x, state=None):
        y, state = self.mixer(x, state)
        return self.drop(y), state


def make(seed=0, mixer: Any = Dropping):
    torch.manual_seed(seed)
    return SequenceModel(2, 8, [Block(8, mixer(), hidden=0)])


def batches(step, generator):
    return tasks.parity(8, 10, generator=generator)


def same(first, second):
    """Say whether two models have the same numbers."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


STEPS = 40


def slow_child(path):
    """Train slowly, with a checkpoint every few steps, until something kills this process."""

    def slow(step, generator):
        time.sleep(0.02)
        return batches(step, generator)

    fit(make(), slow, steps=STEPS, checkpoint_to=path / "run", every=7, log_to=path)


def rows(path):
    if not (path / "log.csv").exists():
        return []
    with open(path / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_training_goes_on_to_the_last_bit(tmp_path):
    whole_model = make()
    whole = fit(whole_model, batches, steps=STEPS, log_to=tmp_path / "whole")

    child = FORK.Process(target=slow_child, args=(tmp_path,))
    child.start()
    for _ in range(3000):
        if not child.is_alive() or len(rows(tmp_path)) > 23:
            break
        time.sleep(0.02)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert 23 < len(rows(tmp_path)) < STEPS

    model = make(seed=5)
    run = fit(model, batches, steps=STEPS, checkpoint_to=tmp_path / "run", every=7,
              log_to=tmp_path, resume=True)  # fmt: skip
    assert torch.equal(run.losses, whole.losses)
    assert same(model, whole_model)
    # the log has each step once, also those after the last checkpoint that were made twice
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(STEPS))
    assert [float(row["loss"]) for row in rows(tmp_path)] == whole.losses.tolist()


def test_a_crash_between_any_two_renames_loses_nothing(tmp_path, monkeypatch):
    whole = fit(make(), batches, steps=8)
    real = os.replace
    for count in range(1, 6):  # the first checkpoint makes two renames, the others three each
        path = tmp_path / str(count) / "run"
        calls = itertools.count()

        def crash(*args, calls=calls, count=count):
            if next(calls) == count + 2:
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.os, "replace", crash)
            with pytest.raises(KeyboardInterrupt):
                fit(make(), batches, steps=8, checkpoint_to=path, every=2)
        assert checkpoints.find(path) is not None
        model = make(seed=9)
        run = fit(model, batches, steps=8, checkpoint_to=path, every=2, resume=True)
        assert torch.equal(run.losses, whole.losses), count


def test_a_damaged_checkpoint_loses_nothing(tmp_path):
    path, steps = tmp_path / "run", 6
    fit(make(), batches, steps=steps, checkpoint_to=path, every=3)
    good, kept = path.read_bytes(), (tmp_path / "run.previous").read_bytes()
    path.write_bytes(good[: len(good) // 2])
    model, before = make(seed=3), make(seed=3)
    with pytest.raises(checkpoints.CheckpointError, match=r"the one before it is .*run\.previous"):
        fit(model, batches, steps=8, checkpoint_to=path, resume=True)
    assert same(model, before)
    assert (tmp_path / "run.previous").read_bytes() == kept
    os.replace(tmp_path / "run.previous", path)
    assert torch.equal(
        fit(model, batches, steps=steps, checkpoint_to=path, resume=True).losses,
        fit(make(), batches, steps=steps).losses,
    )


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "run"
    fit(make(), batches, steps=2, checkpoint_to=path)
    with pytest.raises(FileExistsError, match="resume=True"):
        fit(make(), batches, steps=2, checkpoint_to=path)
    with pytest.raises(ValueError, match=r"lr is 0.1, expected 0.001"):
        fit(make(), batches, steps=2, checkpoint_to=path, resume=True, lr=0.1)
    other = make(mixer=lambda: b.LSTM(8))
    before = make(mixer=lambda: b.LSTM(8))
    with pytest.raises(checkpoints.CheckpointError, match="another model.*nothing was changed"):
        fit(other, batches, steps=2, checkpoint_to=path, resume=True)
    assert same(other, before)
    trained = make()
    fit(trained, batches, steps=2)
    assert same(checkpoints.load_parameters(path, make(seed=4)), trained)


class Orthogonal(nn.Module):
    """A linear recurrence by a matrix that has to stay orthogonal."""

    def __init__(self):
        super().__init__()
        start = torch.linalg.qr(torch.randn(8, 8)).Q
        self.matrix = geoopt.ManifoldParameter(start, manifold=geoopt.Stiefel())  # pyright: ignore

    def forward(self, x, state=None):
        return x @ self.matrix, state


def test_parameters_stay_on_their_manifold(tmp_path):
    options = {"steps": 30, "lr": 0.05, "optimizer": "riemannian_adam"}
    model = make(mixer=Orthogonal)
    (matrix,) = (p for p in model.parameters() if isinstance(p, geoopt.ManifoldParameter))
    start = matrix.detach().clone()
    run = fit(model, batches, **options)
    matrix = matrix.detach()
    assert (matrix.T @ matrix - torch.eye(8)).abs().max() < 1e-5
    assert (matrix - start).abs().max() > 0.05
    with pytest.raises(ValueError, match=r"leave the manifold of layers.0.mixer.matrix"):
        fit(make(mixer=Orthogonal), batches, steps=1)
    # a stop that is an error after eleven batches
    short = [batches(i, torch.Generator().manual_seed(i)) for i in range(30)]
    whole = fit(make(mixer=Orthogonal), short, **options)
    with pytest.raises(ValueError, match="batches ended after 11 steps, expected 30"):
        fit(make(mixer=Orthogonal), short[:11], **options, checkpoint_to=tmp_path / "run", every=4)
    again = fit(make(seed=2, mixer=Orthogonal), short, **options,
                checkpoint_to=tmp_path / "run", resume=True)  # fmt: skip
    assert torch.equal(again.losses, whole.losses)
    assert not torch.equal(run.losses, whole.losses)


# Several processes


def halves(rank, count):
    """Return this process's share of three batches, with unequally many targets."""
    found = []
    for seed in range(3):
        task = tasks.parity(6, 9, generator=torch.Generator().manual_seed(seed))
        task.targets[:2, :5] = -100
        found.append(tasks.Task(*(part.chunk(count)[rank] for part in task)))
    return found


PLAIN = {"steps": 3, "lr": 0.1, "optimizer": "sgd", "schedule": "constant", "clip": None}


def two_processes(work, folder):
    """Run ``work(rank, folder)`` in two processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank):
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        warnings.simplefilter("ignore")
        try:
            work(rank, folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    children = [FORK.Process(target=process, args=(r,)) for r in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0, 0]


def close(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def train_plainly(rank, folder):
    run = fit(make(mixer=lambda: b.GRU(8)).double(), halves(rank, 2), **PLAIN,
              checkpoint_to=folder / "run", log_to=folder)  # fmt: skip
    close(run.losses, torch.load(folder / "want"))


def test_two_processes_are_one_at_twice_the_batch(tmp_path):
    model = make(mixer=lambda: b.GRU(8)).double()
    losses = fit(model, halves(0, 1), **PLAIN).losses
    torch.save(losses, tmp_path / "want")
    two_processes(train_plainly, tmp_path)
    other = checkpoints.load_parameters(tmp_path / "run", make(mixer=lambda: b.GRU(8)).double())
    close(other.state_dict(), model.state_dict())
    assert not same(other, make(mixer=lambda: b.GRU(8)).double())
    assert "random.1.torch" in checkpoints.read(tmp_path / "run")[0]
    assert len(rows(tmp_path)) == 3


BOTH = tuple(itertools.product((False, True), repeat=2))


class Sharing(nn.Module):
    """A mixer with a scalar and a parameter of other blocks, which cannot be cut."""

    def __init__(self, turn):
        super().__init__()
        self.mixer, self.turn, self.scale = b.GRU(8), turn, nn.Parameter(torch.tensor(0.5))

    def forward(self, x, state=None):
        y, state = self.mixer(x, state)
        return self.scale * self.turn(y), state


def make_sharing(seed=0):
    torch.manual_seed(seed)
    turn = nn.Linear(8, 8)
    blocks = [Block(8, Sharing(turn), hidden=9) for _ in range(2)]
    return SequenceModel(2, 8, blocks, tie=True).double()


def sharded_options(made) -> dict[str, Any]:
    """Return options of :func:`fit`; its optimizers come into ``made``."""

    def adamw(groups, lr):
        made.append(torch.optim.AdamW(groups, lr=lr, foreach=True))  # the way of a GPU
        return made[-1]

    return {"steps": 3, "lr": 0.01, "optimizer": adamw, "schedule": "constant", "clip": 0.5}


def count_held(optimizer):
    """Count the numbers of this process: its parameters and what Adam keeps of each."""
    leaves = [*optimizer.state, *(x for s in optimizer.state.values() for x in s.values())]
    return sum(getattr(x, "to_local", lambda x=x: x)().numel() for x in leaves)


def train_sharded(rank, folder):
    made: list[torch.optim.Optimizer] = []
    options = sharded_options(made)
    wanted_losses, wanted_norms, wanted = torch.load(folder / "want")
    whole = {}
    for shard in (False, True):
        model, log = make_sharing(seed=rank), folder / f"log{shard}"  # those of the first count
        whole[shard] = fit(model, halves(rank, 2), **options, shard=shard, log_to=log,
                           checkpoint_to=folder / f"run{shard}", every=2).losses  # fmt: skip
        close(whole[shard], wanted_losses)
        close(model.state_dict(), wanted)
        assert {type(p) for p in model.parameters()} == {nn.Parameter}
        if rank == 0:
            close(norms(log), wanted_norms)
        evaluate(model, halves(0, 1)[0])
    whole_count = count_held(made[0])
    assert count_held(made[1]) < 0.65 * whole_count

    for first, second in BOTH:
        path = folder / f"{first}{second}{rank}"
        shutil.copy(folder / f"run{first}.previous", path)
        model = make_sharing(seed=5)
        run = fit(model, halves(rank, 2), **options, shard=second, checkpoint_to=path, resume=True)
        close(run.losses, whole[second])
        assert first != second or torch.equal(run.losses, whole[second])
        assert count_held(made[-1]) < (0.65 if second else 1.01) * whole_count
        close(model.state_dict(), wanted)

    def loss(logits, targets):
        return logits.square().mean() * (math.nan if next(count) == 1 else 1.0)

    model, before, count = make_sharing(), make_sharing(), itertools.count()
    with pytest.raises(ConvergenceError):
        fit(model, halves(rank, 2), **options, loss=loss, shard=True)
    count = itertools.count(2)
    fit(before, halves(rank, 2), **{**options, "steps": 1}, loss=loss, shard=True)
    assert same(model, before)


def norms(folder):
    return torch.tensor([float(row["gradient"]) for row in rows(folder)], dtype=torch.float64)


def test_sharded_is_whole(tmp_path):
    model, options = make_sharing(), sharded_options([])
    run = fit(model, halves(0, 1), **options, log_to=tmp_path, shard=True)
    assert norms(tmp_path).max() > options["clip"]
    torch.save((run.losses, norms(tmp_path), model.state_dict()), tmp_path / "want")
    two_processes(train_sharded, tmp_path)
    first, *rest = (checkpoints.read(tmp_path / f"{a}{b}0")[0] for a, b in BOTH)
    for other in rest:
        close({n: t for n, t in other.items() if n[:6] != "random"},
              {n: t for n, t in first.items() if n[:6] != "random"})  # fmt: skip
    with pytest.raises(ValueError, match=r"shard=True would cut layers.0.mixer.matrix, each"):
        fit(make(mixer=Orthogonal), batches, steps=1, optimizer="riemannian_adam", shard=True)


# The loop


@pytest.mark.parametrize("steps", [7, 100])
def test_schedules_are_torchs(steps):
    def lrs(scheduler, **options):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = scheduler(optimizer, **options)
            for _ in range(steps):
                yield optimizer.param_groups[0]["lr"]
                schedule.step()

    s = torch.optim.lr_scheduler
    for ours, theirs in [
        (training.cosine, lrs(s.CosineAnnealingLR, T_max=steps)),
        (training.one_cycle, lrs(s.OneCycleLR, max_lr=1.0, total_steps=steps + 1)),
    ]:
        total = steps + 1 if ours is training.one_cycle else steps
        got = [ours(i, total, 0) for i in range(steps)]
        assert got == pytest.approx(list(theirs), abs=1e-12)
    warm = [training.cosine(i, 100, 4) for i in range(5)]
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [training.constant(i, 100, 1) for i in range(3)] == [0.5, 1, 1]


def test_the_step_is_adamws():
    """One step by hand: the decay on matrices only, the rate of the schedule."""
    model, twin = (make(mixer=lambda: b.GRU(8)) for _ in range(2))
    task = batches(0, torch.Generator().manual_seed(3))
    run = fit(model, [task], steps=1, lr=0.01, weight_decay=0.5, clip=None)
    loss = nn.functional.cross_entropy(twin(task.tokens)[0].flatten(0, 1), task.targets.flatten())
    loss.backward()
    assert float(run.losses[0]) == pytest.approx(float(loss.detach()), rel=1e-6)
    for new, old in zip(model.parameters(), twin.parameters(), strict=True):
        assert old.grad is not None
        decayed = old.detach() * (1 - 0.01 * 0.5 * (old.dim() > 1))
        step = 0.01 * old.grad / (old.grad.abs() + 1e-8)
        torch.testing.assert_close(new.detach(), decayed - step, rtol=0, atol=1e-6)


def test_it_learns_parity_with_the_trivial_layer_and_streams_it():
    torch.manual_seed(0)
    layer = b.CumulativePhase(8, 16)
    model = SequenceModel(2, 8, [layer], norm=None)
    run = fit(model, lambda step, g: tasks.parity(32, 20, generator=g), steps=150, lr=0.03)
    assert run.losses[:10].mean() > 0.6
    found = evaluate(model, tasks.parity(100, 20, generator=torch.Generator().manual_seed(1)))
    assert found.accuracy == 1.0
    assert found.asked == 2000


def test_evaluation_counts_what_is_asked():
    model = make().eval()
    task = tasks.parity(5, 12, generator=torch.Generator().manual_seed(0))
    task.targets[:3, ::2] = -100
    right, total, asked = 0, 0.0, 0
    logits = model(task.tokens)[0].detach().double()
    for row, target in zip(logits.flatten(0, 1), task.targets.flatten().tolist(), strict=True):
        if target != -100:
            asked += 1
            right += int(row.argmax()) == target
            total -= float(row.log_softmax(0)[target])
    model.train()
    for chunk in (None, 5):
        found = evaluate(model, task, chunk=chunk)
        assert found.asked == asked
        assert found.accuracy == right / asked
        assert found.loss == pytest.approx(total / asked, rel=1e-6)
        assert found.bits == pytest.approx(found.loss / math.log(2))
    assert model.training
    g = torch.Generator
    parts = list(tasks.running(tasks.parity, 3, 100, 17, generator=g().manual_seed(1)))
    whole = tasks.Task(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))
    streamed = evaluate(model, iter(parts))
    assert streamed.accuracy == evaluate(model, whole).accuracy
    with pytest.raises(ValueError, match="no targets"):
        evaluate(model, tasks.Task(task.tokens, torch.full_like(task.tokens, -100)))


def test_bf16_trains_float32_parameters():
    models = [make(mixer=lambda: b.LinearAttention(8, 2)) for _ in range(2)]
    runs = [
        fit(model, batches, steps=5, precision=precision)
        for model, precision in zip(models, ("float32", "bf16"), strict=True)
    ]
    assert all(p.dtype == torch.float32 for p in models[1].parameters())
    assert not torch.equal(runs[0].losses, runs[1].losses)
    torch.testing.assert_close(runs[0].losses, runs[1].losses, rtol=0.03, atol=0)


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model, before = make(), make()

    def loss(logits, targets):
        return logits.sum() * (math.nan if next(count) == 2 else 0.0)

    count = itertools.count()
    with pytest.raises(ConvergenceError, match="loss nan and gradient nan at step 2") as error:
        fit(model, batches, steps=5, loss=loss, weight_decay=0.0)
    assert error.value.iterations == 2
    assert same(model, before)


def test_logs(tmp_path, capsys):
    run = fit(make(), batches, steps=4, log_to=tmp_path, progress=True)
    seen = rows(tmp_path)
    assert tuple(seen[0]) == training.FIELDS
    assert [float(row["loss"]) for row in seen] == run.losses.tolist()
    assert [float(row["lr"]) for row in seen] == pytest.approx(
        [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    )
    assert all(float(row["gradient"]) > 0 for row in seen)
    pytest.importorskip("tqdm")
    assert "4/4" in capsys.readouterr().err
    pytest.importorskip("tensorboard")
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_errors(monkeypatch):
    for options, message in [
        ({"steps": 0}, "steps 0"),
        ({"schedule": "linear"}, "'linear', expected one of constant"),
        ({"precision": "fp8"}, "'fp8', expected 'float32'"),
        ({"optimizer": "newton"}, "'newton', expected one of adamw"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(make(), batches, **{"steps": 1, **options})
    empty = tasks.Task(torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), -100))
    with pytest.raises(ValueError, match="a batch without a target"):
        fit(make(), [empty], steps=1)
    with pytest.raises(ValueError, match="no trainable parameters"):
        fit(make().requires_grad_(False), batches, steps=1)
    with pytest.raises(ValueError, match="chunk 0"):
        next(training.stream(make(), empty.tokens, chunk=0))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RuntimeError, match=r"pip install 'darboux\[train\]'"):
        checkpoints.write("nowhere", {}, {})
