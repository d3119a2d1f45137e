#!/usr/bin/env bash
# What a bare machine with Python 3.12, torch 2.11, triton 3.6 and transformers 5.17 lacks, as eleven wheels:
#   benchmarks/gpu/wheels.sh [FOLDER]      by default .whl
# Run it where a package registry can be reached, and bring the folder along; first.sh and second.sh install from .whl. xFormers is
# not among them: 0.0.35 does not load under CUDA 13.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "${1:-.whl}" \
    diffusers==0.42.1 optimum-quanto==0.2.7 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 \
    typing-inspection==0.4.5 typing-extensions==4.16.0 importlib-metadata==10.2.0 lazy-importer==0.1.0 \
    ftfy==6.3.1 wcwidth==0.9.4
