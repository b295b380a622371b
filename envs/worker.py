"""Simulators in processes of their own."""
import contextlib, os, socket, subprocess, sys, tempfile
from multiprocessing.connection import Connection
from pathlib import Path


def cores():
    """How many simulators run side by side: one a core, torchrun's processes share them."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return max(1, len(mine) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Worker:
    """A process.  It gets the number of its end of a pipe, then `words`; its log is what it prints to stderr."""

    def __init__(self, program, words, cwd, environment):
        mine, its = socket.socketpair()
        self.log, self.pipe = tempfile.TemporaryFile(), Connection(mine.detach())
        self.process = subprocess.Popen([*program, str(its.fileno()), *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.log,
                                        pass_fds=[its.fileno()], cwd=cwd, env=os.environ | environment, start_new_session=True)     # Ctrl-C is the parent's
        its.close()

    def send(self, *request):
        with contextlib.suppress(OSError):               # receive() will tell
            self.pipe.send(request)

    def receive(self, timeout):
        """Its answer; an exception, or a text that says what went wrong, is raised."""
        if not self.pipe.poll(timeout):
            raise TimeoutError(f"no answer for {timeout} s")
        if isinstance(answer := self.pipe.recv(), (BaseException, str)):
            raise RuntimeError(answer) if isinstance(answer, str) else answer
        return answer

    def kill(self):
        """Returns what it complained of last."""
        self.process.kill(), self.process.wait(), self.process.stdin.close(), self.pipe.close(), self.log.seek(0)
        return (self.log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def start(module, words, cwd):
    """A worker that runs a module of ours, on one core (so does Mesa)."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    one = {k: os.environ.get(k, v) for k, v in dict(OMP_NUM_THREADS="1", LP_NUM_THREADS="0").items()}
    return Worker([sys.executable, "-m", module], words, cwd, one | dict(PYTHONPATH=path))


class Failed(SystemExit):
    """Whatever process tries it: this request cannot be answered."""


class Replayed:
    """A worker of a deterministic simulator.  One that dies, hangs or fails is replaced, and the new one replays the episode: nothing is lost, no script needs to
    know, and stderr tells."""

    def __init__(self, name, start, timeout, **more):
        """start: makes a Worker, which happens with the first question.  timeout: seconds for an answer, some kinds of requests have so many more."""
        self.name, self.start, self.timeout, self.more, self.worker, self.asked, self.episode, self.restarts = name, start, timeout, more, None, None, [], 0

    def ask(self, *request):
        self.worker = self.worker or self.start()
        if self.asked:                                   # an exception came between a question and its answer
            self.worker.kill()
            if self.asked[0] == "reset" != request[0]:
                raise RuntimeError(f"{self.name}: its last reset was interrupted: reset it again")
        if request[0] == "reset":
            self.episode = []
        self.asked = request
        self.worker.send(*request)

    def answer(self, replay=None):
        """The answer, whatever happens to the worker.  replay: what to tell a new one in this request's place (None: it changes nothing)."""
        for attempt in range(3):
            try:
                if attempt:
                    for request in self.episode:
                        self.worker.send(*request)
                        self._receive(request)
                    self.worker.send(*self.asked)
                answer = self._receive(self.asked)
                break
            except (EOFError, OSError, RuntimeError, FloatingPointError) as e:
                error = f"{str(e) or 'it died'}; its last words: {self.worker.kill()}"
                self.worker, self.restarts = self.start(), self.restarts + 1
                print(f"{self.name} failed ({error}); a new one replays its episode", file=sys.stderr, flush=True)
        else:
            self.asked = None
            raise Failed(f"{self.name}: three workers in a row failed at the same place ({error})")
        self.asked, self.episode = None, self.episode + [replay] * bool(replay)
        return answer

    def _receive(self, request):
        return self.worker.receive(self.timeout + self.more.get(request[0], 0))

    def kill(self):
        self.worker and self.worker.kill()
