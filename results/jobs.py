"""What the benchmark runs: the list of all jobs, and what a job is.  bench.py runs them."""
import ast, csv, hashlib, json, os, re, shutil, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITES, SIMULATORS = ("object", "long", "spatial", "goal"), ("libero", "maniskill", "rl4vla", "robotwin")
SHIFTS = ("repositioning", "unseen-table", "dynamic-texture", "dynamic-noise", "multi-object", "multi-receptacle", "init-pose")
# {other}: the run directory of that algorithm on the same suite with the same seed, which is run first; {suite/other}: on another suite.
ALGORITHMS = {
    "opd-exact": "vla_opd.py --eval-every 1", "opd-sampled": "vla_opd.py --eval-every 1 --estimator sampled",
    "opd-rollout-reward": "vla_opd.py --eval-every 1 --estimator sampled --reward rollout",
    "opd-g2": "vla_opd.py --eval-every 1 --group-size 2", "opd-g4": "vla_opd.py --eval-every 1 --group-size 4",
    **{f"opd-sampled-g{g}": f"vla_opd.py --eval-every 1 --estimator sampled --group-size {g}" for g in (2, 4)},
    "dagger-fkl": "dagger_forward_kl.py --eval-every 1",
    "fkl-fine": "dagger_forward_kl.py --eval-every 1 --batch-prompts 8 --updates-per-rollout 2 --num-iterations 16",
    "dagger-ce": "dagger_hard_ce.py --eval-every 1",
    "grpo": "grpo.py --eval-every 1", "distill-grpo": "grpo.py --eval-every 1 --num-iterations 6 --student {opd-exact}/checkpoint",
    "distill-grpo-long": "grpo.py --eval-every 5 --num-iterations 30 --student {opd-exact}/checkpoint",
    "distill-grpo-slow": "grpo.py --eval-every 10 --num-iterations 120 --learning-rate 1e-4 --student {opd-exact}/checkpoint",
    # Plain fine-tuning: the teacher's recipe (sft.py) without the disturbances, from the student as all others.
    "sft-many": "sft.py --student checkpoints/{env}-student --demos-per-task 50 --num-iterations 4 --learning-rate 5e-4 --batch-size 32 --eval-every 1",
    "ppo": "ppo.py --eval-every 10 --entropy-coefficient 0.01", "ppo-long": "ppo.py --eval-every 20 --entropy-coefficient 0.01 --num-iterations 200",
    "road": "road_vla.py --eval-every 10 --reference {ppo}", "road-long": "road_vla.py --eval-every 20 --reference {ppo} --num-iterations 160",
    "road-warm": "road_vla.py --eval-every 10 --reference {ppo} --warm-critic",
    "road-even": "road_vla.py --eval-every 10 --reference {ppo} --distill-coefficient 90",
    "road-alone": "road_vla.py --eval-every 10 --reference {ppo} --distill-coefficient 90 --no-ppo-term --entropy-coefficient 0",
    "road-jsd": "road_vla.py --eval-every 10 --reference {ppo} --divergence jsd",
    "road-no-gate": "road_vla.py --eval-every 10 --reference {ppo} --no-gate", "road-positive": "road_vla.py --eval-every 10 --reference {ppo} --positive-only",
    "road-alpha-0": "road_vla.py --eval-every 10 --reference {ppo} --alpha 0", "road-alpha-1": "road_vla.py --eval-every 10 --reference {ppo} --alpha 1",
    **{f"ppo-at-{n}": f"ppo.py --eval-every 10 --entropy-coefficient 0.01 --num-iterations {n}" for n in (10, 20, 30)},
    **{f"road-reference-{n}": f"road_vla.py --eval-every 10 --reference {{ppo-at-{n}}}" for n in (10, 20, 30)},
    **{f"text-{kind}": f"road_vla_text.py --eval-every 10 --privileged-info {kind}" for kind in ("rel-spatial", "plan-rel-spatial", "mcts")},
    # The shipped teacher's own recipe, for what it costs.
    "make-teacher": "sft.py --student checkpoints/tabletop-base --demos-per-task 60 --fresh-demos --num-iterations 4 --learning-rate 5e-4 --batch-size 32 "
                    "--demo-noise .7 --eval-every 2",
    # A teacher with labels as the paper's: undisturbed demonstrations, each label one bin.
    "plain-teacher": "sft.py --student checkpoints/tabletop-base --demos-per-task 60 --fresh-demos --num-iterations 4 --learning-rate 5e-4 --batch-size 32 "
                     "--smoothing 0 --eval-every 4",
    **{f"plain-{k}": f"{flags} --eval-every 1 --teacher {{plain-teacher}}/checkpoint" for k, flags in
       {"exact": "vla_opd.py", "sampled": "vla_opd.py --estimator sampled", "fkl": "dagger_forward_kl.py", "ce": "dagger_hard_ce.py"}.items()},
    # And a student as the paper's on LIBERO: one demonstration a task, each label one bin.
    "sharp-student": "sft.py --student checkpoints/tabletop-base --demos-per-task 1 --num-iterations 20 --learning-rate 1.5e-3 --batch-size 32 --smoothing 0 --eval-every 20",
    **{f"sharp-{k}": f"{flags} --eval-every 1 --student {{sharp-student}}/checkpoint --teacher {{plain-teacher}}/checkpoint" for k, flags in
       {"exact": "vla_opd.py", "sampled": "vla_opd.py --estimator sampled", "fkl": "dagger_forward_kl.py", "ce": "dagger_hard_ce.py"}.items()},
    "base": "evaluate.py --checkpoint checkpoints/tabletop-base", "student": "evaluate.py --checkpoint checkpoints/{env}-student",
    "teacher": "evaluate.py --checkpoint checkpoints/{env}-teacher", **{f"forget-{k}": f"evaluate.py --checkpoint checkpoints/tabletop-object-{k}" for k in ("student", "teacher")},
    **{f"forget-{k}": f"evaluate.py --checkpoint {{object/{k}}}/checkpoint" for k in ("sft-many", "grpo", "opd-exact", "distill-grpo")},
    **{f"all-states-{k}": f"evaluate.py --checkpoint {{{k}}}/checkpoint --episodes-per-task 100" for k in ("opd-exact", "distill-grpo-slow")},
    "cost": "../results/cost.py", "gradients": "../results/gradients.py", "entropy": "../results/teacher.py",
    "forgetting": "../results/forgetting.py"}
