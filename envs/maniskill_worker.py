"""The other side of envs/maniskill.py: ManiSkill's simulator for some environments (on a CPU one, in a process of its own), our scene from primitives, a
privileged expert.  Everything is batched: `rows` says which environments are meant, the rest of the arguments and the answers are one a row."""
import builtins, functools, gc, os, platform, re, signal, sys, tempfile, threading
from multiprocessing.connection import Connection
from pathlib import Path
from xml.etree import ElementTree
import gymnasium
import mani_skill.envs                                                       # registers the ids
import numpy as np
import sapien
import torch
from mani_skill.agents.multi_agent import MultiAgent
from mani_skill.agents.robots import Panda, PandaWristCam
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.registration import register_env
from mani_skill.utils.sapien_utils import look_at
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SimConfig
from envs.maniskill import COLOURS, HEIGHT, KEYPOINTS, OBJECTS, PLATES, RADIUS, SHAPES, THICK, UNSEEN, VIEW, VULKAN, Unavailable

REST, CAMERA = np.array([0, np.pi / 8, 0, -np.pi * 5 / 8, 0, np.pi * 3 / 4, np.pi / 4, .04, .04]), look_at([.34, 0, .45], [-.12, 0, .04])
PARKED, JUMP, SURFACES = np.array([6., 0, 0]), 5, 17                         # behind the camera; the step in which things jump; tables, and textures
MOVABLE = (*OBJECTS, *UNSEEN)
REST_Z = np.array([HEIGHT[k.split()[1]] for k in MOVABLE])
EASY = np.array([{"ball": 0, "can": 0, "cube": 90}.get(k.split()[1], 180) for k in MOVABLE]) / 180 * np.pi      # the turn after which it looks the same
UPRIGHT = [.7071068, 0, .7071068, 0]                                         # SAPIEN's cylinders lie along x


@functools.cache
def waves(n, size, seed):
    """n pictures of colourful waves."""
    rng, at = np.random.default_rng(seed), np.mgrid[:size, :size] * 2 * np.pi / size
    k, phase = rng.integers(-9, 10, (n, 3, 2)), rng.uniform(0, 6.3, (n, 3, 1, 1))
    hue, part = rng.uniform(40, 215, (n, 1, 1, 3)), rng.uniform(20, 90, (n, 3, 1, 1, 1)) * rng.uniform(-1, 1, (n, 3, 1, 1, 3))
    return (hue + (part * np.sin(np.einsum("nwa,aij->nwij", k, at) + phase)[..., None]).sum(1)).clip(0, 255).astype(np.uint8)


@functools.cache
def light(robot):
    """The robot drawn with its collision shapes, in this process: the same physics from 2,300 triangles instead of 135,000.  The file stays for the next process."""
    old = Path(robot.urdf_path)
    folder = Path(tempfile.gettempdir()) / f"maniskill-{os.getuid()}{str(old.parent).replace('/', '-')[-150:]}"
    folder.mkdir(exist_ok=True)
    tree = ElementTree.parse(old)
    for mesh in tree.iter("mesh"):
        mesh.set("filename", str(old.parent / mesh.get("filename")))
    for link in tree.iter("link"):
        for visual in link.findall("visual"):
            link.remove(visual)
        for shape in link.findall("collision"):
            visual = ElementTree.SubElement(link, "visual")
            visual.extend(shape)
            grey = ".25 .25 .28 1" if "hand" in link.get("name") or "finger" in link.get("name") else ".9 .9 .9 1"
            ElementTree.SubElement(ElementTree.SubElement(visual, "material", name=link.get("name")), "color", rgba=grey)
    robot.urdf_path = str(folder / old.name)
    for name, text in ((old.with_suffix(".srdf").name, old.with_suffix(".srdf").read_text()), (old.name, ElementTree.tostring(tree.getroot(), "unicode"))):
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as f:
            f.write(text)
        os.replace(f.name, folder / name)                                    # several processes may do this at once


