"""The like-for-like method table: every method of the package on every pair of known truth."""
