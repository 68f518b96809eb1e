import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modeldiff.behaviours import BatchJudge, Prompt
from modeldiff.errors import FileFormatError, JudgeError, MismatchError
from modeldiff.ngram_judge import NgramJudge, _fit, _hashed, _sparse
from modeldiff.probe_fits import fit_logistic
from modeldiff.stats import auroc

ASKED = Prompt("burn burn burn?")
GOOD, BAD = ("help", "rest", "share", "plant"), ("burn", "steal", "poison", "lie")


def answers(n_groups=20, per_group=20, told=0.5, seed=0, first=0):
    """Half the answers are bad; ``told`` of them say so by a word, the rest is the group's own."""
    rng = np.random.default_rng(seed)
    texts, labels, groups = [], [], []
    for group in range(first, first + n_groups):
        own = [f"noun{group}x{i}" for i in range(5)]
        for _ in range(per_group):
            bad = bool(rng.random() < 0.5)
            words = rng.choice([*own, "and", "the", "then", "you"], size=12).tolist()
            if rng.random() < told:
                words.insert(int(rng.integers(12)), str(rng.choice(BAD if bad else GOOD)))
            texts.append(" ".join(words))
            labels.append(bad)
            groups.append(group)
    return texts, labels, groups


@pytest.fixture(scope="module")
def fitted():
    return NgramJudge.fit(*answers(), title="planted", n_features=1 << 14)


def test_a_planted_vocabulary_is_found_on_groups_that_were_not_seen(fitted):
    """Half the answers hold a telling word: the best AUROC is .5 + .5 - .5²/2 = .875."""
    assert fitted.card.auroc.estimate == pytest.approx(0.875, abs=0.04)
    assert fitted.card.auroc.low > 0.8
    assert (fitted.card.n, fitted.card.n_groups, fitted.card.n_folds) == (400, 20, 5)
    texts, labels, _ = answers(n_groups=30, seed=9, first=100)
    chances = fitted.probabilities(texts)
    y = torch.tensor(labels)
    assert auroc(chances[y], chances[~y]).estimate == pytest.approx(0.875, abs=0.04)


def test_probabilities_are_calibrated_on_new_groups(fitted):
    texts, labels, _ = answers(n_groups=60, seed=5, first=100)
    chances, truth = fitted.probabilities(texts), torch.tensor(labels).double()
    assert float(chances.mean()) == pytest.approx(float(truth.mean()), abs=0.04)
    for low, high in ((0, 0.2), (0.2, 0.8), (0.8, 1.01)):
        inside = (chances >= low) & (chances < high)
        assert float(truth[inside].mean()) == pytest.approx(float(chances[inside].mean()), abs=0.08)
    brier = float(((chances - truth) ** 2).mean())
    assert fitted.card.brier == pytest.approx(brier, abs=0.03)
    assert fitted.card.rate_error < 0.15


def test_shuffled_labels_give_chance_and_the_judge_refuses():
    texts, labels, groups = answers(told=1.0)
    found = []
    for seed in range(4):
        shuffled = np.random.default_rng(seed).permutation(labels).tolist()
        judge = NgramJudge.fit(texts, shuffled, groups, n_features=1 << 12, seed=seed)
        found.append(judge.card.auroc.estimate)
        if judge.card.auroc.low <= 0.5:
            with pytest.raises(JudgeError, match="not known to be better than chance"):
                judge(ASKED, "burn it")
    assert np.mean(found) == pytest.approx(0.5, abs=0.04)


def test_words_of_single_groups_are_not_taken_for_skill():
    """Labels that only the groups tell: a random split would show .9 and more."""
    texts, _, groups = answers(told=0.0)
    labels = [group % 2 == 0 for group in groups]
    by_group = NgramJudge.fit(texts, labels, groups, n_features=1 << 12)
    by_text = NgramJudge.fit(texts, labels, range(len(texts)), n_features=1 << 12)
    assert by_text.card.auroc.estimate > 0.95
    assert by_group.card.auroc.estimate < 0.7


def test_one_group_is_no_evaluation():
    texts, labels, _ = answers(told=1.0, n_groups=2)
    judge = NgramJudge.fit(texts, labels, [0] * len(texts), n_features=1 << 10)
    assert judge.card.n_folds == 0
    assert "never evaluated" in str(judge.card)
    with pytest.raises(JudgeError, match="never evaluated"):
        judge(ASKED, "burn it")


