"""The backend is chosen once, said with its reason, and never replaced in silence."""

import subprocess
import sys

import pytest
import torch
from kernel_checks import CPU

from pikv_kernels import backends
from pikv_kernels.backends import backend_report, choose


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    monkeypatch.setattr(backends, "_choices", {})


def test_a_cpu_takes_the_definition_and_says_why():
    for _ in range(2):
        assert choose("compact", torch.zeros(1)) == "torch"
    (choice,) = backend_report()
    assert choice[:4] == ("compact", "cpu", "float32", "torch") and "cpu" in choice.reason


@CPU
def test_a_forced_backend_is_reported_beside_the_chosen_one():
    choose("compact", torch.zeros(1))
    assert choose("compact", torch.zeros(1), "triton") == "triton"
    assert [choice.backend for choice in backend_report()] == ["torch", "triton"]
    assert "interpreter" in backend_report()[1].reason


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'cuda', known: torch, triton"):
        choose("compact", torch.zeros(1), "cuda")
    assert backend_report() == []


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU, the tensors are on 'cpu'"):
        choose("compact", torch.zeros(1), "triton")


def test_the_definitions_run_where_triton_is_not_installed():
    program = """
import sys
sys.modules["triton"] = None
import torch
from pikv_kernels.backends import backend_report
from pikv_kernels.decode_attention import FullKV, decode_attention
from pikv_kernels.compact import compact
from pikv_kernels.attend_pages import attend_pages
keys = torch.randn(1, 2, 9, 16)
assert decode_attention(torch.randn(1, 4, 16), FullKV(keys, keys), 1.0).output.isfinite().all()
try:
    compact(keys, torch.zeros(1, 2, 1, dtype=torch.int64), backend="triton")
except ValueError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=_with_kernels())
    assert found.returncode == 0, found.stderr
    assert "not installed" in found.stdout


def _with_kernels():
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
