"""``python -m benchmarks.frontier``."""

from .run import main

main()
