"""Runs what results/README.md shows.  An interrupted run goes on where it was; a finished one is not run again unless its script, its flags, or a run that it
starts from changed.  A run that fails is reported and does not stop the others.

    ./benchmark.sh                            every algorithm, small, one seed, at most half an hour on 2 cores: results/quick/
    ./benchmark.sh full                       every table and figure, 3 seeds of what the papers measured, 1 of what we asked besides: results/
    ./benchmark.sh opd-table2 road-alpha      these alone
    ./benchmark.sh libero --gpus 0,1          a real simulator (libero, maniskill, rl4vla, robotwin)
"""
import argparse, csv, fcntl, json, os, platform, re, shutil, signal, subprocess, sys, time
from importlib.metadata import version
from tqdm import tqdm
from jobs import ROOT, SIMULATORS, TABLES, make_jobs, say

PINS = hasattr(os, "sched_setaffinity")                  # Linux does, macOS does not


def cores():
    return sorted(os.sched_getaffinity(0)) if PINS else list(range(os.cpu_count()))


def record(results, name, **row):
    """Writes to the row of a run in runs.csv, where every run's origin is."""
    path, names = results / "runs.csv", ("name", "commit", "command", "seconds", "versions", "machine", "error")
    results.mkdir(parents=True, exist_ok=True)
    rows = {r["name"]: r for r in csv.DictReader(path.open())} if path.exists() else {}
    rows[name] = rows.get(name, {}) | dict(row, name=name)
    with open(path.with_suffix(".tmp"), "w", newline="") as f:
        table = csv.DictWriter(f, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows.values())
    os.replace(path.with_suffix(".tmp"), path)


