#!/usr/bin/env bash
# Prepare a bare machine and run one campaign on it:    benchmarks/gpu/run.sh first|second OUT [full|tiny]
# PYTHON names the interpreter that has torch. Wheels in .whl are installed beside it, for this run alone; what PYTHONPATH holds stays.
set -u
if [ $# -lt 2 ]; then
    echo "usage: ${0##*/} first|second OUT [full|tiny]" >&2
    exit 2
fi
CAMPAIGN=$1 SIZE=${3:-full}
mkdir -p "$2" && OUT=$(cd "$2" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
PYTHON=${PYTHON:-python3}
SITE=$(mktemp -d)
if compgen -G '.whl/*.whl' > /dev/null; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$SITE" .whl/*.whl || echo "the wheels in .whl could not be installed; what they bring will be missing" >&2
fi
export PYTHONPATH=$SITE:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 COLUMNS=160
{
    date -u
    "$PYTHON" --version
    nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu --format=csv
    "$PYTHON" -m pip list 2> /dev/null
} > "$OUT/machine.txt" 2>&1
if [ "$SIZE" = full ]; then
    nvidia-smi dmon -s pc -d 1 -o T > "$OUT/clocks.txt" 2>&1 &
    CLOCKS=$!
fi
# In the background, so that a signal to this script reaches the campaign, which then leaves nothing behind on the GPU.
"$PYTHON" -m benchmarks.gpu.campaign "$CAMPAIGN" "$OUT" "$SIZE" &
RUNNING=$!
trap 'kill -TERM "$RUNNING"' TERM INT
wait "$RUNNING"
STATUS=$?
[ "$STATUS" -le 128 ] || wait "$RUNNING"
[ -z "${CLOCKS:-}" ] || kill "$CLOCKS"
rm -rf "$SITE"
exit $STATUS
