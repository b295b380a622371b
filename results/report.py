"""The CSV files of a folder -> its README.md and figures.  benchmark.sh runs what they hold, then this.  What is not there yet is left out, or said.

    python results/report.py [FOLDER] [--check]          (FOLDER: results/; --check compares with the README.md there and writes nothing)
"""
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np

import data
import figures
from data import SHIFTS, STYLE, SUITES, VISUAL, apart, curves, differ, drawn, ends, entropies, every, falls, forgetting, iqm, last, most, paired, played, reach, read, spent, success
from data import tasks, there, used, valleys, whole, wilson

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
# The papers' own numbers, success in %.
TABLE2 = {"teacher": (94.2, 96.1, 94.6, 90.7, 93.9), "sft-many": (84.7, 88.4, 79.2, 53.7, 76.5), "student": (63.6, 54.9, 59.6, 17.3, 48.9),      # sft-many: OpenVLA
          **dict.fromkeys(("opd-sampled", "opd-exact"), (84.3, 93.8, 92.5, 78.9, 87.4)), "distill-grpo": (93.4, 95.3, 94.5, 90.2, 93.4)}
TABLE3 = {"teacher": 74.0, "student": 45.2, "opd-sampled": 71.1, "opd-exact": 71.1}      # averages over four RoboTwin tasks
ROAD1 = {"unseen-table": (88, 93, 87, 92), "dynamic-texture": (87, 88, 65, 69), "dynamic-noise": (85, 90, 66, 70), "multi-object": (78, 80, 61, 63),
         "multi-receptacle": (84, 84, 57, 62), "init-pose": (87, 91, 75, 79), "repositioning": (89, 88, 73, 77)}     # ID of PPO and ROAD, OOD of PPO and ROAD
ROAD1_AVERAGE = (85, 88, 69, 73, 16.3, 14.6)
ROAD2 = {"ppo": ["87.2 ± 3.6"], "road": ["91.5 ± 1.2"], "road-jsd": ["85.9 ± 1.5"], "road-no-gate": ["89.8 ± 0.1"], "text-rel-spatial": ["4.68 ± 0.0"],
         "text-plan-rel-spatial": ["4.68 ± 0.0"], "text-mcts": ["75.8 ± 2.0"]}           # VR-UnseenTable, out of distribution
ROAD5 = {"road": ("80 ± 6", "63 ± 4"), "road-positive": ("67 ± 8", "57 ± 7")}            # CR-MultiObject
ALPHA = {"road-alpha-0": ["about 67"], "road": ["about 75"], "road-alpha-1": ["overtaken"]}  # Fig. 7, ER-Repositioning
claims = []                                              # (whose, claim, rule, measured, verdict)


# ------------------------------------------------------------------------------------------------------------------------ claims
def chance(p):
    return f"p = {p:.2g}" if p >= .001 else "p < 0.001"


def gap(a, b, n, states=None, margin=0.):
    """p, the upper end of the difference's interval (of 90 % where one side is asked for), and the words."""
    p, d, half = differ(a, b, n, states, margin) / (2 if margin else 1), np.mean(a) - np.mean(b), reach(a, b, n, states, .1 if margin else .05)
    return p, d + half, f"{100 * d:+.1f} [{100 * (d - half):.1f}, {100 * (d + half):.1f}], {chance(p)}{', paired' if states is not None else ''}"


def claim(text, rule, measured, verdict, seeds=0, whose="paper"):
    """seeds: the fewest that a trained side has; of one alone a verdict says so.  whose: "paper", or "ours": what no paper says."""
    said = {True: "holds", False: "does not hold", None: "not resolvable"}[verdict] + " (one seed)" * (seeds == 1 and verdict is not None)
    claims.append((whose, text, rule, measured, said))


def first_runs(work):
    """work(), where of runs that were made twice the first counts."""
    data.FIRST = True
    try:
        return work()
    finally:
        data.FIRST = False


def compare(text, a, b, suites, split="eval", margin=0., key="success", whose="paper"):
    """a is above b; with a margin: a is not below b by more, one-sided.  Where a run was made twice, with either of the two."""
    def judged():
        (x, n), (y, m), both = ends(a, suites, split, key), ends(b, suites, split, key), None if margin else paired(a, b, suites, split, key)
        if not (len(x) and len(y)):
            return
        sides = [drawn(k, suites, split, key) for k in (a, b)]
        p, top, said = gap(*sides, min(n, m), both, margin)
        return x, y, p, f"{100 * x.mean():.1f} and {100 * y.mean():.1f}, {said}", sides, top
    if shown := judged():
        first = first_runs(judged) or shown
        x, y, p, said, sides, top = shown
        theirs, less = re.search(r"([\d.]+), ([\d.]+)\)$", text), ""   # the paper's a and b
        if theirs and not margin and 100 * max(top, first[5]) < (more := float(theirs[1]) - float(theirs[2])):
            less = f"; smaller than the paper's {more:+.1f}"
        above = [bool(each[0].mean() + margin > each[1].mean()) for each in (shown, first)]
        claim(text, f"at most {100 * margin:.0f} lower" if margin else "higher",
              f"{said}{f'; first runs {first[3]}' if first[3] != said else ''}; seeds {len(x)}, {len(y)}{less}",
              None if max(p, first[2]) >= .05 or above[0] != above[1] else above[0], min((np.size(each) for each in sides if np.ndim(each)), default=0), whose)


def at_least(text, a, suites, goal, whose="paper"):
    x, n = ends(a, suites)
    if len(x):
        low, high = wilson(x.mean(), n)                  # all seeds are evaluated on the same states
        claim(text, f"at least {100 * goal:.0f} %", f"{100 * x.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]; seeds {len(x)}",
              True if low >= goal else False if high < goal else None, len(x), whose)


# ------------------------------------------------------------------------------------------------------------------------ tables
def table(header, rows):
    yield f"| {' | '.join(header)} |\n|{'---|' * len(header)}"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)
    yield ""


def spread(x, scale=100, digits=1):
    mean = f"{scale * np.mean(x):.{digits}f}" if len(x) else "not run"
    return f"{mean} [{scale * min(x):.{digits}f}, {scale * max(x):.{digits}f}]" if len(x) > 1 else mean


def cell(algorithm, suites, split="eval"):
    """Mean success over the seeds [lowest, highest]; of one seed, its Wilson interval."""
    x, n = ends(algorithm, suites, split)
    return spread(x) if len(x) != 1 else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in (x[0], *wilson(x[0], n))))


def seeds(algorithm, suites, split="eval"):
    n = sorted({len(success(suite, algorithm, split)) for suite in suites})
    return f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"


def middle(algorithm, suites, split="eval"):
    """IQM over tasks and the seeds of which every suite has the episodes."""
    each = [played(suite, algorithm, split) for suite in suites]
    common = sorted(set.intersection(*map(set, each)))
    if not common:
        return ""
    x = np.array([sum(([*tasks(e[seed]).values()] for e in each), []) for seed in common])
    return ("{:.1f} [{:.1f}, {:.1f}]" if len(x) > 1 else "{:.1f}").format(*(100 * v for v in iqm(x)))


def first_last(suite, algorithm, key, digits=2):
    return ", ".join(f"{last(suite, algorithm, key, i).mean():.{digits}f}" for i in (0, -1)) if curves(suite, algorithm, key) else ""


def early_late(suite, algorithm, key):
    """Of every seed, the mean over the first and over the last five iterations."""
    return (np.array([c[1][part].mean() for c in curves(suite, algorithm, key).values()]) for part in (slice(5), slice(-5, None)))


def named(algorithms, suite, *columns):
    """Rows of a table: name, seeds, success, and what the functions in `columns` make of the algorithm."""
    return [(STYLE[k][0], seeds(k, [suite]), cell(k, [suite]), *(f(k) for f in columns)) for k in algorithms]


# --------------------------------------------------------------------------------------------------------------------- VLA-OPD
def compared():
    """Environment steps that all have in common, a row an algorithm."""
    order = ("grpo", "ppo", "road", "opd-exact", "opd-sampled", "opd-rollout-reward", "opd-g2", "opd-g4", "dagger-fkl", "dagger-ce", "distill-grpo", "distill-grpo-slow")
    runs, rows = {k: read("object", k) for _, k in there(order, ["object"])}, []
    budget = min((spent(r)[0] for k, each in runs.items() if k not in ("opd-g2", "opd-g4") and not k.startswith("distill") for r in each.values()), default=0)
    for k, each in runs.items() if budget else ():
        both = [(np.interp(min(budget, c[0][-1]), *c), np.interp(np.linspace(0, budget, 200), *c).mean()) for c in curves("object", k).values()]
        steps, minutes = whole("object", k)
        rows.append((STYLE[k][0], len(each), *map(spread, zip(*both)), cell(k, ["object"]), ", ".join(f"{e:.2f}" for e in entropies("object", k).mean(0)[[0, 1, 3]]),
                     f"{np.mean([spent(r, budget)[1] for r in each.values()]):.1f}", f"{steps:.0f}", f"{minutes:.1f}"))
    pace = [[minutes / steps for steps, minutes in map(spent, each.values())] for each in runs.values()]
    return budget, rows, max((max(p) / min(p) for p in pace), default=1)


