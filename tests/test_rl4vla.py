"""envs/rl4vla.py against a stand-in for RL4VLA's ManiSkill fork: its ids, arguments, spaces, options and info; it restarts everything at once."""
import sys

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from envs import rl4vla
from envs.rl4vla import RL4VLAEnv

# The object is in hand while action[0] > 0, on its plate while action[1] > 0; what follows from it is put_on_in_scene_multi.py's, line by line.
STAND_IN = '''
import gymnasium, numpy as np, torch
class Fork(gymnasium.Env):
    made, asks, shape = [], False, (480, 640)
    def __init__(self, suffix, num_envs=1, obs_mode=None, control_mode=None, sim_config={}, sensor_configs={}, sim_backend="auto", render_backend="gpu"):
        if Fork.asks: input("Would you like to download them now? (y|n): ")
        assert obs_mode == "rgb+segmentation" and control_mode == "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
        assert sim_config == dict(sim_freq=500, control_freq=5) and sensor_configs == dict(shader_pack="default")
        if (sim_backend, render_backend) == ("cpu", "cpu"):
            assert num_envs == 1, "Cannot set the sim backend to 'cpu' and have multiple environments."
            torch.cuda.synchronize()
        else: assert (sim_backend, render_backend) == ("gpu", "gpu")
        self.suffix, self.num_envs, self.device = suffix, num_envs, torch.device("cpu")
        self.xyz_configs, self.quat_configs = np.zeros((784, 2, 3)), np.zeros((4, 2, 4))
        self.action_space, self.actions, self.ids = gymnasium.spaces.Box(-np.inf, np.inf, (num_envs, 7)), [], []
        Fork.made.append(self)
    def reset(self, seed=None, options=None):
        n = self.num_envs
        assert "env_idx" not in options and options["obj_set"] in ("train", "test")
        low, many = (0, 16) if options["obj_set"] == "train" else (16, 9)
        episode_id = options["episode_id"].reshape(n) % (many * 784 * 4)
        self.select_carrot_ids, self.place = episode_id // (784 * 4) + low, episode_id % (784 * 4)
        self.ids.append(options["episode_id"].tolist())
        self.clock, self.consecutive_grasp = 0, torch.zeros(n, dtype=torch.int32)
        self.episode_stats = dict(is_src_obj_grasped=torch.zeros(n, dtype=torch.bool), consecutive_grasp=torch.zeros(n, dtype=torch.bool))
        info = self.evaluate(torch.zeros(n, 7))
        return self.look(), dict(info, reconfigure=False)
    def step(self, action):
        assert action.dtype == torch.float32 and action.shape == (self.num_envs, 7) and set(action[:, 6].tolist()) <= {-1., 1.}
        self.actions.append(action.clone())
        self.clock += 1
        info = self.evaluate(action)
        return self.look(), torch.zeros(self.num_envs), info["success"].clone(), torch.zeros(self.num_envs, dtype=torch.bool), info
    def evaluate(self, action):
        grasped = action[:, 0] > 0
        self.consecutive_grasp += grasped
        self.consecutive_grasp[grasped == 0] = 0
        self.episode_stats["is_src_obj_grasped"] = self.episode_stats["is_src_obj_grasped"] | grasped
        self.episode_stats["consecutive_grasp"] = self.episode_stats["consecutive_grasp"] | (self.consecutive_grasp >= 5)
        return dict(**self.episode_stats, src_on_target=action[:, 1] > 0, success=action[:, 1] > 0, elapsed_steps=torch.full((self.num_envs,), self.clock))
    def look(self):
        rgb = torch.zeros(self.num_envs, *Fork.shape, 3, dtype=torch.uint8)
        rgb[:, 100:400, 100:500, 0] = self.select_carrot_ids[:, None, None].to(torch.uint8) * 10
        rgb[:, 100:400, 100:500, 1] = self.clock
        rgb[..., 2] = (torch.arange(Fork.shape[1]) // 3).to(torch.uint8)
        return dict(sensor_data={"3rd_view_camera": dict(rgb=rgb, segmentation=rgb[..., :1])})
    def get_language_instruction(self):
        return [f"put object{int(k)} on plate" for k in self.select_carrot_ids]
    def close(self): self.closed = True
for suffix in ("Main-v3", "VisionImage-v1", "VisionTexture05-v1", "VisionWhole05-v1", "MultiCarrot-v1", "MultiPlate-v1", "EEPose-v1", "PositionChangeTo-v1"):
    gymnasium.register("PutOnPlateInScene25" + suffix, entry_point=Fork, max_episode_steps=80, disable_env_checker=True, kwargs=dict(suffix=suffix))
'''


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """The stand-in, installed; returns its class."""
    (tmp_path / "mani_skill").mkdir()
    (tmp_path / "mani_skill/__init__.py").touch()
    (tmp_path / "mani_skill/envs.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mani_skill", "mani_skill.envs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: 1 / 0)            # as without CUDA; undone after the test whatever sets it
    import mani_skill.envs
    yield mani_skill.envs.Fork
    for name in ("mani_skill", "mani_skill.envs"):
        sys.modules.pop(name, None)
    for name in [k for k in gymnasium.registry if k.startswith("PutOnPlateInScene25")]:
        del gymnasium.registry[name]


def acts(*rows):
    """One step; a row an environment: in hand, on the plate (and the gripper, closed if absent)."""
    actions = np.zeros((len(rows), 1, 7))
    for i, row in enumerate(rows):
        actions[i, 0, :2], actions[i, 0, 6] = row[:2], row[2] if len(row) > 2 else -1
    return actions


@pytest.mark.parametrize("name", rl4vla.IDS)
def test_contract(fork, name):
    env = RL4VLAEnv(name, 3)
    suite, sim = env.suite, fork.made[-1]
    assert isinstance(env, gymnasium.vector.VectorEnv) and sim.suffix == rl4vla.IDS[name] and (suite.max_steps, suite.action_dim, suite.chunk) == (80, 7, 1)
    train, kept, ood = (suite.splits[k] for k in ("train", "eval", "ood"))
    places = [{s % (784 * 4) for s in part} for part in (train, kept, ood)]  # whatever the number of objects, tables, ...: other scenes
    assert not places[0] & (places[1] | places[2]) and len({*train, *kept, *ood}) == len(train) + len(kept) + len(ood) and len(places[0]) > 2500
    for split, numbers in (("train", range(16)), ("eval", range(16)), ("ood", range(16, 25))):
        seen = set()
        for k in range(0, 36, 3):
            obs, info = env.reset(options=dict(init_state=suite.splits[split][k:k + 3], split=split))
            assert env.observation_space.contains(obs) and not info["success"].any() and sim.ids[-1] == suite.splits[split][k:k + 3]
            seen |= {int(t.removeprefix("put object").removesuffix(" on plate")) for t in obs["instruction"]}
        assert seen <= set(numbers) and len(seen) > len(numbers) / 2, seen
    obs, reward, terminated, truncated, info = env.step(acts((0, 0), (1, 0), (0, 0)))
    kinds = {k: (v.shape, v.dtype.kind) for k, v in info.items()}
    assert env.observation_space.contains(obs) and kinds == dict(success=((3,), "b"), grasped=((3,), "b"), kept=((3,), "b"), steps=((3,), "i"))
    assert info["grasped"].tolist() == [False, True, False] and not (terminated | truncated).any() and reward.tolist() == pytest.approx([0, .1, 0]) and (info["steps"] == 1).all()
    env.close()
    assert sim.closed


def test_picture_and_gripper(fork):
    env = RL4VLAEnv("main", 2)
    env.reset(options=dict(init_state=[5, 784 * 4 * 7]))
    for value, want in ((-1., -1), (.4, -1), (.51, 1), (1., 1)):             # opens above 0.5, as RL4VLA's checkpoints were trained
        obs = env.step(acts((0, 0, value), (0, 0, -1)))[0]
        assert fork.made[-1].actions[-1][:, 6].tolist() == [want, -1]
    exact = env.sim.look()["sensor_data"]["3rd_view_camera"]["rgb"].numpy()
    want = np.stack([np.asarray(Image.fromarray(x).resize((224, 224), Image.BICUBIC)) for x in exact])
    assert np.abs(obs["image"].astype(int) - want).max() <= 1 and obs["image"][1, 100, 100, 0] == 70 and obs["image"][0, 100, 100, 1] == 4
    arm = np.zeros((2, 1, 7)) + [.01, -.02, .03, .1, -.2, .3, 1]
    env.step(arm)
    assert torch.allclose(fork.made[-1].actions[-1], torch.tensor(arm[:, 0], dtype=torch.float32))


def test_reward_is_rl4vlas(fork):
    """Random hands and goals for 80 steps: the differences of get_reward in simpler_wrapper.py, with both grasp flags sticky and success not."""
    fork.shape = (6, 8)
    env, rng = RL4VLAEnv("main", 16, image=8), np.random.default_rng(0)
    for _ in range(2):                                   # nothing is left of the episode before
        env.reset()
        old, total = np.zeros(16), np.zeros(16)
        hands, goals = rng.random((80, 16)) < np.linspace(0, .97, 16), rng.random((80, 16)) < .2
        for t in range(80):
            _, reward, terminated, truncated, info = env.step(acts(*np.stack([hands[t], goals[t]], 1)))
            five = np.any([hands[k:k + 5].all(0) for k in range(t - 3)], 0) if t >= 4 else np.zeros(16, bool)
            new = .1 * hands[:t + 1].any(0) + .1 * five + (goals[t] & hands[:t + 1].any(0))
            np.testing.assert_allclose(reward, new - old, atol=1e-6)
            old, total = new, total + reward
            assert not terminated.any() and (truncated == (t == 79)).all()
            assert (info["grasped"] == hands[:t + 1].any(0)).all() and (info["success"] == goals[t]).all()
        assert .1 < five.mean() < .9


def test_success_ends_nothing(fork):
    """As RL4VLA counts: all play to the horizon, whatever the scripts ask for, and success is whether the goal holds, after the last step as well."""
    env = RL4VLAEnv("main", 3, max_steps=4)
    env.fixed_horizon = False
    env.reset()
    obs, reward, terminated, truncated, info = env.step(acts((1, 1), (0, 0), (0, 0)))
    assert reward.tolist() == pytest.approx([1.1, 0, 0]) and info["success"].tolist() == [True, False, False] and not (terminated | truncated).any()
    for name in ("mask", "reset_mask"):
        with pytest.raises(ValueError, match="restarts all environments at once"):
            env.reset(options={name: [True, False, False]})
    env.reset(options=dict(mask=[False] * 3))            # asks for nothing
    _, reward, terminated, truncated, info = env.step(acts((0, 0), (1, 1), (0, 0)))
    assert reward.tolist() == pytest.approx([-1, 1.1, 0]) and info["steps"].tolist() == [1, 1, 1] and info["success"].tolist() == [False, True, False]
    env.step(acts((0, 0), (0, 1), (0, 0)))
    obs, reward, terminated, truncated, info = env.step(acts((0, 0), (0, 1), (0, 0)))
    assert not terminated.any() and truncated.all() and info["success"].tolist() == [False, True, False]     # the first one had it, and lost it
    _, reward, _, _, info = env.step(acts((0, 1), (0, 0), (0, 1)))
    assert not reward.any() and not info["steps"].any() and info["success"].tolist() == [False, True, False]      # what comes after the end counts no more
    old, count = obs, len(fork.made[-1].ids)
    obs, info = env.reset(options=dict(init_state=[7, 8, 9], mask=[False, True, False], split="ood"))        # fewer episodes than environments
    assert (obs["image"][0] == old["image"][0]).all() and obs["instruction"][0] == old["instruction"][0] and obs["image"][1, 100, 100, 1] == 0
    assert len(fork.made[-1].ids) == count + 1 and fork.made[-1].ids[-1][1] == 8 and not info["success"][1]
    _, _, _, _, info = env.step(acts((0, 0), (0, 1), (0, 0)))
    assert info["success"][1] and info["steps"].tolist() == [0, 1, 0]


def test_a_chunk_shows_the_picture_of_its_end(fork):
    env = RL4VLAEnv("main", 2)
    env.reset()
    actions = np.concatenate([acts((0, 0), (0, 0)), acts((1, 1), (0, 0)), acts((0, 0), (0, 0))], 1)
    obs, reward, _, _, info = env.step(actions)
    assert info["steps"].tolist() == [3, 3] and obs["image"][:, 100, 100, 1].tolist() == [3, 3] and reward.tolist() == pytest.approx([.1, 0])
    with pytest.raises(ValueError, match="NaN"):
        env.step(actions * np.nan)


def test_rollout(tiny, fork):
    """The scripts' rollout plays every episode once, in waves, to the horizon."""
    import vla_opd
    env, model = RL4VLAEnv("init-pose", 4, max_steps=6), tiny(chunk=1, action_dim=7, words="put on plate".split())
    states = np.array(env.suite.splits["eval"][:10])
    played = vla_opd.rollout(env, model, np.zeros(10, int), states, "eval", 1., 8, torch.Generator().manual_seed(0))
    steps = torch.zeros(10).index_add(0, played["episode"], played["mask"][:, 0].float())
    assert (steps == 6).all() and (played["length"] == 6).all() and len(played["mask"]) == len(played["reward"]) == 60
    last = {int(e): model.actions(t[None])[0, 0, 1] > 0 for e, t in zip(played["episode"], played["tokens"])}           # of an episode's last query
    assert [bool(s) for s in played["success"]] == [last[e] for e in range(10)] and 0 < sum(last.values()) < 10
    assert set(states.tolist()) <= {s for ids in fork.made[-1].ids for s in ids}


def test_without_a_gpu(fork, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    env = RL4VLAEnv("repositioning", 8)
    assert env.num_envs == 1 and "1 environment instead of 8" in capsys.readouterr().err
    obs, _ = env.reset(options=dict(split="ood"))
    assert obs["image"].shape == (1, 224, 224, 3)


def test_errors(fork, monkeypatch):
    fork.asks = True
    with pytest.raises(SystemExit, match="rl4vla-main lacks assets: python -m mani_skill.utils.download_asset bridge_v2_real2sim -y"):
        RL4VLAEnv("main")
    for name in [k for k in gymnasium.registry if k.startswith("PutOnPlateInScene25")]:
        del gymnasium.registry[name]
    with pytest.raises(SystemExit, match="no PutOnPlateInScene25Main-v3.*git clone https://github.com/gen-robot/RL4VLA"):
        RL4VLAEnv("main")
    monkeypatch.setattr(rl4vla.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="rl4vla-init-pose needs RL4VLA's ManiSkill fork: git clone") as e:
        RL4VLAEnv("init-pose")
    assert "\n" not in str(e.value)
