#!/usr/bin/env bash
# Variants of a step against each other, at most 4 minutes:    benchmarks/gpu/second.sh OUT [full|tiny]
# OUT gets second.json, second.log, records.jsonl, machine.txt and clocks.txt. What to compare: VARIANTS in variants.py.
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" second "$@"
