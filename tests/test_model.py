"""The model around the layers: blocks, the stream, sampling, and states on disk."""

import math

import pytest
import torch
from torch import nn

from darboux import GeometryError
from darboux.learners import baselines as b, checkpoints, model as m
from darboux.learners.attention import SoftmaxAttention

MIXERS = {
    "gru": lambda: b.GRU(8),
    "lstm": lambda: b.LSTM(8, 6),
    "softmax": lambda: SoftmaxAttention(8, 2),
    "linear attention": lambda: b.LinearAttention(8, 2, chunk=4),
}


def make(name="gru", vocabulary=5, seed=0, **options):
    torch.manual_seed(seed)
    layers = [m.Block(8, MIXERS[name]()), m.Block(8, MIXERS[name](), hidden=0)]
    return m.SequenceModel(vocabulary, 8, layers, **options).double()


def ids(batch=2, time=12, vocabulary=5, seed=1):
    return torch.randint(vocabulary, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MIXERS, ids=str)
def model(request):
    return make(request.param)


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    block, x = m.Block(8, b.GRU(8), hidden=5), torch.randn(2, 7, 8)
    assert block.mlp is not None
    first, up, _, down = block.mlp
    h = x + block.mixer(block.norm(x))[0]
    want = h + down(nn.functional.gelu(up(first(h))))
    torch.testing.assert_close(block(x)[0], want)
    bare = m.Block(8, b.GRU(8), hidden=0)
    assert m.count_parameters(bare) == 16 + m.count_parameters(b.GRU(8))


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7]], ids=str)
def test_chunks_give_what_the_whole_gives(model, sizes):
    tokens = ids()
    whole, _ = model(tokens)
    assert whole.shape == (2, 12, 5)
    state, parts = None, []
    for part in tokens.split(sizes, 1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    streamed = torch.cat(list(m.stream(model, tokens, chunk=5)), 1)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-12)
    assert not streamed.requires_grad
    again = torch.cat(list(m.stream(model, iter(tokens.split(5, 1)))), 1)
    assert torch.equal(again, streamed)


def test_no_layer_sees_the_future(model):
    tokens = ids()
    other = torch.cat([tokens[:, :6], (tokens[:, 6:] + 1) % 5], 1)
    assert torch.equal(model(other)[0][:, :6], model(tokens)[0][:, :6])


def test_heads():
    tokens = ids()
    assert make(head=3)(tokens)[0].shape == (2, 12, 3)
    assert make(head=nn.Identity())(tokens)[0].shape == (2, 12, 8)
    plain, tied = make(), make(tie=True)
    assert isinstance(tied.head, nn.Linear)
    assert tied.head.weight is tied.embedding.weight
    assert m.count_parameters(plain) - m.count_parameters(tied) == 5 * 8 + 5
    bare = m.SequenceModel(5, 8, [b.GRU(8)], norm=None)
    want = bare.head(bare.layers[0](bare.embedding(tokens))[0])
    assert torch.equal(bare(tokens)[0], want)


def test_greedy_generation_is_the_whole_forward_pass(model):
    prompt = ids(time=4)
    found = m.generate(model, prompt, 6, temperature=0.0)
    assert found.tokens.shape == (2, 6)
    with torch.no_grad():
        tokens = prompt
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(found.tokens, tokens[:, 4:])
    first = m.generate(model, prompt, 2, temperature=0.0)
    rest = m.generate(model, first.tokens[:, -1:], 4, temperature=0.0, state=first.state)
    assert torch.equal(torch.cat([first.tokens, rest.tokens], 1), found.tokens)