def algorithms():
    (budget, rows, apart), (pictures, minutes) = compared(), data.teaching("object", "opd-exact")
    if not rows:
        return
    yield f"All start from the shipped student: {cell('student', ['object'])}; its teacher: {cell('teacher', ['object'])}. Success at {budget:.0f} environment"
    yield "steps of the run's own (interpolated), and at its end. Area: mean success over those steps, a shorter run keeping its last value. Entropy: nats a token,"
    yield "at the first iteration, lowest, last. Minutes: one core, without evaluation, up to those steps" + (
        f"; of several machines, some of them busy (two seeds of one\nalgorithm are up to {apart:.1f} times apart a step; [ROAD's cost over PPO](#road-vla-d5-cost) is of one)"
        if apart > 1 else "") + ". ROAD's reference critic is a finished PPO run, so"
    yield "its honest cost, in the last two columns, is both; that of Distill + GRPO is with the distillation before it; " + (
        f"and with a teacher it is with the teacher's,\nmade from the base: {pictures:.0f} pictures of a scripted expert, one a step (not those that a disturbance spoiled), "
        f"{minutes:.1f} minutes (made again: {cell('make-teacher', ['object'])}).\n" if pictures else "the teacher's is in none of them.\n")
    yield from table(("algorithm", "seeds", "success", "area", "success at its end", "entropy first, lowest, last", "minutes", "all steps", "all minutes"), rows)


def opd_fig2():
    rows = []
    for suite, k in there(("grpo", "opd-exact", "opd-sampled", "distill-grpo"), ("object", "long")):
        teacher, grpo, when, share, shared = ends("teacher", [suite])[0], curves(suite, "grpo"), [], [], []
        for seed, (steps, value) in curves(suite, k).items():
            reached = (n for n, v in zip(*curves(suite, k, x="iteration")[seed]) if len(teacher) and v >= .9 * teacher[0])
            when.append(f"{next(reached, 'never')}".removesuffix(".0") if len(teacher) else "")
            n, goal = grpo.get(seed, np.zeros((2, 1)))
            if k.startswith("opd") and goal[-1] > goal[0]:
                mine, theirs = next(iter(steps[value >= goal[-1]]), np.inf), n[goal >= goal[-1]][0]
                share.append(mine / theirs), shared.append((mine + data.teaching(suite, k)[0]) / theirs)
        shares, making = ", ".join(f"{v:.2f}" for v in share), data.teaching(suite, k)[0]
        taught = ", ".join(f"{v:.2f}" for v in shared) if making else ""
        rows.append((suite, *named([k], suite)[0], ", ".join(when), f"{whole(suite, k)[0]:.0f}", shares, taught, spread(falls(suite, k))))
        if share:
            n = max(r[-1]["step"] for r in read(suite, "grpo").values())
            first, end = (last(suite, "grpo", "charts/eval_success", i) for i in (0, -1))
            risen = differ(end, first[0], ends("grpo", [suite])[1]) < .05                # they start from one checkpoint
            claim(f"{STYLE[k][0]}, reaches the success of {n:.0f} iterations of GRPO in a third of its steps ({suite})",
                  "every seed's share <= 1/3, where GRPO has risen (p < 0.05)", shares + ("" if risen else f"; GRPO {100 * first.mean():.1f}, {100 * end.mean():.1f}"),
                  every([v <= 1 / 3 for v in share]) if risen else None, len(share), "paper" if suite == "long" else "ours")
    if rows:
        yield "Environment steps with those of the run that it starts from and of the teacher's making. Share: steps to reach GRPO's last success, over those that GRPO needed to first reach it. Falls:"
        yield "those of greedy success from one iteration to the next, added up (200 episodes fall by chance, too). A share is as fine as an iteration: what is above GRPO's end after its"
        yield "first one may have been so earlier. The paper, whose step is not defined (our iteration is 16 updates): on object over 90 % within 10; on long near 80 % in 50, where GRPO"
        yield "takes over 150, a third (of object it does not say); smooth, where GRPO goes zig-zag, most of all on long; with GRPO behind it above GRPO's end. GRPO behind Distill is 6"
        yield "iterations at its default rate; [longer, at a lower rate](#vla-opd-table-2-four-suites), it was tried on object alone.\n"
        yield from table(("suite", "algorithm", "seeds", "success", "iteration that reaches 90 % of the teacher", "environment steps", "share", "with the teacher's", "falls"), rows)
        for k in ("opd-exact", "opd-sampled"):
            at_least(f"{STYLE[k][0]}, is over 90 % within 10 iterations (object)", k, ["object"], .9)
        for suite in ("object", "long"):
            calmer("opd-exact", "grpo", suite)
            compare(f"Distill + GRPO ends above GRPO ({suite})", "distill-grpo", "grpo", [suite])
        at_least("VLA-OPD, exact, comes near 80 % (long)", "opd-exact", ["long"], .75)
        for suite, goal in (("object", .95), ("long", .9)):
            at_least(f"Distill + GRPO is over {100 * goal:.0f} % ({suite})", "distill-grpo", [suite], goal)
        at_least(f"{STYLE['distill-grpo-slow'][0]}, is over 95 % (object)", "distill-grpo-slow", ["object"], .95)


def calmer(a, b, suite, whose="paper"):
    x, y = falls(suite, a), falls(suite, b)
    if len(x) and len(y):
        claim(f"{STYLE[a][0]}, rises more smoothly than {STYLE[b][0]} ({suite})", "falls of every seed below the other's", f"{100 * x.mean():.1f} and {100 * y.mean():.1f}",
              apart(y, x), min(len(x), len(y)), whose)


def opd_table2():
    methods = ("teacher", "student", "sft-many", "grpo", "opd-exact", "opd-sampled", "distill-grpo")
    if there(methods, SUITES):
        paper = lambda k, i: TABLE2[k][i] if k in TABLE2 else ""
        yield "The paper's row of SFT is OpenVLA on 50 demonstrations a task; ours starts from the student, as all others, and sees 50 undisturbed ones a"
        yield "task: nearly what the teacher has learned from (60, disturbed), as an expert that is a program costs nothing here. The paper's teacher was"
        yield "made by reinforcement learning (SimpleVLA-RL), ours from demonstrations. Its Distill is the sampled estimator. Our students are the base made to"
        yield "forget, at a learning rate that was chosen for that (`RECIPES` in algos/sft.py; long has its own).\n"
        yield from table(("method", "seeds", *sum(((suite, "paper") for suite in SUITES), ()), "average", "paper", "IQM"),
                         [(STYLE[k][0], seeds(k, SUITES), *sum(((cell(k, [suite]), paper(k, i)) for i, suite in enumerate(SUITES)), ()), cell(k, SUITES),
                           paper(k, 4), middle(k, SUITES)) for k in methods])
        if learned := there(("grpo", "distill-grpo", "distill-grpo-long", "distill-grpo-slow"), SUITES):
            def sampled(suite, k):
                each = [np.array_split(c[1], 3) for c in curves(suite, k, "charts/success_rate").values()]
                return ", ".join(f"{100 * np.mean([part[i].mean() for part in each]):.1f}" for i in (0, -1))
            greedy = lambda suite, k: ", ".join(f"{100 * last(suite, k, 'charts/eval_success', i).mean():.1f}" for i in (0, -1))
            yield "GRPO rewards the policy that plays, which is sampled; the table above has the greedy one. Sampled: of the training's rollouts, first and last third"
            yield "of the iterations; greedy: before training and after it.\n"
            yield from table(("suite", "algorithm", "iterations", "seeds", "sampled", "greedy"),
                             [(suite, STYLE[k][0], f"{max(r[-1]['step'] for r in read(suite, k).values()):.0f}",
                               seeds(k, [suite]), sampled(suite, k), greedy(suite, k)) for suite, k in learned])
        for k in ("opd-exact", "opd-sampled"):
            compare(f"{STYLE[k][0]}, is above its student (87.4, 48.9)", k, "student", SUITES)
        compare("Distill is above SFT on many demonstrations (best such row 87.9; OpenVLA's: 87.4, 76.5)", "opd-exact", "sft-many", SUITES)
        compare("Distill is comparable to SFT on many demonstrations (87.4; 75.1 to 87.9)", "opd-exact", "sft-many", SUITES, margin=.05)
        compare("Distill + GRPO is above Distill (93.4, 87.4)", "distill-grpo", "opd-exact", SUITES)
        for k in ("distill-grpo", "distill-grpo-long", "distill-grpo-slow"):
            compare(f"{STYLE[k][0]}{',' * (',' in STYLE[k][0])} is above Distill (object; 95.3, 93.8)", k, "opd-exact", ["object"])
        compare(f"{STYLE['distill-grpo-slow'][0]}, is above Distill (object, all 100 evaluation states of each task, asked after 20 of each had not told; 95.3, 93.8)",
                "all-states-distill-grpo-slow", "all-states-opd-exact", ["object"], whose="ours")
        compare("Distill + GRPO nearly recovers the teacher (93.4, 93.9)", "distill-grpo", "teacher", SUITES, margin=.05)


