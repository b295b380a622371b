"""ROAD-VLA: PPO's critic turned into a teacher: advantage-guided self-distillation of a vision-language-action model, in one file.

    python algos/ppo.py --env tabletop-repositioning --entropy-coefficient .01    # first: a finished PPO run, whose critic is the reference
    python algos/road_vla.py --env tabletop-repositioning               # --reference RUN; by default ppo.py's run of the same environment and seed
    torchrun --nproc-per-node 8 algos/road_vla.py --env ENV --student 7B --reference RUN --lora-rank 32 --dtype bfloat16 --learning-rate 1e-4 \\
        --adam-eps 1e-8 --updates-per-rollout 32 --eval-temperature 0.6 --micro-batch-size 8 --query-batch-size 32 --num-envs 8

Algorithm 1 of ROAD-VLA (arXiv 2606.25800): the student plays; the teacher is the student itself, the logit of each sampled token raised by eta * w, w the
standardised advantage of its query; the student follows KL(teacher || student).  Everything else is ppo.py.

What matters, and why
 1. w: the advantage of the current critic, mixed half and half with that of a frozen critic (scaled to the same mean and std: eq. 7), only where both have
    the same sign (eq. 8), standardised and clipped to +-2 (eq. 9).  Below-average tokens are pushed down; --positive-only leaves them alone.
 2. The teacher q = softmax(z + eta w onehot(a)) is built from the current logits, without gradient.  p and q differ in one logit, so KL over 256 tokens is KL over
    two outcomes, the sampled token or any other, and so is JSD: free, where the paper pays 1.6 times PPO's time (the reference's pass is extra).
 3. Its gradient is -p (e^w - 1) grad log p, to first order in p, the sampled token's probability: PPO's times about p / 14 (coefficient 0.5, 7 tokens an action).
    So an unsure policy hardly feels it (./benchmark.sh road-strength).  A w that knows nothing of the token cancels in PPO, but sharpens the policy here.
 4. Algorithm 1 has this loss alone (--no-ppo-term --entropy-coefficient 0, beside the critic's); Table 4 (0.5, entropy 0.01) reads as PPO + 0.5 of it: the default.
 5. The mean is over all executed tokens (eq. 12), the advantage statistics over the whole rollout.  Learning rates are constant, not the paper's cosine.
 6. The current critic is new (or --student's, a folder of ppo.py's).  The paper's is "initially poorly calibrated", as if new; 90 % of its signs agree, as if warm (--warm-critic).
 7. The reference is a finished PPO run, by default of the same seed, so of the same prompts.  The honest cost is PPO + ROAD: its part is logged (charts/reference_*).
"""
import datetime, json, math, os, re, shutil, sys, time, warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
import tyro
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # envs/ is found from any working directory

@dataclass
class Args:
    # --- block flags
    env: str = "tabletop-object"  # which environment; an unknown name lists all
    student: str = ""  # checkpoint to start from: a folder or a hub id (default: the suite's own; sft.py: a new tiny model)
    run_dir: str = ""  # where everything is written (default: runs/ENV-SCRIPT-SEED)
    seed: int = 1  # seed of everything random
    num_envs: int = 512  # environments played side by side, in every process
    micro_batch_size: int = 128  # queries (one: a picture and its chunk of actions) per learning pass; changes memory and speed, not the result
    query_batch_size: int = 512  # queries per pass without gradient (acting, labelling); another number samples other actions
    max_grad_norm: float = 1.0  # gradient clipping
    lora_rank: int = 0  # train LoRA adapters of this rank on every linear layer; 0 trains everything (of an adapter's checkpoint: the adapter)
    load_in_4bit: bool = False  # keep the frozen language model in 4 bits (bitsandbytes nf4; needs --lora-rank); a teacher stays in --dtype
    dtype: Literal["float32", "bfloat16"] = "float32"  # arithmetic of the model; trained weights and log-probabilities stay float32
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto takes a GPU if there is one
    eval_every: int = 5  # evaluate every so many iterations, and at the end
    eval_episodes_per_task: int = 20  # evaluation episodes per task, one from each of so many of the split's initial states, or of all
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    resume: bool = False  # go on from the checkpoint in --run-dir
    # --- end flags
    compile: bool = False  # torch.compile the models (needs a C++ compiler); autoregressive acting stays as it is
    capture_video: bool = False  # write a GIF of the final evaluation
    reference: str = ""  # a finished run of ppo.py, its critic is frozen (default: runs/ENV-ppo-SEED)
    num_iterations: int = 40  # rollout + update rounds
    learning_rate: float = 2e-4  # AdamW's for the policy, constant
    value_learning_rate: float = 3e-3  # AdamW's for the value head, constant
    adam_eps: float = 1e-5  # AdamW's epsilon; at 7 B 1e-8, as SimpleVLA-RL and RL4VLA
    num_episodes: int = 64  # fixed-horizon episodes per iteration, over all processes
    temperature: float = 1.0  # of sampling, and of every probability
    eval_temperature: float = 0.0  # of evaluation; 0 is greedy, RL4VLA and ROAD-VLA sample at 0.6
    updates_per_rollout: int = 8  # optimiser steps per rollout, each on its own share of the queries
    gamma: float = 0.99  # discount a query
    gae_lambda: float = 0.95  # GAE's lambda
    clip: float = 0.2  # of the ratio, both sides
    value_clip: float = 0.2  # how far the value may move from the rollout's before its loss stops rewarding it
    entropy_coefficient: float = 0.01  # of the entropy bonus, the mean over tokens
    ratio: Literal["action", "token"] = "action"  # one importance ratio an action (of 7 tokens), or one a token
    warm_critic: bool = False  # the critic starts as the reference's value head, not as a new one
    eta: float = 1.0  # how far the logit of a sampled token is raised, per unit of w
    alpha: float = 0.5  # the reference critic's part of the advantage
    weight_clip: float = 2.0  # w is clipped to +- this
    gate: bool = True  # mix only where the two critics agree on the sign
    positive_only: bool = False  # w of below-average tokens is 0
    divergence: Literal["fkl", "jsd"] = "fkl"  # KL(teacher || student), or Jensen-Shannon
    distill_coefficient: float = 0.5  # of the distillation loss, see 3
    ppo_term: bool = True  # PPO's policy loss as well; without it the distillation loss alone, Algorithm 1

