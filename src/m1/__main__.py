"""`python -m m1` is `m1`."""

from m1.cli import main

main()