def opd_table3():
    methods = ("teacher", "student", "grpo", "opd-exact", "opd-sampled", "distill-grpo")
    if there(methods, ["two-arm"]):
        yield "The paper's column is the average of its four RoboTwin tasks; its student had seen 1,000 demonstrations a task, ours one, at a"
        yield "learning rate that was chosen to make it forget (`RECIPES` in algos/sft.py).\n"
        yield from table(("method", "seeds", "two-arm", "paper", "IQM"),
                         named(methods, "two-arm", lambda k: TABLE3.get(k, ""), lambda k: middle(k, ["two-arm"])))
        for _, value in curves("two-arm", "opd-other-origin").values():
            yield "Student and teacher come from one base. Until commit 11c0f99 the student came from the base without a second arm; VLA-OPD's success from"
            yield f"that one, before it and after each iteration: {', '.join(f'{100 * v:.0f}' for v in value)}.\n"
        for k in ("opd-exact", "opd-sampled"):
            compare(f"{STYLE[k][0]}, is above its student (71.1, 45.2)", k, "student", ["two-arm"])
            compare(f"{STYLE[k][0]}, nearly matches the teacher (71.1, 74.0)", k, "teacher", ["two-arm"], margin=.05)


def opd_fig3():
    (points, able), both = forgetting(), ("goal", "spatial")
    if points:
        n, m = (len(v) for v in able.values())
        yield f"Trained on tabletop-object; unseen are the tasks of tabletop-goal ({n} of 10) and tabletop-spatial ({m} of 10) that the base solves in 80 % or more of its episodes. All"
        yield "but base and teacher start from the student, whose one demonstration a task of tabletop-object has itself cost it much of them, by our making; Distill learns from the teacher,"
        yield "another child of the base. The claims are on all tasks of the two suites. The paper has a figure of all checkpoints during training: success on four unseen tasks falls to"
        yield "about zero (two of Object) and far (two of Spatial) under SFT; RL and Distill largely avoid that, and Distill matches RL or is above it.\n"
        sizes = 200, 20 * n, 20 * m
        one = lambda x, k: "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in (x, *wilson(x, k))))
        yield from table(("checkpoint", "seeds", "seen: object", "unseen: goal", "unseen: spatial"),
                         [(STYLE[k][0], len(v), *(spread(x) if len(x) > 1 else one(x[0], size) for x, size in zip(zip(*v), sizes))) for k, v in points.items()])
        if paths := data.trajectories():
            yield "Every checkpoint during fine-tuning, of one run of each (`python results/forgetting.py`; lines in the figure, whose dots are the ends of the seeds above):\n"
            ways = {k: np.mean(rows[:, 2:], 1) for k, rows in paths.items()}
            yield from table(("checkpoint", "iterations", "seen: first, last", "unseen, mean of both: first, lowest, last"), [
                (STYLE[k][0], len(rows), ", ".join(f"{100 * rows[i, 1]:.1f}" for i in (0, -1)), ", ".join(f"{100 * x:.1f}" for x in (ways[k][0], ways[k].min(), ways[k][-1])))
                for k, rows in paths.items()])
        compare("SFT on 50 demonstrations a task forgets: on unseen suites its student is above it", "forget-student", "forget-sft-many", both)
        for k, name in (("opd-exact", "Distill"), ("grpo", "GRPO")):
            compare(f"{name} keeps its student's success on unseen suites", f"forget-{k}", "forget-student", both, margin=.05)
            compare(f"{name} is above SFT on unseen suites", f"forget-{k}", "forget-sft-many", both)
        compare("Distill matches GRPO on unseen suites", "forget-opd-exact", "forget-grpo", both, margin=.05)


def opd_fig4():
    families, note = data.objectives(), data.FOLDER / "teacher.json"
    if not families:
        return
    yield "Valley: how far success falls under the student's in the first three iterations, greedy and of the training's rollouts, which is the paper's curve. Entropy:"
    yield "nats a token; the first is the mean over the first iteration's updates. The order of success is judged where there is more than one seed. The paper (Beat Block"
    yield "Hammer, 32 prompts, ours 64): forward KL falls by more than 50 % early and its entropy explodes; hard CE ends lowest and its entropy collapses; reverse KL ends"
    yield "highest, its entropy between.\n"
    row = lambda title, suite, k: (title, *named([k], suite)[0], ", ".join(f"{100 * v:.1f}" for v in valleys(suite, k).mean(0)), ", ".join(f"{e:.2f}" for e in entropies(suite, k).mean(0)))
    yield from table(("suite", "objective", "seeds", "success at the end", "valley greedy, sampled", "entropy first, lowest, highest, last"),
                     [row(title, suite, k) for title, suite, names in families for k in names.values()] + [row("object", suite, k) for suite, k in there(["fkl-fine"], ["object"])])
    for title, suite, names in families:
        entropy, few = {k: entropies(suite, v) for k, v in names.items()}, lambda *kinds: min(len(read(suite, names[k])) for k in kinds)
        end = {k: v[:, 3] for k, v in entropy.items()}
        if end.keys() >= {"fkl", "exact"}:
            peak, dips = entropy["fkl"][:, 2] - entropy["fkl"][:, 0], (valleys(suite, names["fkl"]) > .05).any(1)
            claim(f"forward KL raises entropy ({title})", "highest 0.05 nats above first, on every seed", f"peak {spread(peak, 1, 2)} above the first", every(peak > .05), few("fkl"))
            claim(f"forward KL dips early ({title})", "valley of 5 %, greedy or sampled, on every seed", f"{sum(dips)} of {len(dips)} seed{'s' * (len(dips) > 1)}", every(dips), few("fkl"))
        if end.keys() >= {"fkl", "sampled"}:
            deep = {k: valleys(suite, names[k])[:, 1] for k in ("fkl", "sampled")}
            claim(f"forward KL dips deeper than sampled reverse KL ({title})", "valley of every seed's rollouts deeper than the other's",
                  " and ".join(f"{100 * v.mean():.1f}" for v in deep.values()), apart(*deep.values()), few("fkl", "sampled"))
        if end.keys() >= {"ce", "exact"}:
            others, falls = [v for k, v in end.items() if k != "ce"], end["ce"] < entropy["ce"][:, 0]
            claim(f"hard CE lowers entropy, most of all ({title})", "last entropy below the first, and below the other objectives', on every seed",
                  f"{entropy['ce'][:, 0].mean():.2f} to {end['ce'].mean():.2f}, next {min(v.mean() for v in others):.2f}",
                  every(falls) is not False and apart(np.concatenate(others), end["ce"]) and every(falls), few(*names))
        if end.keys() >= {"ce", "fkl", "exact"}:
            claim(f"reverse KL's entropy lies between ({title})", "hard CE < reverse KL < forward KL at the end, on every seed",
                  ", ".join(f"{end[k].mean():.2f}" for k in ("ce", "exact", "fkl")), every([bool(apart(end["exact"], end["ce"])), bool(apart(end["fkl"], end["exact"]))]), few("ce", "exact", "fkl"))
        label = dict(exact="exact reverse KL", sampled="sampled reverse KL", fkl="forward KL", ce="hard CE")
        for a, b in [("exact", k) for k in ("fkl", "ce", "sampled")] + [("sampled", k) for k in ("fkl", "ce")] + [("fkl", "ce")]:
            if end.keys() >= {a, b} and few(a, b) > 1:
                compare(f"{label[a]} ends above {label[b]} ({title})", names[a], names[b], [suite], whose="ours" if b == "sampled" else "paper")
    if order := [said for whose, text, *_, said in claims if whose == "paper" and " ends above " in text]:
        yield f"Of the paper's order of success {sum(said.startswith('holds') for said in order)} of {len(order)} comparisons hold; the other claims are about entropy and early dips.\n"
    if note.exists() and families[0][0] == "object":
        t = json.loads(note.read_text())
        yield f"How sure the teacher on object ({cell('teacher', ['object'])}) is where the student goes, which is where forward KL and hard CE could go wrong:"
        yield f"its tokens have an entropy of {t['entropy_at_teacher_states']:.2f} nats at its own states, {t['entropy_at_student_states']:.2f} at the student's,"
        yield f"{t['entropy_late_in_student_failures']:.2f} late in the student's failures; the smoothed labels it was trained on have {t['entropy_of_a_smoothed_label']:.2f} by"
        yield "themselves (`python results/teacher.py`). Its demonstrations were disturbed on purpose, so that it finds back.\n"
    if fine := curves("object", "fkl-fine"):
        low = ", ".join(f"{100 * min(y[1:4]):.1f} (student {100 * y[0]:.1f})" for _, y in fine.values())
        yield f"Whether a dip hides between two evaluations: after 2, 4 and 6 updates of forward KL the least success is {low}.\n"
    if read("object", "plain-teacher"):
        yield f"The paper's labels were presumably not smoothed, nor its demonstrations disturbed. So with the plain teacher: each label is one bin ({cell('plain-teacher', ['object'])}; the"
        yield "paper's went on by reinforcement learning).\n"
    if read("object", "sharp-student"):
        yield f"The sharp student: the base after one demonstration a task, each label one bin ({cell('sharp-student', ['object'])}), as the paper's on LIBERO (in its figure"
        yield "the student had 1,000).\n"


