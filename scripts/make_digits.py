"""Write edgelearn/scenario/data/digits.npz from scikit-learn's copy (needs scikit-learn)."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

if __name__ == "__main__":
    digits = load_digits()
    target = Path(__file__).parents[1] / "edgelearn" / "scenario" / "data" / "digits.npz"
    np.savez_compressed(
        target, x=digits.images.astype(np.uint8)[:, None], y=digits.target.astype(np.uint8)
    )
    print(target, target.stat().st_size, "bytes")
