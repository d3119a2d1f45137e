import threading
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from uso_engine.conditioning.cache import ByteCache, hash_image, hash_tensor, hash_text, tensor_bytes


def byte_cache(limit: int) -> ByteCache[bytes]:
    return ByteCache(limit, len)


def test_drops_the_least_recently_used() -> None:
    cache = byte_cache(10)
    for key in "abc":
        assert cache.put(key, key.encode() * 3)
    assert cache.get("a") == b"aaa"
    cache.put("d", b"ddd")
    assert cache.get("b") is None
    assert [cache.get(key) for key in "acd"] == [b"aaa", b"ccc", b"ddd"]


def test_counts_hits_misses_evictions_and_bytes() -> None:
    cache = byte_cache(10)
    cache.put("a", b"aaaa")
    cache.get("a")
    cache.get("x")
    cache.put("b", b"bbbbbbbb")
    found = cache.statistics()
    assert (found.hits, found.misses, found.evictions) == (1, 1, 1)
    assert (found.entries, found.size_bytes, found.limit_bytes) == (1, 8, 10)


def test_exactly_the_bound_fits_and_one_byte_more_is_not_kept() -> None:
    cache = byte_cache(4)
    assert cache.put("a", b"aaaa")
    assert not cache.put("b", b"bbbbb")
    assert cache.get("a") == b"aaaa"
    assert cache.statistics().evictions == 0


def test_a_replaced_value_gives_its_bytes_back() -> None:
    cache = byte_cache(10)
    cache.put("a", b"a" * 9)
    cache.put("a", b"b" * 2)
    cache.put("c", b"c" * 8)
    assert cache.get("a") == b"bb"
    assert cache.statistics().size_bytes == 10


def test_an_oversized_replacement_does_not_leave_the_old_value() -> None:
    cache = byte_cache(4)
    cache.put("a", b"old")
    cache.put("a", b"newer")
    assert cache.get("a") is None
    assert cache.statistics().size_bytes == 0


def test_a_bound_of_nothing_keeps_nothing() -> None:
    cache = byte_cache(0)
    assert cache.get_or_compute("a", lambda: b"a") == b"a"
    assert cache.get("a") is None


def test_computes_once_and_not_again() -> None:
    cache = byte_cache(10)
    calls: list[str] = []

    def compute() -> bytes:
        calls.append("call")
        return b"value"

    assert [cache.get_or_compute("a", compute) for _ in range(3)] == [b"value"] * 3
    assert calls == ["call"]


def test_clear_forgets_entries_and_counts() -> None:
    cache = byte_cache(10)
    cache.put("a", b"a")
    cache.get("a")
    cache.clear()
    assert cache.get("a") is None
    found = cache.statistics()
    assert (found.hits, found.misses, found.entries, found.size_bytes) == (0, 1, 0, 0)


def test_refuses_a_negative_bound() -> None:
    with pytest.raises(ValueError, match="got -1"):
        byte_cache(-1)


def test_stays_within_its_bound_between_threads() -> None:
    cache = byte_cache(100)
    start = threading.Barrier(8)
    broken: list[int] = []

    def work(seed: int) -> None:
        start.wait()
        for step in range(300):
            key = str((seed * 7 + step) % 23)
            value = cache.get_or_compute(key, lambda key=key: key.encode() * 9)  # type: ignore[misc]
            size = cache.statistics().size_bytes
            if size > 100 or value != key.encode() * 9:
                broken.append(size)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = cache.statistics()
    assert not broken
    assert found.hits + found.misses == 8 * 300
    assert found.size_bytes == sum(len(cache.get(str(key)) or b"") for key in range(23))


def asked_together(cache: ByteCache[bytes], compute: Callable[[], bytes]) -> list[object]:
    """What three threads get that ask for one value while the first of them computes it."""
    computing, go_on = threading.Event(), threading.Event()
    got: list[object] = []

    def slowly() -> bytes:
        computing.set()
        assert go_on.wait(60)
        return compute()

    def ask() -> None:
        try:
            got.append(cache.get_or_compute("a", slowly))
        except (KeyError, KeyboardInterrupt) as error:
            got.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert computing.wait(60)
    for thread in threads[1:]:
        thread.start()
    while cache.statistics().hits < 2:  # Both are waiting.
        threads[1].join(0.001)
    go_on.set()
    for thread in threads:
        thread.join(60)
    return got


@pytest.mark.parametrize("bound", [0, 10])
def test_what_several_ask_for_is_computed_once(bound: int) -> None:
    calls: list[str] = []

    def compute() -> bytes:
        calls.append("call")
        return b"value"

    assert asked_together(byte_cache(bound), compute) == [b"value"] * 3
    assert calls == ["call"]


def test_an_error_reaches_all_who_wait_and_the_next_computes_anew() -> None:
    cache = byte_cache(10)
    error = KeyError("once")

    def fail() -> bytes:
        raise error

    assert asked_together(cache, fail) == [error] * 3
    assert cache.get_or_compute("a", lambda: b"value") == b"value"


def test_an_interrupt_is_the_computing_threads_own() -> None:
    interrupts = [KeyboardInterrupt()]

    def once() -> bytes:
        if interrupts:
            raise interrupts.pop()
        return b"value"

    got = asked_together(byte_cache(10), once)
    assert [type(value) for value in got].count(KeyboardInterrupt) == 1
    assert got.count(b"value") == 2


def test_text_hash_tells_prompts_and_encoders_apart() -> None:
    hashes = {hash_text("a", "x"), hash_text("b", "x"), hash_text("a", "y"), hash_text("", "x"), hash_text("\ud800", "x")}
    assert len(hashes) == 5
    assert hash_text("a", "x") == hash_text("a", "x")


def test_image_hash_is_of_what_is_seen() -> None:
    red = Image.new("RGB", (4, 2), "red")
    same = red.copy()
    same.info["comment"] = "from another file"
    dot = red.copy()
    dot.putpixel((3, 1), (254, 0, 0))
    others = [dot, Image.new("RGB", (2, 4), "red"), red.convert("L"), red.convert("RGBA")]
    assert hash_image(red) == hash_image(same)
    assert len({hash_image(image) for image in (red, *others)}) == 5
    assert hash_image(red, "encoder") != hash_image(red)


def test_image_hash_sees_the_palette() -> None:
    first = Image.new("P", (2, 2), 0)
    first.putpalette([255, 0, 0])
    second = Image.new("P", (2, 2), 0)
    second.putpalette([0, 255, 0])
    assert hash_image(first) != hash_image(second)


def test_tensor_hash_sees_shape_dtype_and_values() -> None:
    x = torch.arange(6.0)
    others = [x.reshape(2, 3), x.to(torch.bfloat16), x + 1]
    assert len({hash_tensor(value) for value in (x, *others)}) == 4
    assert hash_tensor(x.reshape(2, 3).T) == hash_tensor(x.reshape(2, 3).T.contiguous())


def test_tensor_bytes() -> None:
    assert tensor_bytes(torch.zeros(3, 4, dtype=torch.bfloat16)) == 24
