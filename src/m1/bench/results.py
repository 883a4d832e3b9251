"""Where benchmarks write their results."""

from pathlib import Path

from m1.outputs import make_room

RESULTS = Path("results")


def result_file(benchmark: str, device: str, out: Path | None, force: bool = False) -> Path | None:
    """The file for a benchmark's result, free or an earlier result of the same benchmark.

    Args:
        benchmark: its name, such as "scan".
        out: the file the user named. None: results/bench-BENCHMARK-DEVICE.json if there is a folder `results`.

    Returns:
        None if the result isn't to be written.

    Raises:
        UserError: the file can't be written, or is something else, as `make_room`.
    """
    if out is None and not RESULTS.is_dir():
        return None
    path = out or RESULTS / f"bench-{benchmark}-{device}.json"
    make_room(path, f"bench {benchmark}", ("benchmark", benchmark), force)
    return path
