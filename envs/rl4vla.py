"""RL4VLA's own put-on-plate environments, on its ManiSkill fork: rl4vla-main to train on, and ROAD-VLA's seven shifts.

Protocol (SimplerEnv/simpler_env/env/simpler_wrapper.py there): 80 steps of 0.2 s, the 640x480 camera squeezed to 224 pixels as its processor does, actions
are the un-normalised end-effector delta of 6 numbers and a gripper that opens above 0.5.  An initial state is the fork's episode_id: it says which object,
table, place and so on.  train and eval are obj_set "train" with different places and turns, ood is obj_set "test".  Objects come with the id: one task.

An episode always has all its steps, and info["success"] is whether the goal holds now: after the last one, that is what RL4VLA counts, in training and in
evaluation.  So all end together, as they must: the fork can only restart all environments at once.
All environments live in one process: on the GPU, with CUDA; else ManiSkill's CPU simulation, which has one environment.  ManiSkill takes the first GPU it
sees: torchrun's processes all simulate on that one.
"""
import importlib.util, sys
from unittest import mock
import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from envs import Suite, SimulatorEnv

IDS = {"main": "Main-v3", "unseen-table": "VisionImage-v1", "dynamic-texture": "VisionTexture05-v1", "dynamic-noise": "VisionWhole05-v1",
       "multi-object": "MultiCarrot-v1", "multi-receptacle": "MultiPlate-v1", "init-pose": "EEPose-v1", "repositioning": "PositionChangeTo-v1"}
CONTROLLER, CAMERA = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos", "3rd_view_camera"
# --no-deps: the fork pins gymnasium 0.29, which knows no autoreset modes; it runs on gymnasium 1 as well.
INSTALL = ("git clone https://github.com/gen-robot/RL4VLA && pip install --no-deps -e RL4VLA/ManiSkill && pip install 'numpy<2' sapien==3.0.0b1 mplib==0.1.1 "
           "fast_kinematics==0.2.2 pytorch_kinematics==0.7.5 scipy dacite h5py GitPython tabulate transforms3d trimesh networkx 'imageio[ffmpeg]' IPython "
           "nvidia-ml-py pyyaml six requests 'opencv-python-headless<4.12' 'setuptools<81'")
ASSETS = " && ".join(f"python -m mani_skill.utils.download_asset {name} -y" for name in ("bridge_v2_real2sim", "widowx250s"))
# What instructions are made of: the fork's model_db.json, objects 0-15 are those of obj_set "train".
OBJECTS = ("carrot", "kitchen shovel", "bread", "plastic bottle", "7up can", "zuchinni", "ketchup bottle", "watering can", "pipe", "toy bear", "fast food cup",
           "plant", "banana", "hamburger", "golf ball", "BBQ sauce", "travel cup", "pepper", "nonstop can", "potato", "baguette", "champagne glass",
           "kitchen spoon", "onion", "cup")
PLATES = ("plate", "cloth", "carpet", "newspaper", "sheet metal", "drawing tablet", "tomato slice", "pizza", "flat bowl", "gramophone disk", "frying pan",
          "mouse pad", "cutting board", "chess board", "manhole cover", "envelope", "notepad")


