"""A command's options are its stage's fields: names, types, defaults and help texts."""

import dataclasses
import tomllib
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from m1.cli import app
from m1.cli.arguments import option_type, options_of
from m1.options import build, option
from m1.recipe import STAGES, BudgetStage, ConvertStage, EvalStage, GenerateStage, RankLayersStage, load_stage

COMMANDS = {
    "convert": ConvertStage,
    "rank-layers": RankLayersStage,
    "generate": GenerateStage,
    "eval run": EvalStage,
    "budget": BudgetStage,
}


def help_of(command):
    return " ".join(CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "500"}).output.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_every_option_of_its_stage(command):
    text = help_of(command)
    for field in dataclasses.fields(COMMANDS[command]):
        if field.name != "models":
            assert f"--{field.name.replace('_', '-')} " in text
        own = field.name in ("models", "data", "limit", "task", "out")  # some of these a command declares itself
        assert own or " ".join(field.metadata["help"].split()) in text, field.name


@pytest.mark.parametrize("kind", STAGES)
def test_every_option_has_a_help_text_that_is_a_sentence(kind):
    for field in dataclasses.fields(STAGES[kind]):
        assert field.metadata["help"].endswith(".") and len(field.metadata["help"]) > 8, field.name


@pytest.mark.parametrize("kind", ["sft", "distill", "grpo"])
def test_a_training_command_lists_the_keys_of_its_recipe(kind):
    text = help_of(kind)
    for field in dataclasses.fields(STAGES[kind]):
        assert f"{field.name}: {field.metadata['help']}" in text
    assert "data.slip_rate: " in text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    name: str = option(help="A text.")
    count: int | None = option(None, "A number.")
    share: float = option(0.5, "A share.")
    kind: Literal["a", "b"] = option("a", "A choice.")
    layers: list[int] | str | None = option(None, "Layers.")
    words: list[str] = option([], "Words.")
    switch: bool = option(False, "A switch.")
    table: dict[str, Any] = option({}, "A table.")


def called(*arguments):
    """The options a command made of Example receives."""
    example, received = typer.Typer(), []

    @example.command()
    @options_of(Example)
    def command(extra: int = 3, **options):
        """What it does."""
        received.append((extra, options))

    done = CliRunner().invoke(example, list(arguments))
    assert done.exit_code == 0, done.output
    return received[0]


def test_options_reach_the_command_with_their_types_and_defaults():
    extra, options = called("--name", "x")
    assert extra == 3 and build(Example, options, "example") == Example(name="x")
    extra, options = called(
        *("--name", "x", "--count", "2", "--share", "1", "--kind", "b", "--layers", "1,3", "--words", "p"),
        *("--words", "q", "--switch", "--extra", "4"),
    )
    expected = Example(name="x", count=2, share=1.0, kind="b", layers="1,3", words=["p", "q"], switch=True)
    assert extra == 4 and build(Example, options, "example") == expected


def test_tables_are_no_options():
    assert option_type(dict[str, Any]) is None and option_type(Example) is None
    assert option_type(int | None) == int | None and option_type(list[int] | str | None) == str | None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "m1: Missing option '--teacher' (see `m1 convert --help`)"),
        (["convert", "--sead", "1"], "m1: No such option: --sead"),
        (["convert", "--teacher", "x", "--out", "y", "--seed", "abc"], "m1: Invalid value for '--seed'"),
        (["nonsense"], "m1: No such command 'nonsense' (see `m1 --help`)"),
        (
            ["solve", "1+1", "--model", "m", "--repetition-penalty", "0"],
            "m1: solve: repetition_penalty=0.0 is out of range: must be 0.01 to 100",
        ),
        (
            ["solve", "1+1", "--model", "m", "--max-new-tokens", "3", "--min-new-tokens", "4"],
            "m1: solve: min_new_tokens=4 is out of range: must be 0 to 3",
        ),
        (["eval", "run", "--model", "m", "--task", "chain", "--n", "0"], "m1: eval: n=0: need at least 1"),
        (["convert", "--teacher", "x", "--out", "y", "--mixer", "c"], "m1: convert: mixer = 'c' should be 'mamba' or"),
    ],
)
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, arguments, message):
    from m1.cli import main

    monkeypatch.setattr("sys.argv", ["m1", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith(message) and err.count("\n") == 1


def test_a_recipe_and_a_command_line_make_the_same_stage(tmp_path):
    text = 'stage = "convert"\nteacher = "t"\nout = "o"\nkeep_attention = "1,3"\nstate_size = 8\n'
    (tmp_path / "r.toml").write_text(text)
    options = {key: value for key, value in tomllib.loads(text).items() if key != "stage"}
    assert load_stage(tmp_path / "r.toml") == build(ConvertStage, options, "convert")