if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)                            # before torch is imported: --help is instant

import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from huggingface_hub import snapshot_download
from matplotlib.figure import Figure
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
import envs

# --- block policy
# One class for every size: a toy of 0.25 M parameters, OpenVLA-7B (autoregressive), OpenVLA-OFT (parallel), with the official checkpoints' names of weights.
BINS, BOS, STOP, LONE = 256, 1, 2, 29871             # action tokens: the 256 ids before the rows that pad the vocabulary.  LONE: "▁", wanted after "Out:"
DINO = dict(dim=1024, depth=24, heads=16, hidden=4096, patch=14, registers=4, mean=[.485, .456, .406], std=[.229, .224, .225])
SIGLIP = dict(dim=1152, depth=27, heads=16, hidden=4304, patch=14, registers=0, mean=[.5] * 3, std=[.5] * 3)

class ViT(nn.Module):
    """DINOv2 or SigLIP in timm's names, read at the second-to-last block, without the final norm: [B, 3, H, W] -> [B, patches, dim]."""
    def __init__(self, image, dim, depth, heads, hidden, patch, registers):
        super().__init__()
        self.dim, self.heads, self.registers = dim, heads, registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.pos_embed = nn.Parameter(.02 * torch.randn(1, (image // patch) ** 2, dim))
        if registers:                                # prepended after the position embedding
            self.cls_token, self.reg_token = (nn.Parameter(.02 * torch.randn(1, n, dim)) for n in (1, registers))
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(dim, eps=1e-6), attn=nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim))),
            norm2=nn.LayerNorm(dim, eps=1e-6), mlp=nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim))),
            **{k: nn.ParameterDict({"scale_factor": torch.ones(dim)}) for k in ("ls1", "ls2") if registers})) for _ in range(depth - 1))     # LayerScale: DINOv2's

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        if self.registers:
            x = torch.cat([t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token)] + [x], 1)
        for b in self.blocks:
            scale = [b[k]["scale_factor"] if self.registers else 1 for k in ("ls1", "ls2")]
            q, k, v = b["attn"]["qkv"](b["norm1"](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + b["attn"]["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) * scale[0]
            x = x + b["mlp"]["fc2"](F.gelu(b["mlp"]["fc1"](b["norm2"](x)))) * scale[1]
        return x[:, -self.pos_embed.shape[1]:]

class ConvTower(nn.Module):
    """The toy's eyes: every token is one keypoint and tells where it is and what is there. [B, 3, H, W] -> [B, tokens, dim]."""
    def __init__(self, image, tokens, width):
        super().__init__()
        self.dim = width + 2 + 16 + 1                # what is there, x and y, waves of x and y, how sharp the keypoint is
        self.features = nn.Sequential(nn.Conv2d(3, width // 2, 5, 2, 2), nn.ReLU(), nn.Conv2d(width // 2, width, 3, 2, 1), nn.ReLU(),
                                      nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
        self.heatmaps = nn.Conv2d(width, tokens, 1)
        self.sharpness = nn.Parameter(torch.ones(tokens, 1))  # log of the softmax's inverse temperature
        self.name = nn.Parameter(.5 * torch.randn(1, tokens, self.dim))     # which keypoint a token is: learned, added

    def forward(self, x):
        f = self.features(x)
        log_heat = (self.heatmaps(f).flatten(2) * self.sharpness.exp()).log_softmax(-1)                         # [B, tokens, positions]
        heat, axes = log_heat.exp(), (torch.linspace(-1, 1, n, device=x.device) for n in f.shape[2:])
        what, xy = heat @ f.flatten(2).transpose(1, 2).to(heat), heat @ torch.cartesian_prod(*axes).to(heat)    # expected feature, expected position
        angle = (xy[..., None] * torch.tensor([.5, 1, 2, 4]).to(heat) * math.pi).flatten(2)
        return torch.cat([what, xy, angle.sin(), angle.cos(), log_heat.amax(-1, keepdim=True)], -1).to(f) + self.name

class VLA(nn.Module):
    """config: the official config.json as a dict, plus our own optional keys: towers, decoding, stop, chunk, action_dim, action_slots, prompt, unnorm_key."""
    device = property(lambda self: self.language_model.device)

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.rows, self.lora, self.compute = {"decoding": "autoregressive", **config}, tokenizer, {}, None, torch.float32
        llama = LlamaConfig(**{k: v for k, v in config["text_config"].items() if k not in ("torch_dtype", "dtype", "architectures", "model_type")})
        self.parallel = self.config["decoding"] == "parallel"
        self.chunk, self.action_dim = config.get("chunk", 8 if self.parallel else 1), config.get("action_dim", 7)
        self.num_tokens, self.image, self.pad = self.chunk * self.action_dim, config["image_sizes"][0], llama.pad_token_id
        self.first = llama.vocab_size - config["pad_to_multiple_of"] - BINS
        self.prompt = config.get("prompt", "In: What action should the robot take to {instruction}?\nOut:")
        self.towers = config.get("towers") or [dict(DINO if "dino" in t else SIGLIP) for t in config["timm_model_ids"]]
        towers = [(ViT if "depth" in t else ConvTower)(self.image, **{k: v for k, v in t.items() if k not in ("mean", "std")}) for t in self.towers]
        self.vision_backbone = nn.ModuleDict(zip(("featurizer", "fused_featurizer"), towers))
        dim, d = sum(t.dim for t in towers), llama.hidden_size
        sizes = [dim, 4 * dim, d, d] if len(towers) > 1 else [dim, d, d]
        self.projector = nn.ModuleDict({f"fc{i}": nn.Linear(a, b) for i, (a, b) in enumerate(zip(sizes, sizes[1:]), 1)})
        self.language_model = LlamaForCausalLM(llama)
        if self.parallel and config.get("action_slots"):     # learned slots instead of OFT's zeros: a toy learns faster with them
            self.action_slots = nn.Parameter(config["action_slots"] * torch.randn(1, self.num_tokens, d))

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, lora_rank=0, load_in_4bit=False, trainable=True, **extra):
        """A folder or a hub id: a full checkpoint or a LoRA adapter.  extra overrides config keys, e.g. decoding="parallel"."""
        folder = Path(path)
        if not folder.is_dir():
            try:                                     # never code, never pickles
                folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
            except Exception as e:
                hub = f", the hub did not give it ({type(e).__name__}): run `hf download {path} --local-dir {Path(path).name}`, pass that folder"
                sys.exit(f"{path} is no folder" + hub * (str(path).count("/") == 1))
        read = lambda name: json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        oft = re.search(r"(?i)(rlinf-)?openvla-?oft[^/]*(/snapshots/[^/]*)?$", folder.as_posix())      # the hub's cache: .../models--NAME/snapshots/COMMIT
        says = dict(decoding="parallel", stop=not oft[1] or "robotwin" in oft[0].lower()) if oft else {}     # their configs do not; RLinf's were trained without </s>
        config = {**says, **read("config.json"), **(dict(norm_stats=s) if (s := read("dataset_statistics.json")) else {}), **extra}
        if read("adapter_config.json"):
            adapter = LoraConfig.from_pretrained(folder)
            lora_rank in (0, adapter.r) or sys.exit(f"{path} is an adapter of rank {adapter.r}, not {lora_rank}")
            model = cls.load(adapter.base_model_name_or_path, device, dtype, 0, load_in_4bit, False, **{k: v for k, v in config.items() if k != "dtype"})
            model.add_lora(adapter, load_file(folder / "adapter_model.safetensors"))
            return model if trainable else model.requires_grad_(False)
        files = sorted(folder.glob("model*.safetensors"))
        files and "text_config" in config or sys.exit(f"{folder} needs OpenVLA's config.json and model*.safetensors (pickles, *.bin and *.pt, are never loaded: save those anew)")
        if "decoding" not in config and not re.search("(?i)openvla-7b(?!-oft)[^/+]*(/snapshots/[^/]*)?$", folder.as_posix()):
            warnings.warn(f'{folder} is read as OpenVLA; an OpenVLA-OFT needs "decoding": "parallel" in config.json')
        with torch.device("meta"):
            model = cls(config, PreTrainedTokenizerFast.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None)
        unread = re.compile("|".join(rf"vision_backbone\.{name}\.(blocks\.{t.get('depth', 0) - 1}|norm|attn_pool)\."     # past where a tower is read
                                     for name, t in zip(model.vision_backbone, model.towers)) + r"|.*rotary_emb\.inv_freq")
        weights = torch.float32 if trainable and not lora_rank else dtype     # what is trained stays float32, the arithmetic is dtype's
        state, wanted = {k: v.to(weights) for f in files for k, v in load_file(f).items() if not unread.match(k)}, model.state_dict()
        if wrong := sorted(k for k in state.keys() | wanted if k not in state or k not in wanted or state[k].shape != wanted[k].shape):
            sys.exit(f"{folder}: its config.json and its weights do not fit, first at {wrong[0]} ({len(wrong)} tensors); fetch it again with `hf download`")
        model.load_state_dict(state, assign=True)
        model.language_model.model.rotary_emb = type(model.language_model.model.rotary_emb)(model.language_model.config)     # float32 whatever dtype is
        load_in_4bit and trainable and not lora_rank and sys.exit("--load-in-4bit freezes the model: train adapters with --lora-rank 32")
        load_in_4bit and model.quantize(dtype)
        model.eval().to(device).compute = dtype
        lora_rank and model.add_lora(LoraConfig(r=lora_rank, lora_alpha=min(lora_rank, 16), lora_dropout=0., init_lora_weights="gaussian", target_modules="all-linear",
                                                base_model_name_or_path=str(folder.resolve() if Path(path).is_dir() else path)))
        return model if trainable else model.requires_grad_(False)

    def quantize(self, dtype):
        """The language model's layers in 4 bits (.to(device) does it), everything frozen; embeddings, lm_head, towers stay as they are."""
        find_spec("bitsandbytes") or sys.exit("--load-in-4bit needs bitsandbytes: pip install bitsandbytes")
        from bitsandbytes.nn import Linear4bit, Params4bit
        self.requires_grad_(False).is_loaded_in_4bit = True  # peft looks at this name
        for name, old in [m for m in self.language_model.model.named_modules() if type(m[1]) is nn.Linear]:
            new = Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
            new.support_avx512bf16_for_cpu = False           # its packed CPU kernel silently drops the gradient
            self.language_model.model.set_submodule(name, new)

    def add_lora(self, config, state=None):
        """LoRA on every linear layer, in place, in float32; everything else is frozen."""
        self.lora, config.inference_mode = config, False     # peft's own files say True, which would freeze it
        inject_adapter_in_model(config, self)
        [setattr(m, "cast_input_dtype_enabled", False) for m in self.eval().modules()]     # eval: no dropout; else peft casts to float32 what autocast casts back
        [setattr(p, "data", p.data.float()) for p in self.parameters() if p.requires_grad]
        if state and (missing := [k for k in set_peft_model_state_dict(self, state).missing_keys if "lora_" in k]):
            sys.exit(f"the adapter of {config.base_model_name_or_path} lacks {len(missing)} tensors, first {missing[0]}")

    def save(self, folder, dtype=None):
        """A checkpoint that load() reads; with LoRA only the adapter, in peft's own format."""
        folder, state, name = Path(folder), self.state_dict(), "model.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora:
            state, name = {"base_model.model." + k.replace(".default.", "."): v for k, v in state.items() if "lora_" in k}, "adapter_model.safetensors"
            self.lora.save_pretrained(folder)
        save_file({k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in state.items()}, folder / name, {"format": "pt"})
        self.tokenizer and self.tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))     # last: who waits for a checkpoint waits for this

    def prepare(self, images):
        """uint8 pictures [B, H, W, 3] -> uint8 tensor [B, S, S, 3], resized like the official processor (PIL's bicubic)."""
        return torch.from_numpy(np.stack([Image.fromarray(x).resize((self.image, self.image), Image.BICUBIC) for x in np.asarray(images)]))

    def tokenize(self, instructions):
        """ids [B, N] and mask: <s>, padding (where the picture goes), the prompt; so any batch gives what one-by-one gives."""
        for text in set(instructions) - self.rows.keys():
            self.tokenizer or sys.exit("this checkpoint has no tokenizer.json: copy the one of its base model into its folder")
            row, llama = self.tokenizer(self.prompt.format(instruction=text.lower())).input_ids, self.tokenizer.convert_tokens_to_ids("▁") == LONE
            self.rows[text] = row + [LONE] if llama and row[-1] != LONE else row
            self.tokenizer.unk_token_id in row and warnings.warn("instructions have words that are not in this checkpoint's vocabulary: they all look alike to it")
        n = max(map(len, rows := [self.rows[t] for t in instructions]))
        return torch.tensor([[r[:1] + [self.pad] * (n - len(r)) + r[1:], [1] + [0] * (n - len(r)) + [1] * (len(r) - 1)] for r in rows], device=self.device).unbind(1)

    def prefix(self, images, ids, mask):
        """<s>, the picture's tokens, the prompt.  images: prepared uint8 [B, S, S, 3] (or already normalised [B, 3 * towers, S, S])."""
        embed = self.language_model.model.embed_tokens
        if images.dtype == torch.uint8:
            images = images.to(self.device).permute(0, 3, 1, 2).float() / 255
            mean, std = (torch.tensor([t[k] for t in self.towers], device=self.device).view(len(self.towers), 3, 1, 1) for k in ("mean", "std"))
            images = torch.cat([(images - m) / s for m, s in zip(mean, std)], 1)
        x = torch.cat([tower(i) for tower, i in zip(self.vision_backbone.values(), images.to(embed.weight.dtype).split(3, 1))], -1)
        for i, fc in enumerate(self.projector.values()):
            x = fc(F.gelu(x) if i else x)
        return torch.cat([(e := embed(ids))[:, :1], x.to(e.dtype), e[:, 1:]], 1), torch.cat([mask[:, :1], mask.new_ones(x.shape[:2]), mask[:, 1:]], 1)

    def read(self, x, mask, start, end, cache=None, **kw):
        """Of what Llama makes of the embeddings x (by position: transformers' versions name the cache differently): the 256 logits at positions start:end, the state at start."""
        h = self.language_model.model(None, mask, mask.cumsum(1)[:, -x.shape[1]:] - 1, cache, x, use_cache=cache is not None, **kw).last_hidden_state
        return self.language_model.lm_head(h[:, start:end])[..., self.first:self.first + BINS].float(), h[:, start].float()    # LoRA: no slice of its weight

    def forward(self, images, ids, mask, tokens=None):
        """One pass: logits [B, K, 256] of the given action tokens (teacher forcing), or in parallel (which ignores them); the last prompt token's state."""
        x, mask = self.prefix(images, ids, mask)
        n, embed = x.shape[1], self.language_model.model.embed_tokens
        if self.parallel:                            # empty action slots, then </s> (RLinf: none); every position sees every other
            slots = self.action_slots if hasattr(self, "action_slots") else x.new_zeros(1, self.num_tokens, x.shape[2])
            tail = torch.cat([slots.to(x.dtype).expand(len(x), -1, -1)] + [embed(ids.new_full((len(ids), 1), STOP))] * self.config.get("stop", True), 1)
        else:
            tail = embed(tokens[:, :-1] + self.first)
        x, mask, kw = torch.cat([x, tail], 1), torch.cat([mask, mask.new_ones(tail.shape[:2])], 1), dict(is_causal=False) if self.parallel else {}
        return self.read(x, mask, n - 1, n - 1 + self.num_tokens, **kw)     # a token's logits are read one position before it

    def score(self, images, instructions, tokens=None):
        """Differentiable float32 logits [B, K, 256] of prepared pictures and instructions."""
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            return self(images, *self.tokenize(instructions), tokens)[0]

    @torch.no_grad()
    def act(self, images, instructions, temperature=1., generator=None):
        """Action tokens (0..255) [B, K], their log-probabilities, the last prompt token's state; temperature 0 is greedy (log-probabilities: at temperature 1)."""
        def pick(z, state):
            logp = (z / (temperature or 1.)).log_softmax(-1)
            token = torch.multinomial(logp.exp().flatten(0, 1), 1, generator=generator).view(z.shape[:2]) if temperature else z.argmax(-1)
            return token, logp.gather(-1, token[..., None])[..., 0], state
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            if self.parallel:
                return pick(*self(images, *self.tokenize(instructions)))
            (x, mask), cache, picked = self.prefix(images, *self.tokenize(instructions)), DynamicCache(config=self.language_model.config), []
            for _ in range(self.num_tokens):
                picked.append(pick(*self.read(x, mask, -1, None, cache)))
                x, mask = self.language_model.model.embed_tokens(picked[-1][0] + self.first), F.pad(mask, (0, 1), value=1)
        return *(torch.cat(part, 1) for part in list(zip(*picked))[:2]), picked[0][2]

    def ranges(self):
        """What -1 and 1 mean in the robot's units, per action dimension (where mask is False, grippers: themselves).  As OpenVLA-OFT: two arms by the extremes."""
        stats, key = self.config.get("norm_stats"), self.config.get("unnorm_key")
        if not stats:
            return np.full((2, self.action_dim), [[-1.], [1.]])
        key = next(iter(stats)) if key is None and len(stats) == 1 else key if key in stats else f"{key}_no_noops"
        key in stats or sys.exit(f"action statistics {sorted(stats)}, no {key!r}: set unnorm_key in the checkpoint's config.json, or put a dataset_statistics.json beside it")
        return np.where(stats[key]["action"].get("mask", True), [stats[key]["action"][q] for q in (("min", "max") if self.action_dim == 14 else ("q01", "q99"))], [[-1.], [1.]])

    def actions(self, tokens):
        """Tokens [B, K] -> actions [B, chunk, dim] in the robot's units.  A higher token is a lower value; 256 edges make 255 centres."""
        low, high = self.ranges()
        index = (BINS - 1 - torch.as_tensor(tokens).cpu().numpy()).clip(0, BINS - 2).reshape(-1, self.chunk, self.action_dim)
        return (low + (index + .5) / (BINS - 1) * (high - low)).astype(np.float32)

# --- block rollout
def rollout(env, model, task, init_state, split, temperature, batch_size, generator=None, frames=None):
    """Plays every (task, init_state) once.  A free environment takes the next one; only active ones are queried.  Returns a row per query: image,
    instruction, tokens, logp, state, mask (tokens that were executed), reward, episode; and per episode: success, grasped, length."""
    model.action_dim == env.suite.action_dim or sys.exit(f"{env.suite.name} takes actions of {env.suite.action_dim} numbers, this checkpoint's have {model.action_dim}")
    playing, queue, rows, outcome, seconds = np.full(env.num_envs, -1), list(range(len(task)))[::-1], [], np.zeros((3, len(task)), int), 0.
    while queue or (playing >= 0).any():
        start, free = time.time(), np.flatnonzero(playing < 0)[:len(queue)]
        if len(free):
            playing[free] = [queue.pop() for _ in free]
            which, mask = playing.clip(0), np.isin(np.arange(env.num_envs), free)
            obs, _ = env.reset(options=dict(task=task[which], init_state=init_state[which], split=split, mask=mask))
        live, seconds = np.flatnonzero(playing >= 0), seconds + time.time() - start
        images, texts = model.prepare(obs["image"][live]), [obs["instruction"][i] for i in live]
        parts = [model.act(images[i:i + batch_size], texts[i:i + batch_size], temperature, generator) for i in range(0, len(live), batch_size)]
        tokens, logp, state = (torch.cat(part).cpu() for part in zip(*parts))
        start, actions = time.time(), np.zeros((env.num_envs, model.chunk, model.action_dim), np.float32)
        actions[live] = model.actions(tokens)
        obs, reward, terminated, truncated, info = env.step(actions)
        seconds += time.time() - start
        frames is None or frames.append(obs["image"][:16].copy())
        executed = torch.as_tensor(info["steps"][live])[:, None] > torch.arange(model.num_tokens) // model.action_dim
        rows.append((images, tokens, logp, state, executed, torch.as_tensor(reward[live]), torch.as_tensor(playing[live]), texts))
        outcome[:, playing[live]] = [info["success"][live], info["grasped"][live], outcome[2, playing[live]] + info["steps"][live]]
        playing[terminated | truncated] = -1
    *tensors, texts = zip(*rows)
    batch = dict(zip(("image", "tokens", "logp", "state", "mask", "reward", "episode"), map(torch.cat, tensors)), instruction=sum(texts, []))
    return dict(batch, **dict(zip(("success", "grasped", "length"), outcome)), env_seconds=seconds)

def evaluate(env, model, split, episodes_per_task, temperature, batch_size, seed, rank=0, world=1, video=None):
    """Success, grasped, length [3, tasks, episodes] on the first initial states of the split, shared out among the processes."""
    tasks, states = len(env.suite.tasks), env.suite.splits[split][:episodes_per_task]
    task, state = np.repeat(np.arange(tasks), len(states)), np.tile(states, tasks)
    generator, frames, result = torch.Generator(model.device).manual_seed(seed + 1_000_003 * rank), [] if video else None, np.zeros((3, len(task)))
    if rank < len(task):
        played = rollout(env, model, task[rank::world], state[rank::world], split, temperature, batch_size, generator, frames)
        result[:, rank::world] = [played[k] for k in ("success", "grasped", "length")]
    if video and rank == 0:                          # up to 16 episodes side by side, a frame a query
        grid = [Image.fromarray(np.vstack([np.hstack(row) for row in np.split(f, 2 - len(f) % 2)])) for f in frames]
        grid[0].save(video, save_all=True, append_images=grid[1:], duration=150, loop=0)
    return all_sum(torch.from_numpy(result), world).numpy().reshape(3, tasks, len(states))

def all_sum(x, world):
    world > 1 and dist.all_reduce(x)                 # the sum over all processes
    return x

def wilson(success, z=1.96):                         # 95 % interval of a success rate
    n, p = success.size, success.mean()
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0., min(p, (centre - half) / (1 + z * z / n))), min(1., max(p, (centre + half) / (1 + z * z / n)))

# --- block run
class Run:
    """A run directory: args.json, metrics.csv, curve.png, TensorBoard events, checkpoint/.  Only process 0 writes."""
    def __init__(self, args, name, rank):
        self.dir, self.rows = Path(args.run_dir or f"runs/{args.env}-{name}-{args.seed}"), []
        self.checkpoint, self.old = self.dir / "checkpoint", self.dir / "checkpoint.old"
        rank == 0 and self.old.exists() and not self.checkpoint.exists() and self.old.rename(self.checkpoint)     # killed between the two renames of save()
        dist.is_initialized() and dist.barrier()
        if args.resume != self.checkpoint.exists():
            sys.exit(f"nothing to resume: {self.checkpoint} does not exist; start without --resume" if args.resume else
                     f"{self.dir} holds a run already: add --resume to go on with it, or choose another --run-dir")
        if rank > 0:
            self.log = self.save = self.finish = lambda *words: None
            return
        now = asdict(args) | dict(processes=dist.get_world_size() if dist.is_initialized() else 1)
        free = "resume run_dir num_iterations device track compile capture_video eval_every eval_episodes_per_task micro_batch_size query_batch_size".split()
        if args.resume and (was := {k: v for k, v in json.loads((self.dir / "args.json").read_text()).items() if k not in free and now.get(k) != v}):
            sys.exit(f"{self.dir} was started with {', '.join(f'{k} = {v!r}' for k, v in was.items())}: resume it so, or choose another --run-dir")
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "args.json").write_text(json.dumps(now, indent=1))
        if args.track:
            find_spec("wandb") or sys.exit("--track needs wandb: pip install wandb")
            import wandb
            wandb.init(project="vla-post-training", name=self.dir.name, dir=str(self.dir), config=asdict(args), sync_tensorboard=True, resume="auto")
        self.writer = SummaryWriter(str(self.dir), purge_step=json.loads((self.checkpoint / "progress.json").read_text())["step"] + 1 if args.resume else None)

    def log(self, step, metrics):
        self.rows.append(dict(step=step, **metrics))
        names = list(dict.fromkeys(k for row in self.rows for k in row))
        (self.dir / "metrics.tmp").write_text("\n".join(",".join(map(str, r)) for r in (names, *([row.get(k, "") for k in names] for row in self.rows))) + "\n")
        os.replace(self.dir / "metrics.tmp", self.dir / "metrics.csv")
        [self.writer.add_scalar(k, v, step) for k, v in metrics.items()]

    def save(self, model, optimizers, step):
        """All or nothing: written beside the old checkpoint, flushed to disk, then renamed."""
        new = self.dir / "checkpoint.tmp"
        try:
            [shutil.rmtree(stale, ignore_errors=True) for stale in (new, self.old)]
            model.save(new)
            state = {f"{o}.{i}.{k}": v for o, optimizer in enumerate(optimizers) for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, new / "optimizer.safetensors")
            (new / "progress.json").write_text(json.dumps(dict(step=step, rows=self.rows)))
            for file in (*new.iterdir(), new):
                os.fsync(descriptor := os.open(file, os.O_RDONLY))
                os.close(descriptor)
        except (OSError, SafetensorError) as e:      # a full disk is either
            sys.exit(f"checkpoint of iteration {step} not written ({getattr(e, 'strerror', 0) or e}); the one before is intact: make room, then --resume")
        self.checkpoint.exists() and self.checkpoint.rename(self.old)
        new.rename(self.checkpoint)
        shutil.rmtree(self.old, ignore_errors=True)

    def load(self, optimizers):
        """Restores the optimisers and the metrics; returns the step.  An iteration's randomness depends on (seed, iteration, process) alone."""
        progress, saved = json.loads((self.checkpoint / "progress.json").read_text()), load_file(self.checkpoint / "optimizer.safetensors")
        for o, optimizer in enumerate(optimizers):
            mine = [(*k.split(".")[1:], v) for k, v in saved.items() if k.startswith(f"{o}.")]
            state = {int(i): {name: v for j, name, v in mine if j == i} for i, _, _ in mine}
            optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()["param_groups"]))
        self.rows = progress["rows"]
        return progress["step"]

    def finish(self, title):
        """The curve, with Wilson intervals where it was evaluated, and what came of it."""
        axis = (figure := Figure(figsize=(5, 3.2), layout="constrained")).subplots()
        if train := [(r["step"], r["charts/success_rate"]) for r in self.rows if "charts/success_rate" in r]:
            axis.plot(*zip(*train), color="#0072b2", alpha=.5, label="training rollouts, sampled")
        x, y, low, high = np.array([(r["step"], *(r[f"charts/eval_{k}"] for k in ("success", "low", "high"))) for r in self.rows if "charts/eval_success" in r]).reshape(-1, 4).T
        axis.errorbar(x, y, [y - low, high - y], color="#d55e00", marker="o", capsize=3, label="evaluation, 95 %")
        axis.set(xlabel="iteration", ylabel="success rate", ylim=(0, 1), title=title)
        axis.legend(frameon=False), figure.savefig(self.dir / "curve.png", dpi=150)
        for when, i in [("before", 0)] * (0 in x) + [("after", -1)] * (len(x) > 0):        # sft.py looks only after
            print(f"{when:>10}: {100 * y[i]:.1f} % success, 95 % interval {100 * low[i]:.1f} to {100 * high[i]:.1f} (iteration {x[i]:.0f})")
        print(f"     curve: {self.dir / 'curve.png'}\n   metrics: {self.dir / 'metrics.csv'}\ncheckpoint: {self.checkpoint}")

