import json

import pytest
import torch
from safetensors.torch import save_file

from modeldiff.dictionaries import files
from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.models import Dictionary, crosscoder, sae
from modeldiff.errors import FileFormatError


@pytest.fixture
def made():
    found = crosscoder(6, 10, k=3, site="resid_post.1", n_exclusive=(1, 1), groups=(5, 10))
    found.set_normaliser(Normaliser(torch.randn(2, 6), torch.tensor([0.3, 1.7])))
    found.threshold.fill_(0.123456)
    found.provenance["store"] = "abc"
    return found


@pytest.mark.parametrize("kind", ["batch_topk", "topk", "relu", "jumprelu", "gated"])
def test_what_is_read_is_what_was_written_bit_for_bit(kind, tmp_path):
    found = sae(6, 10, k=3, activation=kind, side="difference")
    found.save_to(tmp_path / "new" / "folder")
    again = Dictionary.load_from(tmp_path / "new" / "folder")
    assert again.config == found.config
    assert again.provenance == found.provenance
    x = torch.randn(20, 2, 6)
    assert torch.equal(again.encode_dense(x), found.encode_dense(x))
    for name, each in found.state_dict().items():
        assert torch.equal(again.state_dict()[name], each), name


def test_normaliser_threshold_and_blocks_are_in_the_files(made, tmp_path):
    made.save_to(tmp_path)
    again = Dictionary.load_from(tmp_path)
    assert torch.equal(again.mean, made.mean)
    assert torch.equal(again.scale, made.scale)
    assert float(again.threshold) == float(made.threshold)
    assert torch.equal(again.owned, made.owned)
    assert again.provenance["store"] == "abc"
    assert sorted(path.name for path in tmp_path.iterdir()) == [files.RECORD, files.WEIGHTS]


def test_writing_again_replaces(made, tmp_path):
    made.save_to(tmp_path)
    made.threshold.fill_(9.0)
    made.save_to(tmp_path)
    assert float(Dictionary.load_from(tmp_path).threshold) == 9.0


def test_a_write_that_fails_leaves_what_was_there(made, tmp_path, monkeypatch):
    made.save_to(tmp_path)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        made.save_to(tmp_path)
    assert float(Dictionary.load_from(tmp_path).threshold) == float(made.threshold)
    assert len(list(tmp_path.iterdir())) == 2


def cut(folder):
    path = folder / files.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    raw = bytearray((folder / files.WEIGHTS).read_bytes())
    raw[-5] ^= 1
    (folder / files.WEIGHTS).write_bytes(bytes(raw))


def other_weights(folder):
    save_file({"W_enc": torch.zeros(2)}, folder / files.WEIGHTS)


def change(folder, **fields):
    record = json.loads((folder / files.RECORD).read_text())
    (folder / files.RECORD).write_text(json.dumps({**record, **fields}))


@pytest.mark.parametrize(
    "fault",
    [
        cut,
        flip,
        other_weights,
        lambda folder: (folder / files.RECORD).write_text("{"),
        lambda folder: (folder / files.RECORD).write_text("[]"),
        lambda folder: change(folder, version=99),
        lambda folder: change(folder, format="other"),
        lambda folder: change(folder, config={"d_model": 6, "n_latents": 11}),
        lambda folder: change(folder, config={"width": 6}),
        lambda folder: change(folder, config=None),
    ],
    ids=["cut", "bit", "other weights", "no JSON", "a list", "version", "format", "size", "field",
         "no config"],
)  # fmt: skip
def test_damaged_and_foreign_folders_are_refused(made, tmp_path, fault):
    made.save_to(tmp_path)
    fault(tmp_path)
    with pytest.raises(FileFormatError):
        Dictionary.load_from(tmp_path)


@pytest.mark.parametrize("name", [files.RECORD, files.WEIGHTS])
def test_a_missing_file_is_named(made, tmp_path, name):
    made.save_to(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Dictionary.load_from(tmp_path)
