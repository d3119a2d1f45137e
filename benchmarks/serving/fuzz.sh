#!/bin/sh
# Thousands of requests made from a server's own OpenAPI document, to a server with low limits: no 5xx, no undocumented answer.
#   benchmarks/serving/fuzz.sh [EXAMPLES per operation; 12 operations]
set -eu
examples=${1:-600}
folder=$(mktemp -d)
python=${PYTHON:-python}
"$python" -c 'from uso_engine.cli import main; main()' serve --port 8917 --device cpu --storage "file://$folder/storage" \
	--max-steps 1 --max-images 1 --max-pixels 16384 --max-waiting 50 --deadline 20 --no-ui 2>"$folder/log" &
server=$!
# What came back is told however the fuzzer ends.
trap 'kill $server; wait $server || true; grep -o "\"status\": [0-9]*" "$folder/log" | sort | uniq -c' EXIT
until "$python" -c 'import urllib.request; urllib.request.urlopen("http://127.0.0.1:8917/readyz")' 2>/dev/null; do sleep 1; done
root=$(cd "$(dirname "$0")/../.." && pwd)
(cd "$folder" && PYTHONPATH="$root:${PYTHONPATH:-}" SCHEMATHESIS_HOOKS=benchmarks.serving.fuzz_hooks "$python" -m schemathesis.cli run http://127.0.0.1:8917/openapi.json --phases coverage,fuzzing \
	--max-examples "$examples" --request-timeout 60 --no-color --generation-database none --checks \
	not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection)