class Fixed(nn.Module):
    """Logits that do not depend on the tokens."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, tokens, state=None):
        return self.logits.expand(*tokens.shape, -1), state


def test_samples_follow_the_softmax():
    model, n = Fixed([0.0, 1.0, 2.0, -1.0]), 4000
    prompt = torch.zeros(n, 1, dtype=torch.int64)

    def shares(**options):
        generator = torch.Generator().manual_seed(0)
        found = m.generate(model, prompt, 1, generator=generator, **options).tokens
        return torch.bincount(found.flatten(), minlength=4) / n

    for temperature in (0.5, 1.0, 3.0):
        want = (model.logits / temperature).softmax(-1)
        assert (shares(temperature=temperature) - want).abs().max() < 4 * 0.5 / math.sqrt(n)
    two = shares(top_k=2)
    assert two[0] == two[3] == 0
    assert abs(two[2] - 1 / (1 + math.exp(-1))) < 4 * 0.5 / math.sqrt(n)
    assert shares(temperature=1e-30).tolist() == [0, 0, 1, 0]
    assert torch.equal(shares(), shares())  # the generator decides


def test_generation_leaves_the_model_as_it_was():
    model = make()
    model.layers[0].eval()
    m.generate(model, ids(time=2), 2)
    assert [layer.training for layer in model.layers] == [False, True]
    with pytest.raises(GeometryError, match="logits are NaN"):
        m.generate(Fixed([math.nan, 0.0]), ids(time=1), 1)
    with pytest.raises(ValueError, match="temperature -1"):
        m.generate(model, ids(), 1, temperature=-1)


# States on disk


def test_a_saved_state_goes_on_to_the_last_bit(model, tmp_path):
    tokens = ids()
    want = model(tokens[:, 8:], model(tokens[:, :8])[1])[0]
    m.save_state(tmp_path / "state", model, model(tokens[:, :8])[1])
    state = m.load_state(tmp_path / "state", model)
    assert type(state[0]) is type(model(tokens)[1][0])
    assert torch.equal(model(tokens[:, 8:], state)[0], want)
    assert [f.name for f in tmp_path.iterdir()] == ["state"]


def test_the_state_of_another_model_is_refused(tmp_path):
    model, tokens = make(), ids()
    m.save_state(tmp_path / "state", model, model(tokens)[1])
    m.load_state(tmp_path / "state", make())  # the same numbers
    others = [make(seed=1), make("lstm"), make().float(), make(head=3), make()]
    with torch.no_grad():
        others[-1].embedding.weight[4, 7] += 1e-15
    for other in others:
        with pytest.raises(checkpoints.CheckpointError, match="the state of another model"):
            m.load_state(tmp_path / "state", other)
    with pytest.raises(ValueError, match="tuple of 2: the state of another model"):
        model(tokens, model(tokens)[1][:1])
    with pytest.raises(TypeError, match="expected Hidden"):
        model(tokens, make("lstm")(tokens)[1])


def test_a_damaged_file_is_refused(tmp_path):
    model, path = make(), tmp_path / "state"
    m.save_state(path, model, model(ids())[1])
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-5] ^= 1  # one bit of one number
    for damaged in (whole[:-1], whole[:50], b"", bytes(changed), b"x" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(checkpoints.CheckpointError, match="not a whole file"):
            m.load_state(path, model)
    with pytest.raises(FileNotFoundError, match="no file"):
        m.load_state(tmp_path / "other", model)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoints.write(path, {"a": torch.ones(3)}, {})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write(path, {"a": torch.zeros(3)}, {})
    assert torch.equal(checkpoints.read(path)[0]["a"], torch.ones(3))
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_trees_come_back():
    tree = (b.Hidden(torch.ones(2)), (b.HiddenCell(torch.zeros(1), torch.ones(1)), 3))
    leaves = checkpoints.flatten(tree)
    assert list(leaves) == ["0.hidden", "1.0.hidden", "1.0.cell", "1.1"]
    back = checkpoints.unflatten(tree, dict(leaves))
    assert isinstance(back[1][0], b.HiddenCell)
    assert back[1][1] == 3
    with pytest.raises(checkpoints.CheckpointError, match=r"no 1\.1 in the file"):
        checkpoints.unflatten(tree, {k: v for k, v in leaves.items() if k != "1.1"})


def test_counts():
    model = make("linear attention")
    state = model(ids())[1]
    assert m.state_bytes(state) == 2 * 2 * 2 * (4 * 4 + 4) * 8  # layers, batch, heads, float64
    model.embedding.weight.requires_grad_(False)
    assert m.count_parameters(model) == sum(p.numel() for p in model.parameters()) - 40


# The door


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            torch.tensor([[0, 1], [7, -1]]),
            ValueError,
            r"token 7 at batch 1, time 0.*0 to 4 \(2 of 4",
        ),
        (torch.tensor([[0, -2]]), ValueError, "token -2 at batch 0, time 1"),
        (torch.zeros(2, 3), TypeError, "float32, expected a tensor of int64"),
        ([[1, 2]], TypeError, "list, expected a tensor"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \(3,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "time > 0"),
    ],
)
def test_bad_tokens(tokens, error, message):
    with pytest.raises(error, match=message):
        make()(tokens)


def test_bad_sizes():
    with pytest.raises(ValueError, match="width 6, but that of its mixer is 8"):
        m.Block(6, b.GRU(8))
    with pytest.raises(ValueError, match="layer 0 has width 8, expected 6"):
        m.SequenceModel(5, 6, [m.Block(8, b.GRU(8))])
    with pytest.raises(ValueError, match="at least one of each"):
        m.SequenceModel(5, 6, [])
    with pytest.raises(ValueError, match="tie=True has its own head"):
        make(head=3, tie=True)
    with pytest.raises(ValueError, match="cannot be rotated"):
        SoftmaxAttention(10, 2)
    mixed = make()
    mixed.layers[1].float()
    with pytest.raises(TypeError, match="Block: x has dtype torch.float64, expected torch.float32"):
        mixed(ids())
