"""Supervised fine-tuning of a vision-language-action model: makes the base, the students and the teachers that the other scripts start from.

    python algos/sft.py --make tabletop-object-student                         # a shipped checkpoint, by its recipe (RECIPES below)
    python algos/sft.py --env ENV --student DIR --data FOLDER                  # LIBERO's or robomimic's HDF5 demonstrations, actions as they are there
    python algos/sft.py --env tabletop-goal --demos-per-task 1                 # a suite's scripted expert; with --save-demos DIR it only writes them

The loss is the cross-entropy of the 256 action tokens; --smoothing spreads each label over neighbouring bins (a Gaussian), which tells the model that
bins are ordered.  The expert's demonstrations can be disturbed (--demo-noise): bursts of random actions that the expert then makes good.  Only windows
without a disturbance inside are learned from, so that a label is always what the expert would do next.
A tiny base has no DINOv2 and SigLIP to start from: --pretrain-tower teaches its tower first where things are in a picture.
"""
import datetime, json, math, os, re, shutil, sys, time, warnings
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
import tyro
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # envs/ is found from any working directory

# How the shipped checkpoints are made.  The base sees every suite, in two stages; a student is the base after one undisturbed demonstration per task of its
# suite (it forgets most recoveries), a teacher the base after many more.
RECIPES = dict(
    start=dict(env="tabletop", demos_per_task=6, fresh_demos=True, num_iterations=44, pretrain_tower=1500, num_envs=64, batch_size=32, demo_noise=.7,
               eval_every=10, eval_episodes_per_task=3),
    base=dict(env="tabletop", student="start", demos_per_task=6, fresh_demos=True, num_iterations=24, num_envs=64, batch_size=32, demo_noise=.7,
              eval_every=6, eval_episodes_per_task=3),
    student=dict(student="base", demos_per_task=1, num_iterations=20, learning_rate=1.5e-3, batch_size=32),
    teacher=dict(student="base", demos_per_task=60, fresh_demos=True, num_iterations=4, learning_rate=5e-4, batch_size=32, demo_noise=.7,
                 eval_every=2))
# At that learning rate some suites' students forget too little or too much.  The base has no second arm: two-arm has one of its own.
RECIPES |= {f"{suite}-student": RECIPES["student"] | dict(learning_rate=rate) for suite, rate in
            {"long": 1.2e-3, "unseen-table": 1.9e-3, "dynamic-texture": 1.8e-3, "dynamic-noise": 1.7e-3, "multi-receptacle": 2.5e-3}.items()}
RECIPES |= {"two-arm-base": dict(student="base", demos_per_task=20, fresh_demos=True, num_iterations=16, learning_rate=1e-3, batch_size=32, demo_noise=.7),
            "two-arm-student": RECIPES["student"] | dict(student="two-arm-base", learning_rate=2.2e-3),
            "two-arm-teacher": RECIPES["teacher"] | dict(student="two-arm-base", demos_per_task=20)}

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
    make: str = ""  # make a shipped checkpoint by its recipe, which overrides the other flags: tabletop-start, tabletop-base, tabletop-two-arm-base, ENV-student, ENV-teacher
    data: str = ""  # folder of HDF5 demonstrations (LIBERO, robomimic); default: the suite's scripted expert
    batch_size: int = 128  # samples per optimiser step, in every process
    demos_per_task: int = 1  # demonstrations per task
    fresh_demos: bool = False  # new demonstrations every iteration (the scripted expert never tires)
    demo_noise: float = 0.0  # size of the bursts of random actions in the expert's demonstrations
    save_demos: str = ""  # folder to write the expert's demonstrations to, and stop: HDF5 files, with keypoints, for --data
    demo_policy: str = ""  # a checkpoint that plays, sampled, in between; the expert finds back from where it went (DAgger's states)
    learning_rate: float = 1e-3  # AdamW's, falling to 0; Muon's is ten times it
    num_iterations: int = 30  # passes over the demonstrations
    smoothing: float = 6.0  # labels are Gaussians, their standard deviation in bins; 0: one bin, as OpenVLA's
    decoding: Literal["parallel", "autoregressive"] = "parallel"  # of a new tiny model
    pretrain_tower: int = 0  # steps of teaching a new tiny model's tower where things are
    tower_rate: float = 1.0  # the towers' part of the learning rate; below 1 a pretrained tower keeps longer what it was taught

