"""All GPU benchmarks, results as JSON with the device's name.

Run: ``python -m tests.benchmarks.gpu_all --out results.json [--small] [--compiled] [--only NAME]``.
The file is written after each benchmark; one that fails is noted and the others go on.
"""

import argparse
import gc
import json
import sys
from functools import partial

import torch

from modeldiff._files import atomic_write
from modeldiff.errors import ModelDiffError
from tests.benchmarks import gpu_crosscoder, gpu_generate, gpu_harvest, gpu_kl
from tests.benchmarks.gpu_common import about_device

MAINS = {
    "kl": gpu_kl.main,
    "crosscoder": gpu_crosscoder.main,
    "harvest": gpu_harvest.main,
    "generate": gpu_generate.main,
}


def run(out, small=False, compiled=False, only=None):
    """Run benchmarks and write their results; returns what was written."""
    found = about_device() | {"small": small, "results": [], "failed": {}}
    for name, main in MAINS.items():
        if name == "generate":
            main = partial(main, compiled=compiled)
        if only not in (None, name):
            continue
        try:
            found["results"] += [each.record() | {"benchmark": name} for each in main(small=small)]
        except (RuntimeError, ModelDiffError) as error:
            found["failed"][name] = f"{type(error).__name__}: {error}"
            sys.stdout.write(f"{name} failed: {error}\n")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with atomic_write(out) as path:
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu_all")
    parser.add_argument("--out", required=True)
    parser.add_argument("--small", action="store_true", help="shapes that run on a CPU")
    parser.add_argument("--compiled", action="store_true", help="also transformers' compiled step")
    parser.add_argument("--only", choices=list(MAINS))
    options = parser.parse_args()
    found = run(options.out, options.small, options.compiled, options.only)
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
