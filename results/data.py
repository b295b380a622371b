"""What the CSV files say, and the statistics: for report.py and figures.py."""
import csv
import json
import math
import re
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from jobs import SIMULATORS

FOLDER, used = Path(__file__).resolve().parent, set()    # the folder in use; the runs read since it was cleared
FIRST = False                                            # of runs that were made twice, read the first (NAME-earlier-SEED)
SUITES = ("spatial", "object", "goal", "long")
SHIFTS = ("unseen-table", "dynamic-texture", "dynamic-noise", "multi-object", "multi-receptacle", "init-pose", "repositioning")
VISUAL = SHIFTS[:3]
MINIATURE = "libero-object-nomsaa"                        # where the README's distillation on LIBERO runs
PHASES = ("rollout", "teacher", "reference", "advantages", "update", "demos")
# Label, colour (Okabe and Ito's, told apart by colour-blind readers as well), line.
STYLE = {
    "teacher": ("Teacher", "#999999", ":"), "base": ("Base", "#999999", "--"), "student": ("Student", "#999999", "-"), "grpo": ("GRPO", "#000000", "-"),
    "ppo": ("PPO", "#999999", "-"), "ppo-long": ("PPO, 200 iterations", "#999999", "--"), "sft-many": ("SFT, 50 demonstrations a task", "#009e73", "-"),
    "opd-exact": ("VLA-OPD, exact", "#d55e00", "-"), "opd-sampled": ("VLA-OPD, sampled", "#0072b2", "-"), "distill-grpo": ("Distill + GRPO", "#d55e00", "--"),
    "distill-grpo-long": ("Distill + GRPO, longer, learning rate 4e-4", "#d55e00", "-."),
    "distill-grpo-slow": ("Distill + GRPO, longer, learning rate 1e-4", "#d55e00", ":"),
    "all-states-opd-exact": ("VLA-OPD, exact", "#d55e00", "-"), "all-states-distill-grpo-slow": ("Distill + GRPO, longer, learning rate 1e-4", "#d55e00", ":"),
    "opd-rollout-reward": ("VLA-OPD, sampled, log p in the reward of the policy that played", "#f0e442", "-"), "opd-g2": ("VLA-OPD, exact, G = 2", "#e69f00", "-"),
    "opd-g4": ("VLA-OPD, exact, G = 4", "#cc79a7", "-"), "opd-sampled-g2": ("VLA-OPD, sampled, G = 2", "#e69f00", "--"),
    "opd-sampled-g4": ("VLA-OPD, sampled, G = 4", "#cc79a7", "--"), "dagger-fkl": ("DAgger, forward KL", "#009e73", "-"), "dagger-ce": ("DAgger, hard CE", "#cc79a7", "-"),
    "plain-teacher": ("plain teacher", "#999999", ":"), "plain-exact": ("VLA-OPD, exact", "#d55e00", ":"),
    "plain-sampled": ("VLA-OPD, sampled", "#0072b2", ":"), "plain-fkl": ("DAgger, forward KL", "#009e73", ":"),
    "plain-ce": ("DAgger, hard CE", "#cc79a7", ":"), "sharp-student": ("sharp student", "#999999", "-"),
    "sharp-exact": ("VLA-OPD, exact", "#d55e00", "--"), "sharp-sampled": ("VLA-OPD, sampled", "#0072b2", "--"), "sharp-fkl": ("DAgger, forward KL", "#009e73", "--"),
    "sharp-ce": ("DAgger, hard CE", "#cc79a7", "--"), "fkl-fine": ("DAgger, forward KL, 2 updates an iteration", "#009e73", ":"),
    "road": ("ROAD-VLA", "#56b4e9", "-"), "road-long": ("ROAD-VLA, 160 iterations", "#56b4e9", "--"),
    "road-warm": ("ROAD-VLA, critic from the reference", "#56b4e9", ":"),
    "road-even": ("ROAD-VLA, distillation as strong as PPO", "#0072b2", "--"), "road-alone": ("ROAD-VLA, distillation alone", "#009e73", "--"),
    "road-alpha-0": ("ROAD-VLA, alpha = 0", "#0072b2", "-"), "road-alpha-1": ("ROAD-VLA, alpha = 1", "#d55e00", "-"),
    "road-jsd": ("ROAD-VLA, JSD", "#009e73", "-"), "road-no-gate": ("ROAD-VLA, no gate", "#e69f00", "-"), "road-positive": ("ROAD-VLA, positive only", "#cc79a7", "-"),
    "text-mcts": ("text teacher: MCTS", "#0072b2", "-"), "text-rel-spatial": ("text teacher: RelSpatial", "#d55e00", "-"),
    "text-plan-rel-spatial": ("text teacher: Plan + RelSpatial", "#000000", "-"),
    **{f"road-reference-{n}": (f"ROAD-VLA, reference of {n} iterations", c, "-") for n, c in ((10, "#cc79a7"), (20, "#e69f00"), (30, "#009e73"))}}