@register_env("PutOnPlate-v1", max_episode_steps=80)
class PutOnPlate(BaseEnv):
    """Everything that any scene may have is there; a scene is who stands on the table, all else is parked behind the camera."""
    SUPPORTED_ROBOTS, SUPPORTED_REWARD_MODES = ["panda"], ("none",)

    def __init__(self, *args, robot_uids="panda", **kw):
        super().__init__(*args, robot_uids=robot_uids, **kw)

    @property
    def _default_sim_config(self):
        return SimConfig(spacing=20)                                         # on a GPU scenes lie side by side, and a floor is 18 m wide

    @property
    def _default_sensor_configs(self):
        return [CameraConfig("base_camera", CAMERA, 128, 128, 1.1, .01, 10)]

    def _load_agent(self, options):
        super()._load_agent(options, sapien.Pose([-.615, 0, 0]))

    def _load_scene(self, options):
        def build(name, kind, add, *size, look, pose=sapien.Pose()):
            builder = self.scene.create_actor_builder()
            getattr(builder, f"add_{add}_visual")(pose, *size, material=look)
            if kind == "table":
                builder.add_box_visual(sapien.Pose([-1, 0, 0]), [.01, 2, 1], material=wall)
            else:
                getattr(builder, f"add_{add}_collision")(pose, *size, density=600)
            builder.initial_pose = sapien.Pose(PARKED + (0, len(self.things) * .15, .1))
            self.things[name] = actor = builder.build(name) if kind == "movable" else builder.build_kinematic(name)
            if kind == "movable" and add in ("sphere", "capsule"):           # they would roll for ever
                for body in actor._bodies:
                    body.set_angular_damping(40.)
        self.things, tables = {}, waves(2 * SURFACES, 256, 0) // 2 + 40
        floor = self.scene.create_actor_builder()
        floor.add_box_collision(half_size=[9, 9, .5])
        floor.initial_pose = sapien.Pose([0, 0, -.5])
        floor.build_static("floor")
        for k in range(SURFACES):                                            # a table, and a wall behind it
            look, wall = (sapien.render.RenderMaterial(roughness=.9) for _ in range(2))
            for material, picture in ((look, tables[k]), (wall, tables[SURFACES + k])):
                rgba = np.concatenate([picture, np.full((*picture.shape[:2], 1), 255, np.uint8)], 2)
                material.base_color_texture = sapien.render.RenderTexture2D(rgba, "R8G8B8A8Unorm")
            build(f"table {k}", "table", "box", [.5, .9, .01], look=look, pose=sapien.Pose([-.2, 0, -.01]))
        paint = lambda name: sapien.render.RenderMaterial(base_color=[*COLOURS[name], 1], roughness=.6)
        for name in MOVABLE:
            colour, shape = name.split()
            add, *size = SHAPES[shape]
            build(name, "movable", add, *size, look=paint(colour), pose=sapien.Pose(q=UPRIGHT) if shape == "can" else sapien.Pose())
        for name in PLATES:
            build(name, "plate", "cylinder", RADIUS, THICK / 2, look=paint(name.split()[0]), pose=sapien.Pose(q=UPRIGHT))
        self.thing, self.plate = (torch.zeros(self.num_envs, dtype=torch.long, device=self.device) for _ in range(2))
        self.jumps = [{} for _ in range(self.num_envs)]

    def place(self, rows, where):
        """where: for each of `rows` {name: (x, y, z, turn)}; what is not named stays."""
        for name in {name for scene in where for name in scene}:
            mine = [(row, *scene[name]) for row, scene in zip(rows, where) if name in scene]
            row, x, y, z, turn = np.array(mine, np.float32).T
            self.scene._reset_mask[:] = False
            self.scene._reset_mask[row.astype(int)] = True
            pose = np.stack([x, y, z, np.cos(turn / 2), 0 * x, 0 * x, np.sin(turn / 2)], 1)
            self.things[name].set_pose(Pose.create(torch.as_tensor(pose, device=self.device)))
            if name in MOVABLE:
                for set_velocity in (self.things[name].set_linear_velocity, self.things[name].set_angular_velocity):
                    set_velocity(torch.zeros(3, device=self.device))
        self.scene._reset_mask[:] = True

    def _initialize_episode(self, env_idx, options):
        rows, scenes = env_idx.tolist(), options.get("scenes", [dict(at={}, arm=np.zeros(7), thing=0, plate=0, jump={})] * len(env_idx))
        parked = {name: (*(PARKED + (0, k * .15, .05)), 0.) for k, name in enumerate(self.things)}
        self.agent.reset(torch.as_tensor(REST + np.array([[*s["arm"], 0, 0] for s in scenes]), dtype=torch.float32, device=self.device))
        self.place(rows, [parked | s["at"] for s in scenes])
        for row, s in zip(rows, scenes):
            self.thing[row], self.plate[row], self.jumps[row] = s["thing"], s["plate"], s["jump"]

    def _before_control_step(self):
        rows = [i for i in np.flatnonzero((self.elapsed_steps == JUMP - 1).cpu()).tolist() if self.jumps[i]]
        if rows:
            held = self.held().cpu()
            self.place(rows, [{k: v for k, v in self.jumps[i].items() if k in PLATES or not held[i]} for i in rows])
            if self.gpu_sim_enabled:
                self.scene._gpu_apply_all()

    def of_mine(self, index, ask, names):
        """ask(actor) for each environment's own one."""
        answers = {k: ask(self.things[names[k]]) for k in index.unique().tolist()}
        return torch.stack([answers[k][i] for i, k in enumerate(index.tolist())])

    def held(self):
        return self.of_mine(self.thing, self.agent.is_grasping, MOVABLE)

    def evaluate(self):
        """As RL4VLA: over the plate, near it, touching it; and besides let go, and at rest."""
        held = self.held()
        at, speed = (self.of_mine(self.thing, ask, MOVABLE) for ask in (lambda a: a.pose.p, lambda a: a.linear_velocity))
        pair, many = self.thing * len(PLATES) + self.plate, len(PLATES)
        force = {k: self.scene.get_pairwise_contact_forces(self.things[MOVABLE[k // many]], self.things[PLATES[k % many]]) for k in pair.unique().tolist()}
        force = torch.stack([force[k][i] for i, k in enumerate(pair.tolist())])
        away = at - self.of_mine(self.plate, lambda a: a.pose.p, PLATES)
        on = (away[:, :2].norm(dim=1) < RADIUS + .01) & (away[:, 2] < .06) & (force.norm(dim=1) > .03)
        return dict(is_grasped=held, success=on & ~held & (speed.norm(dim=1) < .05))


def enable_gpu_simulation():
    version, kind = sapien.physx.version(), "linux-aarch64-so" if platform.machine() in ("aarch64", "arm64") else "linux-so"
    try:
        sapien.physx.enable_gpu()                                            # downloads a library the first time
    except Exception as e:
        there = (Path.home() / ".sapien" / "physx" / version / "libPhysXGpu_64.so").exists()
        fix = f"unzip https://github.com/sapien-sim/physx-precompiled/releases/download/{version}/{kind}.zip in ~/.sapien/physx/{version}, or "
        raise Unavailable(f"GPU simulation cannot be had here ({' '.join(f'{type(e).__name__}: {e}'.split())}): {fix * (not there)}"
                          "put -cpu behind the name, then the GPU only draws")


class Simulation:
    def __init__(self, env_id, num_envs, image, full_meshes, device, card):
        """device: what simulates; card: what draws."""
        self.device, self.num_envs, self.image, self.ours = torch.device(device), num_envs, image, not env_id
        if not full_meshes:
            for robot in (Panda, PandaWristCam):
                light(robot)

        def refuse(question=""):
            raise Unavailable(f"{env_id} needs a download: python -m mani_skill.utils.download_asset {env_id} -y")
        ask, builtins.input = builtins.input, refuse                         # ManiSkill would ask whether to download
        try:
            if self.device.type == "cuda":
                enable_gpu_simulation()
            env_id = env_id or "PutOnPlate-v1"
            self.limit = gymnasium.spec(env_id).max_episode_steps or 100
            self.env = gymnasium.make(env_id, num_envs=num_envs, obs_mode="none", control_mode="pd_ee_delta_pose",
                                      sensor_configs=dict(width=image, height=image) | (dict(fov=VIEW[env_id]) if env_id in VIEW else {}),
                                      sim_backend=f"physx_{device}", render_backend=f"sapien_{card}")
            self.sim = self.env.unwrapped
            self.sim._reward_mode = "none"                                   # nobody reads ManiSkill's own
            if "success" not in self.sim.evaluate():
                raise Unavailable(f"{env_id} does not say what success is")
            if self.device.type == "cuda" and any(view.merged for view in self.sim.scene.actor_views.values()):
                raise Unavailable(f"{env_id} makes things of another size in each environment, which no reset changes on a GPU: put -cpu behind the name")
        except (gymnasium.error.NameNotFound, gymnasium.error.VersionNotFound):
            raise Unavailable(f"ManiSkill has no {env_id}: python -c 'import mani_skill.envs, gymnasium; print(*gymnasium.registry)' lists all")
        except Exception as e:
            raise e if isinstance(e, Unavailable) else Unavailable(VULKAN if re.search("vk::|[Vv]ulkan|physical device|render", str(e)) else
                                                                   f"ManiSkill cannot make it here ({' '.join(f'{type(e).__name__}: {e}'.split())})")
        finally:
            builtins.input = ask
        spaces = self.sim.single_action_space
        self.spaces = {k: v.shape[0] for k, v in (spaces.items() if isinstance(spaces, gymnasium.spaces.Dict) else [("", spaces)])}
        self.scenes, self.textures = [{} for _ in range(num_envs)], torch.tensor(waves(SURFACES, 2 * image, 1), device=device)
        self.textures[0] = self.textures[0].float().mean(-1, keepdim=True).byte()            # in training it is grey
        self.look([0])                                                       # compiles shaders
        gc.freeze()                                                          # ManiSkill collects garbage whenever it makes a scene

    def suite(self, rows):
        return [dict(action_dim=sum(self.spaces.values()), max_steps=self.limit)]

    def reset(self, rows, scenes):
        """scenes: those of envs/maniskill.py, or seeds."""
        if self.device.type == "cpu":                                        # a new scene: an old one remembers contacts, and moves differ in the last digits
            self.env.reset(seed=0 if self.ours else scenes[0], options=dict(reconfigure=True, scenes=scenes))
        elif self.ours:
            self.env.reset(seed=0, options=dict(env_idx=torch.as_tensor(rows, device=self.device), scenes=scenes))
        else:
            for row, seed in zip(rows, scenes):                              # alone, so that it does not matter who else restarts
                self.env.reset(seed=[seed], options=dict(env_idx=torch.as_tensor([row], device=self.device)))
        for row, scene in zip(rows, scenes if self.ours else ()):
            self.scenes[row] = scene
        return np.zeros(len(rows))

    def step(self, rows, actions):
        """Where the goal holds and who holds the right thing (in ManiSkill's own tasks: anything, or the goal holds), for each row."""
        batch = torch.zeros(self.num_envs, sum(self.spaces.values()), device=self.device)
        batch[rows] = torch.as_tensor(np.stack(actions), dtype=torch.float32, device=self.device)
        parts = dict(zip(self.spaces, batch.split(list(self.spaces.values()), 1)))
        info = self.env.step(parts.get("", parts))[4]
        held = info["is_grasped"] if self.ours else info["success"].bool()   # some of ManiSkill's tasks hold nothing
        arms = [] if self.ours else self.sim.agent.agents if isinstance(self.sim.agent, MultiAgent) else [self.sim.agent]
        for arm in (arm for arm in arms if hasattr(arm, "finger1_link")):   # a stick holds nothing
            for thing in self.sim.scene.actors.values():
                if thing.px_body_type == "dynamic":
                    held = held | arm.is_grasping(thing)
        return torch.stack([info["success"].bool(), held], 1)[rows].cpu().numpy()

    def look(self, rows):
        """What the camera sees now, with the textures of the dynamic suites blended in, uint8."""
        self.sim.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self.sim._sensors.get("base_camera") or next(iter(self.sim._sensors.values()))         # a task may make new ones when it is reset
        camera.capture()
        whose = {row: self.scenes[row]["texture"] for row in rows if "texture" in self.scenes[row]}
        seen = {k: v.to(self.device) for k, v in camera.get_obs(depth=False, position=False, segmentation=bool(whose)).items()}      # a GPU's, where it draws
        picture, size = seen["rgb"].clone(), self.image
        for row, (whole, which, *seed) in whose.items():
            y, x = np.random.default_rng([*seed, int(self.sim.elapsed_steps[row])]).integers(0, size, 2)
            mixed = picture[row] // 2 + self.textures[which, y:y + size, x:x + size] // 2
            mine = [*self.sim.agent.robot.links, self.sim.things[MOVABLE[self.sim.thing[row]]], self.sim.things[PLATES[self.sim.plate[row]]]]
            mask = True if whole else torch.isin(seen["segmentation"][row], torch.stack([thing.per_scene_id[row] for thing in mine]))
            picture[row] = torch.where(torch.as_tensor(mask, device=self.device), mixed, picture[row])
        return picture[rows].cpu().numpy()

    def keypoints(self, rows):
        """An index into KEYPOINTS (-1: not in sight) and the pixel (x, y) of every object, plate, goal and hand that there is, [rows, things, 3]."""
        sim, camera = self.sim, self.sim._sensors["base_camera"].get_params()
        if self.ours:
            what = [(k if k in PLATES else k.split()[0], thing) for k, thing in sim.things.items() if k in (*MOVABLE, *PLATES)] + [("hand", sim.agent.tcp)]
        else:
            things = [("blue", sim.cubeA), ("green", sim.cubeB), ("goal", sim.goal_region)] if hasattr(sim, "cubeB") else [("red", sim.cube), ("goal", sim.goal_site)]
            what = [*things, ("left hand", sim.left_agent.tcp), ("hand", sim.right_agent.tcp)]
        at = torch.stack([thing.pose.p for _, thing in what], 1)
        world_to_camera, projection = camera["extrinsic_cv"].mT, camera["intrinsic_cv"].mT
        u, v, z = ((at @ world_to_camera[:, :3] + world_to_camera[:, 3:]) @ projection).unbind(-1)
        x, y, size = u / z, v / z, self.image                                # what is parked lies behind the camera
        index = torch.tensor([KEYPOINTS.index(name) for name, _ in what], device=at.device)
        index = torch.where((z > 0) & (x > 0) & (x < size) & (y > 0) & (y < size), index, -1)
        return torch.stack([index, x - .5, y - .5], -1)[rows].cpu().numpy()  # the first pixel's middle is 0

    def expert(self, rows):
        """Controllers without memory, so that they recover from anywhere."""
        sim, get = self.sim, lambda x: x.cpu().numpy().astype(float)[rows]
        if not self.ours:
            return self.two_arms(get)
        which = sim.thing.cpu().numpy()[rows]
        pose, plate = (get(sim.of_mine(*x)) for x in ((sim.thing, lambda a: a.pose.raw_pose, MOVABLE), (sim.plate, lambda a: a.pose.p, PLATES)))
        plate[:, 2] = REST_Z[which] + THICK
        return pick_and_place(get(sim.agent.tcp.pose.to_transformation_matrix()), pose, EASY[which], get(sim.held()) > 0, plate, RADIUS - .01)

    def two_arms(self, get):
        """TwoRobotPickCube: the left arm puts the cube where the right one reaches it, which takes it to the goal.  TwoRobotStackCube: both arms pick their
        cube up, the right one puts its own on the goal and makes room, the left one stacks."""
        sim, stack = self.sim, hasattr(self.sim, "cubeB")
        arms, things = (sim.left_agent, sim.right_agent), (sim.cubeA, sim.cubeB) if stack else (sim.cube, sim.cube)
        goal, one, two, left, right = (get(x.pose.p) for x in (sim.goal_region if stack else sim.goal_site, *things, *(arm.tcp for arm in arms)))
        holds = [get(arm.is_grasping(thing)) > 0 for arm, thing in zip(arms, things)]
        if stack:
            placed = ~holds[1] & (np.linalg.norm((two - goal)[:, :2], axis=1) < .055) & (two[:, 2] < .025)
            room, ready = placed & (right[:, 1] > .08), placed | holds[0] & (one[:, 1] < -.17)
            lies = (np.linalg.norm((two - goal)[:, :2], axis=1) < .05) & (two[:, 2] < .026)        # good enough: it lets go there
            stacked = (np.linalg.norm((one - two)[:, :2], axis=1) < .025) & (abs(one[:, 2] - two[:, 2] - .04) < .006)
            goals = [np.where(room[:, None], two + (0, 0, .04), one * (1, 0, 0) + (0, -.2, .2)),
                     np.where(ready[:, None], goal * (1, 1, 0) + (0, .035, .02), two * (1, 0, 0) + (0, .15, .15))]       # the goal's edge: it reaches no farther
            goals = [np.where((there & here)[:, None], x * (1, 1, 0) + y * (0, 0, 1), y) for x, y, there, here in zip((one, two), goals, (room, ready), (stacked, lies))]
            let_go, idle = (room, ready), (room & ~holds[0] & (one[:, 2] > .05), placed)
        else:
            handed = ~holds[0] & (one[:, 1] > 0)
            goals, let_go, idle = (0 * one + (0, .03, .02), goal), (True, False), (handed, ~holds[1] & ~(handed & (left[:, 1] < -.1)))
        action = []
        for k, arm in enumerate(arms):
            to_base = arm.robot.pose.inv()
            base, thing = get(to_base.to_transformation_matrix()), get((to_base * things[k].pose).raw_pose)
            there = (base[:, :3, :3] @ goals[k][:, :, None])[:, :, 0] + base[:, :3, 3]
            hand, quarter = base @ get(arm.tcp.pose.to_transformation_matrix()), np.full(len(thing), np.pi / 2)
            action.append(pick_and_place(hand, thing, quarter, holds[k], there, .02, let_go[k], idle[k], tilt=.5))       # tilted it reaches farther
        return np.concatenate(action, 1)


def pick_and_place(hand, pose, alike, held, goal, within, let_go=True, idle=False, tilt=0.):
    """Arms' next actions, all in their bases' frames: above the thing, down, close; up, across, down to the goal (where the thing's middle is to rest), open if
    it may let go; back up from what is less than `within` off.  alike: the turn after which the thing looks the same, 0 a ball.  The idle keep away."""
    hand, turn, at, (w, x, y, z), up = hand[:, :3, 3], hand[:, :3, :3], pose[:, :3], pose[:, 3:].T, np.array([0, 0, 1.])
    yaw = np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))
    yaw = np.where(held, np.arctan2(turn[:, 1, 0], turn[:, 0, 0]), np.where(alike > 0, (yaw + alike / 2) % np.maximum(alike, .1) - alike / 2, 0))
    ahead = np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw], 1)                 # the hand looks down, or ahead by the tilt; its fingers close along its second axis
    want = np.stack([np.cos(tilt) * ahead + np.sin(tilt) * up, np.cross(-up, ahead), np.sin(tilt) * ahead - np.cos(tilt) * up], 2)
    spin = np.cross(turn, want, axis=1).sum(2) / 2
    flat = lambda v: np.linalg.norm(v[:, :2], axis=1)
    far, twist, away, height = flat(at - hand), np.linalg.norm(spin, axis=1), flat(goal - at), at[:, 2] - goal[:, 2]
    near = (np.linalg.norm(at - hand, axis=1) < .015) & (twist < .15)
    placed = ~held & ((away < within) & (abs(height) < .01) | idle)
    drop = held & (away < .015) & (height < .006) & let_go
    pick = at + up * np.clip(np.maximum(4 * (far - .008), .3 * (twist - .15)), 0, .09)[:, None]
    carry = np.where(((height > .03) | (away < .03))[:, None], goal, at) * (1, 1, 0) + hand - at
    carry[:, 2] += goal[:, 2] + .055 * (away > .012)
    home = np.where((idle & (hand[:, 2] > .15))[:, None], (.55, 0, .2), hand + .05 * up)
    way = np.where(held[:, None], carry, np.where(placed[:, None], home, pick)) - hand
    close = held & ~drop | ~placed & ~held & near
    way = np.where(drop[:, None], 0, way) / np.maximum(abs(way).max(1, keepdims=True), .06)
    return np.concatenate([way, -15 * spin / np.maximum(15 * np.linalg.norm(spin, axis=1, keepdims=True), 1), np.where(close, -1., 1)[:, None]], 1)


def serve(descriptor, env_id, image, full_meshes, card):
    """A worker's life: it answers until its parent is gone."""
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()     # the parent holds the other end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    pipe, simulation = Connection(descriptor), None
    while True:
        method, *given = pipe.recv()
        try:
            simulation = simulation or Simulation(env_id, 1, image, full_meshes, "cpu", card)
            pipe.send(getattr(simulation, method)([0], *([x] for x in given)))
        except Exception as e:
            pipe.send(e if isinstance(e, Unavailable) else RuntimeError(f"{type(e).__name__}: {e}"))


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