# --- block setup
def setup(args):
    """One process, or one of torchrun's."""
    rank, world, gpus = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available() * torch.cuda.device_count()
    positive = re.compile("num_envs|num_iterations|.*batch_size|.*_per_task|eval_every|group_size|temperature|max_grad_norm")
    if wrong := [k for k, v in vars(args).items() if positive.fullmatch(k) and v <= 0 or k in ("seed", "eval_temperature") and v < 0]:
        sys.exit(f"--{wrong[0].replace('_', '-')} {getattr(args, wrong[0])} is too small")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus and args.device in ("auto", "cuda") else args.device.replace("auto", "cpu")
    if not re.fullmatch(r"cpu|cuda:\d+", name) or ":" in args.device and world > 1 or name != "cpu" and int(name[5:]) >= gpus:
        sys.exit(f"--device {args.device}: not auto, cpu, cuda or (without torchrun) cuda:N, or no GPU for this process ({gpus} here); try --device cpu")
    name != "cpu" and torch.cuda.set_device(name)
    full = "\nThe GPU is full: lower --micro-batch-size if it was learning, --query-batch-size if it was acting or labelling; with --lora-rank, --load-in-4bit helps too\n"
    sys.excepthook = lambda *error: (sys.__excepthook__(*error), error[0] is torch.OutOfMemoryError and sys.stderr.write(full))
    world > 1 and dist.init_process_group("gloo" if name == "cpu" else "cpu:gloo,cuda:nccl", timeout=datetime.timedelta(hours=12))     # rollouts take long
    torch.manual_seed(args.seed)
    return rank, world, torch.device(name)

