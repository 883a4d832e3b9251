"""`m1 doctor`: what is here, what will be used, what is missing and how to get it."""

import warnings

import pytest
from commands import m1

from m1 import doctor
from m1.doctor import examine


def of(found, what):
    """What is said about a missing thing."""
    return next(missing for missing in found.missing if missing.what == what)


def test_it_fits_on_a_screen_and_names_what_is_used(capsys):
    assert m1("doctor") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 25 and "C++, compiled for this processor" in out
    assert all(name in out for name in ("processor", "memory", "GPU", "compiler", "transformers", "kernels' cache"))


def test_without_a_compiler(monkeypatch):
    def fails():
        warnings.warn("no C++ compiler", stacklevel=1)

    monkeypatch.setattr(doctor, "load_cpu_kernels", fails)
    monkeypatch.setattr(doctor, "compiler", lambda: None)
    found = examine()
    assert found.used["CPU kernels"] == "PyTorch, slow" and found.machine["compiler"] == "none"
    assert "g++" in of(found, "a C++ compiler").remedy


def test_kernels_that_fail_to_compile_say_why(monkeypatch):
    monkeypatch.setattr(doctor, "_cpu_kernels", lambda: ("PyTorch, slow", "error: unknown option"))
    assert of(examine(), "compiled CPU kernels").cost == "error: unknown option"


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "download.pytorch.org" in of(examine(), "torch with CUDA").remedy


@pytest.mark.parametrize("wrong", ["4.0.0", None])
def test_packages_of_other_versions(monkeypatch, wrong):
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: wrong if name in ("transformers", "uvicorn") else version(name)
    )
    found = examine()
    missing = next(missing for missing in found.missing if missing.what.startswith("transformers"))
    assert (wrong or "nothing") in missing.cost and missing.remedy == f"pip install '{missing.what}'"
    assert wrong or "[serve]" in of(found, "a web server").remedy


def test_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "free_host_memory", lambda: 2**29)
    assert "0.5 GiB" in of(examine(), "memory").cost


def test_paths_leave_out_the_users_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("M1_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert examine().software["kernels' cache"].startswith("~/.cache/m1/kernels, 0 MiB")
