"""Compilation: cached, safe when two start at once, and without a compiler a warning and the reference."""

import subprocess
import sys

import torch

from m1.ops import build, selective_scan


def test_two_processes_compile_once(tmp_path):
    compiler = tmp_path / "compiler"  # counts its calls
    compiler.write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    code = "from m1.ops.build import load_cpu_kernels; assert load_cpu_kernels('selective_scan')"
    environment = {"M1_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CXX": str(compiler)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    assert (tmp_path / "calls").read_text().count("\n") == 1


def test_without_compiler_falls_back_with_one_warning(monkeypatch, recwarn):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.load_cpu_kernels.cache_clear()
    x = torch.ones(1, 2, 16)
    arguments = (x, x, -torch.ones(16, 16), x, x, torch.ones(16))
    try:
        results = [selective_scan(*arguments)[0] for _ in range(2)]
    finally:
        build.load_cpu_kernels.cache_clear()
    assert [str(w.message) for w in recwarn if "no C++ compiler" in str(w.message)].__len__() == 1
    torch.testing.assert_close(results[0], selective_scan(*arguments, backend="reference")[0])
