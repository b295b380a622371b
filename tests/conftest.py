"""What the tests share: paths, one thread (the machine may have few cores), a tiny model."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algos")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")             # no test needs a network

import pytest
import torch

torch.set_num_threads(1)

WORDS = "pick up place the red green blue cube bowl on and in".split()


@pytest.fixture
def tiny():
    """Makes a model of a few thousand parameters, always with the same weights; keywords are sft.tiny's."""
    import sft
    import vla_opd

    def make(decoding="parallel", **kw):
        made = sft.tiny(**{**dict(words=WORDS, image=32, chunk=2, action_dim=3, decoding=decoding, width=32, tokens=4, tower=16), **kw})
        torch.manual_seed(0)
        return vla_opd.VLA(made.config, made.tokenizer).eval()
    return make
