"""A crosscoder whose truth is known, on rows of texts: for the panels Latents and Training."""

import torch

from modeldiff.dictionaries.configs import DictionaryConfig
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import TensorRows

D, N_LATENTS, TEXT = 16, 12, 25
SHARED, FINETUNED, BASE, DEAD = range(6), range(6, 8), range(8, 10), range(10, 12)


def features(d_model=D):
    """Orthonormal rows, one a latent."""
    square = torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(1))
    return torch.linalg.qr(square).Q[:N_LATENTS]


def strengths(n_texts, seed=0):
    """``[row, latent]``: sparse, latent j fires on about 1 of (3 + 3 j) rows."""
    generator = torch.Generator().manual_seed(seed)
    n = n_texts * TEXT
    fires = torch.rand(n, N_LATENTS, generator=generator) < 1 / (3 + 3 * torch.arange(N_LATENTS))
    fires[:, list(DEAD)] = False
    return fires * (0.5 + torch.rand(n, N_LATENTS, generator=generator))


def owned():
    """``[latent, model]``: who has each latent."""
    has = torch.ones(N_LATENTS, 2)
    has[list(FINETUNED), 0] = 0
    has[list(BASE), 1] = 0
    return has


def planted_rows(n_texts=40, d_model=D, vocab=40, seed=0):
    """Rows in which six features are shared and two belong to each model, with a little noise."""
    f, W, has = strengths(n_texts, seed), features(d_model), owned()
    generator = torch.Generator().manual_seed(seed + 1)
    acts = torch.einsum("nf,fm,fd->nmd", f, has, W)
    acts = acts + 0.01 * torch.randn(acts.shape, generator=generator)
    ids = torch.randint(4, vocab, (len(f),), generator=generator)
    document = torch.arange(n_texts).repeat_interleave(TEXT)
    return TensorRows(acts, ids, document, 1 + torch.arange(TEXT).repeat(n_texts))


def planted_dictionary(d_model=D, site="resid_post.2"):
    """The dictionary that has exactly these features."""
    W, has = features(d_model), owned()
    encoder = torch.einsum("fm,fd->mdf", has / has.sum(1, keepdim=True), W)
    bias = torch.full((N_LATENTS,), -0.1)
    bias[list(DEAD)] = -100.0
    tensors = {
        "W_enc": encoder, "b_enc": bias, "W_dec": torch.einsum("fm,fd->fmd", has, W),
        "b_dec": torch.zeros(2, d_model), "mean": torch.zeros(2, d_model),
        "scale": torch.ones(2), "threshold": torch.zeros(()),
    }  # fmt: skip
    config = DictionaryConfig(d_model, N_LATENTS, activation="relu", k=4, site=site)
    return Dictionary.of(config, tensors)
