"""URLs that are refused before anything is connected to."""

import pytest

from uso_engine.errors import FetchError
from uso_engine.imaging.fetch import fetch


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/passwd", "scheme 'file'; expected http or https"),
        ("ftp://host/a.png", "scheme 'ftp'"),
        ("//host/a.png", "scheme ''"),
        ("http:///a.png", "names no host"),
        ("http://user:pass@host/a.png", "holds credentials"),
        ("http://user@host/a.png", "holds credentials"),
        ("http://host\\@other/a.png", "white space or a backslash"),
        ("http://host/a b.png", "white space or a backslash"),
        ("http://host/\r\nX-Header: 1", "white space or a backslash"),
        ("http://host:port/a.png", "is not valid"),
        ("http://[::1/a.png", "is not valid"),
        ("http://xn--/", "is not valid"),
        ("http://xn--a/", "is not valid"),
        ("http://host/\ud800.png", "is not valid"),
        ("http://\ud800/a.png", "is not valid"),
        ("http://host:99999/a.png", "is not valid"),
        ("http://host/" + "a" * 20_000, "is not valid: it has 20,012 characters; at most 16,384"),
    ],
)
def test_urls_that_are_never_fetched(url: str, says: str) -> None:
    with pytest.raises(FetchError, match=says):
        fetch(url)
