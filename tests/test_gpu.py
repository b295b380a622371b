"""The policy on a GPU: what the CPU says.  For the scripts: TEST_DEVICE=cuda python -m pytest tests/test_scripts.py tests/test_sft.py"""
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_policy import batch, worst
from vla_opd import VLA

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here that torch can use")
DECODINGS = pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)       # torch's default rounds the convolutions of float32 to 10 bits


def twice(tmp_path, tiny, **kw):
    """A saved model on both."""
    tiny(**kw).save(tmp_path / "m")
    return [VLA.load(tmp_path / "m", device) for device in ("cpu", "cuda")]


@DECODINGS
def test_official_layout(decoding):
    golden = Path(__file__).parent / "golden"
    a, model = load_file(golden / "answers.safetensors", "cuda"), VLA.load(golden, "cuda", decoding=decoding, chunk=2 if decoding == "parallel" else 1)
    with torch.no_grad():
        assert worst(model(a["images"], a["ids"], a["mask"], a["tokens"])[0].cpu(), a[decoding].cpu()) < 1e-4


@DECODINGS
def test_logits_gradients_and_greedy_tokens(tmp_path, tiny, decoding):
    models, tokens, found = twice(tmp_path, tiny, decoding=decoding), torch.randint(256, (3, 6), generator=torch.Generator().manual_seed(0)), []
    for model in models:
        z = model.score(*batch(model), tokens.to(model.device))
        z.log_softmax(-1).gather(-1, tokens.to(z.device)[..., None]).sum().backward()
        found.append([z.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None), model.act(*batch(model), 0)[0].cpu()])
    (*cpu, greedy), (*gpu, also) = found
    assert len(cpu) == len(gpu) > 20 and torch.equal(greedy, also)
    for a, b in zip(cpu, gpu):
        assert worst(a, b) < 1e-4 * max(1, a.abs().max())


@DECODINGS
def test_sampling_follows_its_seed_and_its_log_probabilities(tmp_path, tiny, decoding):
    model, draw = twice(tmp_path, tiny, decoding=decoding)[1], lambda seed: torch.Generator("cuda").manual_seed(seed)
    (a, logp, _), (b, *_), (c, *_) = (model.act(*batch(model), 1.6, draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with torch.no_grad():
        again = (model.score(*batch(model), a) / 1.6).log_softmax(-1).gather(-1, a[..., None])[..., 0]
    assert worst(again.cpu(), logp.cpu()) < 1e-4


@DECODINGS
def test_bfloat16_and_lora(tmp_path, tiny, decoding):
    """Both give float32 logits near the exact ones; the adapter's weights stay float32 and get every gradient."""
    exact, _ = twice(tmp_path, tiny, decoding=decoding)
    model, tokens = VLA.load(tmp_path / "m", "cuda", torch.bfloat16, lora_rank=4), torch.zeros(3, 6, dtype=torch.long)
    z, want = model.score(*batch(model), tokens.cuda()), exact.score(*batch(exact), tokens)
    assert z.dtype == torch.float32 and 0 < worst(z.detach().cpu(), want.detach()) < .1 * want.std() + .05
    z.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == p.grad.dtype == torch.float32 for p in trained)


def test_4bit(tmp_path, tiny):
    pytest.importorskip("bitsandbytes")
    exact, _ = twice(tmp_path, tiny, width=128)
    model = VLA.load(tmp_path / "m", "cuda", torch.bfloat16, lora_rank=4, load_in_4bit=True)
    with torch.no_grad():
        z, want = model.score(*batch(model)).cpu(), exact.score(*batch(exact))
    assert 0 < worst(z, want) and (z - want).std() < .5 * want.std()
    model.score(*batch(model)).sum().backward()
    assert all(("lora_" in n) == p.requires_grad == (p.grad is not None) for n, p in model.named_parameters())
    model.save(tmp_path / "adapter")
    with torch.no_grad():
        assert worst(VLA.load(tmp_path / "adapter", "cuda", torch.bfloat16, load_in_4bit=True).score(*batch(model)).cpu(), z) < 1e-2


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_compiled(tmp_path, tiny):
    _, model = twice(tmp_path, tiny)
    with torch.no_grad():
        want = model.score(*batch(model))
        model.compile()
        assert model._compiled_call_impl is not None and worst(model.score(*batch(model)).cpu(), want.cpu()) < 1e-4
