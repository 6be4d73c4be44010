"""Videos and captions become what the pipeline itself would feed its transformer."""

import json

import pytest
import torch
from vsa_training import conventions
from vsa_training.conventions import capture_inputs, check_conventions, decode, encode, scheduler_shift, to_layout
from vsa_training.dataset import BatchOrder, Sample, Shards, collate, split_shards, write_shard
from vsa_training.description import Description
from vsa_training.validation import predict
from vsa_training.videos import find_clips, read_clip

from tiny_pipelines_joint import JOINT_PIPELINES
from tiny_pipelines_video import (
    TEXT,
    WAN_IMAGE,
    PipelineRecipe,
    embeddings,
    image_and_text,
    kandinsky5,
    kandinsky5_embeddings,
    ltx,
    masked_embeddings,
    wan,
    wan22,
)
from tiny_pipelines_video import image as picture
from tiny_text_pipeline import tiny_pipeline
from training_material import FPS, FRAMES, HEIGHT, WIDTH, precompute, write_videos
from vsa_diffusers import enable_vsa

NOT_IN_CALLS = ("guidance_scale", "num_inference_steps", "output_type")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precompute")
    write_videos(folder / "videos", 3)  # two in the first shard
    return folder


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    return tiny_pipeline()


def test_a_shard_holds_latents_and_embeddings_of_its_clips(folder, pipe):
    precompute(pipe, folder)
    train, held_out = split_shards(folder / "latents", 1)
    assert [path.name for path in train + held_out] == ["000000.safetensors", "000001.safetensors"]
    assert (len(Shards(train)), len(Shards(held_out))) == (2, 1)
    sample = Shards(train)[1]
    clip = find_clips(folder / "videos", FRAMES, FPS, 1)[1]
    assert sample.caption == clip.caption == (folder / "videos" / "1.txt").read_text().strip()
    latents = encode(pipe, read_clip(clip, FRAMES, FPS, HEIGHT, WIDTH))
    torch.testing.assert_close(sample.clean.float(), latents, atol=1e-3, rtol=1e-3)
    expected = pipe.encode_prompt(clip.caption, do_classifier_free_guidance=False, max_sequence_length=32)[0]
    torch.testing.assert_close(sample.conditions, {"encoder_hidden_states": expected})
    description = Description.load(folder / "latents")
    assert (description.transformer, description.shift, description.channel_axis) == ("WanTransformer3DModel", 3.0, 1)
    assert description.call == {"max_sequence_length": 32}


def test_options_reach_the_call_and_captions_are_dropped(folder, pipe, tmp_path):
    changes = dict(output_dir=str(tmp_path), samples_per_shard=1, pipeline_arguments='{"max_sequence_length": 16}')
    changes |= dict(caption_dropout=1.0)
    precompute(pipe, folder, count=1, **changes)
    shards = Shards(split_shards(tmp_path, 0)[0])
    assert [shards[index].caption for index in range(len(shards))] == [""]
    assert shards[0].conditions["encoder_hidden_states"].shape == (1, 16, 16)


def test_a_clip_is_scaled_cropped_and_sampled_in_time(folder):
    clip = find_clips(folder / "videos", 5, 4, 1)[0]
    sampled = read_clip(clip, 5, 4, 40, 48)
    assert sampled.shape == (1, 3, 5, 40, 48)
    every = read_clip(clip, 17, 16, 40, 48)
    torch.testing.assert_close(sampled, every[:, :, ::4])
    assert read_clip(clip, 1, 16, 64, 32).shape == (1, 3, 1, 64, 32)


def test_a_long_video_gives_several_clips(folder):
    clips = find_clips(folder / "videos", 5, FPS, 3)
    assert [(clip.path.name, clip.number) for clip in clips[:4]] == [
        ("0.mp4", 0), ("0.mp4", 1), ("0.mp4", 2), ("1.mp4", 0),
    ]  # fmt: skip
    whole = read_clip(clips[0], 10, FPS, 40, 48)
    torch.testing.assert_close(read_clip(clips[1], 5, FPS, 40, 48), whole[:, :, 5:])


def test_captions_come_from_metadata_too(folder, tmp_path):
    (tmp_path / "a.mp4").symlink_to(folder / "videos" / "0.mp4")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": "a ring"}) + "\n")
    assert [clip.caption for clip in find_clips(tmp_path, FRAMES, FPS, 1)] == ["a ring"]


