"""The four row orders of a packed batch and the tables between them."""

import pytest
import torch
from random_models import SMALL, drawn_conditions, drawn_sequence, small_transformer

from uso_engine.model.packing import PackedBatch
from uso_engine.model.sequence import Sequence
from uso_kernels.ragged import TILE_ROWS, Ragged


@pytest.fixture(scope="module")
def sequences() -> list[Sequence]:
    transformer = small_transformer()
    shapes = [((4, 4), 16, 0, ()), ((3, 5), 21, 8, ((6, 10),)), ((1, 1), 1, 0, ((2, 2), (4, 2))), ((5, 4), 30, 2, ())]
    return [
        drawn_sequence(transformer, grid, drawn_conditions(SMALL, seed=i, text=text, style=style, contents=contents))
        for i, (grid, text, style, contents) in enumerate(shapes)
    ]


def test_every_segment_starts_on_a_tile(sequences: list[Sequence]) -> None:
    batch = PackedBatch.form(sequences)
    for layout in (batch.text, batch.image, batch.joint, batch.output):
        assert all(start % TILE_ROWS == 0 for start in layout.starts)
        assert layout.rows % TILE_ROWS == 0
        assert layout.tile_sequence.shape == (layout.rows // TILE_ROWS,)
    assert batch.joint.rows == batch.text.rows + batch.image.rows
    assert batch.joint.lengths == tuple(s.length for s in sequences)


def test_merge_and_split_are_inverse_and_cover_every_row(sequences: list[Sequence]) -> None:
    batch = PackedBatch.form(sequences)
    text = torch.arange(batch.text.rows, dtype=torch.float32)[:, None]
    image = 1000 + torch.arange(batch.image.rows, dtype=torch.float32)[:, None]
    joint = batch.merge(text, image)
    assert sorted(joint[:, 0].tolist()) == sorted([*text[:, 0].tolist(), *image[:, 0].tolist()])
    text_again, image_again = batch.split(joint)
    assert isinstance(text_again, torch.Tensor) and isinstance(image_again, torch.Tensor)
    assert torch.equal(text_again, text)
    assert torch.equal(image_again, image)


def test_joint_order_is_text_image_content_then_padding(sequences: list[Sequence]) -> None:
    batch = PackedBatch.form(sequences)
    for i, sequence in enumerate(sequences):
        first = batch.joint.starts[i]
        text_rows = batch.text_joint_rows[batch.text.span(i)]
        image_rows = batch.image_joint_rows[batch.image.span(i)]
        assert text_rows.tolist() == list(range(first, first + sequence.text_length))
        assert image_rows.tolist() == list(range(first + sequence.text_length, first + sequence.length))
        assert batch.output_joint_rows[batch.output.span(i)].tolist() == image_rows.tolist()[: sequence.image_length]


def test_image_stream_takes_latents_then_content(sequences: list[Sequence]) -> None:
    batch = PackedBatch.form(sequences)
    embedded = torch.arange(batch.output.rows, dtype=torch.float32)[:, None].expand(-1, SMALL.hidden_size)
    stream = batch.image_stream(embedded)
    for i, sequence in enumerate(sequences):
        rows = stream[batch.image.span(i)]
        assert torch.equal(rows[: sequence.image_length], embedded[batch.output.span(i)])
        assert torch.equal(rows[sequence.image_length :], sequence.content)


def test_one_aligned_sequence_needs_no_gathering(sequences: list[Sequence]) -> None:
    batch = PackedBatch.form(sequences[:1])
    assert batch.joint_sources is None
    assert batch.image_sources is None
    joint = torch.randn(batch.joint.rows, 4)
    text, image = batch.split(joint)
    assert isinstance(text, torch.Tensor) and isinstance(image, torch.Tensor)
    assert text.data_ptr() == joint.data_ptr()
    assert image.data_ptr() == joint[batch.text.rows :].data_ptr()


def test_padding_is_not_turned_and_text_padding_is_zero(sequences: list[Sequence]) -> None:
    batch = PackedBatch.form(sequences)
    used = torch.zeros(batch.joint.rows, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        used[batch.joint.span(i)] = True
        assert torch.equal(batch.cos[batch.joint.span(i)], sequence.cos)
        assert torch.equal(batch.text_tokens[batch.text.span(i)], sequence.text)
        end = batch.text.starts[i + 1] if i + 1 < len(sequences) else batch.text.rows
        assert not batch.text_tokens[batch.text.span(i).stop : end].any()
    assert (batch.cos[~used] == 1).all()
    assert (batch.sin[~used] == 0).all()


def test_ragged_refuses_what_it_cannot_lay_out() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        Ragged.pack([])
    with pytest.raises(ValueError, match="sequence 1 must hold at least one token, got 0"):
        Ragged.pack([3, 0])
    with pytest.raises(ValueError, match="capacity 24 must be a multiple of 16"):
        Ragged.pack([20], capacities=[24])
    with pytest.raises(ValueError, match="capacity 16 must be a multiple of 16 and at least 20"):
        Ragged.pack([20], capacities=[16])
    with pytest.raises(ValueError, match="one capacity per sequence"):
        Ragged.pack([20], capacities=[32, 32])
    with pytest.raises(ValueError, match="at least one sequence"):
        PackedBatch.form([])


def test_sequence_refuses_parts_that_do_not_fit(sequences: list[Sequence]) -> None:
    s = sequences[1]
    with pytest.raises(ValueError, match="rotary tables"):
        Sequence(s.text[1:], s.content, s.grid, s.cos, s.sin, s.modulation)
    with pytest.raises(ValueError, match="one width"):
        Sequence(s.text[:, 1:], s.content, s.grid, s.cos, s.sin, s.modulation)
    with pytest.raises(ValueError, match="at least one latent token"):
        Sequence(s.text, s.content, (0, 5), s.cos, s.sin, s.modulation)