TABLES = [                                               # table or figure, suites, algorithms, in the order of `full`, after seed and tabletop-object
    ("opd-table2", SUITES, "student teacher opd-exact grpo distill-grpo sft-many opd-sampled"), ("opd-table2", ("object",), "distill-grpo-long distill-grpo-slow all-states-opd-exact all-states-distill-grpo-slow"),
    ("opd-fig2", ("object", "long"), "student teacher opd-exact grpo opd-sampled distill-grpo"),
    ("opd-fig4", ("object", "two-arm"), "opd-exact opd-sampled dagger-fkl dagger-ce"), ("opd-fig4", ("",), "entropy"),
    ("opd-fig4", ("object",), "plain-exact plain-sampled plain-fkl plain-ce fkl-fine sharp-exact sharp-sampled sharp-fkl sharp-ce"),
    ("opd-fig5", ("object",), "opd-exact opd-g2 opd-g4 opd-sampled opd-sampled-g2 opd-sampled-g4"),
    ("opd-fig2", ("long",), "make-teacher"),
    ("algorithms", ("object",), "student teacher opd-exact opd-sampled opd-g2 opd-g4 dagger-fkl dagger-ce grpo distill-grpo ppo road opd-rollout-reward make-teacher distill-grpo-slow"),
    ("opd-table3", ("two-arm",), "student teacher opd-exact opd-sampled grpo distill-grpo"),
    ("opd-fig3", ("",), "forgetting"), ("opd-fig3", ("object", "goal", "spatial"), "base"), ("opd-fig3", ("object",), "student teacher"),
    ("opd-fig3", ("goal", "spatial"), "forget-student forget-teacher forget-sft-many forget-grpo forget-opd-exact forget-distill-grpo"),
    *[(table, SHIFTS, "student ppo road") for table in ("road-table1", "road-fig2", "road-fig3", "road-fig5")],
    ("road-table2", ("repositioning",), "ppo road road-jsd road-no-gate text-rel-spatial text-plan-rel-spatial text-mcts"),
    ("road-table5", ("multi-object",), "ppo road road-positive"),
    ("road-alpha", ("repositioning",), "road-alpha-0 road road-alpha-1"),
    ("road-reference", ("repositioning",), "road-reference-10 road-reference-20 road-reference-30 road"),
    ("road-cost", ("",), "cost"), ("road-critic", ("repositioning",), "ppo road road-warm"),
    ("road-strength", ("repositioning",), "ppo road road-even road-alone"), ("road-strength", ("",), "gradients"),
    ("road-long", ("repositioning",), "ppo road ppo-long road-long"),
    ("checkpoints", (*SUITES, *SHIFTS), "base"), ("checkpoints", (*SUITES, *SHIFTS, "two-arm"), "student teacher")]