@cache
def parse(path):
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(path.open())]


def find(folder, suite, algorithm, tail):
    """{seed: path}; what has no seed, an evaluated checkpoint, is seed 0."""
    name = f"{suite}-{algorithm}" if suite.split("-")[0] in SIMULATORS else f"tabletop-{suite}-{algorithm}"
    named = lambda folder, name, tail: {int(p.name[len(name):].removesuffix(tail)[1:] or 0): p for p in sorted([*folder.glob(f"{name}-[0-9]{tail}"), *folder.glob(f"{name}{tail}")])}
    again = named(FOLDER, f"{name}-earlier", ".csv") if FIRST else {}
    return {seed: p for seed, p in named(folder, name, tail).items() if seed not in again} | (named(folder, f"{name}-earlier", tail) if again else {})


def read(suite, algorithm):
    """{seed: rows} of tabletop-SUITE-ALGORITHM-SEED.csv, on another simulator of SUITE-ALGORITHM-SEED.csv."""
    found = find(FOLDER, suite, algorithm, ".csv")
    used.update(p.stem for p in found.values())
    return {seed: parse(p) for seed, p in found.items()}


def simulated():
    """{name: rows} of what was trained on another simulator and evaluated before and after."""
    found = {p.stem: parse(p) for p in sorted(FOLDER.glob("*-[0-9].csv")) if not p.name.startswith("tabletop")}
    return {name: rows for name, rows in found.items() if sum("charts/eval_success" in r for r in rows) > 1}


def rivals():
    """Suites of other simulators with a run of PPO and one of ROAD."""
    return sorted({name.rpartition("-road-")[0] for name in simulated() if name.replace("-road-", "-ppo-") in simulated() and "-road-" in name})


def others():
    """The rest of those that play while they learn."""
    return {name: rows for name, rows in simulated().items() if any("charts/success_rate" in r for r in rows) and re.sub("-(ppo|road)-.$", "", name) not in rivals()}


def there(algorithms, suites):
    """The (suite, algorithm) that have been trained."""
    return [(suite, k) for suite in suites for k in algorithms if read(suite, k)]


def played(suite, algorithm, split="eval", key="success"):
    """{seed: {(task, state): success}} of the evaluation's episodes; or whether it was grasped; or lost: grasped, and no success."""
    found = find(FOLDER / "episodes", suite, algorithm, ".csv" if split == "eval" else "-ood.csv")
    used.update(p.stem.removesuffix("-ood") for p in found.values())
    return {seed: {(r["task"], r["init_state"]): float(r["grasped"] > r["success"]) if key == "lost" else r[key] for r in parse(p)} for seed, p in found.items()}


def tasks(episodes):
    """Success of every task."""
    return {t: np.mean([v for (task, _), v in episodes.items() if task == t]) for t in sorted({t for t, _ in episodes})}


def size(row, split="eval"):
    """How many episodes a Wilson interval comes from: its ends solve (p - x)^2 = z^2 / n x (1 - x)."""
    p, low, high = (row[f"charts/{split}_{k}"] for k in ("success", "low", "high"))
    p, low, high = (p, low, high) if p > .5 else (1 - p, 1 - high, 1 - low)
    return round(1.96 ** 2 / (p * p / (low * high) - 1))