def test_folders_that_do_not_serve_are_told(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no videos"):
        find_clips(tmp_path, FRAMES, FPS, 1)
    with pytest.raises(ValueError, match=r"0.mp4 lasts 1.25 s, less than 81 frames at 16 per second"):
        find_clips(folder / "videos", 81, FPS, 1)
    (tmp_path / "a.mp4").symlink_to(folder / "videos" / "0.mp4")
    with pytest.raises(ValueError, match=r"a.mp4 has no caption; write a.txt beside it"):
        find_clips(tmp_path, FRAMES, FPS, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl has no text or caption or prompt for a.mp4"):
        find_clips(tmp_path, FRAMES, FPS, 1)


def video_recipe(*arguments):
    recipe = PipelineRecipe(*arguments)
    return lambda: (recipe.build(), recipe.arguments())


TRAINABLE = {
    "wan": video_recipe("WanPipeline", wan(), lambda: TEXT | embeddings()),
    "wan-2.2": video_recipe("WanPipeline", wan22(), lambda: TEXT | embeddings()),
    "wan-image": video_recipe("WanImageToVideoPipeline", wan(config=WAN_IMAGE), lambda: TEXT | image_and_text()),
    "kandinsky5": video_recipe("Kandinsky5T2VPipeline", kandinsky5(), lambda: TEXT | kandinsky5_embeddings()),
    "ltx": video_recipe("LTXPipeline", ltx, lambda: TEXT | masked_embeddings()),
} | {
    case.__name__: case
    for case in JOINT_PIPELINES
    if case.__name__ in ("hunyuan_video", "hunyuan_video15", "easyanimate", "motif_video")
}


def prepared(case):
    """A pipeline, the arguments of a call, and a clip's latents."""
    torch.manual_seed(0)
    pipe, arguments = case()
    call = {key: value for key, value in arguments.items() if key not in NOT_IN_CALLS and "negative" not in key}
    call |= dict(num_frames=5, height=64, width=96)
    if hasattr(pipe, "resolutions"):
        pipe.resolutions = [(96, 64)]
    video = 2 * torch.rand(1, 3, call["num_frames"], call["height"], call["width"]) - 1
    return pipe, call, encode(pipe, video)


@pytest.mark.parametrize("case", TRAINABLE.values(), ids=TRAINABLE.keys())
def test_training_and_the_pipeline_agree_on_latents_noise_and_timesteps(case):
    pipe, call, latents = prepared(case)
    clean = to_layout(pipe, latents)
    inputs = capture_inputs(pipe, call, clean)
    check_conventions(pipe, call, latents, inputs)

    captured = Sample(clean, inputs.timestep_scale, inputs.extra_channels, inputs.conditions)
    batch = collate([captured, captured])
    axis = conventions.layout_of(pipe.transformer).channel_axis
    with torch.no_grad():
        velocity = predict(enable_vsa(pipe.transformer, 0.5), batch, batch.clean, torch.tensor([0.3, 0.7]), axis)
    assert velocity.shape == batch.clean.shape
    assert not velocity[0].equal(velocity[1])


@pytest.mark.parametrize("mistake", ["timestep", "normalisation", "layout"])
def test_a_misunderstanding_is_found(monkeypatch, mistake):
    pipe, call, latents = prepared(TRAINABLE["ltx"])
    inputs = capture_inputs(pipe, call, to_layout(pipe, latents))
    if mistake == "timestep":
        inputs.timestep_scale = inputs.timestep_scale / 1000
    if mistake == "normalisation":
        pipe.vae.latents_std += 0.5
        monkeypatch.setattr(conventions, "_latent_statistics", lambda vae, latents: (0.0, 1.0, 1.0))
    if mistake == "layout":
        other = conventions.Layout(-1, lambda pipe, latents: latents.flatten(2).flip(2).transpose(1, 2))
        monkeypatch.setitem(conventions.LAYOUTS, "LTXVideoTransformer3DModel", other)
    with pytest.raises(ValueError, match="a perfect transformer leaves a relative error of"):
        check_conventions(pipe, call, latents, inputs)


def test_decoding_undoes_the_normalisation():
    pipe, _, latents = prepared(TRAINABLE["wan"])
    raw = latents * torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    raw = raw + torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    video = pipe.video_processor.postprocess_video(pipe.vae.decode(raw).sample, output_type="pt")[0]
    torch.testing.assert_close(decode(pipe, latents), video)


def test_a_pipeline_that_is_understood_otherwise_is_refused():
    arguments = lambda: TEXT | masked_embeddings() | dict(image=picture())  # noqa: E731
    pipe, call, latents = prepared(video_recipe("LTXImageToVideoPipeline", ltx, arguments))
    with pytest.raises(ValueError, match="timesteps that are not proportional to its scheduler's"):
        capture_inputs(pipe, call, to_layout(pipe, latents))
    case = next(case for case in JOINT_PIPELINES if case.__name__ == "cogvideox")
    pipe, call, latents = prepared(case)
    with pytest.raises(ValueError, match="CogVideoXPipeline feeds its transformer hidden_states of"):
        capture_inputs(pipe, call, to_layout(pipe, latents))


def test_the_shift_is_the_schedulers(pipe):
    assert scheduler_shift(pipe, 1000) == 3.0
    config = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
    assert scheduler_shift(pipe, 256) == pytest.approx(1.6487, abs=1e-4)
    assert scheduler_shift(pipe, 4096) == pytest.approx(3.1582, abs=1e-4)


def sample(width=4, mark=0.0, table=(1.0, 2.0)):
    conditions = dict(text=torch.full((1, 2), mark), table=torch.tensor(table), flag=None, sizes=(1, 2))
    return Sample(torch.full((1, 2, width), mark), torch.ones(1), None, conditions, f"caption {mark:g}")


def test_samples_come_back_from_their_shard_and_join_in_batches(tmp_path):
    longer = sample()
    longer.conditions["text"] = torch.zeros(1, 3)
    write_shard(tmp_path / "0.safetensors", [sample(mark=1.0), longer, sample(mark=2.0)])
    write_shard(tmp_path / "1.safetensors", [sample(mark=3.0, table=(1.0, 3.0))])
    shards = Shards(sorted(tmp_path.glob("*.safetensors")))
    assert sorted(shards.kinds().values()) == [[0, 2], [1], [3]]
    batch = collate([shards[0], shards[2]])
    assert batch.clean[:, 0, 0].tolist() == batch.conditions["text"][:, 0].tolist() == [1.0, 2.0]
    assert batch.conditions["table"].tolist() == [1.0, 2.0]
    assert batch.conditions["flag"] is None
    assert batch.conditions["sizes"] == [1, 2]
    assert batch.caption == ["caption 1", "caption 2"]
    assert batch.to("cpu").extra_channels is None


def test_latents_of_two_sizes_are_not_trained_together(tmp_path):
    write_shard(tmp_path / "0.safetensors", [sample()])
    write_shard(tmp_path / "1.safetensors", [sample(width=5)])
    with pytest.raises(
        ValueError, match=r"1.safetensors holds latents of \(1, 2, 5\), but .*0.safetensors of \(1, 2, 4\)"
    ):
        Shards(sorted(tmp_path.glob("*.safetensors")))


def test_what_a_shard_cannot_hold_is_told(tmp_path):
    broken = sample()
    broken.conditions["text"] = object()
    with pytest.raises(TypeError, match=r"sample.conditions.text is a object, which a shard cannot hold"):
        write_shard(tmp_path / "0.safetensors", [broken])


def order(first_batch=0, process=0, processes=1, batches=30):
    kinds = {"a": list(range(7)), "b": [7, 8, 9]}
    return list(BatchOrder(kinds, 2, 5, process, processes, first_batch, batches))


def test_an_epoch_has_every_clip_and_batches_are_of_one_kind():
    epoch = order(batches=6)
    assert {index for batch in epoch for index in batch} == set(range(10))
    assert all(len(batch) == 2 and (max(batch) < 7 or min(batch) >= 7) for batch in epoch)
    assert order(batches=12)[6:] != epoch


def test_the_order_goes_on_where_it_stopped_and_processes_share_it():
    assert order(first_batch=11) == order()[11:]
    assert [order(process=place, processes=2, batches=15) for place in (0, 1)] == [order()[::2], order()[1::2]]
