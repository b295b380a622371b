"""The figures of a results folder: mean over the seeds, and a band from the lowest to the highest; of one seed, success has its Wilson interval."""
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import data
from data import SHIFTS, STYLE, curve, curves, ends, read, there

matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 250})
STEPS, ITERATION, SUCCESS, ENTROPY = "1000 environment steps", "iteration", "greedy success", "entropy (nats)"
OOD, ALONE = "charts/ood_success", " (one seed)"
LONGER = {"distill-grpo-long": "#0072b2", "distill-grpo-slow": "#d55e00"}
SIZES = {2: "#e69f00", 4: "#cc79a7", 8: "#0072b2"}
OKABE_ITO = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7")


def band(axis, suite, algorithm, key="charts/eval_success", x="steps", label=""):
    lines, (name, colour, line) = curves(suite, algorithm, key, x), STYLE[algorithm]
    if algorithm == "distill-grpo":                      # goes on where distillation ended
        before = curves(suite, "opd-exact", x=x)
        lines = {seed: c + [[before[seed][0][-1]], [0]] for seed, c in lines.items() if seed in before}
    if algorithm == "road-long" and x == "steps":        # its reference's steps are its own
        lines = {seed: c + [[rows[0]["charts/reference_env_steps"]], [0]] for (seed, c), rows in zip(lines.items(), read(suite, algorithm).values())}
    if not lines:
        return
    first, last = max(c[0][0] for c in lines.values()), min(c[0][-1] for c in lines.values())
    grid = np.unique([x for c in lines.values() for x in (*c[0], first, last) if first <= x <= last])
    y = np.array([np.interp(grid, *c) for c in lines.values()])
    low, high = y.min(0), y.max(0)
    if len(y) == 1 and key.endswith("success"):
        (seed, c), = lines.items()
        low, high = (np.interp(grid, c[0], curve(read(suite, algorithm)[seed], key.replace("success", end))[1]) for end in ("low", "high"))
    scale = 1e-3 if x == "steps" else 1
    axis.plot(scale * grid, y.mean(0), color=colour, ls=line, lw=1.3, label=(label or name) + ALONE * (len(y) == 1))
    axis.fill_between(scale * grid, low, high, color=colour, alpha=.18, lw=0)


def entitle(axis, title):
    """Where all lines are of one seed, the title says so, once."""
    lines = [line for line in axis.lines if line.get_label() != "Teacher"]
    if alone := bool(lines) and all(line.get_label().endswith(ALONE) for line in lines):
        [line.set_label(line.get_label().removesuffix(ALONE)) for line in lines]
    axis.set_title(title + ALONE * alone)


def panels(rows, columns, height=2.1, **kw):
    figure = Figure(figsize=(5, .85 * height * rows + .4), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kw)


def save(figure, name, columns=4):
    """One legend below all panels, in fewer columns where the names are long."""
    names = {label for axis in figure.axes for label in axis.get_legend_handles_labels()[1]}
    for axis in figure.axes:                             # what is of one seed here and of more in another panel
        if here := [line for line in axis.lines if line.get_label().removesuffix(ALONE) in names and line.get_label().endswith(ALONE)]:
            [line.set_label(line.get_label().removesuffix(ALONE)) for line in here]
            axis.set_title(f"{axis.get_title()} (one seed: {'; '.join(line.get_label() for line in here)})", fontsize=7)
    found = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    for n in range(columns, 0, -1):
        legend = figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=n, fontsize=7)
        if n == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()
    figure.savefig(data.FOLDER / name)


