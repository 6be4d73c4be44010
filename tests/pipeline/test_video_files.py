"""Video files, read back."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from vsa_diffusers.video_files import read_frames, video_frames, write_lossless, write_video


def smooth(frames: int = 5, height: int = 63, width: int = 65) -> np.ndarray:
    """Colours that change slowly, so that little is lost by compression: `[frames, height, width, 3]` in 0 to 1."""
    t, y, x = np.meshgrid(*(np.linspace(0, 1, extent) for extent in (frames, height, width)), indexing="ij")
    return np.stack([x, y, (t + x) / 2], axis=-1).astype(np.float32)


def streams(path) -> str:
    told = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return told.stderr


def test_a_video_of_odd_size_with_sound_plays_in_browsers_and_keeps_its_colours(tmp_path):
    frames = smooth()
    sound = np.sin(np.arange(8000) / 10)[None].repeat(2, axis=0)
    write_video(tmp_path / "video.mp4", frames, 24, audio=sound, sample_rate=16000)
    read = read_frames(tmp_path / "video.mp4")
    assert read.shape == (5, 64, 66, 3)
    assert np.abs(read[:, :63, :65] / 255.0 - frames).mean() < 0.02
    told = streams(tmp_path / "video.mp4")
    assert "h264" in told
    assert "yuv420p(tv, bt709" in told
    assert "aac" in told
    assert "16000 Hz, stereo" in told
    assert [part.name for part in tmp_path.iterdir()] == ["video.mp4"]


def test_lossless_is_lossless(tmp_path):
    noise = np.random.default_rng(0).random((3, 15, 17, 3))
    write_lossless(tmp_path / "video.mkv", noise, 8)
    assert np.array_equal(read_frames(tmp_path / "video.mkv"), video_frames(noise))


def test_arrays_tensors_and_images_of_one_video_are_the_same_frames():
    frames = video_frames(smooth())
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    assert np.array_equal(video_frames(tensor), frames)
    assert np.array_equal(video_frames(tensor / 255), frames)
    assert np.array_equal(video_frames([Image.fromarray(frame) for frame in frames]), frames)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frames: frames * np.nan, "NaN or infinity"),
        (lambda frames: frames * 2 - 1, "values from -1 to 1"),
        (lambda frames: frames[None], "[1, 5, 63, 65, 3]"),
        (lambda frames: frames[:0], "[0]"),
        (lambda frames: (frames * 255).astype(np.int64), "int64"),
    ],
    ids=["nan", "range", "batch", "empty", "dtype"],
)
def test_what_is_no_video_is_refused_and_the_file_stays_as_it_was(spoil, message, tmp_path):
    (tmp_path / "video.mp4").write_text("before")
    with pytest.raises(ValueError) as error:
        write_video(tmp_path / "video.mp4", spoil(smooth()), 24)
    assert message in str(error.value)
    assert (tmp_path / "video.mp4").read_text() == "before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(fps=0), "fps=0"),
        (dict(fps=24, audio=np.zeros((2, 10))), "sample_rate=None"),
        (dict(fps=24, audio=np.full((2, 10), np.nan), sample_rate=8), "audio holds NaN"),
    ],
    ids=["fps", "sample_rate", "audio"],
)
def test_what_no_file_can_be_made_of_is_refused_and_nothing_is_left(arguments, message, tmp_path):
    with pytest.raises(ValueError) as error:
        write_video(tmp_path / "video.mp4", smooth(), **arguments)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_named_as_a_video_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        write_video(tmp_path / "video.avi", smooth(), 24)
    assert ".mp4" in str(error.value)


def test_a_file_with_fewer_frames_than_it_was_given_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda path: (3, 0.1))
    with pytest.raises(OSError) as error:
        write_video(tmp_path / "video.mp4", smooth(), 24)
    assert "3 of 5 frames" in str(error.value)
    assert list(tmp_path.iterdir()) == []