def opd_fig5():
    paper = {"opd-sampled-g2": "over 80", "opd-sampled-g4": "over 80", "opd-sampled": "89", "opd-g2": "", "opd-g4": "", "opd-exact": ""}
    found = [k for _, k in there(paper, ["object"])]
    if set(found) - {"opd-exact", "opd-sampled"}:
        yield "G trajectories of each of 64 prompts (the paper: 32), so a smaller G is fewer environment steps as well. G is 8 where none is named. Falls: as in Figure 2."
        yield "The paper uses the sampled estimator and shows the success of its rollouts; it says that a larger G is smoother, too.\n"
        yield from table(("algorithm", "seeds", "success at the end", "paper", "environment steps", "falls"),
                         named(found, "object", paper.get, lambda k: f"{np.mean([spent(r)[0] for r in read('object', k).values()]):.0f}", lambda k: spread(falls("object", k))))
        for k in found:
            if "-g" in k:
                eight, whose = ("opd-sampled", "paper") if "sampled" in k else ("opd-exact", "ours")
                at_least(f"{STYLE[k][0]}: over 80 %", k, ["object"], .8, whose)
                compare(f"{STYLE[eight][0]}, G = 8, ends above G = {k[-1]}{' (89, over 80)' * (whose == 'paper')}", eight, k, ["object"], whose=whose)
                calmer(eight, k, "object", whose)


# -------------------------------------------------------------------------------------------------------------------- ROAD-VLA
def shifts():
    return [suite for suite in SHIFTS if len(there(("ppo", "road"), [suite])) == 2]


def road_table1():
    four = [(k, split) for split in ("eval", "ood") for k in ("ppo", "road")]

    def row(name, suites, paper):
        mean = [ends(k, suites, split)[0].mean() for k, split in four]
        (x, n), (y, _), both = ends("road", suites, "ood"), ends("ppo", suites, "ood"), paired("road", "ppo", suites, "ood")
        shown = [(cell(k, suites, split), p) for (k, split), p in zip(four, paper)]
        shown += [(f"{100 * (mean[i] - mean[i + 2]):.1f}", paper[4 + i]) for i in (0, 1)]
        p = max(differ(x, y, n, both), first_runs(lambda: differ(ends("road", suites, "ood")[0], ends("ppo", suites, "ood")[0], n, paired("road", "ppo", suites, "ood"))))
        return name, f"{len(y)}, {len(x)}", *sum(shown, ()), chance(p).removeprefix("p = ").removeprefix("p ")
    if suites := shifts():
        yield "In distribution (ID) are the objects, tables, textures and places of training, out of it (OOD) others (`envs/tabletop.py`). Seeds: PPO, ROAD."
        yield "Difference: ID - OOD. p: of ROAD against PPO, OOD (where runs were made twice, the larger). ROAD's reference is that PPO run, so ROAD has cost twice the steps. What base"
        yield "and teachers do out of distribution: [Shipped checkpoints](#shipped-checkpoints). The paper trains for 850,000 steps a run,"
        yield f"these are {np.mean([spent(r)[0] for r in read(suites[0], 'ppo').values()]):.0f} ([longer](#road-vla-against-ppo-longer)).\n"
        rows = [row(suite, [suite], (*(p := ROAD1[suite]), p[0] - p[2], p[1] - p[3])) for suite in suites]
        if len(suites) > 1 and all(len(ends(k, suites, split)[0]) for k, split in four):
            rows.append(row(f"average of {len(suites)}", suites, ROAD1_AVERAGE))
        names = (f"{split} {k}" for split in ("ID", "OOD", "difference") for k in ("PPO", "ROAD"))
        yield from table(("suite", "seeds", *sum(((name, "paper") for name in names), ()), "p"), rows)
        if all(found := [middle(k, suites, "ood") for k in ("ppo", "road")]):
            yield f"IQM over seeds and tasks, out of distribution: PPO {found[0]}, ROAD {found[1]}.\n"
        compare(f"ROAD is above PPO out of distribution ({len(suites)} of our 7 suites; 73, 69)", "road", "ppo", suites, "ood")
        compare(f"ROAD is above PPO in distribution ({len(suites)} of our 7 suites; 88, 85)", "road", "ppo", suites)
        sides = [(drawn(k, suites), drawn(k, suites, "ood")) for k in ("ppo", "road")]
        if all(np.size(x) and np.shape(x) == np.shape(y) for x, y in sides):
            states = [paired("ppo", "road", suites, split) for split in ("eval", "ood")]     # how much oftener PPO succeeds, ID, less how much oftener OOD
            states = None if any(x is None for x in states) else np.concatenate([states[0], -states[1]])
            ppo, road = (x - y for x, y in sides)
            p, _, said = gap(road, ppo, ends("ppo", suites)[1], states)
            claim(f"ROAD loses less than PPO from ID to OOD ({len(suites)} of our 7 suites; 14.6, 16.3)", "smaller difference",
                  f"{100 * road.mean():.1f} and {100 * ppo.mean():.1f}, {said}; seeds {road.size}, {ppo.size}",
                  None if p >= .05 else bool(road.mean() < ppo.mean()), min(road.size, ppo.size))


def road_long():
    home, found = "repositioning", [k for _, k in there(("ppo", "road", "ppo-long", "road-long"), ["repositioning"])]
    if {"ppo", "road"} < set(found):
        own, more = lambda k: np.mean([spent(r)[0] for r in read(home, k).values()]), lambda k: whole(home, k)[0]
        yield "On tabletop-repositioning: in distribution the object jumps at step 5, out of it the receptacle does, too. ROAD of 160 iterations and its reference"
        at = {split: curves(home, "ppo-long", f"charts/{split}_success", "iteration") for split in ("eval", "ood")}
        then = [f"{100 * np.mean([np.interp(160, *c) for c in each.values()]):.1f} {where}" for each, where in zip(at.values(), ("in", "out")) if each]
        yield "of 40 are as many steps as PPO of 200; in the figure it starts behind its reference." + (f" At its iteration 160 PPO had {' and '.join(then)}.\n" if then else "\n")
        yield from table(("algorithm", "seeds", "ID", "OOD", "grasped, OOD", "environment steps"), named(
            found, home, lambda k: cell(k, [home], "ood"), lambda k: spread(ends(k, [home], "ood", "grasped")[0]),
            lambda k: f"{own(k):.0f}" + (f" + {more(k) - own(k):.0f} of the reference" if more(k) > own(k) else "")))
        for split, where in (("ood", "out of distribution"), ("eval", "in distribution")):
            compare(f"ROAD of 160 iterations is above PPO of 200, {where} (repositioning)", "road-long", "ppo-long", [home], split, whose="ours")


def road_fig2():
    key, two, rows, areas, peaks = "charts/ood_success", ("ppo", "road"), [], {"ppo": [], "road": []}, {"ppo": [], "road": []}
    for suite in shifts():
        mine = {k: curves(suite, k, key) for k in two}
        area = {k: {seed: np.interp(np.linspace(0, c[0][-1], 200), *c).mean() for seed, c in r.items()} for k, r in mine.items()}
        peak = {k: {seed: c[1].max() for seed, c in r.items()} for k, r in mine.items()}
        areas, peaks = ({k: kept[k] + [new[k]] for k in two} for kept, new in ((areas, area), (peaks, peak)))
        rows.append((suite, ", ".join(f"{len(r)}" for r in mine.values()), f"{100 * last(suite, 'ppo', key, 0).mean():.1f}",
                     *(spread([*a.values()]) for a in area.values()), *(f"{100 * np.mean([*a.values()]):.1f}" for a in peak.values())))
    if rows:
        yield "Out of distribution, over training. Area: the mean over all environment steps. Peak: the best evaluation of a seed, which flatters both alike."
        yield "The paper starts at 27 to 31; its peaks: 70.8 (PPO 64.1) on VR-DynamicNoise, 76.0 (8 above PPO) on ER-Repositioning."
        yield "In repositioning and the dynamic suites jumps and textures depend on the seed as well: a curve is evaluated with its run's seed, the tables with seed 1, so"
        yield "the last points differ.\n"
        yield from table(("suite", "seeds", "before training", "area PPO", "area ROAD", "peak PPO", "peak ROAD"), rows)
        for what, each, rule in (("leads PPO during training", areas, "higher area"), ("peaks above PPO", peaks, "higher peak")):
            higher(f"ROAD {what}, out of distribution ({len(rows)} of our 7 suites)", rule, *each.values(), ends("road", shifts(), "ood")[1])
            led = [np.mean([*road.values()]) > np.mean([*ppo.values()]) for ppo, road in zip(*each.values())]
            claim(f"ROAD {what} in every suite, out of distribution", rule.replace("higher", "higher mean") + ", in all", f"{sum(led)} of {len(led)} suites", every(led), min(map(len, each["road"])))


