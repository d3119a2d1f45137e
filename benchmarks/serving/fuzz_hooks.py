"""What schemathesis is told before it fuzzes: `SCHEMATHESIS_HOOKS=benchmarks.serving.fuzz_hooks`.

Its generator filters drawn values by validators that take JSON alone, so a file drawn for a form ends the run with "Unsupported
type: 'Binary'" wherever it broke the schema in a way that such a filter judges (schemathesis 4.32; its other filters let files
pass). Here they let files pass, too: a file is judged by the server.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from schemathesis.generation.jsonschema import strategy
from schemathesis.transport.serialization import contains_binary

_validator_of = strategy._validator


@lru_cache(maxsize=4096)
def _validator_that_lets_files_pass(schema: Any) -> Callable[[Any], bool]:
    is_valid = _validator_of(schema)
    return lambda value: contains_binary(value) or is_valid(value)


strategy._validator = _validator_that_lets_files_pass
