"""The pictures that a command reads."""

from __future__ import annotations

from uso_engine.api.request import GenerationRequest
from uso_engine.local_names import is_local_name


def check_pictures(request: GenerationRequest) -> None:
    """Open what is on this machine, before minutes of loading; what URLs lead to is fetched once, by the request.

    Raises:
        ImageError, MissingFileError, BackendError: a picture that cannot be used; names its place.
    """
    from uso_engine.imaging.open import open_image

    for place, source in enumerate(request.image_urls):
        if isinstance(source, str) and is_local_name(source):
            open_image(source, name=f"image_urls[{place}]")
