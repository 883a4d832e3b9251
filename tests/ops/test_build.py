"""Compilation: cached, safe when two start at once, for each instruction set, and without a compiler a warning and the
reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m1.ops import build, state_update

OPS = "selective_scan", "state_update", "decode_attention", "linear"
CAPABILITIES = ["default", "avx2", "avx512"]  # torch's names, each containing those before it


@pytest.mark.long
def test_two_processes_compile_once(tmp_path):
    compiler = tmp_path / "compiler"  # counts its calls
    compiler.write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    code = "from m1.ops.build import load_cpu_kernels; assert load_cpu_kernels()"
    environment = {"M1_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CXX": str(compiler)}
    start = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **start) for _ in range(2)]
    messages = [p.communicate()[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert (tmp_path / "calls").read_text().count("\n") == 1
    assert sorted("compiling M1's CPU kernels" in message for message in messages) == [False, True]


@pytest.mark.long
@pytest.mark.parametrize(
    ("capability", "options"), [*((name, "") for name in CAPABILITIES), ("avx512", "-mno-avx512bf16 -mno-avx512vnni")]
)
def test_every_instruction_set_equals_the_reference(capability, options):
    """The other tests run on the widest this processor has; here each narrower one, chosen as for torch."""
    if CAPABILITIES.index(capability) > CAPABILITIES.index(torch.backends.cpu.get_cpu_capability().lower()):
        pytest.skip(f"this processor lacks {capability}")
    tests = [f"{Path(__file__).parent}/test_{op}.py" for op in OPS]
    chosen = "(kernel_equals_reference or kernel_equals_torch or quantized_weights) and not triton"
    command = [sys.executable, "-m", "pytest", "-k", chosen, *tests]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "M1_CXXFLAGS": options}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


def test_without_compiler_falls_back_with_one_warning(monkeypatch, recwarn):
    x = torch.ones(2, 16)
    arguments = (x, x, x, x, x, -torch.ones(16, 16), torch.ones(16), torch.ones(16, 4), torch.ones(16))
    kernel = state_update(*arguments, torch.zeros(2, 16, 3), torch.zeros(2, 16, 16), backend="cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.load_cpu_kernels.cache_clear()
    try:
        results = [state_update(*arguments, torch.zeros(2, 16, 3), torch.zeros(2, 16, 16)) for _ in range(2)]
    finally:
        build.load_cpu_kernels.cache_clear()
    assert [str(w.message) for w in recwarn if "no C++ compiler" in str(w.message)].__len__() == 1
    torch.testing.assert_close(results[0], kernel)


def test_a_compiler_that_fails_is_quoted_in_the_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("M1_CACHE", str(tmp_path))
    monkeypatch.setenv("M1_CXXFLAGS", "--no-such-option")
    build.load_cpu_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no-such-option"):
            assert build.load_cpu_kernels() is None
    finally:
        build.load_cpu_kernels.cache_clear()
    assert not list(tmp_path.rglob("*.so"))
