"""The other side of envs/libero.py: pictures and actions, LIBERO's simulator in a process of its own, a privileged expert.

The expert picks and places: all of libero-object, and tasks of the other suites whose goal is an object in or on something open.  Where the next goal is
another (a drawer, a knob, a door), it does nothing.
"""
import functools, gc, io, logging, os, re, signal, sys, threading
from multiprocessing.connection import Connection
from pathlib import Path
import numpy as np
from PIL import Image

NOTHING, IDLE = np.array([0, 0, 0, 0, 0, 0, -1.]), np.array([0, 0, 0, 0, 0, 0, 1.])          # stay, open: LIBERO's action, and ours
HAND, FINGER = "gripper0_grip_site", "gripper0_finger_joint"


# ------------------------------------------------------------------------------------------------------ pictures and actions
@functools.cache
def crop(n, size, area):
    """Rows that stretch the middle of n pixels to `size`: tf.image.crop_and_resize, corners aligned."""
    at = (np.linspace(-1, 1, size) * np.sqrt(area) + 1) / 2 * (n - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(n))).astype(np.float32)


def picture(frame, whole=False, size=224):
    """The simulator's frame -> what OpenVLA-OFT sees: turned by 180 degrees, JPEG, Lanczos-3, the middle 0.9 of the area.  TensorFlow did that; PIL decodes
    its JPEG within 5/255 (mean 1.0: another cosine transform), what follows is TensorFlow's to 1/255; all together within 6/255.
    whole: what RLinf's checkpoints see, all of it and no JPEG, made small by torchvision (PIL's bicubic)."""
    turned = Image.fromarray(np.ascontiguousarray(frame[::-1, ::-1]))
    if whole:
        return np.asarray(turned.resize((size, size), Image.BICUBIC))
    turned.save(jpeg := io.BytesIO(), "JPEG", quality=95, subsampling="4:2:0")
    channels = np.asarray(Image.open(jpeg), np.float32).transpose(2, 0, 1)            # as floats: PIL would round between the two directions
    small = np.stack([np.asarray(Image.fromarray(c).resize((size, size), Image.LANCZOS)).round().clip(0, 255) for c in channels]) / np.float32(255)
    rows = crop(size, size, .9)
    return ((rows @ small @ rows.T).clip(0, 1) * np.float32(255.5)).astype(np.uint8).transpose(1, 2, 0)      # rounds as tf.image.convert_image_dtype


def protocol(action):
    """A checkpoint's action -> LIBERO's: the gripper's 0 (close) .. 1 (open) becomes 1 or -1."""
    return np.append(action[:6], -np.sign(2 * action[6] - 1))


def gripper(action):
    """LIBERO's gripper, -1 (open) .. 1 (close), in its demonstrations -> the checkpoints', as OpenVLA's training data has it."""
    return 1 - np.clip(action, 0, 1)


