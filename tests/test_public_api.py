"""The public API: what `import m1` offers. A change to it is made on purpose, and told in CHANGELOG.md.

python tests/test_public_api.py    # writes public_api.txt anew
"""

import dataclasses
import inspect
from pathlib import Path

import m1

PLAIN = (type(None), bool, int, float, str, tuple)
LIST = Path(__file__).parent / "public_api.txt"


def signature(function):
    """Names, kinds and defaults of the parameters, less those that transformers' own dataclasses bring.

    Annotations are mypy's. Defaults that aren't plain values are `...`.
    """
    inherited = {
        field.name
        for base in getattr(function, "__mro__", ())
        if dataclasses.is_dataclass(base) and not base.__module__.startswith("m1.")
        for field in dataclasses.fields(base)
    }
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        plain = parameter.default is parameter.empty or isinstance(parameter.default, PLAIN)
        if parameter.name not in inherited:
            parameters.append(parameter.replace(annotation=parameter.empty, **({} if plain else {"default": ...})))
    return f"({', '.join(map(str, parameters))})".replace("Ellipsis", "...")


def members(cls):
    """A class's public members that this project defines, with their signatures."""
    for name in sorted(dir(cls)):
        owner = next((base for base in cls.__mro__ if name in vars(base)), object)
        if name.startswith("_") or not owner.__module__.startswith("m1."):
            continue
        member = inspect.getattr_static(cls, name)
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        yield name + (signature(function) if inspect.isfunction(function) else "")


def public_api():
    """One line per public name and member."""
    for name in sorted(m1.__all__):
        thing = getattr(m1, name)
        yield f"m1.{name}{signature(thing)}"
        if inspect.isclass(thing):
            yield from (f"    {member}" for member in members(thing))


def test_the_public_api_is_the_list():
    assert list(public_api()) == LIST.read_text().splitlines(), (
        "the public API has changed: run `python tests/test_public_api.py`, and tell it in CHANGELOG.md"
    )


def test_every_public_member_has_a_docstring():
    classes = [thing for name in m1.__all__ if inspect.isclass(thing := getattr(m1, name))]
    for cls in classes:
        for member in members(cls):
            thing = getattr(cls, member.partition("(")[0])
            assert not callable(thing) or inspect.getdoc(thing), f"{cls.__name__}.{member}"


if __name__ == "__main__":
    LIST.write_text("".join(f"{line}\n" for line in public_api()))
