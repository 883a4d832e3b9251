"""The options of the benchmarks: one declaration, which the command line can read without torch."""

import dataclasses
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from m1.bench.options import AttentionOptions, DecodeOptions, JobsOptions, KernelOptions, ScanOptions, StateOptions
from m1.cli import app
from m1.ops.backend import default_device


def test_the_command_line_needs_no_heavy_library():
    code = """
import pathlib, sys, types
import m1
package = types.ModuleType("m1.cli")  # without __init__.py, which imports all other commands
package.__path__ = [str(pathlib.Path(m1.__file__).parent / "cli")]
sys.modules["m1.cli"] = package
import m1.cli.bench
print([name for name in ("torch", "transformers", "numpy", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("cls", [ScanOptions, StateOptions, AttentionOptions, DecodeOptions, JobsOptions])
def test_every_option_has_a_default_and_a_help_text(cls):
    options = cls()
    assert options.device == default_device()
    help = CliRunner().invoke(app, ["bench", cls.name, "--help"], env={"COLUMNS": "400"}).output
    help = " ".join(help.split())
    for field in dataclasses.fields(cls):
        assert f"--{field.name.replace('_', '-')}" in help and field.metadata["help"] in help
    assert ("--backends" in help) == issubclass(cls, KernelOptions)


def test_cells_and_engines_are_lists_of_text():
    options = DecodeOptions(cells="16x512,2x9", engines="ours-hybrid,vllm", prompt=4)
    assert options.chosen_cells() == [(16, 512), (2, 9)] and options.chosen_cells()[1].new_tokens == 9
    assert options.chosen_engines() == ["ours-hybrid", "vllm"] and options.max_model_len == 516


def test_a_job_has_four_numbers():
    options = JobsOptions(jobs="512x128x2x256,1x4096x16x64", max_num_seqs=600)
    first, second = options.chosen_jobs()
    assert (first.prompts, first.tokens, first.samples, first.new_tokens) == (512, 128, 2, 256)
    assert (options.num_seqs(first), options.num_seqs(second)) == (600, 16)
    assert options.max_model_len == 4160 and options.new_tokens(first) == [256] * 512
