"""Jobs of several real processes: started, signalled, and every process of them reaped."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = "reliability.processes"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", PROGRAM]
LAUNCHERS = {"lightning": [sys.executable, "-m", PROGRAM], "torchrun": [sys.executable, "-m", *TORCHRUN]}
TESTS = str(Path(__file__).parent.parent)


class Job:
    """A command whose orphans become this process's children, so that each one's exit code is seen."""

    def __init__(self, command, output, **env):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        self.output = Path(output)
        path = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
        with self.output.open("a") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": path, **env}
            )
        self.pid = self.process.pid

    def ranks(self):
        """Return the processes of the ranks, rank 0 first; none before all have been started."""
        ranks = {}
        for pid in [self.pid, *children(self.pid)]:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                environment = dict(word.split(b"=", 1) for word in words if b"=" in word)
                launched = "torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_text()
                if not launched:
                    ranks[int(environment.get(b"LOCAL_RANK", 0))] = pid
        return [ranks[0], ranks[1]] if len(ranks) == 2 else []

    def wait_for(self, condition, seconds=300):
        """Wait until a condition holds while the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def wait(self, pids, seconds=120):
        """Return the exit codes of the job and of ``pids``, and the seconds until the last of them had left."""
        begun = time.monotonic()
        codes = {self.pid: self.process.wait(seconds)}
        for pid in pids:
            while pid not in codes:
                with contextlib.suppress(ChildProcessError):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[pid] = os.waitstatus_to_exitcode(status)
                if pid not in codes and not Path(f"/proc/{pid}").exists():
                    codes[pid] = None  # its parent has seen its code
                assert time.monotonic() < begun + seconds, f"process {pid} is an orphan: {self.output.read_text()}"
                time.sleep(0.01)
        return codes, time.monotonic() - begun

    def end(self):
        """Kill what is left of the job."""
        for pid in [*children(self.pid), self.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def children(pid):
    """Return the processes that a process has started, of all generations."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(path.parent.name), *children(int(path.parent.name))]
    return found