def run(jobs, todo, results, slots, gpus, lock):
    """Runs the jobs named in `todo`, `slots` at a time.  Each one's error is left in it."""
    shares = [set(cores()[k::slots] or cores()) for k in range(slots)]                   # a simulator has one environment a core: of its job's share
    threads = str(max(1, len(cores()) // slots))
    base = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    shown = gpus or os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    card = [say("nvidia-smi", "-i", shown[0], "--query-gpu=name", "--format=csv,noheader")] if shown[0] not in ("", "-1") and shutil.which("nvidia-smi") else []
    named = re.search(r"(?m)^model name\s*: (.+)$", open("/proc/cpuinfo").read()) if os.path.exists("/proc/cpuinfo") else None
    origin = dict(machine=", ".join([f"{os.cpu_count()} cores", named[1] if named else platform.machine(), *card]),
                  versions=f"Python {platform.python_version()}, " + ", ".join(f"{k} {version(k)}" for k in ("torch", "transformers", "numpy")))
    running, number, total = {}, len(todo), sum(jobs[k].seconds for k in todo)
    bar = tqdm(total=round(total), smoothing=0, bar_format="{l_bar}{bar}| {postfix[0]} of {postfix[1]} jobs, {elapsed} gone, {remaining} left", postfix=[0, number])

    def close(name, error=""):
        job = jobs[name]
        job.error, note = error, job.note("job.json")
        row = dict(origin, command=f"python {' '.join(job.words)}", commit=note.get("commit", ""), seconds=round(note.get("seconds", 0)))
        if not error:
            job.collect(results)
            (job.folder / "done.json").write_text(json.dumps(row | dict(fingerprint=note["fingerprint"]), indent=1))
        record(results, name, error=error, **({} if error and job.outputs(results)[0].exists() else row))          # an older measurement keeps its origin
        error and bar.write(f"{name}: {error}", file=sys.stderr)

    def follow(name):
        """The next command of a job, if there is one."""
        job, (steps, process, began, gpu, slot) = jobs[name], running[name]
        if process:
            job.keep(seconds=job.note("job.json")["seconds"] + time.time() - began)
            if process.returncode:
                said = re.split(r"[\r\n]+", (job.folder / "stderr.txt").read_text(errors="replace").strip())[-1]
                return running.pop(name) and close(name, said or f"exit status {process.returncode}")
        words = next(steps, None)
        if words is None:
            return running.pop(name) and close(name)
        with open(job.folder / "stdout.txt", "a") as stdout, open(job.folder / "stderr.txt", "w") as stderr:
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=stdout, stderr=stderr, pass_fds=[lock.fileno()],
                                       preexec_fn=lambda: PINS and os.sched_setaffinity(0, shares[slot]), env=base | (dict(CUDA_VISIBLE_DEVICES=gpu) if gpu else {}))
        running[name] = [steps, process, time.time(), gpu, slot]
    try:
        while todo or running:
            for name in [k for k, r in running.items() if r[1].poll() is not None]:
                follow(name)
            for name in list(todo):
                failed = [k for k in jobs[name].needs if jobs[k].error]
                if failed:
                    close(name, f"skipped: it needs {failed[0]}")
                elif len(running) == slots or any(k in todo or k in running for k in jobs[name].needs):
                    continue
                else:
                    *_, used, taken = zip(*running.values()) if running else ([], [])
                    slot = min(set(range(slots)) - set(taken))
                    running[name] = [jobs[name].steps(jobs[name].fingerprint(jobs)), None, 0, min(gpus, key=used.count) if gpus else "", slot]
                    follow(name)
                todo.remove(name)
            left = sum(jobs[k].seconds for k in todo) + sum(jobs[k].seconds * (1 - jobs[k].progress()) for k in running)
            bar.postfix[0] = number - len(todo) - len(running)
            bar.update(round(total - left) - bar.n)
            time.sleep(.2)
    finally:
        bar.close()
        for name, (_, process, began, *_) in running.items():
            process.terminate()
            process.wait()
            jobs[name].keep(seconds=jobs[name].note("job.json")["seconds"] + time.time() - began)


def main():
    tables = list(dict.fromkeys(t[0] for t in TABLES))
    parser = argparse.ArgumentParser(prog="./benchmark.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["quick"], metavar="WHAT", help=f"quick (the default), full, {', '.join((*SIMULATORS, *tables))}")
    parser.add_argument("--jobs", type=int, help="processes side by side (default: one a core, or one a GPU of --gpus)")
    parser.add_argument("--gpus", type=lambda s: s.split(","), default=[], help="0,1: the GPUs to take in turns")
    parser.add_argument("--seeds", type=int, help="seeds 1 to N (default: 3, but 1 of what no table of the papers asks for; quick and simulators 1)")
    parser.add_argument("--missing", action="store_true", help="run only what results/ has no CSV of, and what that needs")
    parser.add_argument("--list", action="store_true", help="say what would run, and what is finished")
    parser.add_argument("--student", default="", help="libero, maniskill, rl4vla, robotwin: the checkpoint to start from, a folder (from the repository) or a hub id; "
                        "maniskill, rl4vla and robotwin have none of their own")
    parser.add_argument("--teacher", default="", help="and the teacher")
    args = parser.parse_args()
    if wrong := [k for k in args.what if k not in ("quick", "full", *SIMULATORS, *tables)]:
        parser.error(f"unknown: {wrong[0]}; there are quick, full, {', '.join((*SIMULATORS, *tables))}")
    alone = [k for k in args.what if k in ("quick", "full", *SIMULATORS)]
    if alone and len(args.what) > 1:
        parser.error(f"{alone[0]} goes alone")
    if min(n for n in (args.jobs, args.seeds, 1) if n is not None) < 1:
        parser.error("--jobs and --seeds must be positive")
    (args.seeds or 1) < 10 or parser.error("--seeds: 9 at most, the pages read one digit")
    simulator = alone and alone[0] in SIMULATORS
    if (args.student or args.teacher) and not simulator:
        parser.error(f"--student and --teacher are for {', '.join(SIMULATORS)}: the tables start from the shipped ones")
    results = ROOT / "results" / ("quick" if args.what == ["quick"] else "")
    jobs = make_jobs(args.what, args.seeds or (1 if simulator or args.what == ["quick"] else None), args.student, args.teacher)
    done = {k for k, job in jobs.items() if job.finished(jobs, results)}
    todo = [k for k, job in jobs.items() if (not job.outputs(results)[0].exists() if args.missing else k not in done)]
    def with_needs(todo):
        for name in reversed(jobs):                      # a need stands before who needs it
            todo += [k for k in jobs[name].needs if name in todo and k not in todo and k not in done]
        return todo
    todo = with_needs(todo)
    while args.missing and (more := [k for k, job in jobs.items() if k not in todo and k not in done and set(job.needs) & set(todo)]):
        todo = with_needs(todo + more)                   # what started from a run that is made again
    todo = [k for k in jobs if k in todo]
    if args.list:
        for name, job in jobs.items():
            begun = job.note("job.json").get("fingerprint") == job.fingerprint(jobs) and f"begun, {100 * job.progress():.0f} %"
            state = "finished" if name in done else (begun or "to run") if name in todo else "finished elsewhere"
            print(f"{name:46} {state:20} {'' if simulator or state.startswith('finished') else f'{job.seconds / 60:5.1f} min'}")
        hours = f": about {sum(jobs[k].seconds for k in todo) / 3600:.1f} hours of one core"
        return print(f"{len(jobs)} jobs, {len(todo)} to run" + hours * (not simulator))  # nobody knows how fast a simulator is here
    (ROOT / "runs").mkdir(exist_ok=True)
    lock = open(ROOT / "runs" / "benchmark.lock", "w")                                   # held by the runs as well, should this process be killed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit("another ./benchmark.sh is running here")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(jobs, list(todo), results, args.jobs or len(args.gpus) or (1 if simulator else len(cores())), args.gpus, lock)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from here")
    wrote = subprocess.run([sys.executable, ROOT / "results" / "report.py", results]).returncode
    failed = [k for k in jobs if jobs[k].error]
    sys.exit(f"{len(failed)} of {len(todo)} jobs failed or were skipped: {', '.join(failed)}" if failed else wrote)


if __name__ == "__main__":
    main()