def higher(text, rule, ppo, road, n):
    """Of what is not an evaluation's success: values by seed, a dict a suite; n: episodes of one evaluation, as a run is evaluated on the same states again and again."""
    y, x = (np.array([np.mean([a[s] for a in each]) for s in sorted(set.intersection(*map(set, each)))]) for each in (ppo, road))
    if len(x) and len(y):
        p, _, said = gap(x, y, n)
        claim(text, rule, f"{100 * x.mean():.1f} and {100 * y.mean():.1f}, {said}; seeds {len(x)}, {len(y)}",
              None if p >= .05 else bool(x.mean() > y.mean()), min(len(x), len(y)))


def road_fig3():
    suites, entropy, weight, agree = shifts(), "losses/entropy", "losses/mean_weight", "losses/critic_agreement"
    shown = lambda suite, k, key, digits=2: ", ".join(f"{x.mean():.{digits}f}" for x in early_late(suite, k, key))
    if suites:
        yield "Mean over the first and over the last five iterations, and over the seeds. Entropy: nats a token. Weight: the mean advantage weight. Agree: where both"
        yield "critics' advantages have the same sign. The paper: entropy 3.24 (PPO 3.15) at the end on ER-Repositioning, weight -0.033 to +0.037 and +0.040, above zero"
        yield "in 56 % of the steps, agreement 90 % falling to 71 to 75 %. In the figure weight and agreement are means over the seeds, without bands.\n"
        above = {s: np.array([(c[1] > 0).mean() for c in curves(s, "road", weight).values()]) for s in suites}
        yield from table(("suite", "seeds", "entropy PPO", "entropy ROAD", "weight", "above 0, % of iterations", "agree"), [
            (s, seeds("road", [s]), shown(s, "ppo", entropy), shown(s, "road", entropy), shown(s, "road", weight, 3), f"{100 * above[s].mean():.0f}", shown(s, "road", agree)) for s in suites])
        if "repositioning" in suites:
            (_, x), (_, y) = (early_late("repositioning", k, entropy) for k in ("road", "ppo"))
            claim("ROAD keeps more entropy than PPO (repositioning; 3.24, 3.15)", "late entropy of every seed above PPO's",
                  f"{x.mean():.3f} and {y.mean():.3f}", apart(x, y), min(len(x), len(y)))
        both = lambda key: (np.concatenate(x) for x in zip(*(early_late(suite, "road", key) for suite in suites)))
        (a, b), fewest = both(agree), min(len(curves(suite, "road", agree)) for suite in suites)
        claim("the critics agree less at the end (0.90, 0.71 to 0.75)", "late below early, in most runs", f"{a.mean():.2f}, {b.mean():.2f}; {sum(b < a)} of {len(a)} runs", most(b < a), fewest)
        a, b = both(weight)
        claim("the mean weight rises from below to above zero", "early below 0, late above, in most runs",
              f"{a.mean():.3f}, {b.mean():.3f}; {sum((a < 0) & (b > 0))} of {len(a)} runs", most((a < 0) & (b > 0)), fewest)
        a = np.concatenate([*above.values()])
        claim("the mean weight is above zero more often than not (56 %)", "in more than half of the iterations, in most runs",
              f"{100 * a.mean():.0f} %; {sum(a > .5)} of {len(a)} runs", most(a > .5), fewest)


def road_fig5():
    two, visual, key = ("ppo", "road"), [s for s in shifts() if s in VISUAL], "charts/ood_grasped"
    if shifts():
        yield "At the end, % of all episodes: grasped at any time, in and out of distribution, and lost: grasped, and no success. The paper, on VR-DynamicTexture out of"
        yield "distribution: ROAD's rate of grasps is above PPO's all the way, its peak earlier and higher (81.8, 81.2), its end as well (76.0, 74.0). On ER-Repositioning PPO often"
        yield "grasps, then drifts to where the plate was; ROAD does so less (pictures only).\n"
        yield from table(("suite", "seeds", *(f"{what} {name}" for what in ("ID grasped", "OOD grasped", "OOD lost") for name in ("PPO", "ROAD"))), [
            (s, ", ".join(seeds(k, [s]) for k in two), *(spread(ends(k, [s], split, what)[0]) for split, what in (("eval", "grasped"), ("ood", "grasped"), ("ood", "lost")) for k in two))
            for s in shifts()])
        if visual:
            compare(f"ROAD grasps more often than PPO, out of distribution ({len(visual)} visual suites)", "road", "ppo", visual, "ood", key="grasped")
            if "dynamic-texture" in visual:
                compare("ROAD grasps more often than PPO, out of distribution (dynamic-texture; 76.0, 74.0)", "road", "ppo", ["dynamic-texture"], "ood", key="grasped")
            areas = [[{seed: np.interp(np.linspace(0, c[0][-1], 200), *c).mean() for seed, c in curves(s, k, key).items()} for s in visual] for k in two]
            higher(f"ROAD grasps more often during training, out of distribution ({len(visual)} visual suites)", "higher area", *areas, ends("road", visual, "ood")[1])
        if "repositioning" in shifts():
            compare("PPO more often grasps and then fails than ROAD, out of distribution (repositioning)", "ppo", "road", ["repositioning"], "ood", key="lost")


def road_critic():
    home = "repositioning"
    if read(home, "road-warm"):
        yield "The paper does not say where ROAD's current critic starts. Ours is a new one: it is \"initially poorly calibrated\", as the paper's (D.2). `--warm-critic` starts it"
        yield "as the reference's value head, from which it can only move away: as in the paper's figure (0.90, falling to 0.71 to 0.75). First and last iteration, mean over the"
        yield "seeds, on tabletop-repositioning.\n"
        yield from table(("variant", "seeds", "ID", "OOD", "critics agree", "variance of the returns explained"), named(
            [k for _, k in there(("ppo", "road", "road-warm"), [home])], home, lambda k: cell(k, [home], "ood"),
            lambda k: first_last(home, k, "losses/critic_agreement"), lambda k: first_last(home, k, "losses/explained_variance")))
        for k, name in (("road", "with a new one"), ("ppo", "PPO")):
            compare(f"ROAD with a warm critic is above {'ROAD ' * (k == 'road')}{name}, out of distribution (repositioning)", "road-warm", k, [home], "ood", whose="ours")


def road_strength():
    home, note = "repositioning", data.FOLDER / "gradients.json"
    found = [k for _, k in there(("ppo", "road", "road-even", "road-alone"), [home])]
    if note.exists():
        measured = json.loads(note.read_text())
        yield "How much of a step the distillation is: the norm of the gradient that each term of the loss sends into the policy, with its coefficient (0.5 and 0.01, the"
        yield "paper's), at the first rollout of the student on tabletop-repositioning (`python results/gradients.py`), and the same where tokens are surer, at lower"
        yield "temperatures of the same logits. To first order in the sampled token's probability p the distillation's gradient is PPO's times about p / 14 (coefficient"
        yield "0.5; PPO's ratio is that of an action's 7 tokens): the surer the policy, the more of a step it is.\n"
        columns = ("entropy_of_a_token", "likelihood_of_a_sampled_token", *(f"norm_{k}" for k in ("policy_loss", "distill_loss", "entropy", "value_loss")), "ppo_over_distillation", "cosine")
        yield from table(("temperature", "entropy of a token, nats", "mean p", "PPO", "distillation", "entropy bonus", "value loss", "PPO / distillation", "their cosine"),
                         [(t, *(f"{row[k]:.3g}" for k in columns)) for t, row in measured.items()])
    if set(found) - {"ppo", "road"}:
        part = f", {180 / measured['1']['ppo_over_distillation']:.1f} of PPO's gradient at temperature 1" if note.exists() else ""
        yield f"As strong as PPO: a coefficient of 90, not 0.5{part}. Alone: the same without PPO's term and the entropy bonus, Algorithm 1 (Adam would not mind the"
        yield "factor, but the critic's gradient goes into the policy, too).\n"
        yield from table(("variant", "seeds", "ID", "OOD", "entropy first, lowest, last"), named(
            found, home, lambda k: cell(k, [home], "ood"), lambda k: ", ".join(f"{e:.2f}" for e in entropies(home, k).mean(0)[[0, 1, 3]])))
        for k, name in (("road-even", "as strong as PPO"), ("road-alone", "alone")):
            if {k, "ppo"} <= set(found):
                (_, x), (_, y) = (early_late(home, each, "losses/entropy") for each in (k, "ppo"))
                claim(f"ROAD with the distillation {name} keeps more entropy than PPO (repositioning; 3.24, 3.15)", "late entropy of every seed above PPO's",
                      f"{x.mean():.2f} and {y.mean():.2f}", apart(x, y), min(len(x), len(y)), "ours")
            for split, where in (("ood", "out of distribution"), ("eval", "in distribution")):
                compare(f"ROAD with the distillation {name} is above PPO, {where} (repositioning)", k, "ppo", [home], split, whose="ours")


