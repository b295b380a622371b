"""A tabletop in NumPy: the embedded simulator.  All environments advance together as arrays, 64x64 RGB, no download.

The table is [-1, 1] x [-1, 1], seen from the front and above: x to the right, y away, z up.  A gripper that closes within an object's radius of its centre
holds it; an object let go drops where it is.  A task is a list of subgoals that must come true in order.  Scenes depend on (suite, task, init_state, ood) alone,
what changes during an episode (jumps, textures) on the seed as well.
"""
import functools
import numpy as np
from envs import TABLETOP, Suite, SimulatorEnv

STEP, REACH, SIZE = 0.06, 0.14, 64          # one unit of action moves this far; grasp tolerance = an object's radius; pixels of the picture
SLOW, NEAR = 0.12, 0.09                     # the expert brakes from here on, and grasps or lets go from here on
SLOTS = 8                                   # things in a scene, receptacles first
COLOURS = dict(red=(214, 48, 49), green=(46, 160, 67), blue=(45, 105, 214), yellow=(244, 200, 40), purple=(142, 68, 173), orange=(235, 122, 30),
               white=(240, 240, 236), black=(48, 48, 54), pink=(245, 130, 185), cyan=(50, 190, 200))
SHAPES = ("cube", "ball", "can", "star", "ring", "cone", "cross", "gem")
OBJECTS = ("red cube", "green ball", "blue can", "yellow star", "purple ring", "orange cone", "white cross", "black gem", "pink ball", "cyan cube")
UNSEEN = ("blue cube", "yellow ball", "green can", "red star", "orange ring", "purple cone", "pink cross", "cyan gem", "white ball", "black cube")
PLATES = ("plate", "blue plate", "red plate", "green plate", "yellow plate")          # the last two are never seen in training
FIXTURES = ("basket", "stove", "rack", "cabinet", "handle", "knob", "box", "tray", "bowl", "bottle", "cheese")
KINDS = ("",) + PLATES + FIXTURES + tuple(f"{c} {s}" for c in COLOURS for s in SHAPES)
FIXED = np.array([k in PLATES + ("basket", "stove", "rack", "cabinet", "box", "tray", "") for k in KINDS])
HANDLE, KNOB, (PLACE, SLIDE, TURN) = KINDS.index("handle"), KINDS.index("knob"), range(3)

# ---------------------------------------------------------------------------------------------------------------- tasks
RELATIONS = {"left of the box": ("box", (-.36, 0)), "right of the box": ("box", (.36, 0)), "in front of the box": ("box", (0, -.4)),
             "left of the stove": ("stove", (-.4, 0)), "right of the stove": ("stove", (.4, 0)), "in front of the stove": ("stove", (0, -.42)),
             "on the tray": ("tray", (0, 0)), "left of the tray": ("tray", (-.42, 0)), "right of the tray": ("tray", (.42, 0)), "in the middle": ("", (0, 0))}
GOALS = (("open the drawer", SLIDE, "handle", ""), ("turn on the stove", TURN, "knob", "")) + tuple(
    (f"put the {o} on the {r}", PLACE, o, r) for o, r in (("bowl", "plate"), ("bowl", "stove"), ("bowl", "rack"), ("bottle", "plate"), ("bottle", "stove"),
                                                          ("bottle", "rack"), ("cheese", "plate"), ("cheese", "stove")))
SHIFTS = TABLETOP[4:11]


def instructions(name):
    other = [OBJECTS[(i + 3) % 10] for i in range(10)]
    return {"spatial": [f"pick up the bowl {r} and put it on the plate" for r in RELATIONS], "goal": [g[0] for g in GOALS],
            "object": [f"pick up the {o} and put it in the basket" for o in OBJECTS],
            "long": [f"put the {a} in the basket then the {b} on the plate" for a, b in zip(OBJECTS, other)],
            "multi-receptacle": [f"put the {o} on the {PLATES[i % 3]}" for i, o in enumerate(OBJECTS)],
            "two-arm": [f"hand over the {o} and put it on the plate" for o in OBJECTS]}.get(name, [f"put the {o} on the plate" for o in OBJECTS])