# --------------------------------------------------------------------------------------------------------------- simulator
class Simulation:
    """One task's simulator."""
    def __init__(self, bddl, msaa=True, whole=False):
        import mujoco
        from libero.libero.envs.env_wrapper import ControlEnv
        from robosuite.utils.observables import Observable, sensor
        self.control = ControlEnv(bddl_file_name=bddl, has_offscreen_renderer=False, use_camera_obs=False, hard_reset=False,
                                  ignore_done=True)                      # else an episode ends after 1,000 steps
        self.env, self.sim, self.whole = self.control.env, self.control.sim, whole
        self.env.object_property_initializers *= 2                       # open drawers, lit stoves: LIBERO adds them at every load, so the stock environment draws twice
        self.model, self.data = self.sim.model._model, self.sim.data._data
        self.model.vis.quality.offsamples *= msaa
        self.renderer, self.seen, self.option = mujoco.Renderer(self.model, 256, 256), mujoco.MjData(self.model), mujoco.MjvOption()
        self.option.geomgroup[0] = 0                                     # robosuite's cameras do not see collision shapes
        for name in self.env.observation_names:                          # nobody reads them, and each costs 25 calls a step
            self.env.modify_observable(name, "enabled", False)

        @sensor(modality="picture")
        def look(cache):
            """robosuite's cameras look a little before the end of a step: keep that moment, and what glows (a stove), which is the model's."""
            mujoco.mj_copyData(self.seen, self.model, self.data)
            self.glow = self.model.site_rgba.copy()
            return 0.
        self.env.add_observable(Observable("seen", look, sampling_rate=20))
        self.goals = self.env.parsed_problem["goal_state"]
        self.things = [g[1] for g in self.goals if len(g) == 3 and g[1] in self.env.objects_dict]
        self.fingers = [self.env.robots[0].gripper.important_geoms[f"{side}_finger"] for side in ("left", "right")]

    def reset(self, state, draw=True):
        self.control.seed(0)                                             # initial states do not say where the furniture is
        self.control.reset()
        self.env.robots[0].gripper.current_action[:] = 0                 # a soft reset forgets this, and the stock environment makes a new gripper
        self.control.set_init_state(state)
        for _ in range(10):
            self.control.step(NOTHING)
        self.controller = Expert(self)
        return self.answer([], [], draw)

    def expert(self):
        return self.controller.action()

    def run(self, actions, on=False, draw=True):
        """The actions, until the goal holds; `on`: all of them."""
        holds, held = [], []
        for action in actions:
            try:
                holds.append(bool(self.control.step(protocol(action))[2]))
            except np.linalg.LinAlgError as e:                           # the controller's first word about a NaN
                raise FloatingPointError(f"NaN in the physics: {e}")
            grasp = any(self.env._check_grasp(self.fingers, self.env.objects_dict[thing]) for thing in self.things)
            self.controller.lost = 0 if grasp else self.controller.lost + 1
            held.append(grasp or holds[-1])                              # drawers and knobs are not held, what is pushed neither
            if self.data.warning.number[4:7].any() or not np.isfinite(self.data.qpos).all():         # MuJoCo itself silently starts from scratch
                raise FloatingPointError("NaN or huge numbers in the physics")
            if holds[-1] and not on:
                break
        return self.answer(holds, held, draw)

    def answer(self, holds, held, draw):
        made = dict(holds=holds, held=held, state=self.control.get_sim_state())
        if draw:
            now, self.model.site_rgba[:] = self.model.site_rgba.copy(), self.glow
            self.renderer.update_scene(self.seen, camera="agentview", scene_option=self.option)
            self.model.site_rgba[:] = now
            frame = self.renderer.render()[::-1].copy()                  # upside down, as robosuite gives it
            made.update(frame=frame, image=picture(frame, self.whole), keypoints=self.keypoints())
        return made

    def keypoints(self):
        """Where objects and the hand are in the picture, as fractions of its width and height, whether in sight or not: what a tiny tower learns first."""
        camera, names = self.model.camera("agentview").id, sorted(self.env.objects_dict, key=lambda name: (name in self.things, name))      # of two alike, the one that counts
        at = np.array([self.seen.body(f"{name}_main").xpos for name in names] + [self.seen.site(HAND).xpos])
        x, y, z = ((at - self.seen.cam_xpos[camera]) @ self.seen.cam_xmat[camera].reshape(3, 3)).T
        uv = np.stack([x, y], 1) / z[:, None] / np.tan(np.deg2rad(self.model.cam_fovy[camera]) / 2)     # z < 0; x is mirrored: turned by 180 degrees
        return dict(zip([name.rstrip("_0123456789") for name in names] + ["hand"], (uv / np.sqrt(1 if self.whole else .9) + 1) / 2))


