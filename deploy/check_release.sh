#!/usr/bin/env bash
# Build the wheel, install it into an empty environment for every Python and every extra that needs no GPU, and generate a
# picture there from a folder that has nothing to do with the checkout.
#
#   deploy/check_release.sh OUT [PYTHON …]      default: python3.11 python3.12 python3.13, those of them that are there
#
# OUT gets the wheel and release.jsonl, one line per environment, which are records of benchmarks/results. What each extra brings
# is written by `python -m benchmarks.release.sbom`.
set -euo pipefail

if test $# -lt 1; then
	sed -n 's/^#   //p' "$0" >&2
	exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
pythons=("$@")
test $# -gt 0 || for candidate in python3.11 python3.12 python3.13; do
	"$candidate" -c '' 2>/dev/null && pythons+=("$candidate")
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)

# Into an environment, by uv where it is there, which takes seconds, else by pip. Nothing is compiled in advance: what is run is
# compiled then, and of thousands of modules a request imports few.
installed_by() {
	command -v uv >/dev/null && uv --version | cut -d' ' -f1,2 || "$1" -m pip --version | cut -d' ' -f1,2
}
install() {
	local environment=$1
	shift
	if command -v uv >/dev/null; then
		uv pip install --quiet --python "$environment/bin/python" -c "$root/constraints.txt" "$@"
	else
		"$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile \
			-c "$root/constraints.txt" "$@"
	fi
}

"${pythons[0]}" -m venv "$work/build"
install "$work/build" build hatchling
rm -f "$out"/*.whl "$out/release.jsonl"
"$work/build/bin/python" -m build --wheel --no-isolation --outdir "$out" "$root" >/dev/null
wheel=$(ls "$out"/*.whl)

environment=$work/environment
for python in "${pythons[@]}"; do
	rm -rf "$environment" "$work/bare"
	"$python" -m venv "$environment"
	install "$environment" torch
	install "$environment" "$wheel"
	for extra in none cpu export gguf heif otel quant serve s3; do
		test ! -d "$work/bare" || { rm -rf "$environment" && cp -al "$work/bare" "$environment"; }
		test "$extra" = none || install "$environment" "$wheel[$extra]"
		mkdir -p "$work/elsewhere"
		(
			cd "$work/elsewhere"
			env -u PYTHONPATH "$environment/bin/uso-engine" generate --prompt "a boat by the sea" --size 64x64 --steps 2 \
				--seed 7 --output boat.png >/dev/null
			test "$extra" != none || env -u PYTHONPATH "$environment/bin/uso-engine" info >/dev/null
		)
		"$environment/bin/python" - "$extra" "$work/elsewhere/boat.png" "$commit" "$(installed_by "$python")" >>"$out/release.jsonl" <<-'PYTHON'
			import hashlib, importlib.metadata, json, platform, re, sys, time
			from pathlib import Path
			from PIL import Image
			extra, picture, commit, installer = sys.argv[1:]
			pixels = hashlib.sha256(Image.open(picture).tobytes()).hexdigest()
			versions = {name: importlib.metadata.version(name) for name in ("uso-engine", "torch", "transformers", "diffusers")}
			cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
			machine = {"taken": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "commit": commit}
			machine |= {"cpu": cpu[1].strip() if cpu else platform.machine(), "python": platform.python_version()}
			packages = len(list(importlib.metadata.distributions()))
			found = {"python": platform.python_version(), "extra": extra, "pixels": pixels, "versions": versions, "installer": installer}
			print(json.dumps({"benchmark": "release", **found, "packages": packages, "machine": machine}))
		PYTHON
		tail -n 1 "$out/release.jsonl"
		test "$extra" != none || cp -al "$environment" "$work/bare"
	done
done
