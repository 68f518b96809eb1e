import errno
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeldiff._files import atomic_write, digest, file_digest


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def full_disk():
        with atomic_write(target) as temporary:
            temporary.write_text("half of the n")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        full_disk()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "darwin", reason="needs RLIMIT_FSIZE"
)
def test_a_write_that_the_system_refuses_leaves_the_old_file(tmp_path):
    import resource
    import signal

    target = tmp_path / "a.txt"
    target.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match="too large"), atomic_write(target) as temporary:
            temporary.write_bytes(b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = (
        "import os, sys; from modeldiff._files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as t: t.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 9
    assert target.read_text() == "old"


def test_a_written_file_has_the_usual_permissions(tmp_path):
    target = tmp_path / "sub" / "a.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_digests_are_the_same_everywhere_and_always():
    value = {"b": [1, 2.5, None, True, "ü"], "a": {"z": 1e-300, "y": -0.0}}
    assert digest(value, b"\x00") == "cda52479357c3d81"
    code = f"from modeldiff._files import digest; print(digest({value!r}, b'\\x00'))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert out.stdout.strip() == digest(value, b"\x00")
    with pytest.raises(TypeError):
        digest({1, 2})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values, json_values)
def test_digests_tell_values_apart(a, b):
    same = repr(_ordered(a)) == repr(_ordered(b))
    assert (digest(a) == digest(b)) == same
    assert digest(a, b) != digest([a, b])


def _ordered(value):
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value)}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def test_file_digests_are_of_the_content(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * (1 << 20) + b"y")
    b.write_bytes(b"x" * (1 << 20) + b"z")
    first = file_digest(a)
    assert first != file_digest(b)
    b.write_bytes(a.read_bytes())
    assert file_digest(b) == first