def grid_of(name, algorithms, suites, columns, legend=4, labels={}):
    """A row of panels a suite; columns: (key, x, y label, x label); labels: where the usual ones do not fit."""
    suites = list(dict.fromkeys(suite for suite, _ in there(algorithms, suites)))
    if not suites:
        return
    figure, axes = panels(len(suites), len(columns), sharex="col", sharey="col")
    for line, suite in zip(axes, suites):
        for axis, (key, x, label, below) in zip(line, columns):
            for k in algorithms:
                band(axis, suite, k, key, x, labels.get(k))
            if key == "charts/eval_success" and "road-long" not in algorithms:
                axis.set_ylim(0, 1)
                for value in ends("teacher", [suite])[0]:
                    axis.axhline(value, color="#000000", ls=":", lw=.8, label="Teacher")
            axis.set(ylabel=label, xlabel=below if suite == suites[-1] else "")
            entitle(axis, f"tabletop-{suite}")
    save(figure, name, legend)


def learning(axis, rows):
    """One run on a simulator: rollouts, and the evaluations with their intervals."""
    axis.plot(*curve(rows, "charts/success_rate", "iteration"), color="#0072b2", lw=1.3, label="training rollouts, sampled")
    x, y, low, high = np.array([(r["step"], *(r[f"charts/eval_{k}"] for k in ("success", "low", "high"))) for r in rows if "charts/eval_success" in r]).T
    axis.errorbar(x, y, [y - low, high - y], color="#d55e00", lw=1.3, marker="o", ms=4, capsize=3, label="greedy, Wilson's 95 %")
    axis.set(xlabel=ITERATION, ylim=(0, 1))
    axis.locator_params(axis="x", integer=True)


