import json

import pytest

from modeldiff.cache import Cache

KEY = {"models": ["a", "b"], "seed": 0, "temperature": 0.7}


@pytest.fixture
def cache(tmp_path):
    found = Cache(tmp_path)
    found.put("answers", KEY, [[0, 1, [5, 6], "text", True]])
    return found


def test_the_same_inputs_hit_and_any_other_misses(cache):
    assert cache.get("answers", dict(reversed(KEY.items()))) == [[0, 1, [5, 6], "text", True]]
    others = [
        {**KEY, "seed": 1},
        {**KEY, "temperature": 0.70001},
        {**KEY, "models": ["b", "a"]},
        {**KEY, "more": None},
        {"seed": 0},
    ]
    assert all(cache.get("answers", other) is None for other in others)
    assert cache.get("verdicts", KEY) is None
    assert (cache.hits, cache.misses) == (1, 6)


def test_another_version_of_the_package_misses(cache, monkeypatch):
    monkeypatch.setattr("modeldiff.cache.__version__", "0.0.0+other")
    assert cache.get("answers", KEY) is None


def damaged(text):
    record = json.loads(text)
    return {
        "cut": text[: len(text) // 2],
        "empty": "",
        "other json": "[1, 2]",
        "null": "null",
        "one digit": text.replace("[5, 6]", "[5, 7]"),
        "one letter": text.replace('"text"', '"test"'),
        "no value": json.dumps({k: v for k, v in record.items() if k != "value"}),
        "no digest": json.dumps({k: v for k, v in record.items() if k != "digest"}),
        "rows lost": json.dumps({**record, "value": []}),
    }


@pytest.mark.parametrize("how", damaged('{"value": 0, "digest": ""}'))
def test_a_damaged_record_is_made_again_and_never_believed(cache, how):
    path = cache.path("answers", KEY)
    broken = damaged(path.read_text(encoding="utf-8"))[how]
    assert broken != path.read_text(encoding="utf-8")
    path.write_text(broken, encoding="utf-8")
    assert cache.get_or("answers", KEY, lambda: ["made again"]) == ["made again"]
    assert (cache.hits, cache.misses) == (0, 1)
    assert cache.get("answers", KEY) == ["made again"]


def test_bytes_that_are_no_text_count_as_missing(cache):
    cache.path("answers", KEY).write_bytes(b"\xff\xfe\x00")
    assert cache.get("answers", KEY) is None


def test_a_write_that_fails_leaves_no_record(cache, tmp_path):
    with pytest.raises(TypeError):
        cache.put("answers", {"a": 1}, {1, 2})
    assert cache.get("answers", {"a": 1}) is None
    assert len(list((tmp_path / "answers").iterdir())) == 1


def test_without_a_folder_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("MODELDIFF_CACHE", raising=False)
    nothing = Cache()
    assert [nothing.get_or("k", 1, lambda: "made") for _ in range(2)] == ["made", "made"]
    assert (nothing.hits, nothing.misses, nothing.path("k", 1)) == (0, 2, None)
    monkeypatch.setenv("MODELDIFF_CACHE", str(tmp_path))
    assert Cache().folder == tmp_path