# What no table of the papers asks for: one seed, unless --seeds says how many.
ONCE = [k for k in ALGORITHMS if k.startswith(("plain-", "sharp-", "all-states-", "distill-grpo-"))]
ONCE += "fkl-fine opd-rollout-reward make-teacher ppo-long road-long road-warm road-even road-alone".split()
QUICK = [("quick", ("object",), "student teacher opd-exact grpo opd-sampled opd-g2 dagger-fkl dagger-ce distill-grpo sft-many ppo road"),
         ("quick", SUITES[1:] + ("two-arm",), "student teacher opd-exact grpo"), ("quick", SHIFTS, "ppo road"), ("quick", ("repositioning",), "text-rel-spatial")]
SMALL = dict.fromkeys(("vla_opd", "dagger_forward_kl", "dagger_hard_ce"), "--num-iterations 4 --batch-prompts 16 --eval-episodes-per-task 5")
SMALL |= dict.fromkeys(("ppo", "road_vla", "road_vla_text"), "--num-iterations 6 --eval-every 3 --eval-episodes-per-task 5")
SMALL |= dict(grpo="--num-iterations 3 --batch-prompts 16 --eval-episodes-per-task 5", evaluate="--episodes-per-task 5",
              sft="--demos-per-task 10 --num-iterations 2 --eval-episodes-per-task 5")
# What a real simulator runs; robotwin with the ablation of objectives.
REAL = dict(libero="opd-exact grpo", rl4vla="ppo road", maniskill="ppo road", robotwin="opd-exact opd-sampled dagger-fkl dagger-ce grpo")
DISTILS = ("vla_opd", "dagger_forward_kl", "dagger_hard_ce")
# What a 7B model needs (the torchrun lines of the scripts; PPO's gradient clipping is ROAD-VLA's).
BIG = dict.fromkeys((*DISTILS, "grpo", "ppo", "road_vla"), "--lora-rank 32 --dtype bfloat16 --adam-eps 1e-8 --micro-batch-size 8 --query-batch-size 32 --num-envs 64")
BIG |= {k: f"{BIG[k]} --group-size 2 --learning-rate 1e-4 --temperature 1.6" for k in DISTILS}
BIG |= dict(evaluate="--dtype bfloat16 --query-batch-size 32 --num-envs 64",
            grpo=f"{BIG['grpo']} --learning-rate 1e-4 --temperature 1.6 --updates-per-rollout 4")
