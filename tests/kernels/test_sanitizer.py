"""What compute-sanitizer says of the kernels is told, and so is that there is none or that it does not answer."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import CPU

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sanitizer.py"


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """Return a function that installs a compute-sanitizer which is a shell script, and the functions under test."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def install(program):
        place = tmp_path / "compute-sanitizer"
        place.write_text(f"#!/bin/sh\n{program}\n")
        place.chmod(0o755)
        return runpy.run_path(str(SCRIPT))

    return install


def test_none_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["find_sanitizer"].__globals__, "TOOLKITS", ())
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert script["sanitize"](5.0) == []
    assert "there is none" in capsys.readouterr().out


def test_one_beside_other_packages_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    place = tmp_path / "nvidia" / "cu13" / "bin" / "compute-sanitizer"
    place.parent.mkdir(parents=True)
    place.touch(0o755)
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert script["find_sanitizer"]() == str(place)


def test_both_tools_are_asked_of_tensors_that_share_no_allocation(sanitizer, tmp_path, capsys):
    called = tmp_path / "called"
    script = sanitizer(
        f'echo "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING >> {called}\n'
        'if [ $2 = memcheck ]; then echo "========= ERROR SUMMARY: 0 errors"; exit; fi\n'
        'echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"'
    )
    rows = script["sanitize"](20.0)
    assert [(row["tool"], row["right"]) for row in rows] == [("memcheck", True), ("racecheck", True)]
    assert [line.split()[:2] for line in called.read_text().splitlines()] == [
        ["--tool", "memcheck"],
        ["--tool", "racecheck"],
    ]
    assert all(line.endswith("sanitizer.py 1") for line in called.read_text().splitlines())
    assert "racecheck: ok: RACECHECK SUMMARY: 0 hazards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "right", "said"),
    [
        (
            'echo "========= Invalid __global__ read of size 4"; echo "========= ERROR SUMMARY: 2 errors"',
            False,
            "Inval",
        ),
        ('echo "========= ERROR SUMMARY: 0 errors"; exit 1', False, "exit status 1"),
        ('echo "no device"; exit 3', None, "exit status 3, no summary\nno device"),
        ("sleep 60", None, "not over after 0.5 s"),
    ],
)
def test_what_it_finds_and_that_it_fails_are_told(program, right, said, sanitizer):
    for row in sanitizer(program)["sanitize"](1.0 if "sleep" in program else 20.0):
        assert row["right"] is right and said in row["said"]


@CPU
@pytest.mark.slow
def test_the_checks_it_runs_pass_under_the_interpreter():
    done = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok ") > 30 and "WRONG" not in done.stdout
