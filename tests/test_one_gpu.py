"""Ranks on one GPU: their environment, the MPS daemon's life, the launcher and the tests' ranks.

Tier: CPU ranks, with a script in the place of nvidia-cuda-mps-control.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest
import torch

from tp_kernels import mps, one_gpu
from tp_kernels.launch import LaunchError, launch
from tp_kernels.mps import MpsDaemon
from tp_kernels.one_gpu import SharedGpu, max_blocks, pick_device, rank_environment, shared_environment
from tp_kernels.testing.one_gpu_ranks import OneGpuRanks
from tp_kernels.testing.rank_pool import RankFailedError

# Behaves as FAKE_MPS says, and writes what it was told to $FAKE_MPS_LOG.
FAKE = """\
#!{python} -IS
import os, signal, sys, time
pipe, mode = os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.environ.get("FAKE_MPS", "fine")
pid_file = os.path.join(pipe, "nvidia-cuda-mps-control.pid")
def log(text):
    with open(os.environ["FAKE_MPS_LOG"], "a") as file:
        file.write(text + "\\n")
if sys.argv[1:] == ["-d"]:
    log(f"start device={{os.environ['CUDA_VISIBLE_DEVICES']}} mode={{os.stat(pipe).st_mode & 0o777:o}}")
    if mode == "refuses":
        print("the GPU is held by\\nsomeone else")
        sys.exit(1)
    if mode == "hangs":
        time.sleep(600)
    if os.fork():
        os._exit(0)
    os.setsid()
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.3)  # it listens only some time after -d has returned
    if os.fork() == 0:
        time.sleep(600)  # the server, which -d's process starts for its clients
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    while not os.path.exists(os.path.join(pipe, "quit")):
        time.sleep(0.02)
    if mode in ("stubborn", "deaf"):
        time.sleep(600)
    os.remove(pid_file)
    os.killpg(0, signal.SIGKILL)
for command in sys.stdin.read().split("\\n"):
    if command:
        log(command)
    if mode == "mute":
        time.sleep(600)
    if not os.path.exists(pid_file):
        print("Cannot find MPS control daemon process")
        sys.exit(1)
    if command == "quit":
        open(os.path.join(pipe, "quit"), "w").close()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts the script on PATH; ``fake()`` is what it was told so far, line by line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / mps.CONTROL
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(0o755)
    log = tmp_path / "log"
    # Not under tmp_path, which is too long for the daemon's sockets.
    temporary = tempfile.mkdtemp(prefix="tpk_one_gpu_", dir="/tmp")
    (tmp_path / "t").symlink_to(temporary)
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_VISIBLE_DEVICES", "TP_KERNELS_MPS", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_MPS_LOG", str(log))
    monkeypatch.setenv("TMPDIR", temporary)
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    monkeypatch.setattr(mps, "_DEFAULT_PIPE_DIRECTORY", str(tmp_path / "no_daemon"))
    # This machine has no driver for a client to look through; a machine that has one must not answer for the script.
    monkeypatch.setattr(one_gpu, "sms_seen_by_a_client", lambda environment: None)
    yield lambda: log.read_text().splitlines() if log.exists() else []
    for pid in _fakes(tmp_path, keeper=True):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(temporary)