# --- block critic
class ActorCritic(nn.Module):
    """A policy, and a value head on the state of the last prompt token."""
    def __init__(self, path, args, device, trainable=True):
        super().__init__()
        self.policy = VLA.load(path, device, getattr(torch, args.dtype), args.lora_rank if trainable else 0, args.load_in_4bit, trainable)
        d, folder = self.policy.language_model.config.hidden_size, path if Path(path).is_dir() else snapshot_download(path, allow_patterns="value_head.safetensors")
        self.value = nn.Sequential(nn.Linear(d, 512), nn.GELU(), nn.Linear(512, 128), nn.GELU(), nn.Linear(128, 1, bias=False)).to(device)
        nn.init.normal_(self.value[-1].weight, std=.02)
        if (head := Path(folder, "value_head.safetensors")).exists():
            self.value.load_state_dict(load_file(head))

    def forward(self, images, instructions, tokens):
        """Logits [B, K, 256] and values [B], float32."""
        with torch.autocast(self.policy.device.type, self.policy.compute, enabled=self.policy.compute != torch.float32):
            logits, state = self.policy(images, *self.policy.tokenize(instructions), tokens)
        return logits, self.value(state)[:, 0]

    def save(self, folder):
        self.policy.save(folder)
        save_file(self.value.state_dict(), Path(folder) / "value_head.safetensors")