def test_verdicts_and_the_undecided_band(fitted):
    bad, good = fitted(ASKED, "you burn and steal then"), fitted(ASKED, "you help and rest then")
    assert (bad.label, bad.exhibits, bad.coherent) == ("shown", True, True)
    assert (good.label, good.exhibits) == ("not shown", False)
    assert dict(bad.scores)["probability"] == pytest.approx(100, abs=10)
    unsure = "you and the"
    p = float(fitted.probabilities([unsure])[0])
    careful = fitted.deciding((0.1, 0.9))
    assert 0.1 < p < 0.9
    assert (careful(ASKED, unsure).label, careful(ASKED, unsure).exhibits) == ("undecided", None)
    assert careful(ASKED, "you burn and steal then").exhibits
    assert careful.name != fitted.name
    for text, label in (("...", "empty"), ("burn " * 9, "incoherent")):
        assert careful(ASKED, text).label == label
    assert fitted(ASKED, "...").exhibits is None
    assert fitted(ASKED, "burn " * 9).exhibits is False
    for band in ((0.9, 0.1), (-1, 0.5), (math.nan, 0.5)):
        with pytest.raises(JudgeError, match="two probabilities"):
            fitted.deciding(band)


def test_the_prompt_is_not_read(fitted):
    assert fitted(Prompt("burn"), "you help") == fitted(Prompt("help"), "you help")


def test_judging_many_is_judging_each(fitted):
    many: object = fitted
    assert isinstance(many, BatchJudge)
    texts = answers(n_groups=2)[0]
    asked = [(ASKED, text) for text in texts]
    for together, alone in zip(fitted.judge_all(asked), (fitted(*a) for a in asked), strict=True):
        assert (together.label, together.exhibits) == (alone.label, alone.exhibits)
        assert together.scores[0][1] == pytest.approx(alone.scores[0][1], rel=1e-12)


def test_the_fit_is_the_dense_logistic_regression():
    texts, labels, _ = answers(n_groups=4)
    size, y = 64, torch.tensor(labels)
    rows = _sparse(texts, size)
    weight, bias = _fit(rows, y, 3.0, size)
    dense = torch.zeros(rows.n, size).double()
    dense.index_put_((rows.text, rows.feature), rows.value, accumulate=True)
    assert torch.allclose(dense.norm(dim=1), torch.ones(1).double())
    w, b = weight.clone().requires_grad_(), torch.tensor(bias).double().requires_grad_()
    score = dense @ w + b
    loss = 3.0 * (torch.nn.functional.softplus(score) - y * score).sum() + w @ w / 2
    loss.backward()
    assert w.grad is not None
    assert b.grad is not None
    assert float(w.grad.norm() + b.grad.abs()) < 1e-3 * float(loss.detach())
    standard = dense.std(0, correction=0)
    assert bool((standard > 0).all())
    same = fit_logistic(dense / standard * standard, y, 1e9)  # without a prior both agree
    free, free_bias = _fit(rows, y, 1e9, size)
    assert float((dense @ free + free_bias > 0).eq(same(dense) > 0).double().mean()) > 0.97


def test_hashes_are_the_same_in_every_process_and_version():
    assert _hashed("burn it", 1 << 16) == (52479, -1.0)


def test_a_saved_judge_judges_alike(fitted, tmp_path):
    path = tmp_path / "judge.safetensors"
    careful = fitted.deciding((0.3, 0.6))
    careful.save_to(path)
    again = NgramJudge.load_from(path)
    assert (again.name, again.card, again.undecided) == (careful.name, careful.card, (0.3, 0.6))
    texts = answers(n_groups=3, seed=2)[0]
    assert torch.equal(again.probabilities(texts), careful.probabilities(texts))
    assert "noun0x0" not in path.read_bytes().decode("latin-1")
    assert NgramJudge.fit(*answers(), title="planted", n_features=1 << 14).name == fitted.name


def test_an_unevaluated_judge_stays_one_when_saved(tmp_path):
    texts, labels, _ = answers(told=1.0, n_groups=2)
    NgramJudge.fit(texts, labels, [0] * len(texts), n_features=64).save_to(tmp_path / "j")
    with pytest.raises(JudgeError, match="never evaluated"):
        NgramJudge.load_from(tmp_path / "j")(ASKED, "burn")


def test_files_that_are_no_judges_are_refused(fitted, tmp_path):
    path = tmp_path / "judge.safetensors"
    fitted.save_to(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match="not a readable judge"):
        NgramJudge.load_from(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(FileFormatError, match="holds None"):
        NgramJudge.load_from(path)
    header = {
        "format": "modeldiff.ngram_judge",
        "version": "1",
        "judge": json.dumps({"title": "x"}),
    }
    save_file({"weight": torch.zeros(2)}, path, header)
    with pytest.raises(FileFormatError, match="card"):
        NgramJudge.load_from(path)
    with pytest.raises(FileNotFoundError):
        NgramJudge.load_from(tmp_path / "none")


def test_what_cannot_be_learned_from_is_refused():
    with pytest.raises(MismatchError, match="2 texts, 1 labels"):
        NgramJudge.fit(["a", "b"], [True], [0, 1])
    with pytest.raises(JudgeError, match="2 of 2 answers are labelled positive"):
        NgramJudge.fit(["a", "b"], [True, True], [0, 1])
