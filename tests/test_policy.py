"""The policy block against OpenVLA's original code (OPENVLA_GOLDEN), against tests/golden/, and against itself."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vla_opd as policy
from sft import tokens_of
from vla_opd import VLA, must_match

HERE = Path(__file__).parent
GOLDEN = os.environ.get("OPENVLA_GOLDEN")
official = pytest.mark.skipif(not GOLDEN, reason="OPENVLA_GOLDEN is not set to the folder with the original code's answers")
OFT = dict(decoding="parallel", chunk=8)
TEXTS = ["pick up the red cube", "place the blue cube in the green bowl", "pick"]
STATS = {"toy_no_noops": {"action": {"q01": [-3, .1, -1], "q99": [2, .4, 1], "mask": [True, True, False]}}}


def worst(a, b):
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


def logits(model, *inputs):
    return model(*inputs)[0]


def spoken(model, ids, mask):
    """Instructions that the model tokenizes to these ids, whatever its tokenizer."""
    names = [f"prompt {i}" for i in range(len(ids))]
    model.rows |= {name: row[there.bool()].tolist() for name, row, there in zip(names, ids, mask)}
    return names


def log_probs(logits, tokens, temperature=1.):
    lp = (logits / temperature).log_softmax(-1)
    return lp.gather(-1, tokens[..., None])[..., 0], -(lp.exp() * lp).sum(-1)


def batch(model, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, model.image, model.image, 3), generator=g, dtype=torch.uint8), TEXTS[:n]


# ------------------------------------------------------------------------------------------------- OpenVLA's original code
def original(kind):
    g = load_file(Path(GOLDEN) / f"{kind}.safetensors")
    n = g["prompt_len"].tolist()
    rows = [r[len(r) - k:] for r, k in zip(g["prompt_ids_left_padded"], n)]
    wide = max(n)                                        # left padding there, padding behind <s> here
    g["ids"] = torch.stack([torch.cat([r[:1], r.new_full((wide - len(r),), 32000), r[1:]]) for r in rows])
    g["mask"] = torch.stack([torch.cat([r.new_ones(1), r.new_zeros(wide - len(r)), r.new_ones(len(r) - 1)]) for r in rows])
    g["rows"] = rows
    for k in ("action_tokens", "greedy_tokens"):         # ids there, 0..255 here
        g[k] = g[k] - 31744 if g[k].max() > 255 else g[k]
    towers = [dict(policy.DINO), dict(policy.SIGLIP)]    # the official layout with narrower towers
    for t, narrow in zip(towers, json.loads((Path(GOLDEN) / "config.json").read_text())["tiny_vision"]):
        t.update(hidden=narrow["embed_dim"] * t["hidden"] // t["dim"], dim=narrow["embed_dim"], depth=narrow["depth"], heads=narrow["num_heads"])
    return VLA.load(GOLDEN, towers=towers, **(OFT if kind == "oft" else {})), g


@official
@pytest.mark.parametrize("kind", ["ar", "oft"])
def test_original_logits(kind):
    model, g = original(kind)
    with torch.no_grad():
        together = logits(model, g["pixel_values"], g["ids"], g["mask"], g["action_tokens"])
        alone = torch.cat([logits(model, g["pixel_values"][i:i + 1], r[None], torch.ones_like(r)[None], g["action_tokens"][i:i + 1])
                           for i, r in enumerate(g["rows"])])
    print(kind, "batched", worst(together, g["logits256"]), "alone", worst(alone, g["logits256"]))
    assert together.dtype == torch.float32
    assert worst(together, g["logits256"]) < 5e-5 and worst(alone, g["logits256"]) < 5e-5


@official
@pytest.mark.parametrize("kind", ["ar", "oft"])
def test_original_greedy_actions(kind):
    model, g = original(kind)
    tokens, _, _ = model.act(g["pixel_values"], spoken(model, g["ids"], g["mask"]), 0)
    assert torch.equal(tokens, g["greedy_tokens"])
    got = model.actions(tokens)
    assert got.shape == (4, model.chunk, 7)
    assert worst(got, g["greedy_actions"].view(got.shape)) < 1e-6


@official
def test_original_log_probs():                           # recorded for parallel decoding only
    model, g = original("oft")
    with torch.no_grad():
        lp, entropy = log_probs(model.score(g["pixel_values"], spoken(model, g["ids"], g["mask"]), g["action_tokens"]), g["action_tokens"], 1.6)
    print("log-probs", worst(lp, g["log_probs_t1.6"]), "entropy", worst(entropy, g["entropy_t1.6"]))
    assert worst(lp, g["log_probs_t1.6"]) < 5e-5 and worst(entropy, g["entropy_t1.6"]) < 5e-5


@official
def test_original_image_and_raw_pictures():
    model, g = original("oft")
    for i in range(3):
        x = model.prepare(g[f"image{i}"][None]).permute(0, 3, 1, 2).float() / 255
        both = torch.cat([(x - torch.tensor(t["mean"]).view(3, 1, 1)) / torch.tensor(t["std"]).view(3, 1, 1) for t in model.towers], 1)
        assert worst(both[0], g[f"image{i}_pixel_values"]) < 1e-5
        with torch.no_grad():
            one = (g["rows"][0][None], torch.ones_like(g["rows"][0])[None])
            assert worst(logits(model, model.prepare(g[f"image{i}"][None]), *one),
                         logits(model, g[f"image{i}_pixel_values"][None], *one)) < 1e-4


@official
def test_7b_keys():
    lines = [re.match(r"(\S+)\s+\((.*)\)", s).groups() for s in (Path(GOLDEN) / "keys_7b.txt").read_text().splitlines() if s.strip()]
    want = {k: tuple(int(n) for n in s.split(",") if n.strip()) for k, s in lines}
    unread = {k for k in want if re.match(r"vision_backbone\.featurizer\.(blocks\.23\.|norm\.)|"
                                          r"vision_backbone\.fused_featurizer\.(blocks\.26\.|norm\.|attn_pool\.)", k)}
    assert len(want) == 982 and len(unread) == 43
    with torch.device("meta"):
        model = VLA(dict(image_sizes=[224, 224], pad_to_multiple_of=64, text_config=dict(vocab_size=32064, pad_token_id=32000),
                         timm_model_ids=["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]))
    have = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert have == {k: v for k, v in want.items() if k not in unread}


# --------------------------------------------------------------------------------------------------------- our own golden
@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_own_golden(decoding):
    a = load_file(HERE / "golden" / "answers.safetensors")
    model = VLA.load(HERE / "golden", decoding=decoding, chunk=2 if decoding == "parallel" else 1)
    with torch.no_grad():
        z = logits(model, a["images"], a["ids"], a["mask"], a["tokens"])
        print(decoding, "against float64 numpy", worst(z, a[decoding]))
        assert worst(z, a[decoding]) < 1e-4
        for i in range(3):
            keep = a["mask"][i].bool()
            one = logits(model, a["images"][i:i + 1], a["ids"][i:i + 1, keep], a["mask"][i:i + 1, keep], a["tokens"][i:i + 1])
            assert worst(one, a[decoding][i:i + 1]) < 1e-4


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_bfloat16(decoding, tiny, tmp_path):
    """What is trained stays float32, the arithmetic is bfloat16, logits come out in float32."""
    a = load_file(HERE / "golden" / "answers.safetensors")
    tiny(decoding).save(tmp_path / "tiny")
    for folder, chunk in ((HERE / "golden", 2 if decoding == "parallel" else 1), (tmp_path / "tiny", 2)):
        full = VLA.load(folder, decoding=decoding, chunk=chunk)
        inputs = (a["images"], spoken(full, a["ids"], a["mask"])) if full.tokenizer is None else batch(full)
        tokens = torch.randint(256, (3, full.num_tokens))
        with torch.no_grad():
            z = full.score(*inputs, tokens)
            for kw, weights in ((dict(), torch.float32), (dict(trainable=False), torch.bfloat16), (dict(lora_rank=2), torch.bfloat16)):
                half = VLA.load(folder, dtype=torch.bfloat16, decoding=decoding, chunk=chunk, **kw)
                half.rows |= full.rows
                h, parameters = half.score(*inputs, tokens), dict(half.named_parameters())
                assert half.compute == torch.bfloat16 and half.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
                assert all(p.dtype == (torch.float32 if "lora_" in n else weights) for n, p in parameters.items())
                assert any("lora_" in n for n in parameters) == ("lora_rank" in kw)
                assert h.dtype == torch.float32 and 0 < worst(h, z) and (h - z).abs().mean() < .05 * z.std()
                assert half.act(*inputs, 1.)[1].dtype == torch.float32


def test_parallel_is_not_causal():
    a = load_file(HERE / "golden" / "answers.safetensors")
    model = VLA.load(HERE / "golden", decoding="parallel", chunk=2)
    with torch.no_grad():
        z = logits(model, a["images"], a["ids"], a["mask"])
        llama = model.language_model.model.forward
        model.language_model.model.forward = lambda *args, is_causal=None, **kw: llama(*args, **kw)
        assert worst(z, logits(model, a["images"], a["ids"], a["mask"])) > .1


def test_without_stop():
    """RLinf's: the sequence ends with the last action slot."""
    a = load_file(HERE / "golden" / "answers.safetensors")
    full, short = (VLA.load(HERE / "golden", decoding="parallel", chunk=2, **kw) for kw in ({}, dict(stop=False)))
    with torch.no_grad():
        x, mask = short.prefix(a["images"], a["ids"], a["mask"])
        x, mask = torch.cat([x, x.new_zeros(len(x), 14, x.shape[2])], 1), torch.cat([mask, mask.new_ones(len(x), 14)], 1)
        want = short.read(x, mask, x.shape[1] - 15, x.shape[1] - 1, is_causal=False)[0]
        assert worst(logits(short, a["images"], a["ids"], a["mask"]), want) == 0
        assert worst(logits(full, a["images"], a["ids"], a["mask"]), want) > .01