@functools.lru_cache(100_000)
def scene(name, task, init_state, ood):
    """kinds [S], xyz [S, 3], subgoals [(what, thing, target)], gripper start offset, table, instruction."""
    rng = np.random.default_rng([TABLETOP.index(name), task, init_state, ood])
    things, text, table, start = [], instructions(name)[task], 0, rng.uniform(-.15, .15, 2)

    def put(kind, at=None, x=(-.8, .8), y=(-.75, .6), gap=.38):
        """Adds a thing at a place, or at random where there is room."""
        for attempt in range(1000):
            p = np.array(at if at is not None else (rng.uniform(*x), rng.uniform(*y)))
            if at is not None or all(np.hypot(*(p - q)) > gap * .998 ** attempt for _, q in things):
                break
        things.append((KINDS.index(kind), p))
        return len(things) - 1
    near = lambda x, y, by=.12: (x + rng.uniform(-by, by), y + rng.uniform(-by, by))
    if name == "spatial":
        at = {"box": near(-.45, .35), "stove": near(.45, .3), "tray": near(-.35, -.4), "": near(0, -.05)}
        plate = put("plate", near(.45, -.5, .25))
        for kind in ("box", "stove", "tray"):
            put(kind, at[kind])
        one, two = list(RELATIONS.values())[task], list(RELATIONS.values())[(task + rng.integers(1, 10)) % 10]
        bowls = [put("bowl", np.add(at[k], d) + rng.uniform(-.03, .03, 2)) for k, d in (one, two)]
        goals = [(PLACE, bowls[0], plate)]
    elif name == "goal":
        for kind, at in (("plate", (.35, -.5)), ("stove", (.55, .3)), ("rack", (-.1, .4)), ("cabinet", (-.6, .42))):
            put(kind, near(*at))
        put("handle", things[3][1] - (0, .22)), put("knob", things[1][1] - (0, .3))
        put("bowl", near(0, -.3, .3)), put("bottle" if rng.random() < .5 else "cheese", near(-.6, -.4, .3))
        what, thing, target = GOALS[task][1:]
        if thing in ("bottle", "cheese"):
            things[-1] = (KINDS.index(thing), things[-1][1])
        find = lambda k: [t[0] for t in things].index(KINDS.index(k))
        goals = [(what, find(thing), find(target) if target else 0)]
    elif name == "two-arm":
        plate = put("plate", x=(.46, .8))                                    # neither arm can do it alone
        goals = [(PLACE, put(OBJECTS[task], x=(-.8, -.4)), plate)]
        put(OBJECTS[(task + rng.integers(1, 10)) % 10], x=(-.8, -.4))
    else:
        names = list(UNSEEN if name == "multi-object" and ood else OBJECTS)
        if name in ("object", "long"):
            plates = [put("basket")] + ([put("plate")] if name == "long" else [])
        elif name == "multi-receptacle":
            both = rng.permutation(3 if not ood else 5)[:2]
            mine = task % 3 if not ood else 3 + task % 2
            plates = [put(PLATES[mine]), put(PLATES[[p for p in both if p != mine][0]])]
            text = text if not ood else f"put the {names[task]} on the {PLATES[mine]}"
        else:
            plates = [put("plate")]
            text = f"put the {names[task]} on the plate"
        goals = [(PLACE, put(names[task]), plates[0])]
        rest = [o for o in rng.permutation(names) if o != names[task]]
        if name == "long":
            second = OBJECTS[(task + 3) % 10]
            rest.remove(second)
            goals.append((PLACE, put(second), plates[1]))
        for o in rest[:{"object": 3, "long": 1, "multi-object": 3, "multi-receptacle": 0}.get(name, 1)]:
            put(o)
        if name == "unseen-table":
            table = int(rng.integers(1, 9) if not ood else rng.integers(9, 17))
        if name == "init-pose" and ood:
            start = rng.choice((-1, 1), 2) * rng.uniform(.4, .75, 2)
    kinds, xyz = np.zeros(SLOTS, int), np.zeros((SLOTS, 3))
    kinds[:len(things)], xyz[:len(things), :2] = [t[0] for t in things], [t[1] for t in things]
    return kinds, xyz, goals, start, table, text


