"""
The main job
============

Geodesics of a torus and of a metric learned from handwritten digits, and the outer solar system
for 200,000 years: simulated symplectically, audited, drawn to PNG and to interactive HTML pages.
Each part is an example of its own in this folder::

    python examples/main_job.py --output output/
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import digits_latent
import outer_solar_system
import torch
import torus_geodesics

PARTS = {
    "Geodesics on a torus": torus_geodesics.main,
    "The shape of handwritten digits": digits_latent.main,
    "The outer solar system": outer_solar_system.main,
}


def main(output: str | Path = "output", quick: bool = False) -> dict[str, float]:
    """Run all parts, list what they wrote, and return the seconds that each took."""
    files, seconds = [], {}
    for title, part in PARTS.items():
        print(f"\n{title}\n{'=' * len(title)}\n", flush=True)
        start = time.perf_counter()
        files += part(output, quick).files
        seconds[title] = time.perf_counter() - start
    print("\nWritten\n=======\n")
    for file in files:
        print(f"{file!s:<40}{file.stat().st_size / 1000:10,.0f} kB")
    print("\nTime\n====\n")
    for title, spent in seconds.items():
        print(f"{title:<40}{spent:10.1f} s")
    print(f"{'together':<40}{sum(seconds.values()):10.1f} s")
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run the main job of darboux.")
    parser.add_argument("--output", default="output", help="folder for the pictures")
    parser.add_argument("--quick", action="store_true", help="small settings, under a minute")
    options = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # these tensors are small: more threads wait for each other
    main(options.output, options.quick)
