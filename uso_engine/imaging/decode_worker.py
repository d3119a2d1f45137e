"""The process that decodes pictures for a `DecodePool`: one job at a time, from standard input to standard output.

A job is a line of JSON and the encoded picture, an answer a line of JSON and the pixels; nothing is unpickled on either side.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from typing import BinaryIO

from uso_engine.errors import BackendError, ImageError
from uso_engine.imaging.decode import Formats, decode_image
from uso_engine.imaging.rgb import Alpha, to_rgb

READY = b"ready\n"
"""What the process says once it has imported what it needs."""


def main(memory_bytes: int, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer jobs until the source ends.

    Args:
        memory_bytes: the most address space that this process may have; decoding that needs more is an answer, not a crash.
        source: jobs.
        sink: answers.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes to pipes only
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    sink.write(READY)
    sink.flush()
    while line := source.readline():
        job = json.loads(line)
        data = source.read(job.pop("bytes"))
        _limit_processor_time(job["deadline_s"])
        head, pixels = _answer(data, memory_bytes=memory_bytes, **job)
        sink.write(json.dumps(head).encode() + b"\n")
        sink.write(pixels)
        sink.flush()


def _answer(
    data: bytes, *, memory_bytes: int, max_pixels: int, label: str, deadline_s: float, alpha: Alpha, formats: Formats
) -> tuple[dict[str, object], bytes]:
    try:
        image, orientation = decode_image(data, max_pixels=max_pixels, label=label, deadline_s=deadline_s, formats=formats)
        rgb = to_rgb(image, label=label, orientation=orientation, alpha=alpha)
        return {"size": rgb.size}, rgb.tobytes()
    except (ImageError, BackendError) as error:
        return {"error": str(error), "is_backend_error": isinstance(error, BackendError)}, b""
    except MemoryError:
        return {"error": f"{label}: decoding it needs more than {memory_bytes // 2**20:,} MiB"}, b""


def _limit_processor_time(deadline_s: float) -> None:
    """End this process by the system soon after the deadline, even where nobody is left to end it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + deadline_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing a library prints gets between the answers
    main(int(sys.argv[1]), sys.stdin.buffer, answers)