# ------------------------------------------------------------------------------------------------------------ simulator
class TabletopEnv(SimulatorEnv):
    def __init__(self, name, num_envs, seed=0):
        long, arms = name == "long", 2 if name == "two-arm" else 1
        states = list(range(500))
        splits = dict(train=states[:400], eval=states[400:]) | (dict(ood=states[400:]) if name in SHIFTS else {})
        super().__init__(Suite(f"tabletop-{name}", instructions(name), splits, max_steps=128 if long else 96 if arms == 2 else 80 if name in SHIFTS else 64,
                               action_dim=7 * arms, chunk=4, image=SIZE), num_envs, seed)
        self.name, self.arms, n = name, arms, num_envs
        self.kind, self.xyz, self.home = np.zeros((n, SLOTS), int), np.zeros((n, SLOTS, 3)), np.zeros((n, SLOTS, 3))
        self.goal, self.stage, self.stages = np.zeros((n, 2, 3), int), np.zeros(n, int), np.ones(n, int)
        self.hand, self.yaw, self.open, self.held = np.zeros((n, arms, 3)), np.zeros((n, arms)), np.ones((n, arms)), np.full((n, arms), -1)
        self.angle, self.table, self.touched = np.zeros(n), np.zeros(n, int), np.zeros(n, bool)
        self.low = np.array([[-.95, -.95, 0]] if arms == 1 else [[-.95, -.95, 0], [-.25, -.95, 0]])
        self.high = np.array([[.95, .95, .5]] if arms == 1 else [[.25, .95, .5], [.95, .95, .5]])

    def _reset(self, i, task, init_state, split):
        self.kind[i], self.xyz[i], goals, start, self.table[i], text = scene(self.name, task, init_state, split == "ood")
        self.home[i], self.goal[i, :len(goals)], self.stage[i], self.stages[i] = self.xyz[i], goals, 0, len(goals)
        self.hand[i] = [(*start, .3)] if self.arms == 1 else [(-.5 + start[0], start[1], .3), (.5 + start[0], start[1], .3)]
        self.yaw[i], self.open[i], self.held[i], self.angle[i], self.touched[i] = 0, 1, -1, 0, False
        return text

    def _step(self, action, live):
        """One step of the environments `live`; returns where the last subgoal holds now."""
        a = np.where(live[:, None, None], action.reshape(len(live), self.arms, 7), 0)
        rows = np.arange(len(live))
        self.hand = np.clip(self.hand + STEP * a[..., :3], self.low, self.high)
        self.yaw = np.clip(self.yaw + 3 * STEP * a[..., 5], -1.6, 1.6)
        was, closing = self.open.copy(), a[..., 6] > 0
        self.open = np.where(live[:, None], np.clip(self.open + np.where(closing, -.5, .5), 0, 1), self.open)
        for arm in range(self.arms):
            far = np.linalg.norm(self.xyz - self.hand[:, arm, None], axis=2) + 9 * FIXED[self.kind]
            nearest = far.argmin(1)
            grip = live & (was[:, arm] > 0) & (self.open[:, arm] == 0) & (far[rows, nearest] < REACH)
            drop = live & (self.open[:, arm] > 0) & (self.held[:, arm] >= 0)
            mine = self.held[:, arm].copy()
            self.held[:, arm] = np.where(grip, nearest, np.where(drop, -1, mine))
            alone = drop if self.arms == 1 else drop & (self.held[:, 1 - arm] != mine)
            self.xyz[rows[alone], mine[alone], 2] = 0
            r, k = rows[live & (self.held[:, arm] >= 0)], self.held[live & (self.held[:, arm] >= 0), arm]
            at, kind = self.hand[r, arm], self.kind[r, k]
            slide = np.stack([self.home[r, k, 0], np.clip(at[:, 1], self.home[r, k, 1] - .4, self.home[r, k, 1]), 0 * at[:, 2]], 1)
            self.xyz[r, k] = np.where((kind == HANDLE)[:, None], slide, np.where((kind == KNOB)[:, None], self.home[r, k], at))
            np.add.at(self.angle, r, np.where(kind == KNOB, 3 * STEP * a[r, arm, 5], 0))
        if self.name == "repositioning":
            self._jump(rows[live & (self.steps == 4)])
        what, thing, target = self.goal[rows, self.stage].T
        on = (np.linalg.norm((self.xyz[rows, thing] - self.xyz[rows, target])[:, :2], axis=1) < .2) & (self.held != thing[:, None]).all(1)
        slid = self.home[rows, thing, 1] - self.xyz[rows, thing, 1] > .3
        self.touched |= live & (self.held == thing[:, None]).any(1)
        holds, last = live & np.choose(what, [on & self.touched, slid, self.angle > .8]), self.stage == self.stages - 1
        self.stage += holds & ~last
        return holds & last

    def _jump(self, rows):
        """Object (out of distribution: receptacle too) to another free place."""
        for i in rows:
            rng = np.random.default_rng([self.seed, self.task[i], self.init_state[i], 5])
            for k in [self.goal[i, 0, 1]] + ([self.goal[i, 0, 2]] if self.split[i] == "ood" else []):
                if (self.held[i] != k).all():
                    others = self.xyz[i, self.kind[i] > 0, :2]               # its own old place among them
                    free = (p for p in rng.uniform((-.8, -.75), (.8, .6), (200, 2)) if (np.hypot(*(others - p).T) > .36).all())
                    self.xyz[i, k, :2] = next(free, self.xyz[i, k, :2])

    def _grasped(self):
        return (self.held == self.goal[np.arange(self.num_envs), self.stage, 1][:, None]).any(1)

    def describe(self):                      # of two hands, the one that holds the thing or has to fetch it
        rows, (thing, target) = np.arange(self.num_envs), self.goal[np.arange(self.num_envs), self.stage, 1:].T
        arm = np.where(self._grasped(), (self.held == thing[:, None]).argmax(1), (self.arms == 2) & (self.xyz[rows, thing, 0] > self.high[0, 0]))
        return dict(gripper=self.hand[rows, arm], object=self.xyz[rows, thing], target=self.xyz[rows, target], held=self._grasped(), open=self.open[rows, arm] > .5,
                    names=np.array(KINDS)[np.stack([self.kind[rows, thing], self.kind[rows, target]], 1)],
                    hand=np.array(["gripper"] if self.arms == 1 else ["left gripper", "right gripper"])[arm])

    # ---------------------------------------------------------------------------------------------------------- expert
    def expert_action(self):
        """A privileged controller without memory: it looks at the state only, so that it recovers from anywhere."""
        rows, n = np.arange(self.num_envs), self.num_envs
        what, thing, target = self.goal[rows, self.stage].T
        thing_at, target_at, action = self.xyz[rows, thing], self.xyz[rows, target], np.zeros((n, self.arms, 7))
        held, other, home = self.held == thing[:, None], None, np.array([.5, 0, .3])
        for arm in range(self.arms):
            hand, mine = self.hand[:, arm], held[:, arm]
            pick, carry = ~held.any(1), mine
            if self.arms == 2:
                other = held[:, 1 - arm]
                reach = (thing_at[:, 0] >= self.low[arm, 0]) & (thing_at[:, 0] <= self.high[arm, 0])
                pick, carry = pick & reach & (True if arm == 0 else thing_at[:, 0] > self.high[0, 0]), mine & (arm == 1)
            d = np.linalg.norm((thing_at - hand)[:, :2], axis=1)
            goal = np.where(pick[:, None], thing_at + np.stack([0 * d, 0 * d, np.clip(d - .06, 0, .25)], 1), hand)
            close = mine | (pick & (np.linalg.norm(thing_at - hand, axis=1) < NEAR) & ((self.open[:, arm] > 0) | mine))
            away = np.linalg.norm((target_at - hand)[:, :2], axis=1)
            over = target_at + np.stack([0 * d, 0 * d, np.clip(away, .05, .3)], 1)
            pull = self.home[rows, thing] - (0, .5, 0)
            goal = np.where(carry[:, None], np.where((what == PLACE)[:, None], over, np.where((what == SLIDE)[:, None], pull, hand)), goal)
            close &= ~(carry & (what == PLACE) & (away < NEAR) & (hand[:, 2] < .12))
            if self.arms == 2:                 # the left arm waits in the middle until the right one holds as well
                meet, here = np.array([0, -.1, .3]), np.linalg.norm(thing_at - (0, -.1, .3), axis=1) < NEAR
                if arm == 0:
                    goal = np.where((mine & ~other)[:, None], meet, np.where(other[:, None], hand, np.where(pick[:, None], goal, home * (-1, 1, 1))))
                    goal = np.where((other & ~mine)[:, None], home * (-1, 1, 1), goal)
                    close &= ~other
                else:
                    take = other & here & ~mine
                    goal = np.where(take[:, None], thing_at, np.where((mine & ~other | pick)[:, None], goal, np.where(mine[:, None], hand, home)))
                    close |= take & (np.linalg.norm(thing_at - hand, axis=1) < NEAR) & (self.open[:, arm] > 0)
            way = goal - hand                  # straight there, slower near the end: the action tells how far the goal is
            action[:, arm, :3] = way / np.maximum(np.abs(way).max(1, keepdims=True), SLOW)
            action[:, arm, 5] = np.clip(np.where(carry & (what == TURN), 1, np.where(mine, 0, -self.yaw[:, arm] / (2 * STEP))), -1, 1)
            action[:, arm, 6] = np.where(close, 1, -1)
        return action.reshape(n, -1)

    # --------------------------------------------------------------------------------------------------------- picture
    def _render(self, live):
        rows = np.flatnonzero(live)
        sprites, alphas, tables, textures = _atlas()
        canvas = tables[self.table[rows]]                                   # fancy indexing copies
        flat, n = canvas.reshape(-1, 3), len(rows)

        def paint(sprite, at):
            """Blends one sprite per environment, at a quarter pixel."""
            u, v = PAD + 32 + 29 * at[:, 0] - HALF, PAD + 37 - 25 * at[:, 1] - 22 * at[:, 2] - HALF
            q, p = (4 * u).astype(int), (4 * v).astype(int)
            where, phase = ((np.arange(n) * WIDE + (p >> 2)) * WIDE + (q >> 2))[:, None] + WINDOW, (p & 3) * 4 + (q & 3)
            flat[where] = ((flat[where].astype(np.uint16) * alphas[sprite, phase]) >> 8).astype(np.uint8) + sprites[sprite, phase]
        kind, xyz, hand = self.kind[rows], self.xyz[rows], self.hand[rows]
        order = np.argsort(np.where(FIXED[kind], -2, -xyz[..., 1] * (xyz[..., 2] <= 0) + 2 * (xyz[..., 2] > 0)), 1, kind="stable")
        order = order[:, (kind[np.arange(n)[:, None], order] > 0).any(0)]
        for arm in range(self.arms):
            paint(np.full(n, SHADOW), hand[:, arm] * (1, 1, 0))
        for k in order.T:
            paint(kind[np.arange(n), k], xyz[np.arange(n), k])
        for arm in range(self.arms):
            turn = np.rint(np.clip(self.yaw[rows, arm], -1.6, 1.6) / .8).astype(int) + 2
            paint(HAND + 15 * arm + 5 * (2 * self.open[rows, arm]).astype(int) + turn, hand[:, arm])
        picture = canvas[:, PAD:PAD + SIZE, PAD:PAD + SIZE]
        if self.name.startswith("dynamic"):                                 # a texture, cropped elsewhere at every step
            mixed = picture >> 1
            for j, i in enumerate(rows):
                y, x = np.random.default_rng([self.seed, self.task[i], self.init_state[i], self.steps[i]]).integers(0, SIZE, 2)
                which = 0 if self.split[i] != "ood" else 1 + (self.init_state[i] + self.task[i]) % 16
                mixed[j] += textures[which, y:y + SIZE, x:x + SIZE]
            r, g, b = np.moveaxis(picture ^ tables[self.table[rows], PAD:PAD + SIZE, PAD:PAD + SIZE], -1, 0)
            where = self.name == "dynamic-noise" or ((r | g | b) > 0)[..., None].repeat(3, -1)           # else what is not table; any(-1) would be slow
            np.copyto(picture, mixed, where=where)
        return picture

    def keypoints(self):
        """What is where in the picture: an index into KEYPOINTS (-1: nothing) [N, things] and pixels (x, y) [N, things, 2]."""
        at, index = np.concatenate([self.xyz, self.hand], 1), np.full(len(KINDS), -1)
        for k, name in enumerate(KINDS[1:], 1):
            index[k] = KEYPOINTS.index(name if name in KEYPOINTS else "plate" if "plate" in name else name.split()[0])
        arms = np.broadcast_to(len(KEYPOINTS) + np.arange(self.arms), (self.num_envs, self.arms))
        return np.concatenate([index[self.kind], arms], 1), np.stack([32 + 29 * at[..., 0], 37 - 25 * at[..., 1] - 22 * at[..., 2]], -1)