BIG |= {k: f"{BIG[k]} --learning-rate 1e-4 --updates-per-rollout 32" for k in ("ppo", "road_vla")}
# Iterations by default and seconds of one core for each; suites whose episodes are longer: what the time left starts from.
COST = dict(vla_opd=(10, 30), dagger_forward_kl=(10, 30), dagger_hard_ce=(10, 30), grpo=(10, 50), ppo=(40, 6), road_vla=(40, 8), road_vla_text=(40, 9), sft=(30, 45),
            forgetting=(1, 1500))
LONG = ("tabletop-long", "tabletop-two-arm")


def say(*words):
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()


@dataclass
class Job:
    name: str
    env: str
    words: list                                          # the script and its flags
    play: list                                           # flags of its evaluation
    folder: Path                                         # where it runs
    needs: list
    splits: tuple                                        # what it is evaluated on
    error: str = ""

    @property
    def script(self):
        return Path(self.words[0]).stem

    @property
    def iterations(self):
        return int(dict(zip(self.words, self.words[1:])).get("--num-iterations", COST.get(self.script, (1,))[0]))      # the last one counts

    @property
    def seconds(self):
        return 30 * max(1, len(self.splits)) + self.iterations * COST.get(self.script, (1, 0))[1] * (.25 if "16" in self.words else 1) * (2.5 if self.env in LONG else 1)

    def outputs(self, results):
        """results/NAME.csv of a training, results/episodes/NAME.csv of every evaluation, the file that a script in results/ writes."""
        episodes = [results / "episodes" / f"{self.name}{'' if split == 'eval' else '-ood'}.csv" for split in self.splits]
        own = [] if self.script == "evaluate" else [results / f"{self.name}.csv"] if self.splits else [results / f"{self.script}.json"]
        return own + episodes

    def note(self, name):
        return json.loads((self.folder / name).read_text()) if (self.folder / name).exists() else {}

    def fingerprint(self, jobs):
        sources = [self.words[0], *(() if self.splits else (f"algos/{k}.py" for k in ("ppo", "road_vla", "vla_opd", "grpo", "sft")))]        # what results/ measures
        code = "\n".join(ast.unparse(ast.parse((ROOT / k).read_text())) for k in sources)                                    # a comment changes nothing
        return hashlib.sha256(json.dumps([code, self.words, self.play, *(jobs[k].fingerprint(jobs) for k in self.needs)]).encode()).hexdigest()[:16]

    def finished(self, jobs, results):
        whole = self.note("done.json").get("fingerprint") == self.fingerprint(jobs) and all(path.exists() for path in self.outputs(results))
        trained = whole and self.splits and self.script != "evaluate"                    # and git has not brought another machine's back since
        return whole and (not trained or (results / f"{self.name}.csv").read_bytes() == (self.folder / "metrics.csv").read_bytes())

    def progress(self):
        """The part that is done, from the rows of metrics.csv: header, before training, one an iteration."""
        path = self.folder / "metrics.csv"
        return .9 * min(1, max(0, path.read_text().count("\n") - 2) / self.iterations) if path.exists() else 0        # the rest is evaluation

    def keep(self, **what):
        (self.folder / "job.json").write_text(json.dumps(self.note("job.json") | what))

    def steps(self, stamp):
        """The commands, one after the other: the training, its evaluations."""
        saved = any((self.folder / k).exists() for k in ("checkpoint", "checkpoint.old"))
        go_on = self.note("job.json").get("fingerprint") == stamp and saved
        if not go_on:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "done.json").unlink(missing_ok=True)
        changed = "-dirty" * bool(say("git", "status", "--porcelain", "algos", "envs", "checkpoints"))
        self.keep(fingerprint=stamp, commit=(say("git", "rev-parse", "--short", "HEAD") or "unknown") + changed, seconds=self.note("job.json").get("seconds", 0))
        folder = self.folder.relative_to(ROOT)
        if self.script != "evaluate":
            yield self.words + (["--run-dir", f"{folder}"] + ["--resume"] * go_on if self.splits else [])
        for split in self.splits:
            script, *flags = self.words if self.script == "evaluate" else ["algos/evaluate.py", "--env", self.env, "--checkpoint", f"{folder}/checkpoint"]
            yield [script, *self.play, *flags, "--split", split, "--run-dir", f"{folder}/{split}"]           # of a flag twice the last one counts

    def collect(self, results):
        (results / "episodes").mkdir(parents=True, exist_ok=True)
        if self.script != "evaluate" and self.splits:
            shutil.copy(self.folder / "metrics.csv", results / f"{self.name}.csv")
        for split, path in zip(self.splits, self.outputs(results)[-len(self.splits):]):
            with open(self.folder / split / "episodes.csv") as f, open(path, "w", newline="") as out:      # what paired tests need
                table = csv.DictWriter(out, ["task", "init_state", "success", "grasped"], extrasaction="ignore", lineterminator="\n")
                table.writeheader()
                table.writerows(row for row in csv.DictReader(f) if row["mode"] == "greedy")