@pytest.mark.parametrize("name,oft,stop", [("Openvla-oft-SFT-libero-goal-traj1", True, True), ("openvla-7b-oft-finetuned-libero-spatial", None, True),
                                           ("models--Haozhan72--openvla-oft-x/snapshots/0af3", True, True), ("RLinf-OpenVLAOFT-GRPO-LIBERO-goal", True, False),
                                           ("models--RLinf--RLinf-OpenVLAOFT-GRPO-LIBERO-goal/snapshots/0af3", True, False), ("openvla-oft/openvla-7b", False, True),
                                           ("models--openvla--openvla-7b-finetuned-libero-goal/snapshots/0af3", False, True), ("mine", None, True),
                                           ("RLinf-OpenVLAOFT-RoboTwin-SFT-x", True, True), ("OpenVLA-7B", False, True), ("openvla-7b-work/mine", None, True),
                                           ("openvla-7b+libero_spatial_no_noops+b32+lr-0.0005--parallel_dec--8_acts_chunk", None, True)])
def test_decoding_by_name(tmp_path, recwarn, name, oft, stop):
    """Official configs do not say how they are decoded; where the name does not either, it is asked for."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).symlink_to(HERE / "golden", target_is_directory=True)
    model = VLA.load(tmp_path / name)
    assert (model.parallel, model.config.get("stop", True)) == (bool(oft), stop)
    assert any('OpenVLA-OFT needs "decoding": "parallel"' in str(w.message) for w in recwarn) == (oft is None)
    recwarn.clear()
    model.save(tmp_path / "saved")                       # from then on its config says it
    assert VLA.load(tmp_path / "saved").config == model.config and not [w for w in recwarn if "decoding" in str(w.message)]


# ------------------------------------------------------------------------------------------------------------- tiny models
@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_every_parameter_learns(decoding, tiny):
    a = load_file(HERE / "golden" / "answers.safetensors")
    for model in (VLA.load(HERE / "golden", decoding=decoding, chunk=1), tiny(decoding)):
        tokens = torch.randint(256, (3, model.num_tokens))
        z = model.score(*batch(model), tokens) if model.tokenizer else logits(model, a["images"], a["ids"], a["mask"], tokens)
        log_probs(z, tokens, 1.6)[0].sum().backward()
        dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not dead, dead


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_act_and_score_agree(decoding, tiny):
    model = tiny(decoding)
    images, texts = batch(model)
    for t in (1., 1.6, .3):
        tokens, lp, _ = model.act(images, texts, t, torch.Generator().manual_seed(1))
        assert tokens.shape == lp.shape == (3, model.num_tokens) and 0 <= tokens.min() and tokens.max() < 256
        with torch.no_grad():
            assert worst(lp, log_probs(model.score(images, texts, tokens), tokens, t)[0]) < 1e-5
        again, _, _ = model.act(images, texts, t, torch.Generator().manual_seed(1))
        assert torch.equal(tokens, again)
    greedy, lp, _ = model.act(images, texts, 0)
    with torch.no_grad():
        z = model.score(images, texts, greedy)
    assert torch.equal(z.argmax(-1), greedy) and worst(lp, log_probs(z, greedy)[0]) < 1e-5
    hot = log_probs(z, greedy, 5.)[1]
    assert (hot > log_probs(z, greedy, 1.)[1]).all() and (log_probs(z, greedy, 1.)[1] > log_probs(z, greedy, .5)[1]).all()
    with torch.no_grad():
        assert torch.equal(model.score(images, tuple(texts), greedy), z)     # as environments give them


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_padded_batch_is_one_by_one(decoding, tiny):
    model = tiny(decoding)
    images, texts = batch(model)
    ids, mask = model.tokenize(texts)
    assert (ids[:, 0] == 1).all() and ids.shape[1] == 9 and mask.sum(1).tolist() == [6, 9, 2] and not (ids[mask.bool()] == 3).any()
    tokens, lp, _ = model.act(images, texts, 0)
    for i in range(3):
        t, p, _ = model.act(images[i:i + 1], texts[i:i + 1], 0)
        assert torch.equal(t, tokens[i:i + 1]) and worst(p, lp[i:i + 1]) < 1e-5


def test_unknown_words_are_told(tiny, recwarn):
    model = tiny()
    model.tokenize(TEXTS)
    assert not [w for w in recwarn if "vocabulary" in str(w.message)]
    with pytest.warns(UserWarning, match="not in this checkpoint's vocabulary"):
        model.tokenize([*TEXTS, "pick up the zeppelin"])


def test_sees_and_reads(tiny):
    model = tiny()
    images, texts = batch(model)
    with torch.no_grad():
        z = model.score(images, texts)
        assert worst(z, model.score(images.flip(0), texts)) > 1e-2 and worst(z, model.score(images, texts[::-1])) > 1e-2
        assert worst(z, model.score(images, [t.upper() for t in texts])) == 0
    assert model.language_model.model.layers[0].self_attn.q_proj.weight.std() > .1      # 1/sqrt(width), not .02


def test_autocast_gives_float32_logits(tiny):
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.score(*batch(model)).dtype == torch.float32


@pytest.mark.parametrize("stats", [False, True])
def test_tokens_and_actions_are_inverse(stats, tiny):
    model = tiny(**dict(norm_stats=STATS, unnorm_key="toy") if stats else {})
    tokens = torch.arange(256)[:, None].expand(-1, model.num_tokens)
    a = model.actions(tokens)
    assert a.shape == (256, 2, 3) and (np.diff(a[1:, 0, 0]) < 0).all() and (a[0] == a[1]).all()     # 256 tokens, 255 centres
    assert torch.equal(tokens_of(model, a), tokens.clamp(min=1))
    if not stats:
        assert abs(a[255, 0, 0] + 1 - 1 / 255) < 1e-6
        assert tokens_of(model, np.full((1, 2, 3), 7.)).eq(0).all() and tokens_of(model, np.full((1, 2, 3), -7.)).eq(255).all()
    else:
        model.config["unnorm_key"] = "nowhere"
        with pytest.raises(SystemExit, match="toy_no_noops.*'nowhere_no_noops': set unnorm_key .* dataset_statistics.json"):
            model.actions(tokens)


@pytest.mark.parametrize("dim,low,high", [(7, "q01", "q99"), (14, "min", "max")])
def test_two_arms_are_scaled_by_the_extremes(dim, low, high, tiny):
    """OpenVLA-OFT's constants: BOUNDS_Q99 for LIBERO and Bridge, BOUNDS for ALOHA's (and RoboTwin's) two arms."""
    stats = dict(min=[-5.] * dim, q01=[-2.] * dim, q99=[3.] * dim, max=[6.] * dim, mask=[True] * (dim - 1) + [False])
    want = [[*stats[low][:-1], -1], [*stats[high][:-1], 1]]
    assert np.array_equal(tiny(action_dim=dim, norm_stats={"x": dict(action=stats)}).ranges(), want)


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_save_and_load(tmp_path, dtype, tiny):
    model = tiny(norm_stats=STATS)
    model.save(tmp_path / "m", dtype)
    back = VLA.load(tmp_path / "m")
    images, texts = batch(model)
    with torch.no_grad():
        off = worst(back.score(images, texts), model.score(images, texts))
    assert off == 0 if dtype is None else off < .05
    assert back.config == model.config
    assert all(p.dtype == torch.float32 and p.requires_grad for p in back.parameters())
    assert not any(p.requires_grad for p in VLA.load(tmp_path / "m", trainable=False).parameters())
    halves = load_file(tmp_path / "m" / "model.safetensors").values()
    assert all(v.dtype == (dtype or torch.float32) for v in halves)


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_lora(tmp_path, decoding, tiny):
    base = tiny(decoding)
    base.save(tmp_path / "base")
    model = VLA.load(tmp_path / "base", lora_rank=4)
    scale = lambda rank: VLA.load(tmp_path / "base", lora_rank=rank).projector["fc1"].scaling["default"]
    assert [scale(rank) for rank in (8, 16, 32)] == [1, 1, .5]                           # alpha is min(rank, 16), as OpenVLA's and RL4VLA's
    images, texts = batch(model)
    tokens, _, _ = model.act(images, texts, 1.)
    with torch.no_grad():
        assert worst(model.score(images, texts, tokens), base.score(images, texts, tokens)) < 1e-6      # B starts at zero
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        log_probs(model.score(images, texts, tokens), tokens)[0].sum().neg().backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all("lora_" in k for k in changed)
    for part in ("projector.fc1", "lm_head", "q_proj", "down_proj"):
        assert any(part in k for k in changed)
    model.save(tmp_path / "adapter")
    back = VLA.load(tmp_path / "adapter")
    with torch.no_grad():
        assert worst(back.score(images, texts, tokens), model.score(images, texts, tokens)) == 0
        assert worst(back.score(images, texts, tokens), base.score(images, texts, tokens)) > 1e-2
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    peft = pytest.importorskip("peft")                   # others' are trained on, and others can load ours
    peft.get_peft_model(VLA.load(tmp_path / "base"), peft.LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["inference_mode"]
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()) | dict(base_model_name_or_path=str(tmp_path / "base"))
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    for trainable in (True, False):
        found = [n for n, p in VLA.load(tmp_path / "theirs", trainable=trainable).named_parameters() if p.requires_grad]
        assert len(found) == trainable * sum(p.requires_grad for p in model.parameters())
    theirs = peft.PeftModel.from_pretrained(VLA.load(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        assert worst(theirs.base_model.model.score(images, texts, tokens), model.score(images, texts, tokens)) < 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | dict(lora_dropout=.5)      # many others' have dropout
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for trainable in (True, False):
        noisy = VLA.load(tmp_path / "adapter", trainable=trainable)
        assert any(type(m) is torch.nn.Dropout for m in noisy.modules())
        with torch.no_grad():
            assert worst(noisy.score(images, texts, tokens), model.score(images, texts, tokens)) == 0


def test_adapters_do_not_copy_their_input(tmp_path, tiny):
    """peft casts it to float32, autocast then back: as much work again as the adapters', and memory for the copy, for the very same numbers."""
    tiny("autoregressive").save(tmp_path / "base")
    model, seen, answers = VLA.load(tmp_path / "base", dtype=torch.bfloat16, lora_rank=4), {}, []
    adapters = {n: m for n, m in model.named_modules() if n.endswith("lora_A.default") and "down_proj" in n}
    [m.register_forward_pre_hook(lambda m, x, n=n: seen.update({n: x[0].dtype})) for n, m in adapters.items()]
    for n, p in model.named_parameters():
        p.data = torch.randn_like(p) * .1 if "lora_B" in n else p.data
    for cast in (False, True):
        [setattr(m, "cast_input_dtype_enabled", True) for m in model.modules() if cast]
        model.zero_grad()
        z = model.score(*batch(model), torch.zeros(3, 6, dtype=torch.long))
        z.logsumexp(-1).sum().backward()
        answers.append([z.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        assert adapters and set(seen.values()) == {torch.float32 if cast else torch.bfloat16}
    assert len(answers[0]) > 20 and all(torch.equal(a, b) for a, b in zip(*answers))


def test_4bit(tmp_path, tiny):
    pytest.importorskip("bitsandbytes")
    base = tiny(width=128)
    base.save(tmp_path / "base")
    model = VLA.load(tmp_path / "base", lora_rank=4, load_in_4bit=True)
    images, texts = batch(model)
    with torch.no_grad():
        a, b = model.score(images, texts), base.score(images, texts)
    assert 0 < worst(a, b) and (a - b).std() < .5 * b.std()
    log_probs(model.score(images, texts), a.argmax(-1))[0].sum().backward()
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    tokens, q = a.argmax(-1), model.get_parameter("projector.fc1.lora_A.default.weight")     # its gradient crosses every 4-bit layer
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data.normal_(0, .1)

    def value():
        return log_probs(model.score(images, texts), tokens)[0].double().sum()

    model.zero_grad()
    value().backward()
    with torch.no_grad():
        unit = q.grad / q.grad.norm()
        q += 1e-3 * unit
        up = value()
        q -= 2e-3 * unit
        slope = (up - value()) / 2e-3
        q += 1e-3 * unit
        assert abs(slope / q.grad.norm() - 1) < .05
        a = model.score(images, texts)
    model.save(tmp_path / "adapter")
    with torch.no_grad():
        assert worst(VLA.load(tmp_path / "adapter", load_in_4bit=True).score(images, texts), a) < 1e-5


def test_clear_errors(tmp_path, tiny):
    model = tiny()
    model.save(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="never loaded"):            # pickles are not opened
        VLA.load(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").unlink()
    save = policy.save_file
    save({k: v for k, v in state.items() if "fc1" not in k}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(SystemExit, match="projector.fc1.*2 tensors"):
        VLA.load(tmp_path / "m")
    save({**state, "value_head.weight": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(SystemExit, match="value_head.*1 tensors"):
        VLA.load(tmp_path / "m")
    save({**state, "projector.fc1.bias": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(SystemExit, match="projector.fc1.bias.*1 tensors"):
        VLA.load(tmp_path / "m")
    with pytest.raises(SystemExit, match="hf download nobody/nothing"):
        VLA.load("nobody/nothing")
    with pytest.raises(SystemExit, match="tokenizer.json"):
        VLA.load(HERE / "golden").tokenize(["pick"])


def test_student_and_teacher_must_match(tiny):
    model = tiny(norm_stats=STATS)
    must_match(model, tiny(norm_stats=STATS, width=48))
    for what, kw in dict(chunk=dict(chunk=1), action_dim=dict(action_dim=4, norm_stats={}), parallel=dict(decoding="autoregressive"),
                         image=dict(image=64), ranges=dict(norm_stats={}), prompt=dict(prompt="Q: {instruction}")).items():
        with pytest.raises(SystemExit, match=f"differ in.* {what}:"):
            must_match(model, tiny(**{**dict(norm_stats=STATS), **kw}))


# --------------------------------------------------------------------------------------------------------- make_golden.py
def test_golden_is_what_its_script_writes():
    out = subprocess.run([sys.executable, HERE / "make_golden.py", "--check"], capture_output=True, text=True, check=True).stdout
    off = json.loads(out.replace("'", '"'))
    assert {"autoregressive", "parallel", "images", "ids", "mask", "tokens"} == off.keys() and max(off.values()) < 1e-5
