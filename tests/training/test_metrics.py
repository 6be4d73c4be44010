"""`metrics.jsonl` takes up where a training was killed."""

import json

import pytest
from vsa_training.metrics import MetricsLog


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    for step in range(1, 7):
        log.append({"step": step, "loss": 1 / step})
    return log.path


@pytest.mark.parametrize("torn", [b'{"step": 7, "lo', b"{", b"\0\0\0\0", b'{"step": 7, "loss": 0.1', b"\xff\xfe", b"7"])
def test_a_torn_last_line_is_cut(path, torn):
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    log = MetricsLog(path, step=6)
    assert log.torn == 1
    assert path.read_bytes() == whole
    log.append({"step": 7})
    assert [line["step"] for line in lines(path)] == list(range(1, 8))


def test_a_torn_line_in_the_middle_costs_only_itself(path):
    content = path.read_text().splitlines()
    content[2] = content[2][:9]
    path.write_text("\n".join(content))
    MetricsLog(path, step=6)
    assert [line["step"] for line in lines(path)] == [1, 2, 4, 5, 6]


def test_steps_that_are_done_again_are_not_there_twice(path):
    log = MetricsLog(path, step=4)
    log.append({"step": 5, "loss": 0.2})
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5]


def test_a_log_that_needs_no_change_is_left_alone(path):
    before = path.stat()
    assert MetricsLog(path, step=6).torn == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_not_finite_is_null_and_every_line_is_json(path):
    MetricsLog(path, step=6).append({"step": 7, "grad_norm": float("inf"), "loss": float("nan")})
    assert lines(path)[-1] == {"step": 7, "grad_norm": None, "loss": None}
