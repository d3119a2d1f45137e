#!/usr/bin/env bash
# The whole GPU campaign, in stages of at most nine minutes each:   benchmarks/gpu_run.sh [STAGE]...
#
# Stages, in order: check cold kernels ladder step stages tiers memory_bf16 memory_fp8 memory_int8
# memory_int4 report. Without arguments all of them. Each appends its records to
# benchmarks/results/ and stops at the first thing that is wrong: a speed-up is never reported on a red gate.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD:$PWD/kernels"
PYTHON=${PYTHON:-python}
LIMIT=540 # seconds of a stage; one with two commands divides them

stage_check() { # kernels natively in bfloat16 against float64, attention backends against each other
    timeout $LIMIT $PYTHON -m pytest -q -m gpu tests/test_uso_kernels_norms.py tests/test_uso_kernels_rows.py \
        tests/test_uso_kernels_qk_norm_rope.py tests/test_attention.py tests/test_quantization_gpu.py \
        tests/test_placement_gpu.py
}

stage_cold() { # first step of a process with an empty Triton cache, and peak memory against the formula
    TRITON_CACHE_DIR=$(mktemp -d) timeout $LIMIT $PYTHON -m benchmarks.cold_start --workload full
}

stage_kernels() { # each kernel against eager and torch.compile, with its share of a measured ceiling
    timeout $LIMIT $PYTHON -m pytest -q benchmarks/kernels/bench_kernels.py -p no:cacheprovider \
        -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-columns=median,rounds
}

stage_ladder() { # every rung at full size, L = 5824
    timeout $((LIMIT * 3 / 4)) $PYTHON -m benchmarks.ladder --workload full --rounds 20
    timeout $((LIMIT / 4)) $PYTHON -m benchmarks.ladder --workload small --rounds 50
}

stage_step() { # ours against diffusers, eager, same tokens and weights
    timeout $((LIMIT * 3 / 4)) $PYTHON -m benchmarks.step_benchmark --workload full --rounds 10
    timeout $((LIMIT / 4)) $PYTHON -m benchmarks.step_benchmark --workload small --rounds 50
}

stage_stages() { # encoders, admission, 28 steps and decoding, each apart, at full size
    timeout $LIMIT $PYTHON -m benchmarks.ladder --workload full --rounds 3 --stages
}

stage_tiers() { # every precision tier's step against bf16's, in the same run
    timeout $LIMIT $PYTHON -m benchmarks.tier_steps --workload full --rounds 20
}

# Memory plans for 24, 16, 12 and 8 GiB, each under a cap of its budget; 40 GB of host memory.
stage_memory_bf16() { memory_plans uso-flux-dev; }
stage_memory_fp8() { memory_plans uso-flux-dev-fp8; }
stage_memory_int8() { memory_plans uso-flux-dev-int8; }
stage_memory_int4() { memory_plans uso-flux-dev-int4; }

memory_plans() {
    timeout $LIMIT $PYTHON -m benchmarks.memory_plans --config "$1"
}

stage_report() { # tables of docs/performance.md from the records
    $PYTHON -m benchmarks.report
}

if [ $# -eq 0 ]; then
    set -- check cold kernels ladder step stages tiers memory_bf16 memory_fp8 memory_int8 memory_int4 report
fi
for stage in "$@"; do
    echo "== $stage"
    start=$SECONDS
    "stage_$stage"
    echo "== $stage done in $((SECONDS - start)) s"
done