def variants(suite, paper, header, claimed, *note):
    """A table of ROAD's variants on a suite; (text, a, b, split) are claims that a is above b."""
    found = [k for _, k in there(paper, [suite])]
    if set(found) - {"ppo", "road"}:
        columns = [lambda k, i=i: paper[k][i] for i in range(len(header))]
        yield from note
        if (data.FOLDER / "gradients.json").exists():
            ratio = next(iter(json.loads((data.FOLDER / "gradients.json").read_text()).values()))["ppo_over_distillation"]
            yield f"The gradient of ROAD's distillation is 1/{ratio:.0f} of PPO's (first rollout on repositioning; [how strong](#road-vla-how-strong-the-distillation-is)): its variants can show little.\n"
        yield from table(("variant", "seeds", "ID", "OOD", *header), named(found, suite, lambda k: cell(k, [suite], "ood"), *columns))
        for text, a, b, *split in claimed:
            compare(text, a, b, [suite], *split or ["ood"])


def road_table2():
    above = [(f"PPO is above the {STYLE[k][0]} (repositioning; unseen-table 87.2, {v[0].split()[0]})", "ppo", k) for k, v in ROAD2.items() if k.startswith("text")]
    above += [(f"ROAD is above {STYLE[k][0].removeprefix('ROAD-VLA, ')} (repositioning; unseen-table 91.5, {ROAD2[k][0].split()[0]})", "road", k) for k in ("road-jsd", "road-no-gate", "ppo")]
    yield from variants("repositioning", ROAD2, ["paper, OOD"], above,
                        "On tabletop-repositioning; the paper's column is VR-UnseenTable. The tiny models' vocabulary has the words of the instructions only, so",
                        "most of a text teacher's hint is unknown to them: they show the mechanism, not what text can do. They follow the JSD of eq. 5; the paper, whose default is",
                        "KL(teacher || student), does not say which its text teachers followed.\n", *earlier())
    if there(ROAD2.keys() - {"ppo", "road"}, ["repositioning"]):
        compare("ROAD is above PPO (unseen-table; 91.5, 87.2)", "road", "ppo", ["unseen-table"], "ood")


def earlier():
    """What one run counts for: PPO with the seeds that were run twice as they were at first."""
    mine, other = (success("repositioning", k, "ood") for k in ("ppo", "ppo-earlier"))
    if twice := sorted(mine.keys() & other):
        yield f"One run counts for much: with PPO's seed{'s' * (len(twice) > 1)} {' and '.join(map(str, twice))} as first run ([below](#the-same-command-run-again)), PPO would be at"
        yield f"{100 * np.mean([x[0] for x in (mine | other).values()]):.1f} out of distribution.\n"


def road_table5():
    above = [("the signed weight is above positive-only, out of distribution (63, 57)", "road", "road-positive"),
             ("the signed weight is above positive-only, in distribution (80, 67)", "road", "road-positive", "eval")]
    yield from variants("multi-object", ROAD5, ["paper, ID", "paper, OOD"], above, "On tabletop-multi-object: the weight of below-average tokens as it is, or 0. The paper's",
                        "signed weight is \"substantially stronger\" (D.4, these numbers), or does \"just as well\" (4.2.2).\n")


def road_alpha():
    above, key = [(f"alpha = 0.5 is above {k[-1]} (about 75, {ALPHA[k][0]})", "road", k) for k in ALPHA if k != "road"], "charts/ood_success"
    yield from variants("repositioning", ALPHA, ["paper, OOD"], above,
                        "The reference critic's part of the advantage, on tabletop-repositioning; ROAD-VLA's default is 0.5. The paper's numbers are of smoothed curves",
                        "(its Table 1 has 77); alpha = 1 rises fastest there, then is overtaken.\n")
    first = {k: np.array([c[1][1] for c in curves("repositioning", k, key).values()]) for k in ALPHA}
    if all(map(len, first.values())):
        rest = np.concatenate([first[k] for k in ALPHA if k != "road-alpha-1"])
        claim("alpha = 1 rises fastest", "after 10 iterations every seed above all others', out of distribution", f"{100 * first['road-alpha-1'].mean():.1f} and {100 * rest.mean():.1f}",
              apart(first["road-alpha-1"], rest), min(map(len, first.values())))


def road_reference():
    names = [f"road-reference-{n}" for n in (10, 20, 30)]
    yield from variants("repositioning", dict.fromkeys((*names, "road")), [], [],
                        "The critic of a PPO run stopped after 10, 20 or 30 iterations, or at its end (ROAD-VLA: 40), on tabletop-repositioning.",
                        "The paper: all similar, the last one best where vision shifts, half way \"a modest but consistent improvement\" where execution does.\n")
    for k in names:
        compare(f"the reference may be stopped at {k[-2:]} of 40 iterations", k, "road", ["repositioning"], "ood", .05)
    compare("the reference of half way is above the last one", "road-reference-20", "road", ["repositioning"], "ood")


def road_cost():
    if (data.FOLDER / "cost.json").exists():
        cost = json.loads((data.FOLDER / "cost.json").read_text())
        ratio = cost["with_reference_over_ppo"]
        yield f"The same rollout and minibatches in turns (`python results/cost.py`; {cost['queries']} queries, medians of {cost['repeats']}, one thread). The paper reports 1.6 (40.8 and 25.4"
        yield "hours), which it puts down to the teacher's distribution and the KL, not to the reference critic.\n"
        rows = (("PPO", cost["ppo"], 1), ("ROAD, closed form, without the reference's pass", cost["road"], cost["road_over_ppo"]),
                ("the same, teacher written out over 256 tokens", cost["written_out"], cost["written_out_over_ppo"]),
                ("ROAD, closed form, with the reference's pass", cost["road"] + cost["reference"], ratio))
        yield from table(("an iteration", "seconds", "over PPO"), [(name, f"{cost['rollout'] + update:.1f}", f"{over:.2f}") for name, update, over in rows])
        seconds = {k: np.mean([sum(r.get(f"time/{part}", 0) for part in data.PHASES) for rows in read("repositioning", k).values() for r in rows[1:]] or [0]) for k in ("ppo", "road")}
        if all(seconds.values()):
            yield f"By the clock, over the whole runs on tabletop-repositioning, beside other jobs: {seconds['road'] / seconds['ppo']:.2f}.\n"
        if (path := data.FOLDER / "full_size.csv").exists():
            big = {r["job"]: sum(float(r[f"{phase}_seconds"] or 0) for phase in ("rollout", "label", "update")) for r in csv.DictReader(path.open()) if not r["error"]}
            if {"ppo", "road"} <= big.keys():
                yield f"At 7 B on one GPU, measured once: {big['road'] / big['ppo']:.2f} ([full size](#full-size-7-b-on-one-gpu)).\n"
        claim("ROAD takes 1.6 times PPO's time", "1.5 to 1.7, the reference's pass included", f"{ratio:.2f}", bool(1.5 <= ratio <= 1.7))


# ----------------------------------------------------------------------------------------------------------------- and the rest
def sized():
    """The table of full_size.csv: speeds, and what an iteration takes."""
    phases, rows = ("rollout", "label", "update"), []
    for row in csv.DictReader(open(data.FOLDER / "full_size.csv")):
        seconds = [float(row.get(f"{phase}_seconds") or 0) for phase in phases]
        speeds = [f"{int(row['queries']) / s:.0f}" if s else "" for s in seconds]
        kl = " → ".join(f"{float(x):.2f}" for when in ("first", "last") if (x := row.get(f"reverse_kl_exact_{when}")))
        rows.append((f"`{row['job']}`", row["decoding"], *speeds, (row.get("error") or "").split(": ", 1)[-1] or f"{sum(seconds):.0f}", row.get("peak_gb", ""), kl))
    return table(("job", "decoding", "queries/s acting", "labelling", "learning", "seconds an iteration", "GB", "reverse KL"), rows)