def _fakes(tmp_path, keeper=False):
    """Pids of the script's processes: daemon and server; with ``keeper`` also of what was told to start them."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                command = file.read()
            with open(f"/proc/{entry}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        script = bytes(tmp_path / "bin" / mps.CONTROL)
        if state not in "ZX" and script in (command if keeper else command.split(b"\0")):
            found.append(int(entry))
    return found


def _nothing_left(tmp_path, within=10.0):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not _fakes(tmp_path, keeper=True) and not [name for name in os.listdir(tmp_path / "t") if "_mps_" in name]:
            return True
        time.sleep(0.05)
    return False


# --- pure functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [(None, 0, "0"), (None, 3, "3"), ("2,5", 1, "5"), (" 4 ", 0, "4"), ("GPU-a,GPU-b", 1, "GPU-b"), ("1,-1,2", 0, "1")],
)
def test_the_gpu_is_one_of_the_visible(visible, index, expected):
    assert pick_device(visible, index) == expected


@pytest.mark.parametrize(("visible", "index"), [("", 0), ("-1", 0), ("2,5", 2), ("1,-1,2", 1), (None, -1)])
def test_a_gpu_that_is_not_visible_is_refused(visible, index):
    with pytest.raises(ValueError, match="GPU"):
        pick_device(visible, index)


def test_environment_of_the_ranks():
    with_mps = shared_environment(4, "0", {"CUDA_MPS_PIPE_DIRECTORY": "/p"}, {})
    assert with_mps == {
        "TP_KERNELS_ONE_GPU": "4",
        "TP_KERNELS_ONE_GPU_MPS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "CUDA_MPS_PIPE_DIRECTORY": "/p",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    without = shared_environment(3, "GPU-a", None, {"NCCL_SOCKET_IFNAME": "eth1"})
    assert without["TP_KERNELS_ONE_GPU_MPS"] == "0" and not [name for name in without if name.startswith("CUDA_MPS")]
    assert without["NCCL_SOCKET_IFNAME"] == "eth1" and without["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert len({rank_environment(rank, without)["NCCL_HOSTID"] for rank in range(3)}) == 3
    assert rank_environment(1, {}) == {}


def test_nccl_with_several_ranks_a_gpu_only_where_the_user_says_so():
    chosen = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    shared = shared_environment(2, "0", None, chosen)
    assert shared["NCCL_NVLS_ENABLE"] == "0" and "NCCL_SOCKET_IFNAME" not in shared
    assert rank_environment(0, {**chosen, **shared}) == {}


def test_percentages_never_sum_to_more_than_the_gpu():
    for nproc in range(1, 60):
        share = int(shared_environment(nproc, "0", {}, {})["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"])
        assert share >= 1 and share * nproc <= 100


def test_grids_of_all_ranks_fit_at_once():
    assert max_blocks(132, 8, mps=False, one_gpu=False) == 132  # a GPU each
    assert max_blocks(32, 4, mps=True, one_gpu=True) == 32  # CUDA reports the share already
    assert max_blocks(132, 4, mps=False, one_gpu=True) == 33
    assert max_blocks(132, 1, mps=False, one_gpu=True) == 132
    assert max_blocks(3, 4, mps=False, one_gpu=True) == 1
    for bad in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least one"):
            max_blocks(*bad, mps=True, one_gpu=True)


@pytest.mark.parametrize(("count", "rank", "expected"), [(1, 3, "cuda:0"), (0, 1, "cuda:0"), (4, 3, "cuda:3")])
def test_the_device_of_a_rank(monkeypatch, count, rank, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert str(one_gpu.local_device(rank)) == expected
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert str(one_gpu.local_device()) == expected


def test_more_ranks_than_devices_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"local rank 2 has no GPU.*--one-gpu"):
        one_gpu.local_device(2)


# --- the daemon -----------------------------------------------------------------------------------------------------


def test_a_daemon_lives_as_long_as_its_owner_wants(fake, tmp_path):
    with MpsDaemon("GPU-x") as daemon:
        assert daemon.running and daemon.own and daemon.reason == ""
        pipe = daemon.environment["CUDA_MPS_PIPE_DIRECTORY"]
        assert os.path.isdir(pipe) and os.stat(os.path.dirname(pipe)).st_mode & 0o777 == 0o700
        assert len(_fakes(tmp_path)) == 2  # daemon and server
        assert "device=GPU-x mode=700" in fake()[0] and "get_server_list" in fake()
    assert fake()[-1] == "quit" and not daemon.running and daemon.environment == {}
    assert _nothing_left(tmp_path, within=0.5)
    daemon.close()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuses", "`nvidia-cuda-mps-control -d` ended with status 1: the GPU is held by someone else"),
        ("hangs", "`nvidia-cuda-mps-control -d` did not end within 1 s"),
        ("mute", "the daemon gave no answer within 1 s"),
    ],
)
def test_a_daemon_that_does_not_start_is_done_without(fake, tmp_path, monkeypatch, mode, reason):
    monkeypatch.setenv("FAKE_MPS", mode)
    with MpsDaemon(start_timeout=1.0, end_timeout=0.5) as daemon:
        assert (daemon.running, daemon.reason, daemon.environment) == (False, reason, {})
    assert _nothing_left(tmp_path, within=0.5)


@pytest.mark.parametrize("mode", ["deaf", "stubborn"])
def test_a_daemon_that_does_not_quit_is_killed(fake, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("FAKE_MPS", mode)
    with MpsDaemon(end_timeout=0.3) as daemon:
        assert daemon.running
    assert "quit" in fake() and _nothing_left(tmp_path, within=0.5)


def test_a_keeper_that_was_killed_leaves_the_end_to_the_owner(fake, tmp_path):
    with MpsDaemon() as daemon:
        daemon._keeper.kill()
        daemon._keeper.wait()
        assert len(_fakes(tmp_path)) == 2
    assert _nothing_left(tmp_path, within=0.5)


def test_a_folder_too_long_for_sockets_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 90)))
    assert str(mps._new_folder()).startswith("/tmp/tp_kernels_mps_")


def test_without_mps_it_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TP_KERNELS_MPS", raising=False)
    assert MpsDaemon().start().reason == "nvidia-cuda-mps-control is not on PATH"
    assert one_gpu.describe_mps().startswith("no MPS (nvidia-cuda-mps-control is not on PATH)")
    monkeypatch.setenv("TP_KERNELS_MPS", "0")
    assert MpsDaemon().start().reason == "TP_KERNELS_MPS=0"


def test_the_users_daemon_is_used_and_stays(fake, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(theirs))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    subprocess.run([mps.CONTROL, "-d"], check=True)
    deadline = time.monotonic() + 10
    while not (theirs / "nvidia-cuda-mps-control.pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with SharedGpu() as shared:
        assert shared.mps and shared.environment(2)["CUDA_MPS_PIPE_DIRECTORY"] == str(theirs)
        assert shared.environment(2)["CUDA_VISIBLE_DEVICES"] == "3"
        assert shared.describe(2).endswith("MPS with 50% of the SMs each (the daemon that was already running)")
        shared.restart()
    assert len(_fakes(tmp_path)) == 2 and "quit" not in fake()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "t"))  # set, and nobody there: one of our own
    with SharedGpu() as shared:
        assert shared.mps and shared.environment(2)["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_daemon_that_limits_nobody_is_not_used(fake, tmp_path, monkeypatch):
    def seen(*answers):
        replies = iter(answers)
        monkeypatch.setattr(one_gpu, "sms_seen_by_a_client", lambda environment: next(replies))

    for answers, reason in (
        ((132, 132), "a client limited to 10% has 132 of 132 SMs all the same"),
        (("cuInit gives CUDA error 805", 12), "the daemon runs, but cuInit gives CUDA error 805"),
    ):
        seen(*answers)
        with SharedGpu() as shared:
            assert not shared.mps and shared.environment(4)["TP_KERNELS_ONE_GPU_MPS"] == "0"
            assert shared.describe(4) == (
                f"4 ranks on one GPU, no MPS ({reason}); ranks take turns, results are right, times mean nothing"
            )
        assert _nothing_left(tmp_path, within=0.5)
    seen(132, 12)
    with SharedGpu() as shared:
        assert shared.describe(4) == "4 ranks on one GPU, MPS with 25% of the 132 SMs each" and shared.sms == 132


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to look at")
def test_looking_for_sms_without_a_gpu_gives_none_or_the_drivers_error():
    seen = mps.sms_seen_by_a_client(os.environ)
    assert seen is None or "gives CUDA error" in seen


DRIVER = """\
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return getenv("FAKE_CUDA_ERROR") ? atoi(getenv("FAKE_CUDA_ERROR")) : 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return device == 7 ? 0 : 101; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 16 ? 132 * atoi(getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")) / 100 : -1;
    return device == 7 && !strcmp(getenv("CUDA_VISIBLE_DEVICES"), "0") ? 0 : 1;
}
"""


def test_a_client_tells_its_share(fake, tmp_path, monkeypatch):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for a stand-in of the CUDA driver")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    monkeypatch.setattr(one_gpu, "sms_seen_by_a_client", mps.sms_seen_by_a_client)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with SharedGpu() as shared:
        assert shared.describe(3) == "3 ranks on one GPU, MPS with 33% of the 132 SMs each"
    monkeypatch.setenv("FAKE_CUDA_ERROR", "805")
    with SharedGpu() as shared:
        assert "no MPS (the daemon runs, but cuInit gives CUDA error 805)" in shared.describe(3)


# --- the launcher ---------------------------------------------------------------------------------------------------

SCRIPT = """\
import json, os, pathlib, sys
assert "torch" not in sys.modules
names = [name for name in os.environ if name.startswith(("NCCL_", "CUDA_", "TP_KERNELS_ONE_GPU", "TORCH_SYMM"))]
folder = pathlib.Path(sys.argv[1])
(folder / f"rank{os.environ['RANK']}.part").write_text(json.dumps({name: os.environ[name] for name in names}))
(folder / f"rank{os.environ['RANK']}.part").rename(folder / f"rank{os.environ['RANK']}")
if "fail" in sys.argv:
    raise RuntimeError("on purpose")
