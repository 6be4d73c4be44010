"""Where the disk is full, the old stays whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crashes import fails_with_files_limited_to
from tiny_fine_tuned import WAN, differences, everything, fine_tuned
from vsa_diffusers import VSAConfig, load_gates, load_vsa, save_gates, save_vsa

KINDS = {"full": {}, "shards": dict(max_shard_size="60KB"), "lora": {}, "gates": dict(contents="gates")}
IN_NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def snapshot(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_no_room_for_a_file_while_saving_leaves_the_old_and_no_litter(tmp_path, kind):
    models = [fine_tuned(WAN.build(), lora=kind == "lora", seed=seed) for seed in (1, 2)]
    save_vsa(models[0], tmp_path, **KINDS[kind])
    before = snapshot(tmp_path)
    largest = max(map(len, before.values()))
    video = everything(load_vsa(WAN.build(), tmp_path))["video"]
    for size in (0, 100, 1000, largest // 2, largest - 1):
        assert fails_with_files_limited_to(size, lambda: save_vsa(models[1], tmp_path, **KINDS[kind]))
        assert snapshot(tmp_path) == before
        assert everything(load_vsa(WAN.build(), tmp_path))["video"].equal(video)
    assert not fails_with_files_limited_to(2 * largest, lambda: save_vsa(models[1], tmp_path, **KINDS[kind]))
    assert not everything(load_vsa(WAN.build(), tmp_path))["video"].equal(video)


def test_no_room_for_gates_or_a_config_leaves_the_old_and_no_litter(tmp_path):
    models = [fine_tuned(WAN.build(), seed=seed) for seed in (1, 2)]
    save_gates(models[0], tmp_path)
    VSAConfig(0.25).save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    for size in (0, 100):
        assert fails_with_files_limited_to(size, lambda: save_gates(models[1], tmp_path))
        assert fails_with_files_limited_to(size, lambda: VSAConfig(0.75).save_pretrained(tmp_path))
    assert snapshot(tmp_path) == before
    load_gates(WAN.build(), tmp_path)


def may_mount():
    return shutil.which("unshare") and not subprocess.run([*IN_NAMESPACE, "true"], check=False).returncode


@pytest.mark.slow
@pytest.mark.skipif(
    not may_mount(),
    reason="runs where a user may mount a file system of his own: unshare --map-root-user --mount",
)
def test_on_a_disk_that_is_full_at_any_place_the_old_stays_whole(tmp_path):
    command = f"mount -t tmpfs -o size=8m none {tmp_path} && exec {sys.executable} {__file__} {tmp_path}"
    told = subprocess.run(
        [*IN_NAMESPACE, "sh", "-c", command],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert told.returncode == 0, told.stderr
    print(told.stdout)
    assert "failed with the old whole" in told.stdout


def fill_and_save(folder: Path) -> None:
    """On the small disk `folder`: leave room for ever more of a save, until one succeeds."""
    models = [fine_tuned(WAN.build(), seed=seed) for seed in (1, 2)]
    save_vsa(models[0], folder / "saved")
    before = snapshot(folder / "saved")
    size = sum(map(len, before.values()))
    failed = 0
    for room in range(0, 3 * size, max(4096, size // 40)):
        with (folder / "ballast").open("wb") as ballast:
            ballast.truncate(0)
            free = shutil.disk_usage(folder).free
            ballast.write(bytes(max(0, free - room)))
        try:
            save_vsa(models[1], folder / "saved")
        except Exception:  # what a full disk raises differs by who writes
            failed += 1
            assert snapshot(folder / "saved") == before
            continue
        after = load_vsa(WAN.build(), folder / "saved")
        assert differences(everything(after)["values"], models[1].state_dict()) == []
        print(f"{failed} saves failed with the old whole; with {room} bytes free one succeeded")
        return
    raise AssertionError("no save succeeded")


if __name__ == "__main__":
    fill_and_save(Path(sys.argv[1]))
