"""Free memory is the least of what system, cgroups and ulimit leave; measuring leaves training alone."""

import resource

import pytest
import torch

from m1 import machine


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 8,000 kB free; returns the folder of its cgroups."""
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "own").write_text("")
    for name, path in (("MEMINFO", "meminfo"), ("OWN_CGROUPS", "own"), ("CGROUPS", "groups")):
        monkeypatch.setattr(machine, name, tmp_path / path)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path / "groups"


def group(folder, version, limit, used, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]}inactive_file {inactive}\n")


def test_without_limits(system):
    assert machine.free_host_memory() == 8_192_000


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("inner", ["", "job/step"])
def test_cgroups(system, version, inner):
    """Also where the namespace hides the outer folders, and where an outer group is the tighter one."""
    root = system if version == 2 else system / "memory"
    (system.parent / "own").write_text(f"3:cpu:/x\n0::/{inner}\n" if version == 2 else f"7:cpu,memory:/{inner}\n")
    group(root / inner, version, "max" if version == 2 else 2**63 - 4096, 10, 0)
    group(root, version, 5000, 3000, 400)
    assert machine.free_host_memory() == 2400
    group(root, version, 5000, 9000, 400)
    assert machine.free_host_memory() == 0


def test_a_ulimit(system, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (10_000, 10_000))
    monkeypatch.setattr(machine, "process_bytes", lambda field: 4_000)
    assert machine.free_host_memory() == 6_000


def test_a_system_without_these_files(system):
    for path in system.parent.iterdir():
        path.unlink()
    assert machine.free_host_memory() > 0


def test_measuring_draws_no_random_numbers_of_training():
    """How many it drew was up to the clock, so that two trainings with one seed differed."""
    before = torch.get_rng_state()
    assert machine.gemm_rate(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), before)