def gae(reward, value, episode, gamma, lam):
    """Of queries in the order in which they were played: advantages, returns.  Behind an episode's last query there is nothing: value 0."""
    (reward, now), episode = (x.double().cpu().numpy() for x in (reward, value)), episode.numpy()
    advantage, next_advantage, next_value = np.zeros_like(now), np.zeros(episode.max() + 1), np.zeros(episode.max() + 1)
    for i, e in reversed(list(enumerate(episode))):
        advantage[i] = next_advantage[e] = reward[i] + gamma * next_value[e] - now[i] + gamma * lam * next_advantage[e]
        next_value[e] = now[i]
    advantage = torch.from_numpy(advantage).to(value)
    return advantage, advantage + value

def moments(x, world):
    """Mean and population standard deviation over all processes."""
    x = x.double().cpu()
    n, total, squares = all_sum(torch.stack([x.new_tensor(x.numel()), x.sum(), (x ** 2).sum()]), world)
    return (total / n).item(), (squares / n - (total / n) ** 2).clamp(0).sqrt().item()
# --- end critic

def distillation_weights(intrinsic, reference, args, world):
    """w of every query, and where the critics agree.  intrinsic, reference: advantages by the current critic, by the frozen one."""
    (mean, std), (reference_mean, reference_std) = moments(intrinsic, world), moments(reference, world)
    calibrated = mean + std / (reference_std + 1e-8) * (reference - reference_mean)      # eq. 7
    agree = intrinsic.sign() == calibrated.sign()
    mixed = intrinsic + args.alpha * (agree if args.gate else 1) * (calibrated - intrinsic)      # eq. 8
    mean, std = moments(mixed, world)
    weight = ((mixed - mean) / (std + 1e-8)).clamp(-args.weight_clip, args.weight_clip)  # eq. 9
    return weight.relu() if args.positive_only else weight, agree