def shipped(suite, algorithm, split):
    """The same of a shipped checkpoint that was evaluated before episodes were kept (checkpoints.csv)."""
    path = FOLDER / "checkpoints.csv"
    rows = [r for r in csv.DictReader(path.open()) if (r["env"], r["role"]) == (f"tabletop-{suite}", algorithm)] if path.exists() and split == "eval" else ()
    used.update(f"{r['env']}-{r['role']}" for r in rows)
    return {0: (float(r["success"]) / 100, int(r["episodes"])) for r in rows}


def success(suite, algorithm, split="eval", key="success"):
    """{seed: (success, episodes)} at the end: of the evaluation's episodes, else of the training's last evaluation.  key: as in played()."""
    last = {seed: [r for r in rows if f"charts/{split}_{key}" in r][-1:] for seed, rows in read(suite, algorithm).items()}
    tested = {seed: (rows[0][f"charts/{split}_{key}"], size(rows[0], split)) for seed, rows in last.items() if rows}
    tested |= shipped(suite, algorithm, split) if key == "success" else {}
    return tested | {seed: (np.mean([*e.values()]), len(e)) for seed, e in played(suite, algorithm, split, key).items()}


def seeds_of(algorithm, suites, split="eval", key="success"):
    """The seeds that all of the suites have."""
    return sorted(set.intersection(*(set(success(suite, algorithm, split, key)) for suite in suites)))


def ends(algorithm, suites, split="eval", key="success"):
    """Mean success over the suites of every seed that has them all, and the episodes of one seed."""
    every, seeds = [success(suite, algorithm, split, key) for suite in suites], seeds_of(algorithm, suites, split, key)
    return np.array([np.mean([e[s][0] for e in every]) for s in seeds]), sum(e[seeds[0]][1] for e in every) if seeds else 0


def drawn(algorithm, suites, split="eval", key="success"):
    """The same success, for differ(): of a checkpoint without seeds a number."""
    x = ends(algorithm, suites, split, key)[0]
    return x[0] if seeds_of(algorithm, suites, split, key) == [0] else x


def curve(rows, key="charts/eval_success", x="steps"):
    """Environment steps (or iterations) and the value, wherever it was measured."""
    at = np.cumsum([r.get("charts/env_steps", 0) for r in rows]) if x == "steps" else [r["step"] for r in rows]
    return np.array([(n, r[key]) for n, r in zip(at, rows) if key in r]).T


def curves(suite, algorithm, key="charts/eval_success", x="steps"):
    return {seed: curve(rows, key, x) for seed, rows in read(suite, algorithm).items() if any(key in r for r in rows)}


def last(suite, algorithm, key, i=-1):
    """The last (or i-th) value of every seed."""
    return np.array([c[1][i] for c in curves(suite, algorithm, key).values()])


def falls(suite, algorithm):
    """How far greedy success fell from one evaluation to the next, added up, of every seed."""
    return np.array([np.maximum(0, -np.diff(c[1])).sum() for c in curves(suite, algorithm).values()])


def valleys(suite, algorithm):
    """How far success falls under the student's in the first three iterations: greedy, and of the training's rollouts (the first is the student's); a row a seed."""
    both = zip(*(curves(suite, algorithm, key).values() for key in ("charts/eval_success", "charts/success_rate")))
    return np.array([[max(0, y[0] - min(y[1:4], default=y[0])) for _, y in each] for each in both])


def entropies(suite, algorithm):
    """First, lowest, highest and last, of every seed."""
    return np.array([(e[0], e.min(), e.max(), e[-1]) for _, e in curves(suite, algorithm, "losses/entropy").values()])


def spent(rows, budget=np.inf):
    """Environment steps, and minutes of all phases but evaluation, up to so many steps (within an iteration: its share)."""
    steps, seconds = (np.cumsum(x) for x in ([r.get("charts/env_steps", 0) for r in rows], [sum(r.get(f"time/{k}", 0) for k in PHASES) for r in rows]))
    return np.array([steps[-1], (np.interp(budget, steps, seconds) if budget < steps[-1] else seconds[-1]) / 60])