def full_size():
    if (data.FOLDER / "full_size.csv").exists():
        rows = list(csv.DictReader(open(data.FOLDER / "full_size.csv")))
        each = lambda k: ", ".join(sorted({row[k] for row in rows}))
        yield "OpenVLA-7B (autoregressive; a query is a step) and OpenVLA-OFT (parallel; a query is 8 steps) with random weights in the official layout, through the scripts"
        yield f"themselves on one {each('machine')} (torch {each('torch')}, commit {each('commit')}): LoRA of rank 32, bfloat16, passes of 8 queries when learning (`-micro-16`: 16), of at most"
        yield "32 when acting and labelling. An iteration of 256 queries on tabletop-object, episodes cut to 16 steps, without evaluation; the second of two, measured once."
        yield "Labelling is the teacher's pass, or the reference critic's. GB: what torch had allocated at most. Reverse KL from the first iteration to the last, at learning"
        yield "rate 1e-4; the teacher is the student with another lm_head. `-resumed` is a third iteration, after `--resume`. Nothing of 7 B with trained weights has been run.\n"
        yield from (note + "\n" for row in rows if (note := row.get("note")))
        yield from sized()


def checkpoints():
    suites = [s for s in (*SUITES, *SHIFTS, "two-arm") if success(s, "student") or success(s, "teacher")]
    if suites:
        shown = lambda k, s, split="eval": cell(k, [s], split) if success(s, k, split) else ""
        yield "On the first evaluation states of each task. The base was trained for the most part before the textures of the dynamic suites were muted and"
        yield "the layouts of spatial and goal varied more. The base has no second arm; two-arm has a base of its own.\n"
        three = "base", "student", "teacher"
        yield from table(("suite", *three, *(f"{k}, OOD" for k in three)), [(f"tabletop-{s}", *(shown(k, s, split) for split in ("eval", "ood") for k in three)) for s in suites])


def simulators():
    rows = []
    for path in sorted(data.FOLDER.glob("*-[0-9].csv")):
        trained = [] if path.name.startswith("tabletop") else data.parse(path)
        if tested := [r for r in trained if "charts/eval_success" in r]:
            used.add(path.stem)
            shown = lambda r: f"{100 * r['charts/eval_success']:.1f} [{100 * r['charts/eval_low']:.1f}, {100 * r['charts/eval_high']:.1f}]"
            steps, minutes = spent(trained)
            rows.append((path.stem, shown(tested[0]) if tested[0]["step"] == 0 else "", shown(tested[-1]), data.size(tested[-1]), f"{tested[-1]['step']:.0f}", f"{steps:.0f}", f"{minutes:.0f}"))
    if rows:
        yield from table(("run", "before", "after", "episodes", "iterations", "environment steps", "minutes"), rows)
    if any(row[0].startswith("libero-object-nomsaa") for row in rows):
        yield "LIBERO in miniature: tiny models of 96 pixels, scripted demonstrations; runs.csv has the commands. Ten tasks, or five of them (-tasks13479), 280"
        yield "steps or fewer (-150). Some meshes had stand-in textures (other pictures, the same physics), so the published checkpoints' numbers are no measure"
        yield "for these. Minutes: one core, without evaluation. Students: `student` and `one-demo` learn from nothing, from 6 and 1 demonstrations a task, `two-passes` from"
        yield "nothing, two passes over 24, `forgot` is the base after one demonstration a task at a rate at which it forgets, `of-ten` that of the ten tasks' base; `opd-X` is"
        yield "distillation from student X (`opd-exact` from `student`, the five tasks' `opd-one-demo` from the ten tasks'). maniskill-two-robot: README, Two arms.\n"
        for name, trained in data.simulated().items():
            if played := [r for r in trained if name.startswith("libero-object") and "-opd-" in name and "charts/success_rate" in r]:
                limit = int((re.search(r"-(\d+)-", name) or [0, 280])[1])                # a failure takes all of its steps
                lost = sum(limit * (r["charts/episodes"] - r["charts/success"]) for r in played) / sum(r["charts/env_steps"] for r in played)
                yield f"- {name}: {100 * lost:.0f} % of the steps that were learned from belong to failures."
        yield ""
    for name, rows in data.simulated().items():
        tested = [r for r in rows if "charts/eval_success" in r]
        if name.startswith("libero") and "-opd-" in name and tested and tested[0]["step"] == 0:
            (before, after), n = (tested[i]["charts/eval_success"] for i in (0, -1)), min(data.size(tested[i]) for i in (0, -1))
            p, _, said = gap([after], [before], n)
            claim(f"Distill is above its student ({name.removesuffix('-1')}, {n} episodes)", "higher", f"{100 * after:.1f} and {100 * before:.1f}, {said}; seeds 1, 1",
                  None if p >= .05 else bool(after > before), 1, "ours")
    for suite in ("maniskill-two-robot-pick", "maniskill-two-robot-stack"):
        if (states := paired("opd-exact", "student", [suite])) is not None:                  # by the episodes: the student's own run ended with fewer
            after, before = (np.mean([*data.played(suite, k)[1].values()]) for k in ("opd-exact", "student"))
            p, _, said = gap([after], [before], len(states), states)
            claim(f"Distill is above its student ({suite}, {len(states)} episodes)", "higher", f"{100 * after:.1f} and {100 * before:.1f}, {said}; seeds 1, 1", None if p >= .05 else bool(after > before), 1, "ours")
    if data.others():
        yield "![Other simulators](simulators.png)\n"
    yield from rivals()


