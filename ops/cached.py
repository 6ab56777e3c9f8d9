"""Things made once and kept under the cache folder, whoever asks for them and however often: used by libtorch.py, nvrtc.py and python_tests.py."""

import fcntl
import os
import pathlib
import shutil
import sys
import tempfile
import time

LOCK_TIMEOUT_S = 1800


def fail(message):
    sys.exit(f"{pathlib.Path(sys.argv[0]).stem}: {message}")


def cache_folder():
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "phalanx"


def made_once(name, megabytes, make):
    """The folder `name` of the cache, which `make(folder)` fills if it is not there yet.

    It is filled under a temporary name and renamed when complete, so that an interrupted run leaves only rubbish that the next
    one removes. One process makes it; others wait for that one.
    """
    wanted = cache_folder() / name
    if wanted.is_dir():
        return wanted
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        lock = (wanted.parent / f"{name}.lock").open("w")
    except OSError as error:
        fail(f"cannot write {wanted.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written")
    with lock:
        wait_for(lock, wanted)
        if wanted.is_dir():
            return wanted
        for stale in wanted.parent.glob(f".{name}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        require_space(wanted.parent, megabytes)
        require_space(pathlib.Path(tempfile.gettempdir()), megabytes)  # pip unpacks there
        work = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.", dir=wanted.parent))
        try:
            make(work)
            os.chmod(work, 0o755)
            os.rename(work, wanted)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return wanted


def wait_for(lock, wanted):
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                fail(f"another process has been making {wanted} for {LOCK_TIMEOUT_S} s; end it and try again")
            if not told:
                print(f"setup: waiting for another process that makes {wanted}", file=sys.stderr)
                told = True
            time.sleep(0.2)


def require_space(folder, megabytes):
    free = shutil.disk_usage(folder).free // 1_000_000
    if free < megabytes:
        fail(f"{folder} has {free} MB free, {megabytes} MB are needed; make room, or set XDG_CACHE_HOME and TMPDIR to a larger disk")


def point(link, target):
    """Makes `link` a symbolic link to `target`, at once."""
    if link.is_symlink() and os.readlink(link) == str(target):
        return
    if link.exists() and not link.is_symlink():
        fail(f"{link} is in the way: it is no link; move it and try again")
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
