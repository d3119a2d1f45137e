"""Images of one answer in the storage: where nobody can have been told of them they are removed again."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .files import ImageFiles, RequestStore
from .in_thread import in_thread


class Delivery:
    """The images of one answer, and whether somebody may know them.

    Args:
        files: where images are kept.
        base_url: of this server, as the client reaches it.

    Attributes:
        store: takes the images.
    """

    def __init__(self, files: ImageFiles, base_url: str) -> None:
        self.store = RequestStore(files, base_url)
        self._complete = self._told = False

    def complete(self) -> None:
        """The answer is made."""
        self._complete = True

    def tell(self) -> None:
        """Something is about to be sent. With the answer made, a reader may know the images from now on."""
        self._told = self._told or self._complete

    async def withdraw(self) -> None:
        """Remove the images, unless a reader may know them; what cannot be removed expires."""
        if not self._told and self.store.kept:
            await in_thread(None, self.store.discard)  # A thread of the loop's own: the server may be ending.


class ImageAnswer(Response):
    """An answer that tells of stored images; broken off before its body begins, it withdraws them.

    Args:
        body: of the answer, as JSON.
        status: of the answer.
        delivery: of its images.
    """

    def __init__(self, body: bytes, status: int, delivery: Delivery) -> None:
        super().__init__(body, status, media_type="application/json")
        self._delivery = delivery

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def telling(message: Message) -> None:
            if message["type"] == "http.response.body":
                self._delivery.tell()
            await send(message)

        try:
            await super().__call__(scope, receive, telling)
        finally:
            await self._delivery.withdraw()