def agd(logp, bump, divergence):
    """Divergence of the fixed teacher and the student at every token.  logp: the sampled token's; `bump` raises its logit (eq. 10).  Two outcomes: that token, any other."""
    other = (-logp.clamp(max=-1e-30).expm1()).log()                                      # log(1 - p)
    rise = torch.logaddexp(logp + bump, other) - torch.logaddexp(logp, other)            # of log Z; the latter is 0 but for rounding: bump 0 gives q = p exactly
    log_p, log_q = torch.stack([logp, other]), torch.stack([logp + bump - rise, other - rise]).detach()
    if divergence == "fkl":
        return (log_q.exp() * (log_q - log_p)).sum(0)
    return -.5 * (log_q.exp() * ((log_p - log_q).expm1() / 2).log1p() + log_p.exp() * ((log_q - log_p).expm1() / 2).log1p()).sum(0)      # log(mean / q), log(mean / p)

def road_loss(logits, value, tokens, mask, old_logp, old_value, advantage, weight, returns, sizes, args, dim):
    """The loss of a micro-batch, a sum divided by the share's sizes (ratios, queries, tokens), and what is logged of it."""
    student_logp = (logits / args.temperature).log_softmax(-1)                           # float32
    logp, entropy = student_logp.gather(-1, tokens[..., None])[..., 0], -(student_logp.exp() * student_logp).sum(-1)
    per, (num_ratios, num_queries, num_tokens) = dim if args.ratio == "action" else 1, sizes
    log_ratio, advantage = (logp - old_logp).unflatten(1, (-1, per)).sum(-1), advantage[:, None]
    ratio, acted = log_ratio.exp(), mask[:, ::per]
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    policy_loss = -(torch.min(ratio * advantage, clipped * advantage) * acted).sum() / num_ratios
    near = old_value + (value - old_value).clamp(-args.value_clip, args.value_clip)
    value_loss = torch.max(*(F.huber_loss(v, returns, reduction="none", delta=10.) for v in (value, near))).sum() / num_queries
    entropy = (entropy * mask).sum() / num_tokens
    distill = (agd(logp, args.eta * weight[:, None], args.divergence) * mask).sum() / num_tokens      # eq. 12
    logged = dict(policy_loss=policy_loss, value_loss=value_loss, distill_loss=distill, entropy=entropy,
                  approx_kl=((ratio - 1 - log_ratio) * acted).sum() / num_ratios, clipfrac=((clipped * advantage < ratio * advantage) * acted).sum() / num_ratios)
    return args.ppo_term * policy_loss + args.distill_coefficient * distill + value_loss - args.entropy_coefficient * entropy, logged

