"""Small models built to have a known trait, to check methods against the truth."""
