"""Where a checkpoint's name leads: to a local folder, or to a model on the Hugging Face Hub."""

import functools
import re
from pathlib import Path

from m1.errors import UserError
from m1.secrets import redact

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# What is fetched: no code, and nothing in subfolders. Pickled weights are fetched only where there are no safetensors.
FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "model*.safetensors"]
PICKLES = ["pytorch_model*.bin"]


def checkpoint_folder(name: str | Path, config_only: bool = False) -> Path:
    """The local folder of a checkpoint. A model on the Hub is fetched into the Hub's cache first.

    Args:
        name: a folder, or ORG/NAME or ORG/NAME@REVISION on the Hub. An existing path wins.
        config_only: fetch config.json alone.

    Raises:
        UserError: a file, or neither a folder nor a model on the Hub that can be read.
    """
    path = Path(name)
    if path.suffix == ".gguf" and not path.is_dir():
        raise UserError(f"{name} is one GGUF file: make a checkpoint folder of it with `m1 import-gguf {name} FOLDER`")
    if path.is_file():
        raise UserError(f"{name} is not a folder but a file: give the folder of a Hugging Face checkpoint")
    commit = hub_commit(name)
    if commit is None:
        if not path.is_dir():
            raise UserError(
                f"{name} is not a folder: check the path, or give ORG/NAME or ORG/NAME@REVISION of a model on the Hub"
            )
        return path
    repo = _hub_id(name)["repo"]  # type: ignore[index]  # as hub_commit has found
    if config_only:
        return _fetch(str(name), repo, commit, ("config.json",))
    folder = _fetch(str(name), repo, commit, tuple(FILES))
    return folder if list(folder.glob("model*.safetensors")) else _fetch(str(name), repo, commit, tuple(PICKLES))


def hub_commit(name: str | Path) -> str | None:
    """The commit that a model's name on the Hub stands for, the same one throughout a process; None for a local path.

    Without a network it is the commit that was fetched last.

    Raises:
        UserError: the name has the form of a model on the Hub, but there is none that can be read.
    """
    path, named = Path(name), _hub_id(name)
    # A folder without a config.json is no checkpoint: `m1 eval --model ORG/NAME` makes one for its results.
    if named is None or path.is_file() or (path / "config.json").exists():
        return None
    folder = _fetch(str(name), named["repo"], named["revision"], ("config.json",))
    if not (folder / "config.json").exists():
        raise UserError(
            f"{name} on the Hub has no config.json: give a model in transformers' format, or a local folder"
        )
    return folder.name


def _hub_id(name: str | Path) -> re.Match[str] | None:
    """The parts of a name that the Hub could have; None for other names, such as a path ending in a hyphen."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    named = HUB_ID.fullmatch(str(name))
    try:
        if named:
            validate_repo_id(named["repo"])
    except HFValidationError:
        return None
    return named


@functools.cache
def _fetch(name: str, repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns="*/*"))
    except GatedRepoError:
        raise UserError(f"{name} is gated: ask for access on its page on the Hub, and {log_in}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a checkpoint folder here nor a model on the Hub: check the spelling; if it is private, "
            f"{log_in}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the model {repo} has no revision {revision!r} on the Hub") from None
    except (OSError, httpx2.HTTPError) as error:
        raise UserError(
            f"{name} is no checkpoint folder here, and the Hub can't be asked for it: check the path, or the network "
            f"({_cause(error)})"
        ) from None


def _cause(error: BaseException) -> str:
    """The first line of the innermost error's message: huggingface_hub wraps that of the network."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])