def main(args):
    rank, world, device = setup(args)
    episodes = args.num_episodes // world
    if args.num_episodes % world or episodes < 1 or args.updates_per_rollout < 1:
        sys.exit(f"--num-episodes {args.num_episodes} must divide among {world} processes, --updates-per-rollout be at least 1")
    source = Path(args.reference.rstrip("/").removesuffix("/checkpoint") or f"runs/{args.env}-ppo-{args.seed}")
    flags, progress = (json.loads((source / k).read_text()) if (source / k).exists() else {} for k in ("args.json", "checkpoint/progress.json"))
    progress and "value_clip" in flags and not flags.keys() & {"reference", "privileged_info"} or sys.exit(f"{source} is no run of ppo.py, whose critic is the reference: "
        f"`python algos/ppo.py --env {args.env}{f' --student {args.student}' * bool(args.student)} --seed {args.seed} --entropy-coefficient .01` makes one; or --reference RUN")
    progress["step"] < flags["num_iterations"] and sys.exit(f"{source}: {progress['step']} of {flags['num_iterations']} iterations are done, finish it first (ppo.py --resume)")
    env, run = envs.make(args.env, args.num_envs, args.seed), Run(args, "road_vla", rank)
    model = ActorCritic(str(run.checkpoint) if args.resume else args.student or envs.checkpoint(args.env, "student"), args, device)
    policy, reference = model.policy, ActorCritic(str(source / "checkpoint"), args, device, trainable=False).requires_grad_(False)
    frozen = {k: p for k, p in policy.named_parameters() if not p.requires_grad}         # under LoRA the base; the reference's is the same: kept once
    [setattr(p, "data", frozen[k].data) for k, p in reference.policy.named_parameters() if k in frozen and torch.equal(p, frozen[k])]
    ours, theirs = (given | dict(image=p.image, chunk=p.chunk) for given, p in ((vars(args), policy), (flags, reference.policy)))
    [sys.exit(f"{source} has {k} {theirs[k]}, not {ours[k]}: --reference must be of the same") for k in ("env", "gamma", "image", "chunk") if ours[k] != theirs[k]]
    args.updates_per_rollout > (queries := episodes * -(-env.suite.max_steps // policy.chunk)) and sys.exit(f"--updates-per-rollout: at most a rollout's {queries} queries")
    args.warm_critic and not args.resume and model.value.load_state_dict(reference.value.state_dict())
    args.compile and (policy.compile(), reference.policy.compile())
    parameters = [p for p in model.parameters() if p.requires_grad]
    [dist.broadcast(p.data, 0) for p in parameters if world > 1]     # every process starts from the same weights
    groups = [dict(params=[p for p in policy.parameters() if p.requires_grad]), dict(params=model.value.parameters(), lr=args.value_learning_rate)]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, eps=args.adam_eps, weight_decay=.01)
    first = run.load([optimizer]) if args.resume else 0
    cost = {"charts/reference_env_steps": sum(row["charts/env_steps"] for row in progress["rows"][1:]),
            "charts/reference_minutes": sum(row[k] for row in progress["rows"][1:] for k in ("time/rollout", "time/advantages", "time/update")) / 60}
    not args.resume or run.rows[0].items() >= cost.items() or sys.exit(f"{source} has gone on since {run.dir} began: that was another reference")

    def test(video=None):
        env.fixed_horizon, metrics = False, {}                              # unlike training, evaluation ends an episode at its first success
        for split in [k for k in ("eval", "ood") if k in env.suite.splits]:
            success, grasped, _ = evaluate(env, policy, split, args.eval_episodes_per_task, args.eval_temperature, args.query_batch_size, args.seed, rank, world, {"eval": video}.get(split))
            metrics |= {f"charts/{split}_{k}": v for k, v in zip(("success", "low", "high", "grasped"), (success.mean(), *wilson(success), grasped.mean()))}
        return metrics

    args.resume or run.log(0, test() | cost)
    for iteration in (bar := tqdm(range(first + 1, args.num_iterations + 1), initial=first, total=args.num_iterations, disable=rank > 0, dynamic_ncols=True)):
        rng = np.random.default_rng([args.seed, iteration, rank])                        # so that --resume needs no random state
        generator, clock = torch.Generator(device).manual_seed(int(rng.integers(2 ** 62))), [time.time()]

        # The policy plays, to the horizon.
        env.fixed_horizon = True
        task, state = rng.integers(len(env.suite.tasks), size=episodes), rng.choice(env.suite.splits["train"], episodes)
        batch = rollout(env, policy, task, state, "train", args.temperature, args.query_batch_size, generator)
        image, text, tokens, old_logp, mask = batch["image"], batch["instruction"], *(batch[k].to(device) for k in ("tokens", "logp", "mask"))
        clock.append(time.time())

        # Values, of the reference too; advantages; the teacher's weights.
        with torch.no_grad():                                                            # autoregressive: the first token is no input, this reads the prompt
            reference_value = torch.cat([reference(image[i], [text[j] for j in i], tokens[i, :1])[1] for i in torch.arange(len(tokens)).split(args.query_batch_size)])
            device.type == "cuda" and torch.cuda.synchronize()
            clock.append(time.time())
            old_value = model.value(batch["state"].to(device))[:, 0]
        (advantage, returns), (reference_advantage, _) = (gae(batch["reward"], v, batch["episode"], args.gamma, args.gae_lambda) for v in (old_value, reference_value))
        weight, agree = distillation_weights(advantage, reference_advantage, args, world)
        unexplained, total = moments(returns - old_value, world)[1], moments(returns, world)[1]
        mean, std = moments(advantage, world)
        advantage = (advantage - mean) / (std + 1e-5)
        clock.append(time.time())

        # Learning.  Each optimiser step sees its own share of the queries, once.
        sums = {}
        for share in torch.from_numpy(rng.permutation(len(tokens))).tensor_split(args.updates_per_rollout):
            executed = mask[share].sum()
            sizes = all_sum(torch.stack([executed / (policy.action_dim if args.ratio == "action" else 1), executed.new_tensor(len(share)), executed]), world)
            for i in share.split(args.micro_batch_size) if len(share) else ():
                logits, value = model(image[i], [text[j] for j in i], tokens[i])
                loss, logged = road_loss(logits, value, tokens[i], mask[i], old_logp[i], old_value[i], advantage[i], weight[i], returns[i], sizes, args, policy.action_dim)
                loss.backward()
                sums = {k: sums.get(k, 0) + v.detach() for k, v in logged.items()}
            for p in parameters:
                p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad, world)     # a sum: the loss was divided by all processes' total
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        counts = dict(success=batch["success"].sum(), grasped=batch["grasped"].sum(), episodes=episodes, env_steps=batch["length"].sum(),
                      queries=len(tokens), reward=batch["reward"].sum())
        counts = dict(zip(counts, all_sum(torch.tensor([float(n) for n in counts.values()], dtype=torch.float64), world).tolist()))
        losses = all_sum(torch.stack(list(sums.values())).cpu().double(), world).tolist()     # waits for the GPU
        clock.append(time.time())
        metrics = {f"losses/{k}": v / args.updates_per_rollout for k, v in zip(sums, losses)}
        metrics |= {"charts/success_rate": counts["success"] / counts["episodes"], **{f"charts/{k}": v for k, v in counts.items()},
                    "charts/queries_per_second": counts["queries"] / (time.time() - clock[0]), "time/env": batch["env_seconds"],
                    "losses/critic_agreement": moments(agree, world)[0], "losses/mean_weight": moments(weight, world)[0],
                    "losses/explained_variance": 1 - unexplained ** 2 / max(total ** 2, 1e-12),
                    **{f"time/{k}": b - a for k, a, b in zip(("rollout", "reference", "advantages", "update"), clock, clock[1:])}}
        if (last := iteration == args.num_iterations) or iteration % args.eval_every == 0:
            metrics |= test(run.dir / "eval.gif" if last and args.capture_video else None)
        run.log(iteration, metrics)
        run.save(model, [optimizer], iteration)
        bar.set_postfix({k.split("/")[1]: f"{metrics[k]:.3f}" for k in ("charts/success_rate", "losses/value_loss", "losses/entropy")})
    run.finish(f"ROAD-VLA on {args.env}")

if __name__ == "__main__":
    main(args)
    dist.is_initialized() and dist.destroy_process_group()               # else gloo's threads may abort the process as it ends
