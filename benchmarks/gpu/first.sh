#!/usr/bin/env bash
# A GPU's first minutes, expected 6, at most 9:    benchmarks/gpu/first.sh OUT [full|tiny]
# Everything that is measured before anything is tuned. OUT gets first.json, first.log, records.jsonl, machine.txt and clocks.txt;
# the last 10,000 characters printed hold the results. Ends with 1 if any part failed; every part runs all the same.
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" first "$@"