KEYPOINTS = list(COLOURS) + list(PLATES[:3]) + list(FIXTURES)                # objects by colour
HALF, PAD, WIDE, SHADOW, HAND = 12, 24, SIZE + 48, len(KINDS), len(KINDS) + 1   # half a sprite, margin and width of the canvas, the sprites after KINDS
WINDOW = (np.arange(2 * HALF)[:, None] * WIDE + np.arange(2 * HALF)).ravel()


@functools.lru_cache(1)
def _atlas():
    """Every sprite at 16 sub-pixel phases as (premultiplied colour, 256 - alpha), the tables, and the textures of the dynamic suites, halved."""
    y, x = np.mgrid[:2 * HALF, :2 * HALF].astype(float)
    colour, alpha = np.zeros((HAND + 30, 16, 4 * HALF * HALF, 3), np.uint8), np.zeros((HAND + 30, 16, 4 * HALF * HALF, 1), np.uint16)
    box = lambda u, v, a, b, r=0.: np.hypot(np.maximum(np.abs(u) - a + r, 0), np.maximum(np.abs(v) - b + r, 0)) - r + np.minimum(np.maximum(np.abs(u) - a, np.abs(v) - b) + r, 0)
    for phase in range(16):
        u, v = x - HALF - (phase % 4) / 4, y - HALF - (phase // 4) / 4
        r, t = np.hypot(u, v), np.arctan2(v, u)
        shapes = dict(cube=box(u, v, 4, 4, 1), ball=r - 4.4, can=box(u, v, 3.2, 4.8, 1.5), star=r - 3.6 - 1.4 * np.cos(5 * t + np.pi / 2), ring=np.abs(r - 3.4) - 1.5,
                      cone=np.maximum(.88 * (np.abs(u) - .55 * (v + 5)), v - 4), cross=np.minimum(box(u, v, 4.8, 1.7), box(u, v, 1.7, 4.8)),
                      gem=np.abs(u) + np.abs(v) - 5)
        disc = r - 6.6
        looks = {SHADOW: [(np.hypot(u, v * 1.3) - 4.2, (0, 0, 0), .35)]}
        for k, name in enumerate(KINDS):
            words = name.split()
            if words[-1:] and words[-1] in SHAPES:
                looks[k] = [(shapes[words[-1]], COLOURS[words[0]], 1.)]
            elif name in PLATES:
                rim = COLOURS[words[0]] if len(words) > 1 else (205, 214, 222)
                looks[k] = [(disc, rim, 1.), (r - 4.4, tuple(min(255, c + 28) for c in rim), 1.)]
        look = lambda name, *layers: looks.__setitem__(KINDS.index(name), list(layers))
        look("basket", (box(u, v, 7, 6, 2), (150, 100, 50), 1.), (box(u, v, 5, 4, 1), (92, 58, 30), 1.))
        look("stove", (box(u, v, 7, 6, 1), (70, 72, 80), 1.), (np.abs(r - 3.6) - .8, (225, 90, 60), 1.))
        look("rack", (box(u, v, 7, 5.5, 1), (120, 82, 50), 1.), (box(u, np.abs(v) - 2.2, 6, 1.), (214, 170, 110), 1.))
        look("cabinet", (box(u, v, 8.5, 6, 1), (165, 120, 80), 1.), (box(u, v, 7, 4.4, .5), (186, 140, 96), 1.))
        look("handle", (box(u, v, 4, 1.6, 1), (225, 205, 90), 1.))
        look("knob", (r - 2.8, (200, 40, 60), 1.), (box(u, v + 1, .6, 1.4), (255, 240, 240), 1.))
        look("box", (box(u, v, 5, 4.4, .5), (190, 90, 110), 1.), (box(u, v, 5, .8), (240, 220, 160), 1.))
        look("tray", (box(u, v, 7.4, 5.6, 2), (110, 160, 150), 1.), (box(u, v, 5.8, 4.2, 1.5), (150, 195, 185), 1.))
        look("bowl", (r - 4.6, (40, 44, 66), 1.), (r - 3, (96, 104, 140), 1.))
        look("bottle", (np.minimum(box(u, v - 1.5, 2.6, 3.6, 1), box(u, v + 3.6, 1.2, 2)), (60, 20, 80), 1.), (box(u, v - 1.5, 2.6, 1), (230, 220, 200), 1.))
        look("cheese", (np.maximum(box(u, v, 4.6, 3.2, .5), u * .5 - v - 3), (250, 205, 70), 1.), (np.hypot(u - 1, v - .5) - 1, (220, 160, 40), 1.))
        for arm, tint in enumerate(((88, 96, 110), (120, 84, 70))):
            for gap in range(3):
                for turn in range(5):
                    c, s = np.cos((turn - 2) * .4), np.sin((turn - 2) * .4)
                    p, q = c * u + s * v, -s * u + c * v
                    fingers = box(np.abs(p) - 1.6 - 1.4 * gap, q - .5, 1, 2.6, .5)
                    looks[HAND + 15 * arm + 5 * gap + turn] = [(box(u, v + 8, 1.6, 4), tint, 1.), (box(p, q + 3, 2.8 + 1.2 * gap, 1.5, .8), tint, 1.), (fingers, (222, 226, 232), 1.)]
        for k, layers in looks.items():
            rgb, a = np.zeros(u.shape + (3,)), np.zeros(u.shape + (1,))
            if k < SHADOW:                                                   # a soft contact shadow, then the layers with a dark edge and light from above
                d = layers[0][0]
                a = np.clip(.35 * (.5 - np.roll(np.roll(d, 1, 0), 1, 1) / 2), 0, .3)[..., None]
            for d, tint, opacity in layers:
                shade = (1.06 - .02 * v - .28 * np.clip(1.4 + d, 0, 1))[..., None]
                b = opacity * np.clip(.5 - d, 0, 1)[..., None]
                rgb, a = rgb * (1 - b) + b * np.clip(np.array(tint) * shade, 0, 255), a + b - a * b
            colour[k, phase], alpha[k, phase] = np.floor(rgb.reshape(-1, 3) * 255 / 256), np.rint(256 * (1 - a)).reshape(-1, 1)
    rng, (j, i) = np.random.default_rng(7), np.mgrid[:WIDE, :WIDE]
    tables = np.zeros((17, WIDE, WIDE, 3), np.uint8)
    for k in range(17):                                                      # 0: wood.  1-8 and 9-16: other colours and grains
        wood = np.array((222, 190, 150)) if k == 0 else rng.uniform(70, 235, 3)
        a, b, c = (0, .5, 0) if k == 0 else rng.uniform(-.6, .6, 3)
        grain = np.sin(a * i + b * j + 2 * np.sin((.07 + abs(c) * .3) * i)) * (5 if k == 0 else rng.uniform(5, 22))
        wall = np.broadcast_to(np.array((196, 208, 216)) - (np.arange(WIDE)[:, None, None] - PAD) * .8, (WIDE, WIDE, 3))
        tables[k] = np.clip(np.where((j < PAD + 9)[..., None], wall, wood + grain[..., None]), 0, 255)
        tables[k, PAD + 9] = tables[k, PAD + 9] // 2
    noise = rng.uniform(0, 255, (17, 16, 16, 3)).repeat(8, 1).repeat(8, 2)
    waves = 128 + 120 * np.sin(rng.uniform(-.7, .7, (17, 1, 1, 3)) * np.arange(128)[:, None, None] + rng.uniform(-.7, .7, (17, 1, 1, 3)) * np.arange(128)[:, None])
    textures = np.where((np.arange(17) % 2)[:, None, None, None] == 0, noise, waves) * .5 + 64
    textures[0] = textures[0].mean(-1, keepdims=True)                        # the training texture is grey, the unseen ones have colours
    return colour, alpha, tables, textures.astype(np.uint8) >> 1


if __name__ == "__main__":                                                   # python -m envs.tabletop montage.png: the expert in every suite
    import sys
    from PIL import Image
    strips = []
    for name, split in [(n, "eval") for n in TABLETOP] + [(n, "ood") for n in SHIFTS]:
        env, frames = TabletopEnv(name, 2), []
        env.reset(options=dict(task=[0, 3], init_state=[401, 402], split=split))
        for _ in range(5):
            frames.append(env.image.copy())
            [env.step(env.expert_action()[:, None]) for _ in range(env.suite.max_steps // 8)]
        strips.append(np.concatenate(np.stack(frames, 1).reshape(-1, SIZE, SIZE, 3), 1))
    picture = np.concatenate([np.pad(s, ((0, 2), (0, 0), (0, 0))) for s in strips])
    Image.fromarray(picture).resize((2 * picture.shape[1], 2 * picture.shape[0]), 0).save(sys.argv[1])