def teaching(suite, algorithm):
    """What making the teacher costs those that have one, if that was measured: pictures of an expert, one a step, and minutes."""
    taught = algorithm.startswith(("opd-", "dagger-", "fkl-", "distill-grpo"))
    return np.mean([(sum(r.get("charts/samples", 0) for r in rows), spent(rows)[1]) for rows in (read(suite, "make-teacher") if taught else {}).values()] or [(0, 0)], 0)


def whole(suite, algorithm):
    """Steps and minutes, mean over the seeds, with the run that it starts from (Distill + GRPO) or whose critic is the reference (ROAD), and the teacher's."""
    before = read(suite, "opd-exact") if algorithm.startswith("distill-grpo") else {}
    return np.mean([spent(rows) + [rows[0].get(f"charts/reference_{k}", 0) for k in ("env_steps", "minutes")] + (spent(before[seed]) if seed in before else 0)
                    for seed, rows in read(suite, algorithm).items()], 0) + teaching(suite, algorithm)


def objectives():
    """[(title, suite, {objective: algorithm})] of Figure 4: the shipped models on two suites, a plain teacher, a sharp student as well."""
    names = [("object", "object", "opd-exact opd-sampled dagger-fkl dagger-ce"), ("two-arm", "two-arm", "opd-exact opd-sampled dagger-fkl dagger-ce"),
             ("object, plain teacher", "object", "plain-exact plain-sampled plain-fkl plain-ce"),
             ("object, sharp student, plain teacher", "object", "sharp-exact sharp-sampled sharp-fkl sharp-ce")]
    found = [(title, suite, {k: v for k, v in zip(("exact", "sampled", "fkl", "ce"), each.split()) if read(suite, v)}) for title, suite, each in names]
    return [family for family in found if family[2]]


def forgetting():
    """{algorithm: [(seen, unseen on goal, unseen on spatial) a seed]}, and the unseen tasks: those that the base could do."""
    able = {suite: {t for e in played(suite, "base").values() for t, v in tasks(e).items() if v >= .8} for suite in ("goal", "spatial")}
    points = {}
    if not all(able.values()):
        return points, able
    for k in ("base", "student", "teacher", "sft-many", "grpo", "opd-exact", "distill-grpo"):
        seen, *unseen = played("object", k), *(played(suite, k if k == "base" else f"forget-{k}") for suite in able)
        for seed in sorted(set(seen).intersection(*unseen)):
            rest = [np.mean([v for t, v in tasks(u[seed]).items() if t in able[suite]]) for u, suite in zip(unseen, able)]
            points.setdefault(k, []).append([np.mean([*seen[seed].values()]), *rest])
    return points if points.keys() & {"sft-many", "grpo", "opd-exact"} else {}, able


def trajectories():
    """{algorithm: [(iteration, seen, unseen on goal, unseen on spatial)]} of every checkpoint of one run (forgetting.py)."""
    path, able = FOLDER / "forgetting.json", forgetting()[1]
    if not path.exists() or not all(able.values()):
        return {}
    used.add("forgetting")
    return {k: np.array([(r["iteration"], r["object"], *(np.mean([r[suite][int(t)] for t in able[suite]]) for suite in able)) for r in rows])
            for k, rows in json.loads(path.read_text()).items()}


# ---------------------------------------------------------------------------------------------------------------------- statistics
def wilson(p, n, z=1.96):
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0., (centre - half) / (1 + z * z / n)), min(1., (centre + half) / (1 + z * z / n))


def iqm(x, repeats=2000):
    """Interquartile mean of success [seeds, tasks] and its 95 % interval by a bootstrap that draws seeds anew within every task.  The library for this is
    rliable; it brings arch, pandas, scipy, seaborn and statsmodels for these lines.  tests/test_results.py does it the long way."""
    cut = x.size // 4
    middle = lambda v: np.sort(v.reshape(len(v), -1))[:, cut:x.size - cut].mean(1)
    drawn = np.take_along_axis(x[None], np.random.default_rng(0).integers(len(x), size=(repeats, *x.shape)), 1)
    return middle(x[None])[0], *np.percentile(middle(drawn), (2.5, 97.5))