def draw():
    eval_ = "charts/eval_success"
    grid_of("algorithms.png", ("grpo", "ppo", "road", "opd-exact", "opd-sampled", "opd-g2", "dagger-fkl", "dagger-ce"), ["object"],
            [(eval_, "steps", SUCCESS, STEPS), ("losses/entropy", "steps", ENTROPY, STEPS)])
    grid_of("opd-fig2.png", ("grpo", "opd-exact", "opd-sampled", "distill-grpo"), ["object", "long"],
            [(eval_, "iteration", SUCCESS, ITERATION), (eval_, "steps", "", STEPS)], 5)
    if families := [family for family in data.objectives() if len(family[2]) > 1]:
        figure, axes = panels(len(families), 2, 1.8, sharex=True, sharey="col")
        for i, (line, (title, suite, names)) in enumerate(zip(axes, families), 1):
            for axis, key, label in zip(line, (eval_, "losses/entropy"), (SUCCESS, ENTROPY)):
                for kind, k in names.items():
                    lines, (name, colour, _) = curves(suite, k, key, "iteration"), STYLE[dict(exact="opd-exact", sampled="opd-sampled", fkl="dagger-fkl", ce="dagger-ce")[kind]]
                    y = np.array([c[1] for c in lines.values()])
                    axis.plot(next(iter(lines.values()))[0], y.mean(0), color=colour, lw=1.3, label=name)
                    axis.fill_between(next(iter(lines.values()))[0], y.min(0), y.max(0), color=colour, alpha=.18, lw=0)
                n = sorted({len(curves(suite, k, key)) for k in names.values()})
                many = f"{n[0]} seed{'s' * (n[0] > 1)}" if len(n) == 1 else f"{n[0]} to {n[-1]} seeds"
                axis.set(title=f"{title.removeprefix('object, ')} ({many})", ylabel=label, xlabel=ITERATION if i == len(families) else "")
            line[0].set_ylim(0, 1)
        save(figure, "opd-fig4.png")
    if longer := [k for _, k in there(("distill-grpo-long", "distill-grpo-slow"), ["object"])]:
        figure, ((left, right),) = panels(1, 2, 2.3, sharex=True, sharey=True)
        for k in longer:
            for x, y in curves("object", k, "charts/success_rate", "iteration").values():
                left.plot(x[4:], np.convolve(y, np.ones(5) / 5, "valid"), color=LONGER[k], lw=1.3)
            band(right, "object", k, eval_, "iteration", STYLE[k][0])
            right.lines[-1].set(color=LONGER[k], ls="-"), right.collections[-1].set_color(LONGER[k])
        for value in ends("teacher", ["object"])[0]:
            right.axhline(value, color="#000000", ls=":", lw=.8, label="Teacher")
        left.set(title="object: sampled, running mean of 5", xlabel=ITERATION, ylabel="success", ylim=(None, 1))
        right.set(title="object: greedy", xlabel=ITERATION)
        save(figure, "opd-table2.png", 3)
    sizes = {estimator: {g: k for g, k in zip((2, 4, 8), (f"{stem}g2", f"{stem}g4", f"opd-{estimator}")) if read("object", k)}
             for estimator, stem in (("exact", "opd-"), ("sampled", "opd-sampled-"))}
    if rows := [row for row in sizes.items() if len(row[1]) > 1]:
        figure, axes = panels(len(rows), 2, sharex="col", sharey=True)
        for line, (estimator, each) in zip(axes, rows):
            for axis, x, below in zip(line, ("iteration", "steps"), (ITERATION, STEPS)):
                for g, k in each.items():
                    band(axis, "object", k, eval_, x, f"G = {g}")
                    axis.lines[-1].set(color=SIZES[g], ls="-"), axis.collections[-1].set_color(SIZES[g])
                for value in ends("teacher", ["object"])[0]:
                    axis.axhline(value, color="#000000", ls=":", lw=.8, label="Teacher")
                axis.set(ylabel=SUCCESS if axis is line[0] else "", xlabel=below if estimator == rows[-1][0] else "", ylim=(None, 1))
                entitle(axis, f"tabletop-object, {estimator}")
        [axis.locator_params(axis="x", integer=True) for axis in axes[:, 0]]
        save(figure, "opd-fig5.png")
    for name, others, own in (("alpha", ("road-alpha-0", "road", "road-alpha-1"), "alpha = 0.5"),
                              ("reference", (*(f"road-reference-{n}" for n in (10, 20, 30)), "road"), "reference of 40 iterations")):
        if len(there(others, ["repositioning"])) > 1:
            grid_of(f"road-{name}.png", others, ["repositioning"],
                    [(OOD, "iteration", "success, OOD", ITERATION), ("losses/critic_agreement", "iteration", "critics agree", ITERATION)], labels={"road": f"ROAD-VLA, {own}"})
    if there(("ppo-long", "road-long"), ["repositioning"]):
        grid_of("road-long.png", ("ppo-long", "road-long"), ["repositioning"],
                [("charts/eval_success", "steps", "success, ID", STEPS), (OOD, "steps", "success, OOD", STEPS)])
    if points := data.forgetting()[0]:
        figure, axes = panels(1, 2, 2.8, sharex=True, sharey=True)
        paths = data.trajectories()
        for axis, i, suite in zip(axes[0], (1, 2), ("goal", "spatial")):
            for k, seeds in points.items():
                if k in paths:
                    start = paths["opd-exact"][-1:, 1:] if k == "distill-grpo" else np.array(points.get("student", np.empty((0, 3))))
                    axis.plot(*np.vstack([start, paths[k][:, 1:]])[:, [0, i]].T, color=STYLE[k][1], ls=STYLE[k][2], lw=.8, marker=".", ms=3)
                axis.scatter(*np.array(seeds)[:, [0, i]].T, s=70 if k == "base" else 28, marker=dict(base="*", student="s").get(k, "o"), label=STYLE[k][0], zorder=3,
                             edgecolors=STYLE[k][1], facecolors="none" if k == "distill-grpo" else STYLE[k][1])
            axis.set(xlabel="seen: success on tabletop-object", ylabel="unseen: success" if i == 1 else "", title=f"unseen: tabletop-{suite}")
        save(figure, "opd-fig3.png", 6)
    if suites := [suite for suite, _ in there(["road"], SHIFTS)]:
        figure, axes = panels(-(-len(suites) // 4), min(4, len(suites)), 1.7, sharex=True, sharey=True)
        for axis, suite in zip(axes.flat, suites):
            for k in ("ppo", "road"):
                band(axis, suite, k, OOD)
            entitle(axis, suite)
        [axis.axis("off") for axis in axes.flat[len(suites):]]
        [axis.tick_params(labelbottom=True) for axis in axes.flat[max(0, len(suites) - 4):len(suites)]]
        axes[-1][len(axes[-1]) // 3].set_xlabel(STEPS), figure.supylabel("success, OOD", fontsize=8)
        save(figure, "road-fig2.png")
        if visual := [suite for suite in suites if suite in data.VISUAL]:
            figure, axes = panels(2, len(visual), 1.7, sharex=True, sharey=True)
            for line, split, label in zip(axes, ("ood", "eval"), ("OOD", "ID")):
                for axis, suite in zip(line, visual):
                    for k in ("ppo", "road"):
                        band(axis, suite, k, f"charts/{split}_grasped")
                    axis.set(ylabel=f"grasped, {label}" if suite == visual[0] else "", xlabel=STEPS if split == "eval" and suite == visual[len(visual) // 2] else "")
                    entitle(axis, suite)
            save(figure, "road-fig5.png")
        figure, axes = panels(1, 3, 2.3)
        for k in ("ppo", "road"):
            band(axes[0][0], "repositioning", k, "losses/entropy", "iteration")
        for i, suite in enumerate(suites):
            for axis, key in zip(axes[0][1:], ("losses/mean_weight", "losses/critic_agreement")):
                lines = [c[1] for c in curves(suite, "road", key, "iteration").values()]
                mean = np.convolve(np.mean([c[:min(map(len, lines))] for c in lines], 0), np.ones(5) / 5, "valid")
                axis.plot(3 + np.arange(len(mean)), mean, color=OKABE_ITO[i], ls="--" if i % 2 else "-", lw=1.1, label=suite)
        for axis, label, title in zip(axes[0], (ENTROPY, "advantage weight", "critics agree"), ("repositioning", *["running mean of 5"] * 2)):
            axis.set(xlabel=ITERATION, ylabel=label, title=title)
        axes[0][1].axhline(0, color="#999999", lw=.6)
        save(figure, "road-fig3.png", 5)
    for suite in data.rivals():
        figure, axes = panels(2, 3, 2.)
        for axis, key, label in zip(axes.flat, (eval_, OOD, "charts/ood_grasped", "losses/entropy", "losses/mean_weight", "losses/critic_agreement"),
                                    ("success, ID", "success, OOD", "grasped, OOD", ENTROPY, "advantage weight",
                                     "critics agree")):
            for k in ("ppo", "road"):
                band(axis, suite, k, key, "iteration")
            axis.set(ylabel=label, xlabel=ITERATION if key.startswith("losses") else "")
            key.startswith("charts") and axis.set_ylim(0, 1)
        figure.suptitle(suite, fontsize=8)
        save(figure, f"{suite}.png")
    for rows in read(data.MINIATURE, "opd-forgot").values():
        figure, ((left, right),) = panels(1, 2, 2.2, sharex=True)
        learning(left, rows)
        for teacher in read(data.MINIATURE, "teacher-policy-demos").values():
            left.axhline(teacher[-1]["charts/eval_success"], color="#999999", ls=":", label="teacher, greedy")
        right.plot(*curve(rows, "losses/reverse_kl_exact", "iteration"), color="#d55e00", lw=1.3)
        left.set(ylabel="success", title=data.MINIATURE), right.set(xlabel=ITERATION, ylabel="reverse KL (nats)", ylim=(0, None))
        save(figure, "libero.png")
    if runs := data.others():
        figure, axes = panels(-(-len(runs) // 3), min(3, len(runs)), 2.1, sharey=True)
        [axis.axis("off") for axis in axes.flat[len(runs):]]
        for axis, (name, rows) in zip(axes.flat, runs.items()):
            learning(axis, rows)
            axis.set_ylabel("success" if axis in axes[:, 0] else "")
            axis.set_title(name.removesuffix("-1").replace("libero-object-nomsaa", "LIBERO").replace("-150-tasks13479", ", 5 tasks").replace("maniskill-two-robot", "ManiSkill").replace("-opd-", ": "), fontsize=7)
        save(figure, "simulators.png")
