#!/usr/bin/env bash
# Build the wheel, install it into an empty environment for every Python and every extra that needs no GPU, and generate a
# picture there from a folder that has nothing to do with the checkout. Writes what each extra brings, with its licence.
#
#   deploy/check_release.sh OUT [PYTHON …]      default: python3.11 python3.12 python3.13, those of them that are there
#
# OUT gets the wheel, release.jsonl (one line per environment) and, of the first Python, packages-EXTRA.json and sbom-EXTRA.json.
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
quietly=(--quiet --disable-pip-version-check --no-input)

"${pythons[0]}" -m venv "$work/build"
"$work/build/bin/python" -m pip install "${quietly[@]}" -c "$root/constraints.txt" build hatchling pip-licenses cyclonedx-bom
rm -f "$out"/*.whl "$out/release.jsonl"
"$work/build/bin/python" -m build --wheel --no-isolation --outdir "$out" "$root" >/dev/null
wheel=$(ls "$out"/*.whl)

for python in "${pythons[@]}"; do
	for extra in none cpu export gguf heif quant serve s3; do
		environment=$work/environment
		"$python" -m venv --clear "$environment"
		wanted=$wheel
		test "$extra" = none || wanted="$wheel[$extra]"
		"$environment/bin/python" -m pip install "${quietly[@]}" -c "$root/constraints.txt" torch
		"$environment/bin/python" -m pip install "${quietly[@]}" -c "$root/constraints.txt" "$wanted"
		mkdir -p "$work/elsewhere"
		(
			cd "$work/elsewhere"
			env -u PYTHONPATH "$environment/bin/uso-engine" generate --prompt "a boat by the sea" --size 64x64 --steps 2 \
				--seed 7 --output boat.png >/dev/null
			env -u PYTHONPATH "$environment/bin/uso-engine" info >info.txt
		)
		"$environment/bin/python" - "$extra" "$work/elsewhere/boat.png" >>"$out/release.jsonl" <<-'PYTHON'
			import hashlib, importlib.metadata, json, platform, sys
			from PIL import Image
			pixels = hashlib.sha256(Image.open(sys.argv[2]).tobytes()).hexdigest()
			versions = {name: importlib.metadata.version(name) for name in ("uso-engine", "torch", "transformers", "diffusers")}
			print(json.dumps({"python": platform.python_version(), "extra": sys.argv[1], "pixels": pixels, "versions": versions}))
		PYTHON
		if test "$python" = "${pythons[0]}"; then
			"$work/build/bin/pip-licenses" --python "$environment/bin/python" --format json --with-urls >"$out/packages-$extra.json"
			"$work/build/bin/cyclonedx-py" environment "$environment/bin/python" --output-format JSON --output-reproducible \
				--output-file "$out/sbom-$extra.json"
		fi
		tail -n 1 "$out/release.jsonl"
	done
done
