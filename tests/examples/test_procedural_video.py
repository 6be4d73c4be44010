"""Rendered clips are reproducible, say what their captions say, and can be judged."""

import pytest
import torch
from caption_detector import Verdict, detect, validate
from procedural_video import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Description,
    descriptions,
    render,
    render_batch,
    sample_scene,
    view,
    vocabulary,
)


def test_same_seed_gives_same_clip():
    first, again = (render(sample_scene(3), 48, 48, 9) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, render(sample_scene(4), 48, 48, 9))


def test_splits_are_disjoint_and_stable():
    train, held_out = ({d.caption for d in descriptions(split)} for split in ("train", "held_out"))
    assert not train & held_out
    assert len(train) + len(held_out) == 2 * len(COLOURS) * len(SHAPES) * len(DIRECTIONS) * 4 * 4
    assert 0.05 < len(held_out) / len(train) < 0.2
    assert sample_scene(0, split="held_out").description.split == "held_out"


def test_every_word_of_a_caption_is_in_the_vocabulary():
    assert {word for d in descriptions("held_out") for word in d.caption.split()} <= set(vocabulary())


@pytest.mark.parametrize(("height", "width", "frames"), [(32, 32, 5), (40, 64, 1), (64, 40, 7)])
def test_any_size_is_rendered_within_range(height, width, frames):
    video = render(sample_scene(1), height, width, frames)
    assert video.shape == (3, frames, height, width)
    assert video.min() >= -1
    assert video.max() <= 1


def test_a_window_is_a_piece_of_the_whole_clip():
    scene = sample_scene(2)
    window = (slice(2, 8, 3), slice(8, 40), slice(16, 30))
    torch.testing.assert_close(
        render(scene, 64, 64, 9, window=window), render(scene, 64, 64, 9)[(slice(None), *window)]
    )


def test_a_batch_is_its_clips_one_by_one():
    scenes = [sample_scene(seed) for seed in range(24)]
    batch = render_batch(scenes, [view(32, 32, 5)] * len(scenes))
    for scene, video in zip(scenes, batch, strict=True):
        torch.testing.assert_close(video, render(scene, 32, 32, 5))


def test_a_small_rendering_is_the_large_one_scaled_down():
    scene = sample_scene(5)
    small, large = render(scene, 32, 32, 3), render(scene, 128, 128, 3)
    assert (small - torch.nn.functional.avg_pool3d(large[None], (1, 4, 4))[0]).abs().mean() < 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_detector_reads_shape_colour_and_direction(shape, direction):
    colour = list(COLOURS)[(SHAPES.index(shape) + list(DIRECTIONS).index(direction)) % len(COLOURS)]
    description = Description("large", colour, shape, direction, "blue", "waves")
    video = render(sample_scene(0, description=description), 96, 96, 17)
    assert detect(video) == Verdict(shape, colour, direction)


def test_detector_is_right_on_held_out_clips():
    assert validate(60, side=96, frames=17)["all"] >= 0.98


def test_detector_sees_nothing_where_nothing_is():
    assert detect(torch.full((3, 9, 64, 64), -0.8)) == Verdict()


def test_detector_gives_no_direction_to_a_still():
    video = render(sample_scene(0), 96, 96, 17)[:, :1].expand(-1, 17, -1, -1)
    assert detect(video).direction is None
