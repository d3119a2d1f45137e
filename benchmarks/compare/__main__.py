"""`python -m benchmarks.compare` is `benchmarks.compare.run`."""

from .run import main

if __name__ == "__main__":
    main()