if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)                        # before torch is imported: --help is instant

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
# --- end setup

def tiny(words, image=64, action_dim=7, chunk=4, decoding="parallel", width=64, layers=3, heads=4, tokens=28, tower=48, **extra):
    """A new tiny VLA: 0.25 M parameters, one convolutional tower, a vocabulary of the suites' words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    specials = ["<pad>", "<s>", "</s>", "<unk>"]     # ids 0, BOS, STOP, 3
    vocab = {w: i for i, w in enumerate(dict.fromkeys(specials + [w.lower() for w in words]))}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), specials)))
    text = dict(vocab_size=-(-len(vocab) // 8) * 8 + BINS + 8, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=heads, pad_token_id=0, initializer_range=width ** -.5)   # at Llama's .02 it does not learn
    config = dict(text_config=text, image_sizes=[image, image], pad_to_multiple_of=8, n_action_bins=BINS, prompt="{instruction}", decoding=decoding,
                  chunk=chunk, action_dim=action_dim, action_slots=.5, norm_stats={},
                  towers=[dict(tokens=tokens, width=tower, mean=[.5] * 3, std=[.25] * 3)])
    model = VLA({**config, **extra}, tokenizer)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight)             # keeps the signal's size through the ReLUs; torch's default shrinks it
    for fc in model.projector.values():
        nn.init.normal_(fc.weight, std=fc.in_features ** -.5)
    return model

def tokens_of(model, actions):
    """The inverse of model.actions: [B, chunk, dim] -> tokens [B, K].  Like the official one, exactly 1 is token 0."""
    low, high = model.ranges()
    unit = ((np.asarray(actions, np.float64) - low) / np.maximum(high - low, 1e-8)).clip(0, 1)
    return torch.from_numpy(BINS - 1 - np.floor(unit * (BINS - 1)).astype(np.int64)).flatten(1)

def play_expert(env, demos_per_task, noise, rng, intruder=None, batch_size=512, keypoints=False):
    """Episodes of the scripted expert: (images [T, H, W, 3], actions [T, dim], clean [T], instruction).  intruder: a policy that plays in between.
    keypoints: and what is where, [T, things, 3], an index (-1: not in sight) and parts of the picture."""
    n, tasks, demos = env.num_envs, len(env.suite.tasks), []
    generator = torch.Generator(intruder.device).manual_seed(int(rng.integers(2 ** 62))) if intruder else None
    gripper = np.arange(env.suite.action_dim) % 7 == 6
    for start in range(0, demos_per_task * tasks, n):
        task = (start + np.arange(n)) % tasks
        obs, _ = env.reset(options=dict(task=task, init_state=rng.choice(env.suite.splits["train"], n), split="train"))
        images, actions, clean, live, points, burst, left = [], [], [], [], [], np.zeros(n, int), rng.integers(60) if intruder else 0
        while not env.done.all():
            action = env.expert_action()
            burst = np.where((burst == 0) & (rng.random(n) < .08 * (noise > 0)), rng.integers(1, 8, n), np.maximum(burst - 1, 0))
            executed = action + (burst > 0)[:, None] * noise * (1 + gripper) * rng.standard_normal(action.shape)
            for series, x in zip((images, actions, clean, live), (obs["image"], action, burst == 0, ~env.done)):
                series.append(x)
            if keypoints:
                index, at = env.keypoints()
                points.append(np.concatenate([index[..., None], at / env.suite.image], -1))
            obs, left = env.step(executed[:, None])[0], left - 1
            if intruder and left < 0:                        # it loses its way, and the expert has to find back from there
                for _ in range(rng.integers(1, 2 + env.suite.max_steps // intruder.chunk // 2)):
                    pictures, texts = intruder.prepare(obs["image"]), list(obs["instruction"])
                    tokens = [intruder.act(pictures[i:i + batch_size], texts[i:i + batch_size], 1., generator)[0] for i in range(0, n, batch_size)]
                    obs = env.step(intruder.actions(torch.cat(tokens)))[0]
                left, clean[-1] = rng.integers(60, 120), np.zeros(n, bool)       # no label reaches over the gap
        images, actions, clean, live, *points = (np.stack(x, 1) for x in (images, actions, clean, live, *[points] * keypoints))
        demos += [(images[i, :t], actions[i, :t], clean[i, :t], obs["instruction"][i], *(x[i, :t] for x in points))
                  for i, t in enumerate(live.sum(1)[:demos_per_task * tasks - start]) if np.ptp(actions[i, :t], 0).any()]        # it stands still where it does not know the task
    if len(demos) < demos_per_task * tasks:
        print(f"the scripted expert of {env.suite.name} does not know some of the tasks: {len(demos)} demonstrations instead of {demos_per_task * tasks}")
    return demos or sys.exit("no demonstrations: pass --data, a folder of HDF5 files")

def write_hdf5(demos, folder, name):
    """play_expert's, in robomimic's layout, one file an instruction.  A file is whole or not there."""
    import h5py
    Path(folder).mkdir(parents=True, exist_ok=True)
    for text in dict.fromkeys(demo[3] for demo in demos):
        file, mine = Path(folder) / f"{name}-{text.replace(' ', '-')}.hdf5", [demo for demo in demos if demo[3] == text]
        with h5py.File(file.with_suffix(".part"), "w") as f:
            f.create_group("data").attrs.update(problem_info=json.dumps(dict(language_instruction=text)))
            for i, (images, actions, clean, _, *points) in enumerate(mine):
                f.create_dataset(f"data/demo_{i}/obs/agentview_image", data=images, compression="lzf", chunks=(1, *images.shape[1:]))
                f[f"data/demo_{i}/actions"], f[f"data/demo_{i}/clean"] = actions, clean
                for x in points:                         # every keypoint has a column; outside the picture where it is not in sight
                    at = np.full((len(x), int(x[..., 0].max()) + 1, 2), -1.)
                    for thing in x.swapaxes(0, 1)[::-1]: # of two alike the first counts
                        t = (thing[:, 0] >= 0).nonzero()[0]
                        at[t, thing[t, 0].astype(int)] = thing[t, 1:]
                    f[f"data/demo_{i}/obs/keypoints"] = at
                    f[f"data/demo_{i}/obs/keypoints"].attrs["names"] = [f"{k:02}" for k in range(at.shape[1])]
        os.replace(file.with_suffix(".part"), file)
        print(f"   {len(mine)} demonstrations: {file}")

def read_hdf5(folder, demos_per_task, whole=False):
    """The same from LIBERO's or robomimic's files, one a task; envs/libero.py's and --save-demos' hold keypoints as well, {name: places [T, 2]}."""
    find_spec("h5py") or sys.exit("--data needs h5py: pip install h5py")
    import h5py
    from envs.libero_worker import gripper, picture
    demos, files = [], sorted(Path(folder).glob("**/*.hdf5"))
    if not files:
        raise SystemExit(f"no *.hdf5 in {folder}: download LIBERO's demonstrations there, or leave --data out to use the suite's scripted expert")
    for file in files:
        with h5py.File(file) as f:
            named = re.sub(r"^[A-Z_]+_SCENE\d+_", "", file.stem.removesuffix("_demo")).replace("_", " ")      # what LIBERO's environments say; its problem_info has other words
            said = json.loads(f["data"].attrs.get("problem_info", "{}")).get("language_instruction", named)
            for name in sorted(f["data"], key=lambda k: int(k.split("_")[1]))[:demos_per_task]:
                demo = f["data"][name]
                upside_down = "agentview_rgb" in demo["obs"]                             # LIBERO's, not robomimic's
                images = demo["obs"]["agentview_rgb" if upside_down else "agentview_image"][:]
                actions = demo["actions"][:].astype(np.float32)
                clean = demo["clean"][:] if "clean" in demo else np.ones(len(actions), bool)
                points, more = demo["obs"].get("keypoints", np.zeros((len(actions), 0, 2))), getattr(demo["obs"].get("keypoints"), "attrs", {})
                grip = np.arange(actions.shape[1]) % 7 == 6                              # of one arm or of two
                moving = (np.abs(actions[:, ~grip]) > 1e-4).any(1) | (np.diff(actions[:, grip], axis=0, prepend=actions[:1, grip]) != 0).any(1)      # OpenVLA drops no-ops
                images, actions, clean = images[moving], actions[moving], clean[moving]
                if upside_down:                          # what envs/libero.py shows, and what the published checkpoints say: 0 closes, 1 opens
                    images, actions[:, 6] = np.stack([picture(image, whole) for image in images]), gripper(actions[:, 6])
                    points = .5 + (points[:] - .5) * .9 ** (.5 * (whole - int(more.get("whole", 0))))       # from the picture of -whole to the middle of it, or back
                demos.append((images, actions, clean, named if upside_down else "".join(said), {n: points[moving][:, i] for i, n in enumerate(more.get("names", ()))}))
    return demos

def windows(demos, model):
    """Every frame with the chunk of actions that follows; past the end the last action repeats."""
    images, actions, texts = [], [], []
    for image, action, clean, text, *_ in demos:
        index = np.minimum(np.arange(len(image))[:, None] + np.arange(model.chunk), len(image) - 1)
        good = clean[index].all(1)
        if not good.any():
            continue
        images.append(model.prepare(np.ascontiguousarray(image[good])))
        actions.append(action[index[good]])
        texts += [text] * int(good.sum())
    return torch.cat(images), texts, tokens_of(model, np.concatenate(actions))

def look_around(suite_envs, model, rng):
    """Pictures and what is where in them: (images, index of a keypoint or -1 [N, things], pixels (x, y) [N, things, 2]) a suite and moment."""
    for env in suite_envs:
        seen = []
        for _ in range(1 if env.num_envs >= 64 else 256 // env.num_envs):    # a simulator has few environments, one a core: it starts again
            env.reset()
            for _ in range(8):
                index, at = env.keypoints()
                seen.append((model.prepare(env.image.copy()).numpy(), index, at * (model.image / env.suite.image)))
                noise = .5 * rng.standard_normal((env.num_envs, 5, env.suite.action_dim))
                env.step(np.where(rng.random() < .8, env.expert_action()[:, None], 0) + noise)
        yield from (tuple(map(np.concatenate, zip(*seen[k::8]))) for k in range(8))

def look_at(demos, model):
    """The same of demonstrations with keypoints, all in one."""
    names = sorted({name for *_, points in demos for name in points})
    if not 0 < len(names) <= model.towers[0]["tokens"]:
        raise SystemExit(f"--pretrain-tower: the demonstrations have {len(names)} keypoints, not 1 to {model.towers[0]['tokens']}: "
                         "--save-demos, or python -m envs.libero --demos, writes some")
    at = np.concatenate([np.stack([points.get(name, np.full((len(image), 2), -1.)) for name in names], 1) for image, *_, points in demos])
    seen = ((at > 0) & (at < 1)).all(-1)
    return [(torch.cat([model.prepare(image) for image, *_ in demos]).numpy(), np.where(seen, np.arange(len(names)), -1), at * model.image)]

def pretrain_tower(model, frames, steps, rng):
    """The tiny tower's heatmaps learn to point at things (bilinear over the four nearest cells): what DINOv2 and SigLIP bring to OpenVLA."""
    tower, frames = model.vision_backbone["featurizer"], list(frames)
    optimizer = torch.optim.AdamW(tower.parameters(), 2e-3, betas=(.9, .99))
    for step in tqdm(range(steps), desc="tower", dynamic_ncols=True):
        image, name, at = frames[rng.integers(len(frames))]
        pick = rng.integers(len(image), size=64)
        image, name, at = (torch.from_numpy(v[pick]).to(tower.sharpness.device) for v in (image, name, at))
        x = (image.permute(0, 3, 1, 2).float() / 255 - .5) / .25
        log_heat, side = (tower.heatmaps(tower.features(x)).flatten(2) * tower.sharpness.exp()).log_softmax(-1), image.shape[1] // 4
        cell, (e, j) = ((at.float() - 1.5) / 4).clamp(0, side - 1.001), (name >= 0).nonzero(as_tuple=True)
        corner, loss = cell.floor().long()[e, j], 0.
        part = cell[e, j] - corner
        for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (part[:, 0] if dx else 1 - part[:, 0]) * (part[:, 1] if dy else 1 - part[:, 1])
            loss = loss - (weight * log_heat[e, name[e, j], (corner[:, 1] + dy) * side + corner[:, 0] + dx]).mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()

