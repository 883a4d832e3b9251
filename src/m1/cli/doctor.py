"""The command doctor."""

import typer

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Show what this machine has, what M1 will use, and what is missing. Add it when you report a problem."""
    from m1.cli import render
    from m1.doctor import examine

    found = examine()
    for title, facts in (("machine", found.machine), ("used", found.used), ("software", found.software)):
        render.line(title)
        for name, text in facts.items():
            render.line(f"  {name:<15}{text}")
    render.line("missing" if found.missing else "missing: nothing")
    for missing in found.missing:
        render.line(f"  {missing.what}: {missing.cost}\n    -> {missing.remedy}")
