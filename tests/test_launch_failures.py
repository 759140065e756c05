"""The launcher when things go wrong: the root cause once, no orphan, nothing in /dev/shm. Tier: CPU ranks."""

import os
import signal
import subprocess
import sys
import time

import pytest

import tp_kernels
from tp_kernels.launch import LaunchError, RankFailure, default_threads, launch, rank_failures
from tp_kernels.testing.tiny_checkpoint import save_tiny_checkpoint

PROGRAM = """\
import os, signal, sys, time
rank, mode, folder = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
open(os.path.join(folder, f"{mode}{rank}"), "w").write(repr((os.getpid(), os.environ["OMP_NUM_THREADS"], sys.argv[3:])))
if mode == "fine":
    sys.exit(0)
while rank == 1 and len([name for name in os.listdir(folder) if name.startswith(mode)]) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.02)  # fail only when every rank has said that it runs
time.sleep(0.1)
if rank == 1:
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "raised":
        raise KeyError("the cause")
    if mode == "exited":
        sys.exit(3)
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def _records(folder, mode, count):
    """What the ranks wrote, once all have."""
    deadline = time.monotonic() + 60
    paths = [folder / f"{mode}{rank}" for rank in range(count)]
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [eval(path.read_text()) for path in paths]


def _ended(pids, within=10.0):
    """Whether all processes are gone (or are zombies of someone else's) before the deadline."""
    deadline = time.monotonic() + within
    while any(map(_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _children(pid):
    """Command lines of the living children of a process, by pid."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{entry}/cmdline") as file:
                command = file.read().replace("\0", " ")
        except OSError:
            continue
        if parent == pid and _alive(entry):
            found[int(entry)] = command
    return found


# --- launch() in this process ---------------------------------------------------------------------------------------


def test_arguments_and_environment_arrive_as_given(program, tmp_path):
    handler, environment = signal.getsignal(signal.SIGINT), dict(os.environ)
    odd = ["${local_rank}", "$$", "--json", "two words", ""]
    launch(2, [str(program), "fine", str(tmp_path), *odd], threads=3)
    for _, threads, words in _records(tmp_path, "fine", 2):
        assert threads == "3" and words == odd
    assert signal.getsignal(signal.SIGINT) is handler and dict(os.environ) == environment


@pytest.mark.parametrize("as_module", [False, True])
def test_a_checkout_in_the_working_directory_does_not_hide_the_package(tmp_path, monkeypatch, as_module):
    (tmp_path / "tp_kernels").mkdir()
    (tmp_path / "tp_kernels" / "__init__.py").write_text("raise ImportError('a checkout that was not built')")
    (tmp_path / "beside.py").write_text("value = 7")
    script = (
        "import beside, pathlib, tp_kernels\npathlib.Path('found').write_text(f'{beside.value} {tp_kernels.__file__}')"
    )
    (tmp_path / "own_program.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    launch(1, ["-m", "own_program"] if as_module else ["own_program.py"], threads=1)
    assert (tmp_path / "found").read_text() == f"7 {tp_kernels.__file__}"


@pytest.mark.parametrize(
    ("mode", "cause"),
    [
        ("killed", "was killed by SIGKILL"),
        ("raised", "failed: KeyError: 'the cause'"),
        ("exited", "exited with status 3"),
    ],
)
def test_the_rank_that_failed_is_named_and_the_others_are_ended(program, tmp_path, capfd, mode, cause):
    with pytest.raises(LaunchError) as caught:
        launch(3, [str(program), mode, str(tmp_path)])
    pids = [record[0] for record in _records(tmp_path, mode, 3)]
    assert str(caught.value) == f"rank 1 (pid {pids[1]}) {cause}; the other 2 ranks were ended"
    assert _ended(pids)
    out, err = capfd.readouterr()
    assert out == err == "", "the error is the caller's to print"
    assert caught.value.is_a("LookupError") == (mode == "raised")


@pytest.mark.parametrize(
    ("nproc", "words", "threads", "message"),
    [
        (0, ["x.py"], None, "ranks must be at least 1, got 0"),
        (2, [], None, "expected a program"),
        (2, ["-m"], None, "expected a program"),
        (2, ["no_such.py"], None, "no such script: no_such.py"),
        (2, ["-m", "os"], 0, "threads per rank must be at least 1, got 0"),
    ],
)
def test_bad_arguments(nproc, words, threads, message):
    with pytest.raises(ValueError, match=message):
        launch(nproc, words, threads=threads)


def test_root_cause_comes_first():
    def failed(rank, kind, at):
        bases = ["PeerDiedError", "CommTimeoutError", "CommError"] if kind == "PeerDiedError" else [kind]
        return RankFailure(rank, 10 + rank, 1, {"type": kind, "bases": bases, "message": "m", "time": at})

    ended, killed = RankFailure(0, 10, -signal.SIGTERM), RankFailure(2, 12, -signal.SIGSEGV)
    follower, program_error = failed(1, "PeerDiedError", 1.0), failed(3, "OSError", 2.0)
    order = rank_failures([ended, follower, program_error, killed])
    assert [failure.rank for failure in order] == [2, 3, 1, 0]
    assert str(LaunchError(order, 4)) == "rank 2 (pid 12) was killed by SIGSEGV; the other 3 ranks were ended"
    assert [f.rank for f in rank_failures([failed(1, "OSError", 5.0), failed(0, "OSError", 4.0)])] == [0, 1]


def test_default_threads_share_the_cores():
    assert default_threads(1) >= 1 and default_threads(10_000) == 1


# --- whole commands -------------------------------------------------------------------------------------------------


def _start(*words, **options):
    # A group of its own, so that whatever a failed test leaves can be ended at once.
    return subprocess.Popen(
        [sys.executable, "-m", "tp_kernels", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_ranks_end_with_their_launcher(program, tmp_path, sent, status):
    # A launcher killed by SIGKILL cannot remove its temporary folder: let it be where pytest will.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = _start("launch", "--nproc", 2, program, "wait", tmp_path, env=environment)
    try:
        pids = [record[0] for record in _records(tmp_path, "wait", 2)]
        process.send_signal(sent)
        _, err = process.communicate(timeout=30)
        assert process.returncode == status
        assert _ended(pids), "a rank outlived its launcher"
        assert "Traceback" not in err or sent == signal.SIGINT  # the ranks' own KeyboardInterrupt
    finally:
        process.kill()


@pytest.mark.timeout(120)
def test_a_killed_rank_ends_a_generation(tmp_path):
    model = save_tiny_checkpoint(tmp_path / "model")
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    words = ["--prompt", "Hello", "--tp", 3, "--max-new-tokens", 500_000, "--threads", 1]
    process = _start("generate", "--model", model, *words)
    try:
        process.stdout.read(20)  # text comes: all three ranks are in the middle of it
        ranks = [pid for pid, command in _children(process.pid).items() if "generate_rank" in command]
        assert len(ranks) == 3, _children(process.pid)
        victim = sorted(ranks)[1]
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 1
        assert f"(pid {victim}) was killed by SIGKILL; the other 2 ranks were ended" in err
        assert err.count("SIGKILL") == 1 and "Traceback" not in err, err
        assert _ended(ranks)
        if os.path.isdir("/dev/shm"):
            assert not [name for name in set(os.listdir("/dev/shm")) - before if "tp" in name]
    finally:
        process.kill()
