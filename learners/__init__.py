"""Sequence models assembled from the layers below, and what it takes to train and compare them.

A layer maps ``(batch, time, width)`` to the same: ``y, state = layer(x, state)``; whole, in chunks
or token by token. :mod:`~darboux.learners.tasks`, :mod:`~darboux.learners.forensics` and
:mod:`~darboux.learners.recurrence` are modules of functions.
"""

from darboux.learners import forensics, recurrence, tasks
from darboux.learners.attention import KeyValue, SoftmaxAttention
from darboux.learners.baselines import (
    GRU,
    LSTM,
    CumulativePhase,
    DiagonalRecurrence,
    LinearAttention,
)
from darboux.learners.checkpoints import CheckpointError, load_parameters
from darboux.learners.flow_block import FlowBlock
from darboux.learners.head_maps import (
    attention_maps,
    induction_score,
    previous_token_score,
    repeated_tokens,
)
from darboux.learners.model import (
    Block,
    Generated,
    SequenceModel,
    count_parameters,
    evaluating,
    generate,
    load_state,
    save_state,
    state_bytes,
    stream,
)
from darboux.learners.momentum_attention import (
    Filter,
    FilteredAttention,
    MomentumAttention,
    convolved_keys,
    key_value_shift,
    scaling_law,
    smeared_keys,
)
from darboux.learners.spectral_attention import Relaxation, SpectralAttention
from darboux.learners.sympformer import MomentumBlock, SympFormer
from darboux.learners.symplectic_attention import SymplecticAttention
from darboux.learners.training import Evaluation, Fit, evaluate, fit

__all__ = [
    "GRU",
    "LSTM",
    "Block",
    "CheckpointError",
    "CumulativePhase",
    "DiagonalRecurrence",
    "Evaluation",
    "Filter",
    "FilteredAttention",
    "Fit",
    "FlowBlock",
    "Generated",
    "KeyValue",
    "LinearAttention",
    "MomentumAttention",
    "MomentumBlock",
    "Relaxation",
    "SequenceModel",
    "SoftmaxAttention",
    "SpectralAttention",
    "SympFormer",
    "SymplecticAttention",
    "attention_maps",
    "convolved_keys",
    "count_parameters",
    "evaluate",
    "evaluating",
    "fit",
    "forensics",
    "generate",
    "induction_score",
    "key_value_shift",
    "load_parameters",
    "load_state",
    "previous_token_score",
    "recurrence",
    "repeated_tokens",
    "save_state",
    "scaling_law",
    "smeared_keys",
    "state_bytes",
    "stream",
    "tasks",
]