class Expert:
    def __init__(self, simulation):
        """simulation: one of envs/libero.py, just reset."""
        self.env, self.sim, self.model, self.data = simulation.env, simulation.sim, simulation.model, simulation.data
        self.goals, self.things, self.lost = simulation.goals, simulation.things, 99         # lost: steps since an object was in hand
        ahead = self.sim.data.get_site_xmat(HAND)[:, 0] * (1, 1, 0)
        self.ahead, self.plan = ahead / np.linalg.norm(ahead), {thing: self.how_to_take(thing) for thing in self.things}

    def box(self, name):
        """Two corners of the box around a thing's collision shapes."""
        m, d = self.model, self.data
        g = np.flatnonzero((m.body_rootid[m.geom_bodyid] == m.body(name + "_main").id) & (m.geom_group == 0))
        turn, (at, half) = d.geom_xmat[g].reshape(-1, 3, 3), m.geom_aabb[g].reshape(-1, 2, 3).swapaxes(0, 1)
        middle, half = d.geom_xpos[g] + np.einsum("nij,nj->ni", turn, at), np.einsum("nij,nj->ni", abs(turn), half)
        return (middle - half).min(0), (middle + half).max(0)

    def how_to_take(self, thing):
        """Whether to turn the hand, and where from the middle.  Fingers close along y; what is too wide is taken by its rim."""
        low, high = self.box(thing)
        wide, deep, _ = high - low
        turned = bool(deep > .072 and wide < deep)
        if min(wide, deep) > .075:
            return False, 0, deep / 2 - .008
        for other in self.env.objects_dict.keys() - {thing}:             # a tall neighbour under the 20 cm wide hand
            l, h = self.box(other)
            x, y, _ = (l + h - low - high) / 2
            if h[2] > high[2] + .03 and abs(y) < .14 and abs(x) < .10 and wide > .06:
                return turned, -np.sign(x) * min(.022, wide / 2 - .018), 0
        return turned, 0, 0

    def action(self):
        goal = next((g for g in self.goals if not self.env._eval_predicate(g)), ())
        if len(goal) < 3 or goal[1] not in self.things:
            return IDLE
        (turned, dx, dy), (low, high), inside, state = self.plan[goal[1]], self.box(goal[1]), goal[0] == "in", self.sim.data
        hand, turn, speed = (read(HAND).copy() for read in (state.get_site_xpos, state.get_site_xmat, state.get_site_xvelp))
        width, middle = state.get_joint_qpos(FINGER + "1") - state.get_joint_qpos(FINGER + "2"), (low + high) / 2
        if owner := [n for n in self.env.objects_dict if goal[2].startswith(n)]:
            l, h = self.box(owner[0])
            place = np.array([*(l + h)[:2] / 2, h[2]])                   # the middle of its top
        else:
            place = state.get_site_xpos(goal[2])
        if self.lost > 5:                                                # not in hand: above it, down, close
            aim = np.array([middle[0] + dx, middle[1] + dy, max(high[2] - .035, low[2] + .018)])
            far, near = np.linalg.norm((aim - hand)[:2]), .008 if width > .07 and np.linalg.norm(speed) > .01 else .03
            close = far < (.012 if width > .07 else .03) and hand[2] - aim[2] < near
            target = np.array([*hand[:2], aim[2]]) if close else aim + [0, 0, np.clip(5 * (far - .008), 0, high[2] + .08 - aim[2])]
        else:                                                            # in hand: up, across, down, open
            over, lift, above = place[:2] + (hand - middle)[:2], .04 if inside else .05, low[2] - place[2]
            far = np.linalg.norm(over - hand[:2])
            close = far > .015 or above > (.08 if inside else .02)
            target = np.array([*(over if above > lift - .02 or far < .03 else hand[:2]), hand[2] - above + (lift if inside or far > .015 else .005)])
        x = np.array([-self.ahead[1], self.ahead[0], 0]) if turned else self.ahead
        error = np.stack([x, np.cross([0, 0, -1], x), [0, 0, -1]], 1) @ turn.T       # the hand looks down
        spin = np.array([error[2, 1] - error[1, 2], error[0, 2] - error[2, 0], error[1, 0] - error[0, 1]])
        return np.concatenate([np.clip((target - hand) * 30, -1, 1), np.clip(spin, -1, 1), [1. - close]])


def serve(descriptor, assets, msaa, whole):
    """A worker's life: it answers until its parent is gone.  Simulators stay for the next episode of their task while there is memory."""
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()     # the parent holds the other end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    from envs.libero import DRAWING, setup           # which imports this module
    setup(assets)
    pipe, kept, now = Connection(descriptor), {}, None
    while True:
        command, *request = pipe.recv()
        try:
            if command == "reset":
                bddl = request.pop(0)
                while kept and bddl not in kept and int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) < 3e6:
                    kept.pop(next(iter(kept))).renderer.close()
                    gc.collect()
                kept[bddl] = now = kept.pop(bddl, None) or Simulation(bddl, msaa, whole)
            pipe.send(getattr(now, command)(*request))
        except Exception as e:
            if not kept and re.search("EGL|OSMesa|OpenGL|GLContext", str(e)):
                e = SystemExit(f"LIBERO cannot draw here ({e}): {DRAWING}")
            pipe.send(e if isinstance(e, (FloatingPointError, SystemExit)) else RuntimeError(f"{type(e).__name__}: {e}"))


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
