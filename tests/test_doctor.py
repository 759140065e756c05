"""The doctor: its report, its checks on 2 and 4 CPU ranks, and that nothing can break the report. Tier: CPU ranks."""

import json

import pytest

from tp_kernels import cli, doctor, doctor_checks


def test_doctor_json_reports_and_passes_here(capfd):
    capfd.readouterr()
    status = cli.main(["doctor", "--json"])
    out, err = capfd.readouterr()
    report = json.loads(out)
    failed = [check for check in report["checks"] if check["status"] == "failed"]
    assert status == 0 and report["ok"] is True and not failed, (failed, err)
    assert set(report["environment"]) == {"versions", "native core", "NCCL", "host", "GPU"}
    assert report["environment"]["versions"]["torch"][0].isdigit()
    names = [check["name"] for check in report["checks"]]
    for expected in ("collectives: shm, 4 ranks", "collectives: gloo, 2 ranks", "CUDA kernel: reduce_buffers"):
        assert expected in names
    for check in report["checks"]:
        assert set(check) == {"name", "status", "detail", "seconds"}
        assert check["status"] in ("passed", "skipped") and check["detail"]
    assert [c["status"] for c in report["checks"] if c["name"].startswith("layers")] == ["passed"]


def test_a_broken_probe_is_a_line_of_the_report(monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "_gpus", broken)
    monkeypatch.setattr(doctor, "_memory", broken)
    found = doctor.environment()
    assert found["GPU"]["devices"] == "could not be found out (OSError: no such device)"
    assert "no such device" in found["host"]["memory"]
    assert found["versions"]["torch"][0].isdigit()


def test_a_failed_check_fails_the_command_and_does_not_stop_the_others(monkeypatch, capfd):
    def failing():
        raise RuntimeError("first line\nsecond line\nlast line")

    def skipping():
        raise doctor.Skip("nothing to check")

    checks = [("bad", failing), ("absent", skipping), ("good", lambda: "fine")]
    monkeypatch.setattr(doctor_checks, "all_checks", lambda: iter(checks))
    assert cli.main(["doctor"]) == 1
    out = capfd.readouterr().out
    assert "first line ... last line" in out and "nothing to check" in out and "fine" in out
    assert "1 passed, 1 failed, 1 skipped" in out


def test_no_checks_starts_nothing(monkeypatch, capfd):
    monkeypatch.setattr(doctor_checks, "all_checks", lambda: pytest.fail("checks ran"))
    assert cli.main(["doctor", "--no-checks"]) == 0
    assert "/dev/shm" in capfd.readouterr().out


def test_two_copies_of_nccl_fail(monkeypatch):
    monkeypatch.setattr(doctor_checks, "mapped_libraries", lambda stem: ["/a/libnccl.so.2", "/b/libnccl.so.2"])
    result = doctor.run_check("nccl", doctor_checks.check_nccl_copies)
    assert result.status == "failed" and "/a/libnccl.so.2, /b/libnccl.so.2" in result.detail


def test_mapped_libraries_sees_this_process():
    assert any("libc" in path for path in doctor.mapped_libraries("libc"))
    assert doctor.mapped_libraries("libsurely_not_there") == []