def flips(differences):
    """How likely a sum of whole numbers is 0, 1, 2, ... or more in size, were the sign of each a coin's."""
    chances = np.ones(1)
    for k in np.abs(differences[differences != 0]):
        chances = np.convolve(chances, [.5, *[0] * (2 * k - 1), .5])
    sizes = chances[len(chances) // 2:] * 2
    sizes[0] /= 2
    return sizes[::-1].cumsum()[::-1].clip(max=1.)


def sign_flips(differences):
    """Exact two-sided p value of the sum.  Of +-1 it is McNemar's test."""
    return float(flips(differences)[abs(differences.sum())])


def paired(a, b, suites, split="eval", key="success"):
    """For every initial state how much oftener a succeeds than b, each the mean over its seeds (times what makes that whole); None where episodes are missing."""
    (one, n), (two, m) = (([played(suite, k, split, key) for suite in suites], seeds_of(k, suites, split, key)) for k in (a, b))
    if any(seed not in e for each, seeds in ((one, n), (two, m)) for e in each for seed in seeds):
        return None
    both = [(x, y, state) for x, y in zip(one, two) for state in sorted(set.intersection(*(set(e[s]) for e, seeds in ((x, n), (y, m)) for s in seeds)))] if n and m else []
    return np.array([round(len(m) * sum(x[s][k] for s in n) - len(n) * sum(y[s][k] for s in m)) for x, y, k in both]) if both else None


def student(t, freedom):
    """Two-sided p value of Student's t, by the trapezoid rule over the angle whose tangent is t / sqrt(freedom)."""
    angle = np.linspace(0, math.atan(t / math.sqrt(freedom)), 10001)
    y = math.gamma((freedom + 1) / 2) / math.sqrt(math.pi) / math.gamma(freedom / 2) * np.cos(angle) ** (freedom - 1)
    return max(0., 1 - 2 * float(((y[1:] + y[:-1]) / 2 * np.diff(angle)).sum()))


def doubt(a, b, n):
    """Standard errors of a difference of mean success, n episodes a seed: of two proportions, and of the seeds (one variance for both), with their degrees of
    freedom.  A number instead of seeds: one checkpoint, the same for all."""
    share, (a, b) = sum(1 / len(x) for x in (a, b) if np.ndim(x)), (np.atleast_1d(x) for x in (a, b))
    p, freedom = (a.sum() + b.sum()) / (len(a) + len(b)), len(a) + len(b) - 2
    variances = p * (1 - p) * (1 / (n * len(a)) + 1 / (n * len(b))), sum(((x - x.mean()) ** 2).sum() for x in (a, b)) / max(freedom, 1) * share
    return *(math.sqrt(max(v, 1e-12)) for v in variances), freedom


def differ(a, b, n, states=None, margin=0.):
    """Two-sided p value of the difference (from -margin): the larger of that of the episodes (paired, where the differences on the same initial states are known)
    and that of the seeds (Student's t)."""
    gap, (episodes, seeds, freedom) = abs(np.mean(a) + margin - np.mean(b)), doubt(a, b, n)
    p = math.erfc(gap / math.sqrt(2) / episodes) if states is None else sign_flips(states)
    return max(p, student(gap / seeds, freedom)) if freedom else p                       # one run against one says nothing of other seeds


def reach(a, b, n, states=None, level=.05):
    """Half of the difference's interval: the least that differ() would tell from none at this level."""
    (episodes, seeds, freedom), low, high = doubt(a, b, n), 0., 1000.
    for _ in range(60 * bool(freedom)):                  # Student's quantile, by bisection
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, freedom) > level else (low, middle)
    least = NormalDist().inv_cdf(1 - level / 2) * episodes if states is None else (flips(states) > level).sum() / (n * np.size(a) * np.size(b))
    return max(least, low * seeds)


def every(flags):
    """True if all are, False if none is, None in between."""
    return all(flags) or (None if any(flags) else False)


def most(flags):
    """True if clearly more than half are, False if clearly fewer: the sign test, at 5 %."""
    signs = np.where(flags, 1, -1)
    return None if sign_flips(signs) >= .05 else bool(signs.sum() > 0)


def apart(a, b):
    """Is every seed of a above every seed of b?  False if below, None if they overlap."""
    return True if min(a) > max(b) else False if max(a) < min(b) else None