def follow_recipe(args):
    """--make NAME: the flags of its recipe, and the folder the result goes to.  An interrupted one goes on where it was."""
    suite, _, role = args.make.rpartition("-")
    if args.make not in ("tabletop-start", "tabletop-base", "tabletop-two-arm-base", *(f"{env}-{k}" for env in envs.known() for k in ("student", "teacher"))):
        raise SystemExit(f"--make {args.make}: not tabletop-start, tabletop-base, tabletop-two-arm-base, ENV-student or ENV-teacher with ENV one of {', '.join(envs.known())}")
    recipe = dict(env=suite, run_dir=f"runs/make-{args.make}-{args.seed}") | RECIPES.get(args.make.removeprefix("tabletop-"), RECIPES[role])
    if "student" in recipe:
        recipe["student"] = os.path.relpath(envs.checkpoint("tabletop", recipe["student"]))
    begun = any((Path(recipe["run_dir"]) / k).exists() for k in ("checkpoint", "checkpoint.old"))
    return replace(args, **recipe, resume=begun), Path(envs.__file__).parents[1] / "checkpoints" / args.make

def main(args):
    if args.make:
        args, shipped = follow_recipe(args)
    rank, world, device = setup(args)
    names = [e for e in envs.known() if e.startswith("tabletop-") and e != "tabletop-two-arm"] if args.env == "tabletop" else [args.env]
    suite_envs = [envs.make(name, args.num_envs, args.seed) for name in names]
    env, rng = suite_envs[0], np.random.default_rng(args.seed)
    for needed, why in (("expert_action", "scripted expert"), ("keypoints", "keypoints for --pretrain-tower"))[:1 + bool(args.pretrain_tower)]:
        args.data or hasattr(env, needed) or sys.exit(f"{args.env} has no {why}: pass --data, a folder of HDF5 demonstrations (README, LIBERO: how to write some)")
    for k in ("demo_policy", "demo_noise", "fresh_demos", "save_demos"):
        args.data and getattr(args, k) and sys.exit(f"--{k.replace('_', '-')} is about the scripted expert's demonstrations: leave --data out")
    args.student and args.pretrain_tower and sys.exit("--pretrain-tower is for a new tiny model: leave --student out")
    args.student or not (args.lora_rank or args.load_in_4bit) or sys.exit("a new tiny model is trained whole: --lora-rank and --load-in-4bit need --student")
    intruder = VLA.load(args.demo_policy, device, getattr(torch, args.dtype), trainable=False) if args.demo_policy else None
    if args.save_demos:
        find_spec("h5py") or sys.exit("--save-demos needs h5py: pip install h5py")       # before anything is played
        world > 1 and sys.exit("--save-demos plays in one process: leave torchrun out")
        for e in suite_envs:
            demos = play_expert(e, args.demos_per_task, args.demo_noise, rng, intruder, args.query_batch_size, hasattr(e, "keypoints"))
            write_hdf5(demos, args.save_demos, f"{e.suite.name.replace(':', '-')}-{args.seed}")
        return
    run, demos = Run(args, "sft", rank), read_hdf5(args.data, args.demos_per_task, "-whole" in args.env) if args.data else []
    if args.resume or args.student:
        model = VLA.load(str(run.checkpoint) if args.resume else args.student, device, getattr(torch, args.dtype), args.lora_rank, args.load_in_4bit)
        if model.action_dim != env.suite.action_dim:     # another robot: its own action slots
            model.lora and sys.exit(f"{args.student} has {model.action_dim} action dimensions, {args.env} {env.suite.action_dim}: train all of it, without --lora-rank")
            model.config.update(action_dim=env.suite.action_dim)
            state = {k: v for k, v in model.state_dict().items() if k != "action_slots"}
            model = VLA(model.config, model.tokenizer).to(device).eval()
            model.load_state_dict(state, strict=False)
            model.compute = getattr(torch, args.dtype)
    else:
        words = sorted({w for e in {*envs.known(), *names} for w in envs.vocabulary(e)})
        model = tiny(words, min(env.suite.image, 96), env.suite.action_dim, env.suite.chunk, args.decoding).to(device).eval()
        model.compute = getattr(torch, args.dtype)
        if args.pretrain_tower:
            pretrain_tower(model, look_at(demos, model) if args.data else look_around(suite_envs, model, rng), args.pretrain_tower, rng)
    parameters = [p for p in model.parameters() if p.requires_grad]
    [dist.broadcast(p.data, 0) for p in parameters if world > 1]     # every process starts from the same weights
    matrices = [p for n, p in model.named_parameters() if not model.lora and p.ndim == 2 and ".layers." in n]
    towers = [p for p in model.vision_backbone.parameters() if p.requires_grad]
    others = [p for p in parameters if not any(p is q for q in matrices + towers)]
    optimizers = [torch.optim.AdamW([dict(params=others), dict(params=towers)], args.learning_rate, betas=(.9, .99), weight_decay=.01)]
    if matrices:                                         # Muon for the transformer's matrices: the tiny model needs 1.7x fewer samples
        optimizers.append(torch.optim.Muon(matrices, 10 * args.learning_rate, weight_decay=.01))
    first = run.load(optimizers) if args.resume else 0
    bins = torch.arange(BINS, device=device)
    labels = torch.softmax(-.5 * ((bins[:, None] - bins) / args.smoothing) ** 2, -1) if args.smoothing else F.one_hot(bins).float()

    for iteration in (bar := tqdm(range(first + 1, args.num_iterations + 1), initial=first, total=args.num_iterations, disable=rank > 0, dynamic_ncols=True)):
        began = time.time()
        if args.fresh_demos or iteration == first + 1:   # the same in every process; each then takes its share
            rng = np.random.default_rng([args.seed, iteration * args.fresh_demos])       # so that --resume needs no random state
            image, text, target = windows(demos or [d for e in suite_envs for d in play_expert(e, args.demos_per_task, args.demo_noise, rng, intruder, args.query_batch_size)], model)
        collected, order = time.time(), torch.from_numpy(np.random.default_rng([args.seed, iteration]).permutation(len(target) // world * world)[rank::world])
        losses, hits = [], []
        for part in order.split(args.batch_size):
            scale = (1 - (iteration - 1 + len(losses) * args.batch_size / len(order)) / args.num_iterations)
            loss, hit = 0., 0.
            for i in part.split(args.micro_batch_size):
                logp = model.score(image[i], [text[j] for j in i], target[i].to(device)).log_softmax(-1)
                share = -(labels[target[i].to(device)] * logp).sum() / target[part].numel()
                (share / world).backward()
                loss, hit = loss + share.item(), hit + ((logp.argmax(-1).cpu() - target[i]).abs() <= 10).sum().item() / target[part].numel()
            for p in parameters:
                if p.grad is not None:
                    all_sum(p.grad, world)
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            for optimizer, rates in zip(optimizers, ((1, args.tower_rate), (10,))):
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * args.learning_rate * scale
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss)
            hits.append(hit)
        loss, hit = (all_sum(torch.tensor([np.mean(losses), np.mean(hits)]), world) / world).tolist()     # the shares are of one size
        metrics = {"losses/policy_loss": loss, "losses/within_10_bins": hit, "charts/samples": len(order),
                   "time/demos": collected - began, "time/update": time.time() - collected}
        if iteration % args.eval_every == 0 or iteration == args.num_iterations:
            success = np.concatenate([evaluate(e, model, "eval", args.eval_episodes_per_task, 0., args.query_batch_size, args.seed, rank, world)[0]
                                      for e in suite_envs])
            low, high = wilson(success)
            metrics |= {"charts/eval_success": success.mean(), "charts/eval_low": low, "charts/eval_high": high}
        run.log(iteration, metrics)
        run.save(model, optimizers, iteration)
        bar.set_postfix({k.split("/")[1]: f"{metrics[k]:.3f}" for k in ("losses/policy_loss", "losses/within_10_bins", "charts/eval_success") if k in metrics})
    run.finish(f"SFT on {args.env}")
    if args.make and rank == 0:
        model.save(shipped, torch.float16)
        print(f"   shipped: {shipped}")

if __name__ == "__main__":
    main(args)
    dist.is_initialized() and dist.destroy_process_group()               # else gloo's threads may abort the process as it ends
