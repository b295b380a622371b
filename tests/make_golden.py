"""Writes tests/golden/: a seeded toy in OpenVLA's official layout and what it should answer, worked out here in plain float64 numpy.

Nothing of the policy block is used: one example, one head, one position at a time, so that the two implementations share no shortcuts.
Run `python tests/make_golden.py` to write the files again; `--check` only compares with what is there.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parent / "golden"
D, HEADS, LAYERS, HIDDEN, VOCAB, SPARE, IMAGE, PATCH = 32, 2, 2, 86, 352, 64, 28, 14
FIRST, STOP = VOCAB - SPARE - 256, 2
TOWERS = [("featurizer", 16, 3, 2, 64, True), ("fused_featurizer", 24, 3, 3, 89, False)]     # name, dim, depth, heads, mlp, DINOv2?
NORMALISE = ((.485, .456, .406), (.229, .224, .225)), ((.5,) * 3, (.5,) * 3)
STATS = {"toy": {"action": {"q01": [-1, -.5, -2, 0, -.1, -3, 0], "q99": [1, .5, 1, 2, .3, 3, 1], "mask": [True] * 6 + [False]}}}
CONFIG = dict(model_type="openvla", image_sizes=[IMAGE, IMAGE], pad_to_multiple_of=SPARE, n_action_bins=256, norm_stats=STATS,
              towers=[dict(dim=dim, depth=depth, heads=heads, hidden=mlp, patch=PATCH, registers=4 * dino, mean=mean, std=std)
                      for (_, dim, depth, heads, mlp, dino), (mean, std) in zip(TOWERS, NORMALISE)],
              text_config=dict(model_type="llama", vocab_size=VOCAB, hidden_size=D, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
                               num_attention_heads=HEADS, pad_token_id=0))


def weights():
    rng, w = np.random.default_rng(0), {}

    def linear(name, n_in, n_out, bias=True):
        w[f"{name}.weight"] = rng.normal(0, n_in ** -.5, (n_out, n_in))
        if bias:
            w[f"{name}.bias"] = rng.normal(0, .1, n_out)

    def norm(name, dim, bias=True):
        w[f"{name}.weight"] = 1 + rng.normal(0, .1, dim)
        if bias:
            w[f"{name}.bias"] = rng.normal(0, .1, dim)

    for name, dim, depth, heads, mlp, dino in TOWERS:
        p = f"vision_backbone.{name}"
        w[f"{p}.patch_embed.proj.weight"] = rng.normal(0, .05, (dim, 3, PATCH, PATCH))
        w[f"{p}.patch_embed.proj.bias"] = rng.normal(0, .1, dim)
        w[f"{p}.pos_embed"] = rng.normal(0, .5, (1, (IMAGE // PATCH) ** 2, dim))
        if dino:
            w[f"{p}.cls_token"], w[f"{p}.reg_token"] = rng.normal(0, 1, (1, 1, dim)), rng.normal(0, 1, (1, 4, dim))
        for i in range(depth):                           # the last block is in the file, as in the official ones, and must not be read
            b = f"{p}.blocks.{i}"
            for n in ("norm1", "norm2"):
                norm(f"{b}.{n}", dim)
            linear(f"{b}.attn.qkv", dim, 3 * dim), linear(f"{b}.attn.proj", dim, dim)
            linear(f"{b}.mlp.fc1", dim, mlp), linear(f"{b}.mlp.fc2", mlp, dim)
            if dino:
                for n in ("ls1", "ls2"):
                    w[f"{b}.{n}.scale_factor"] = rng.normal(.5, .2, dim)
        norm(f"{p}.norm", dim)
        if not dino:
            w[f"{p}.attn_pool.latent"] = rng.normal(0, 1, (1, 1, dim))
    dim = sum(t[1] for t in TOWERS)
    linear("projector.fc1", dim, 4 * dim), linear("projector.fc2", 4 * dim, D), linear("projector.fc3", D, D)
    m = "language_model.model"
    w[f"{m}.embed_tokens.weight"] = rng.normal(0, .5, (VOCAB, D))
    for i in range(LAYERS):
        b = f"{m}.layers.{i}"
        for n in "qkvo":
            linear(f"{b}.self_attn.{n}_proj", D, D, False)
        linear(f"{b}.mlp.gate_proj", D, HIDDEN, False), linear(f"{b}.mlp.up_proj", D, HIDDEN, False)
        linear(f"{b}.mlp.down_proj", HIDDEN, D, False)
        norm(f"{b}.input_layernorm", D, False), norm(f"{b}.post_attention_layernorm", D, False)
    norm(f"{m}.norm", D, False), linear("language_model.lm_head", D, VOCAB, False)
    return {k: v.astype(np.float16) for k, v in w.items()}


def gelu(x):
    return x * .5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def attend(q, k, v, causal):
    """One head, one position at a time."""
    out = np.zeros_like(q)
    for i in range(len(q)):
        seen = range(i + 1) if causal else range(len(q))
        s = np.array([q[i] @ k[j] for j in seen]) / math.sqrt(q.shape[1])
        s = np.exp(s - s.max())
        out[i] = sum(a * v[j] for a, j in zip(s / s.sum(), seen))
    return out


def tower(w, p, picture, dim, depth, heads, dino):
    """picture [3, H, W], normalised -> [patches, dim] at the second-to-last block."""
    def linear(x, n):
        return x @ w[f"{n}.weight"].T + w[f"{n}.bias"]

    def layernorm(x, n):
        c = x - x.mean(-1, keepdims=True)
        return c / np.sqrt((c ** 2).mean(-1, keepdims=True) + 1e-6) * w[f"{n}.weight"] + w[f"{n}.bias"]

    kernel, bias, x = w[f"{p}.patch_embed.proj.weight"], w[f"{p}.patch_embed.proj.bias"], []
    for r in range(0, IMAGE, PATCH):
        for c in range(0, IMAGE, PATCH):
            x.append([(kernel[o] * picture[:, r:r + PATCH, c:c + PATCH]).sum() + bias[o] for o in range(dim)])
    x = np.array(x) + w[f"{p}.pos_embed"][0]
    extra = [w[f"{p}.cls_token"][0], w[f"{p}.reg_token"][0]] if dino else []
    patches, x, size = len(x), np.concatenate([*extra, x]), dim // heads
    for i in range(depth - 1):
        b = f"{p}.blocks.{i}"
        qkv = linear(layernorm(x, f"{b}.norm1"), f"{b}.attn.qkv")
        q, k, v = qkv[:, :dim], qkv[:, dim:2 * dim], qkv[:, 2 * dim:]
        y = np.concatenate([attend(q[:, h:h + size], k[:, h:h + size], v[:, h:h + size], False) for h in range(0, dim, size)], 1)
        x = x + linear(y, f"{b}.attn.proj") * (w[f"{b}.ls1.scale_factor"] if dino else 1)
        y = linear(gelu(linear(layernorm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        x = x + y * (w[f"{b}.ls2.scale_factor"] if dino else 1)
    return x[-patches:]


def rotate(x, positions):
    """Rotary embedding: feature i and feature i + half turn together."""
    half, y = x.shape[1] // 2, np.zeros_like(x)
    for row, position in enumerate(positions):
        for i in range(half):
            a = position / 10000 ** (i / half)
            y[row, i] = x[row, i] * math.cos(a) - x[row, i + half] * math.sin(a)
            y[row, i + half] = x[row, i + half] * math.cos(a) + x[row, i] * math.sin(a)
    return y


def llama(w, x, causal):
    def rms(x, n):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * w[n]

    m, size, positions = "language_model.model", D // HEADS, range(len(x))
    for i in range(LAYERS):
        b = f"{m}.layers.{i}"
        h, parts = rms(x, f"{b}.input_layernorm.weight"), []
        q, k, v = (h @ w[f"{b}.self_attn.{n}_proj.weight"].T for n in "qkv")
        for c in range(0, D, size):
            parts.append(attend(rotate(q[:, c:c + size], positions), rotate(k[:, c:c + size], positions), v[:, c:c + size], causal))
        x = x + np.concatenate(parts, 1) @ w[f"{b}.self_attn.o_proj.weight"].T
        h = rms(x, f"{b}.post_attention_layernorm.weight")
        h = silu(h @ w[f"{b}.mlp.gate_proj.weight"].T) * (h @ w[f"{b}.mlp.up_proj.weight"].T)
        x = x + h @ w[f"{b}.mlp.down_proj.weight"].T
    return rms(x, f"{m}.norm.weight") @ w["language_model.lm_head.weight"].T


def reference(w, image, ids, tokens):
    """uint8 picture, prompt ids (the first is <s>), 7 action tokens to score -> logits autoregressive [7, 256], parallel [14, 256]."""
    w, x = {k: v.astype(np.float64) for k, v in w.items()}, image.astype(np.float64).transpose(2, 0, 1) / 255
    views = [(x - np.array(m)[:, None, None]) / np.array(s)[:, None, None] for m, s in NORMALISE]
    seen = np.concatenate([tower(w, f"vision_backbone.{t[0]}", v, t[1], t[2], t[3], t[5]) for t, v in zip(TOWERS, views)], 1)
    for i in (1, 2, 3):
        seen = seen @ w[f"projector.fc{i}.weight"].T + w[f"projector.fc{i}.bias"]
        seen = gelu(seen) if i < 3 else seen
    e = w["language_model.model.embed_tokens.weight"]
    prefix = np.concatenate([e[ids[:1]], seen, e[ids[1:]]])
    n, actions = len(prefix), slice(FIRST, FIRST + 256)
    one_by_one = llama(w, np.concatenate([prefix, e[FIRST + np.array(tokens)]]), True)[n - 1:n + 6, actions]
    at_once = llama(w, np.concatenate([prefix, np.zeros((14, D)), e[[STOP]]]), False)[n - 1:n + 13, actions]
    return one_by_one, at_once


def make():
    rng, w = np.random.default_rng(1), weights()
    prompts = [[1, 9, 20], [1, 7, 12, 30, 5, 11, 4], [1, 28, 28, 6, 17]]
    images, tokens = rng.integers(0, 256, (3, IMAGE, IMAGE, 3), dtype=np.uint8), rng.integers(0, 256, (3, 7))
    both = [reference(w, *z) for z in zip(images, prompts, tokens)]
    ids = np.zeros((3, 7), np.int64)                     # padding right behind <s>
    mask = np.zeros((3, 7), np.int64)
    for row, p in enumerate(prompts):
        ids[row, 0], mask[row, 0] = 1, 1
        ids[row, 8 - len(p):], mask[row, 8 - len(p):] = p[1:], 1
    return w, dict(images=images, ids=ids, mask=mask, tokens=tokens, autoregressive=np.stack([b[0] for b in both]).astype(np.float32),
                   parallel=np.stack([b[1] for b in both]).astype(np.float32))


if __name__ == "__main__":
    w, answers = make()
    if "--check" in sys.argv:
        old = load_file(FOLDER / "answers.safetensors")
        print({k: float(np.abs(v.astype(np.float64) - old[k]).max()) for k, v in answers.items()})
    else:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "config.json").write_text(json.dumps(CONFIG, indent=1))
        save_file(w, FOLDER / "model.safetensors", {"format": "pt"})
        save_file(answers, FOLDER / "answers.safetensors")
        print({f.name: f.stat().st_size for f in FOLDER.iterdir()})
