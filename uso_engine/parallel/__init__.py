"""One step computed by several processes: each has a share of every sequence's rows (Ulysses sequence parallelism)."""