if "wait" in sys.argv:
    import time
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_launch_gives_every_rank_the_gpu_and_a_share(fake, script, tmp_path):
    said = []
    launch(2, [str(script), str(tmp_path)], one_gpu=True, gpu=1, say=said.append)
    assert said == ["2 ranks on one GPU, MPS with 50% of the SMs each"]
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert first["CUDA_VISIBLE_DEVICES"] == "0" and "device=1" in fake()[0], "clients number what the daemon sees"
    assert first["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50" and first["TP_KERNELS_ONE_GPU"] == "2"
    assert first.pop("NCCL_HOSTID") != second.pop("NCCL_HOSTID") and first == second
    assert _nothing_left(tmp_path, within=0.5)
    assert not [name for name in os.environ if name.startswith("TP_KERNELS_ONE_GPU")]


def test_a_failed_rank_ends_the_daemon_too(fake, script, tmp_path):
    with pytest.raises(LaunchError, match="on purpose"):
        launch(1, [str(script), str(tmp_path), "fail"], one_gpu=True, say=lambda line: None)
    assert fake()[-1] == "quit" and _nothing_left(tmp_path, within=0.5)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_daemon_ends_with_its_launcher(fake, script, tmp_path, sent):
    words = ["launch", "--nproc", "1", "--one-gpu", str(script), str(tmp_path), "wait"]
    program = (
        "import sys; from tp_kernels import cli, mps, one_gpu; mps._DEFAULT_PIPE_DIRECTORY = '/nonexistent'\n"
        "one_gpu.sms_seen_by_a_client = lambda environment: None; sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "rank0").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        assert len(_fakes(tmp_path)) == 2
        process.send_signal(sent)
        _, err = process.communicate(timeout=30)
        assert process.returncode in (-sent, 128 + sent)
        assert "1 rank on one GPU, MPS with 100% of the SMs each" in err
        assert _nothing_left(tmp_path)
    finally:
        process.kill()
    assert fake()[-1] == "quit"


def test_an_owner_that_forked_cannot_keep_the_daemon_alive(fake, tmp_path):
    program = f"""
        import os, sys, time
        sys.path.insert(0, {os.path.dirname(os.path.dirname(mps.__file__))!r})
        from tp_kernels import mps
        mps._DEFAULT_PIPE_DIRECTORY = "/nonexistent"
        daemon = mps.MpsDaemon().start()
        child = os.fork()  # inherits the pipe to the keeper
        if child == 0:
            time.sleep(60)
        print(child, daemon.running, flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    child, running = process.stdout.readline().split()
    try:
        assert running == "True" and len(_fakes(tmp_path)) == 2
        process.kill()
        assert _nothing_left(tmp_path)
    finally:
        process.kill()
        os.kill(int(child), signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--gpu", "1"], "--gpu chooses the GPU of --one-gpu"), (["--one-gpu", "--gpu", "2"], "GPU 2 was asked for")],
)
def test_command_line_errors(script, monkeypatch, capsys, words, message):
    from tp_kernels import cli

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert cli.main(["launch", "--nproc", "2", *words, str(script)]) == 2
    assert message in capsys.readouterr().err


# --- the tests' own ranks, on CPUs ----------------------------------------------------------------------------------


def look(group):
    names = ("NCCL_HOSTID", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "TP_KERNELS_ONE_GPU")
    total = group.all_reduce(torch.tensor([float(group.rank + 1)])).item()
    return total, one_gpu.ranks_on_this_gpu(), one_gpu.has_mps(), tuple(os.environ.get(name) for name in names)


def die(group):
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()


def test_ranks_of_gpu_tests(fake, tmp_path):
    with OneGpuRanks(device="cpu") as ranks:
        assert ranks(2) is ranks(2)
        found = ranks(2).run(look)
        assert [each[:3] for each in found] == [(3.0, 2, True)] * 2
        (host0, pipe, share, count), (host1, *rest) = (each[3] for each in found)
        assert host0 != host1 and [pipe, share, count] == rest and (share, count) == ("50", "2")
        assert ranks.shared_gpu.mps and len(_fakes(tmp_path)) == 2
        with pytest.raises(RankFailedError, match=r"rank 1 was killed by SIGKILL"):
            ranks(2).run(die)
        assert fake().count("quit") == 1, "a daemon that had a client killed is replaced"
        again = ranks(2).run(look)
        assert again[0][:3] == (3.0, 2, True) and again[0][3][1] != pipe
        pids = ranks(2).pids
    assert fake().count("quit") == 2 and _nothing_left(tmp_path, within=0.5)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
