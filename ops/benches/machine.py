"""The machine under measurement: waiting until it is idle, running a command on chosen cores, and who else used them meanwhile."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

RUN_TIMEOUT_S = 900
IDLE_WINDOW_S = 0.5


class Failed(Exception):
    """A measured command failed; the text says how."""


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def busy_s():
    """CPU seconds that the whole machine has used since it started, or that its host kept from it."""
    with open("/proc/stat") as f:
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) for x in f.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_s():
    """CPU seconds of this process and of all that it started and that ended."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def wait_until_idle(limit_cores, timeout_s):
    """Returns how many cores others use: below the limit, or what it was when the time was up."""
    deadline = time.monotonic() + timeout_s
    while True:
        busy, own = busy_s(), own_s()
        time.sleep(IDLE_WINDOW_S)
        foreign = (busy_s() - busy - (own_s() - own)) / IDLE_WINDOW_S
        if foreign < limit_cores or time.monotonic() > deadline:
            return foreign


def descendants(pid):
    """The processes below `pid`, as (pid, name)."""
    children = {}
    names = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as f:
                head, tail = f.read().rsplit(")", 1)
        except OSError:
            continue  # it ended
        names[int(entry)] = head.split("(", 1)[1]
        children.setdefault(int(tail.split()[1]), []).append(int(entry))
    found, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            found.append((child, names[child]))
            queue.append(child)
    return found


def peak_rss_mb(pid):
    try:
        with open(f"/proc/{pid}/status") as f:
            kib = next((int(line.split()[1]) for line in f if line.startswith("VmHWM:")), 0)
    except OSError:
        kib = 0
    return kib / 1024


def run(command, env=None, watch=None):
    """Runs a command to its end. Returns its standard output and how many cores others used meanwhile.

    `watch(process)` is called every few milliseconds while it runs.
    """
    busy, own, start = busy_s(), own_s(), time.monotonic()
    full = dict(os.environ, **(env or {}), BENCH_T0=repr(time.time()))
    # A session of its own: on a time-out the whole group is ended.
    process = subprocess.Popen(command, env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while watch and process.poll() is None and time.monotonic() - start < RUN_TIMEOUT_S:
            watch(process)
            time.sleep(0.005)
        out, err = process.communicate(timeout=max(1.0, RUN_TIMEOUT_S - (time.monotonic() - start)))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    wall = time.monotonic() - start
    foreign = (busy_s() - busy - (own_s() - own)) / wall
    if process.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{(err or out)[-2000:]}")
    return out, foreign


def last_json(out):
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if not lines:
        raise Failed(f"no JSON line in the output:\n{out[-1000:]}")
    return json.loads(lines[-1])


def fact(name):
    """What /proc/cpuinfo says of the first processor."""
    with open("/proc/cpuinfo") as f:
        return next((line.split(":", 1)[1].strip() for line in f if line.split(":", 1)[0].strip() == name), "unknown")


def processor():
    """Family and model: processors of one name can differ twofold in speed."""
    return fact("cpu family"), fact("model")


def description():
    """What the figures depend on, in a few lines."""
    family, model = processor()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return f"{fact('model name')} (family {family}, model {model}), {len(os.sched_getaffinity(0))} cores used; commit {commit}"