class RL4VLAEnv(SimulatorEnv):
    fixed_horizon = property(lambda self: True, lambda self, on: None)       # whatever the scripts ask for

    def __init__(self, name, num_envs=1, seed=0, max_steps=80, image=224):
        label, env_id, cuda = f"rl4vla-{name}", f"PutOnPlateInScene25{IDS[name]}", torch.cuda.is_available()
        if not importlib.util.find_spec("mani_skill"):
            raise SystemExit(f"{label} needs RL4VLA's ManiSkill fork: {INSTALL}")
        import mani_skill.envs                                               # registers the ids
        if env_id not in gymnasium.registry:
            raise SystemExit(f"the ManiSkill installed here has no {env_id}, it is not RL4VLA's fork: pip uninstall -y mani_skill && {INSTALL}")
        if num_envs > 1 and not cuda:
            print(f"{label}: 1 environment instead of {num_envs}: ManiSkill simulates several on a GPU only", file=sys.stderr, flush=True)
            num_envs = 1

        if not cuda:
            torch.cuda.synchronize = lambda device=None: None                # the fork calls it after every picture, CUDA or not

        def refuse(question=""):
            raise SystemExit(f"{label} lacks assets: {ASSETS}")
        with mock.patch("builtins.input", refuse):                           # ManiSkill would ask whether to download
            self.env = gymnasium.make(env_id, num_envs=num_envs, obs_mode="rgb+segmentation", control_mode=CONTROLLER, max_episode_steps=max_steps,
                                      sim_config=dict(sim_freq=500, control_freq=5), sensor_configs=dict(shader_pack="default"),
                                      **(dict(sim_backend="gpu") if cuda else dict(sim_backend="cpu", render_backend="cpu")))
        self.sim, self.frame, self.stale, self.holding = self.env.unwrapped, None, False, np.zeros(num_envs, bool)

        # The fork takes ids modulo the number of its scenes, a multiple of the number of places and turns: those say what is kept for evaluation.
        places, rng = len(self.sim.xyz_configs) * len(self.sim.quat_configs), np.random.default_rng(0)
        kept, known = np.split(rng.permutation(places), [max(1, places // 10)])
        draw = lambda where, n: (rng.choice(2 ** 40 // places, n, replace=False) * places + rng.choice(where, n)).tolist()
        train, held_out = draw(known, 16384), draw(kept, 1024)
        super().__init__(Suite(label, ["put an object on a plate"], dict(train=train, eval=held_out[:512], ood=held_out[512:]), max_steps, 7, 1, image),
                         num_envs, seed)

    def reset(self, *, seed=None, options=None):
        o = options or {}
        mask = np.broadcast_to(o.get("mask", o.get("reset_mask", True)), self.num_envs).astype(bool)
        if mask.any() and not (self.done | mask).all():
            raise ValueError(f"{self.suite.name} restarts all environments at once: wait until all have ended, or restart those too")
        return super().reset(seed=seed, options=options)

    def _reset(self, i, task, init_state, split):
        self.stale, self.obj_set = True, "test" if split == "ood" else "train"
        return ""                                                            # _render restarts all of them, then it is known

    def _render(self, live):
        if self.stale:
            self.stale, episode_id = False, torch.as_tensor(self.init_state, device=self.sim.device)
            self._look(self.env.reset(options=dict(obj_set=self.obj_set, episode_id=episode_id))[0], live)
            self.instruction = [new if restarted else old for new, old, restarted in zip(self.sim.get_language_instruction(), self.instruction, live)]
        if not live.any():
            return self.image[:0]
        frame = self.frame[torch.as_tensor(live)].permute(0, 3, 1, 2)
        frame = frame if frame.device.type == "cpu" else frame.float()       # in bytes: 20 times faster, but not on a GPU
        small = F.interpolate(frame, (self.suite.image,) * 2, mode="bicubic", antialias=True)
        return small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()

    def _look(self, obs, live):
        """Keeps what the live ones see, on the simulator's device."""
        rgb, live = obs["sensor_data"][CAMERA]["rgb"].to(torch.uint8), torch.as_tensor(live)
        self.frame = torch.zeros_like(rgb) if self.frame is None else self.frame
        self.frame[live] = rgb[live]

    def _step(self, action, live):
        action = torch.as_tensor(np.append(action[:, :6], np.where(action[:, 6:] > .5, 1, -1), 1), dtype=torch.float32, device=self.sim.device)
        obs, _, _, _, info = self.env.step(action)
        self._look(obs, live)
        success, self.holding, row = (info[k].cpu().numpy().astype(bool) for k in ("success", "is_src_obj_grasped", "consecutive_grasp"))
        self.in_a_row = np.where(live, 4 * row, self.in_a_row)               # the fork has counted: "at any time so far" is 5, after SimulatorEnv adds 1
        return success

    def _grasped(self):
        return self.holding                                                  # at any time so far, for the reward the same as now

    def _info(self, steps):
        return dict(super()._info(steps), success=self.holds.copy())

    def close_extras(self, **kwargs):
        self.env.close()