def rivals():
    for suite in data.rivals():
        yield f"### PPO and ROAD on {suite}\n"
        n = {data.size(rows[0]) for k in ("ppo", "road") for rows in read(suite, k).values()}
        again = any(played(suite, k, split) for k in ("ppo", "road") for split in ("eval", "ood"))
        yield f"Before: {', '.join(map(str, n))} episodes; after: with interval, {ends('road', [suite])[1]} episodes" + ", \"same\" those of them that were played before" * again + ". Entropy, weight and"
        yield "agreement: first and last iteration. Steps: ROAD's with its reference's." + (" Weak: the suite is maniskill-repositioning, from a weaker base.\n" if "weak" in suite else "\n")
        first = lambda k, key: f"{100 * last(suite, k, f'charts/{key}', 0).mean():.0f}"
        def same(k, split):
            parts = [e for e in played(suite, k, split).values()]
            many = {data.size(rows[0], split) // len({task for task, _ in parts[0]}) for rows in read(suite, k).values()} if parts else {0}
            first_played = set([*dict.fromkeys(state for _, state in parts[0])][:max(many)]) if parts else ()
            return [f"{100 * np.mean([np.mean([v for (_, state), v in e.items() if state in first_played]) for e in parts]):.0f}" if parts else ""] * again
        yield from table(("algorithm", "seeds", "ID before", *["same"] * again, "ID", "OOD before", *["same"] * again, "OOD", "grasped, OOD before", "grasped, OOD", "entropy", "weight", "agree", "environment steps", "minutes"), [
            (STYLE[k][0], len(read(suite, k)), first(k, "eval_success"), *same(k, "eval"), cell(k, [suite]), first(k, "ood_success"), *same(k, "ood"), cell(k, [suite], "ood"), first(k, "ood_grasped"),
             f"{100 * np.mean([np.mean([*e.values()]) for e in played(suite, k, 'ood', 'grasped').values()] or last(suite, k, 'charts/ood_grasped')):.0f}",
             *(first_last(suite, k, f"losses/{c}", 3) for c in ("entropy", "mean_weight", "critic_agreement")),
             *(f"{x:.0f}" for x in sum(np.mean([spent(rows) for rows in read(suite, a).values()], 0) for a in (["ppo"] if k == "ppo" else ["ppo", "road"]))))
            for k in ("ppo", "road")])
        yield f"![PPO and ROAD on {suite}]({suite}.png)\n"
        for split, where in (("ood", "out of"), ("eval", "in")):
            compare(f"ROAD is above PPO {where} distribution ({suite})", "road", "ppo", [suite], split, whose="ours")


def again():
    """Runs that were made again by the same command: what the rounding of sums alone may change."""
    rows, twice, between, once = [], [], [], {}
    for suite, k in [(s, k) for s in (*SUITES, "two-arm", *SHIFTS) for k in STYLE]:
        for split in ("eval", "ood"):
            if not (other := success(suite, f"{k}-earlier", split)):
                continue
            mine = success(suite, k, split)
            once |= {f"{STYLE[k][0]} (seed {seed})": 0 for seed in sorted(other.keys() - mine.keys())}
            for seed in sorted(mine.keys() & other):
                before, after = 100 * other[seed][0], 100 * mine[seed][0]
                rows.append((suite, STYLE[k][0], seed, {"eval": "in", "ood": "out"}[split], f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"))
                twice.append(after - before)
            between += [100 * abs(mine[a][0] - mine[b][0]) for a in mine for b in mine if a < b]
    if rows:
        yield "Some runs were made a second time, because others start from their checkpoints, which are not kept here, or because no episodes were kept of the first, which paired tests"
        yield "need; the second is what is shown above. Same command, same seed, another processor, which rounds sums differently, most at another commit with the same algorithm"
        yield "(runs.csv). Greedy success at the end: the second is"
        yield f"{np.mean(twice):+.1f} from the first in the mean, {np.mean(np.abs(twice)):.1f} in size ({sum(d > 0 for d in twice)} of {len(twice)} are higher); two seeds of these algorithms are {np.mean(between):.1f} apart.\n"
        yield from table(("suite", "algorithm", "seed", "distribution", "at first", "shown", "difference"), rows)
        if once:
            yield f"What started from a first run and was not made again counts among the first runs alone: {'; '.join(once)}.\n"


def failures():
    if failed := [(r["name"], r["error"].replace("|", "\\|")) for r in runs() if r["error"]]:
        yield from table(("run", "what it said last"), failed)


def runs():
    path = data.FOLDER / "runs.csv"
    return [*csv.DictReader(path.open())] if path.exists() else []


# title, what ./benchmark.sh runs, the text, the figure
SECTIONS = [
    ("Every algorithm at equal environment steps", "algorithms", algorithms, "algorithms.png"), ("VLA-OPD, Figure 2: efficiency", "opd-fig2", opd_fig2, "opd-fig2.png"),
    ("VLA-OPD, Table 2: four suites", "opd-table2", opd_table2, "opd-table2.png"), ("VLA-OPD, Table 3: two arms", "opd-table3", opd_table3, ""),
    ("VLA-OPD, Figure 3: forgetting", "opd-fig3", opd_fig3, "opd-fig3.png"), ("VLA-OPD, Figure 4: objectives", "opd-fig4", opd_fig4, "opd-fig4.png"),
    ("VLA-OPD, Figure 5: group size", "opd-fig5", opd_fig5, "opd-fig5.png"), ("ROAD-VLA, Table 1: seven shifts", "road-table1", road_table1, ""),
    ("ROAD-VLA against PPO, longer", "road-long", road_long, "road-long.png"),
    ("ROAD-VLA, Figure 2: adaptation", "road-fig2", road_fig2, "road-fig2.png"), ("ROAD-VLA, Figure 3: why", "road-fig3", road_fig3, "road-fig3.png"),
    ("ROAD-VLA, Figures 4 to 6: grasps", "road-fig5", road_fig5, "road-fig5.png"),
    ("ROAD-VLA, how strong the distillation is", "road-strength", road_strength, ""), ("ROAD-VLA, where the critic starts", "road-critic", road_critic, ""),
    ("ROAD-VLA, Table 2: ablations", "road-table2", road_table2, ""), ("ROAD-VLA, Table 5: sign of the weight", "road-table5", road_table5, ""),
    ("ROAD-VLA, Figure 7: alpha", "road-alpha", road_alpha, "road-alpha.png"),
    ("ROAD-VLA, Figure 8: reference critics", "road-reference", road_reference, "road-reference.png"), ("ROAD-VLA, D.5: cost", "road-cost", road_cost, ""),
    ("Full size: 7 B on one GPU", "full-size", full_size, ""), ("Shipped checkpoints", "checkpoints", checkpoints, ""), ("Other simulators", "libero", simulators, ""),
    ("The same command, run again", "full --missing", again, ""),
    ("Runs that failed", "full", failures, "")]


def page():
    summary, told, body, measured = [], [], [], []
    for title, what, section, figure in SECTIONS:
        [kept.clear() for kept in (used, claims)]
        lines, command = [*section()], {"libero": "README, LIBERO and ManiSkill", "full-size": "`python results/full_size.py --folder DIR`"}.get(what, f"`./benchmark.sh {what}`")
        if lines:
            origin, link = [r for r in runs() if r["name"] in used], re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
            each, kinds = lambda k: ", ".join(sorted({r[k] for r in origin if r[k]})), ("holds", "does not hold", "not resolvable")
            counted = {whose: [[c[-1].removeprefix(kind) for c in claims if c[0] == whose and c[-1].startswith(kind)] for kind in kinds] for whose in ("paper", "ours")}
            ours = ", ".join(f"{len(c)}" for c in counted["ours"]) if any(counted["ours"]) else ""
            summary.append((f"[{title}](#{link})", command, *(f"{len(c)}" + (f" ({len(c) - c.count('')} of one seed)" if any(c) else "") if c else "" for c in counted["paper"]), ours))
            told += [(title.split(":")[0], *c) for c in claims]
            body += [f"## {title}\n", *lines, *([f"![{title}]({figure})\n"] if figure else [])]
            body += [f"{len(origin)} [runs](runs.csv); commits {each('commit')}.\n"] if origin else []
            measured += [r for r in origin if r not in measured]
        elif section not in (full_size, simulators, again, failures):
            summary.append((title, command, "not run", "", "", ""))
    return "\n".join([
        "# Measured results\n",
        "Every number here comes from the files beside this page; `python results/report.py` writes it, `./benchmark.sh` runs what they hold. The embedded",
        "suites and models of 0.25 M parameters stand for the papers' simulators and 7 B: the papers' numbers beside ours say whether the same thing happens,",
        "not that it is as large.\n",
        "Success is greedy (in ROAD-VLA's paper: sampled at 0.6), in %, on initial states never trained on: mean over the seeds [lowest seed, highest seed], or of a single run [Wilson's 95 %",
        "interval]; averages over suites are of the seeds that every suite has. IQM: the interquartile mean over these and tasks, its interval by a bootstrap of the",
        "seeds within each task (2.5 to 97.5 %: of two or three seeds too narrow for 95 %). The figures' bands are the same as the tables' intervals (objectives, and what is no",
        "success: none of one seed); a curve ends where its shortest seed does. A command gives the same numbers again on the same processor; on another one sums are rounded differently, after which a run",
        "of reinforcement learning can end as far away as another seed's.\n",
        *["A quick run: one seed, 3 to 6 iterations, 5 episodes a task, 16 prompts, SFT of 10 demonstrations a task; texts and labels below say a full run's settings. It shows that "
          "everything runs, not what the algorithms can.\n"] * (data.FOLDER.name == "quick"),
        *table(("what", "command", "claims that hold", "that do not", "not resolvable", "our own: yes, no, open"), summary), "## The papers' claims, here\n",
        "* Higher: p < 0.05, two-sided, p the larger of two tests. Of the episodes: exact sign flips of the differences on the same initial states, each the mean over the seeds,",
        "  where it says paired (of one seed each that is McNemar's test), else two proportions. Of the seeds: Student's t; one run against one has none, so its verdict is on",
        "  those two runs; one against three can show large gaps only. Where a run was made twice, both must lead to it (only for higher and at most 5 lower, of success at the end).",
        "* At most 5 lower: the same, one-sided, at 5 %; p is that of the side found.",
        "* At least: one seed's Wilson interval, around the mean, lies on one side. On every seed: all or none. In most runs: the sign test, at 5 %, as if suites and seeds were",
        "  coins apart.",
        "* Otherwise not resolvable. Not corrected for the number of claims.",
        "* After two values: their difference and its interval (95 %; at most 5 lower: 90 %), as wide as what the weaker of the two tests would find from no difference on. Smaller than",
        "  the paper's: all of the interval is below the difference of the two numbers of the paper with which the claim ends.",
        "* In parentheses our suites; the paper's numbers. Distill is VLA-OPD, exact (in Figure 4: exact reverse KL), where nothing else is said; the paper's estimator is the",
        "  sampled one, which ends lower here.\n",
        *table(("where", "claim", "rule", "measured", "verdict"), [(where, *c) for where, whose, *c in told if whose == "paper"]),
        "## Questions of our own\n", "What neither paper says, or says of another setting, by the same rules.\n",
        *table(("where", "claim", "rule", "measured", "verdict"), [(where, *c) for where, whose, *c in told if whose == "ours"]), *body,
        *["## Machines\n", *(f"* {', '.join(k)}: {sum((r['machine'], r['versions']) == k for r in measured)} runs" for k in sorted({(r["machine"], r["versions"]) for r in measured})), ""] * bool(measured)])


def front():
    """The project's README with the main table in it, between its marks."""
    budget, rows, _ = compared()
    header = "algorithm", "seeds", f"success, % at {budget:.0f} steps of its own, or at its end", "at its end", "environment steps in all", "minutes in all"
    lines = table(header, [(*row[:3], row[4], *row[7:]) for row in rows])
    text = README.read_text()
    for name, lines in ("main table", lines), ("full size", sized()):
        text = re.sub(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", lambda _: "\n" + "\n".join(lines), text)
    return text


if __name__ == "__main__":
    data.FOLDER = Path(next((a for a in sys.argv[1:] if a != "--check"), HERE)).resolve()
    pages = {data.FOLDER / "README.md": page()} | ({README: front()} if data.FOLDER == HERE else {})
    if "--check" in sys.argv:
        wrong = [path for path, text in pages.items() if path.read_text() != text]
        sys.exit(f"{wrong[0]} is not what the files beside it say: run python results/report.py" if wrong else 0)
    figures.draw()
    [path.write_text(text) for path, text in pages.items()]