def make_jobs(what, seeds=None, student="", teacher=""):
    """{name: Job}, in the order to run in, each behind those that it needs.  seeds: 3 by default, and one of ONCE."""
    quick, kind, jobs = what == ["quick"], next((k for k in what if k in SIMULATORS), "tabletop"), {}
    tables = QUICK if quick else [t for t in TABLES if t[0] in what or "full" in what]
    sizes, runs = SMALL if quick else BIG if kind not in ("tabletop", "maniskill") else {}, "quick" if quick else "bench"
    if kind != "tabletop":
        sys.path.insert(0, str(ROOT))
        import envs
        names = [k for k in envs.SUITES.get(kind, ("", ()))[1] if k != "main"]
        tables = [(kind, names, REAL[kind])]
        envs.make(f"{kind}-{(names or ['?'])[0]}", 1).close()                            # says here, in one sentence, if the simulator is missing

    def add(suite, algorithm, seed):
        env, (script, *flags), needs = f"{kind}-{suite}", ALGORITHMS[algorithm].replace("{env}", f"{kind}-{suite}").split(), []
        stem, seeded = Path(script).stem, not script.startswith("..") and (script != "evaluate.py" or "{" in ALGORITHMS[algorithm].replace("{env}", ""))
        name = f"{env}-{algorithm}" + f"-{seed}" * seeded if suite else algorithm
        if name in jobs:
            return name

        def directory(match):
            other, _, algorithm = match[1].rpartition("/")
            needs.append(add(other or suite, algorithm, seed))
            return f"runs/{runs}/{needs[-1]}"
        words = [os.path.normpath(f"algos/{script}")] + (["--env", env] if suite else []) + (["--seed", str(seed)] if seeded and stem != "evaluate" else [])
        words += [re.sub("{(.+?)}", directory, flag) for flag in flags]
        if suite and stem != "evaluate":
            words += sizes.get(stem, "").split() + ["--student", student] * bool(student) + ["--teacher", teacher] * (bool(teacher) and stem in DISTILS)
        splits = () if not suite else ("eval", "ood") if suite in SHIFTS else ("eval",)
        episodes = "100" if kind in ("rl4vla", "robotwin") else "20"                     # these have one task
        jobs[name] = Job(name, env, words, ["--episodes-per-task", episodes, *sizes.get("evaluate", "").split()], ROOT / "runs" / runs / name, needs, splits)
        return name
    for seed in range(1, (seeds or 3) + 1):
        for first in (True, False):                      # tabletop-object first
            for _, suites, algorithms in tables:
                [add(suite, k, seed) for suite in suites if (suite == "object") == first for k in algorithms.split() if seeds or seed == 1 or k not in ONCE]
    return jobs
