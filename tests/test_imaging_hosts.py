"""Lists of hosts that operators write: what an entry means, and what is no entry."""

import pytest

from uso_engine.imaging.hosts import HostList
from uso_engine.imaging.open import ImageLimits


@pytest.mark.parametrize(
    ("entry", "host", "port"),
    [
        ("pictures.example", "pictures.example", 443),
        ("Pictures.Example", "pictures.EXAMPLE.", 80),
        ("pictures.example.", "pictures.example", 80),
        ("pictures.example:9000", "pictures.example", 9000),
        ("*.example", "a.b.example", 443),
        ("*.example:9000", "a.example", 9000),
        ("10.0.0.7", "10.0.0.7", 80),
        ("10.0.0.7:9000", "10.0.0.7", 9000),
        ("[fd00::7]", "fd00:0::7", 80),
        ("[FD00::7]:9000", "fd00::7", 9000),
        ("minio", "minio", 9000),
        ("under_score.internal", "under_score.internal", 80),
    ],
)
def test_on_the_list(entry: str, host: str, port: int) -> None:
    assert HostList(["other.example", entry]).holds(host, port)


@pytest.mark.parametrize(
    ("entry", "host", "port"),
    [
        ("pictures.example", "evil-pictures.example", 443),
        ("pictures.example", "a.pictures.example", 443),
        ("pictures.example", "pictures.example.evil", 443),
        ("pictures.example", "pictures.example..", 443),
        ("pictures.example:9000", "pictures.example", 443),
        ("*.example", "example", 443),
        ("*.example", "evilexample", 443),
        ("127.0.0.1", "127.1", 80),
        ("127.0.0.1", "0x7f.0.0.1", 80),
        ("127.0.0.1", "::ffff:127.0.0.1", 80),
        ("[fd00::7]", "fd00::70", 80),
    ],
)
def test_not_on_the_list(entry: str, host: str, port: int) -> None:
    assert not HostList([entry]).holds(host, port)


def test_an_empty_list_holds_nobody() -> None:
    assert not HostList().holds("pictures.example", 443)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.",
        ".",
        "https://pictures.example",
        "pictures.example/a",
        "user@pictures.example",
        "pictures.example:",
        "pictures.example:0",
        "pictures.example:65536",
        "pictures.example:٣",
        "a b",
        "bücher.example",
        "a.*.example",
        "*.10.0.0.7",
        "fd00::7:99999",
        "x" * 64,
    ],
)
def test_what_is_no_host_is_refused_when_it_is_written(entry: str) -> None:
    with pytest.raises(ValueError, match=r"is no host; expected 'host', 'host:port', '\*\.domain'"):
        HostList([entry])
    with pytest.raises(ValueError, match="is no host"):
        ImageLimits(allowed_hosts=(entry,))
    with pytest.raises(ValueError, match="is no host"):
        ImageLimits(private_hosts=(entry,))
