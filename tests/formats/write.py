"""Write the files that a version of the format is tested with; once, when the version is new.

Run from the repository as ``python -m tests.formats.write``.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit, serialization

METHODS = {
    "explicit-primal": Explicit(1e-2, solver="primal"),
    "explicit-dual": Explicit(1e-2, solver="dual", fisher="exact"),
    "datainf": DataInf(regularization="auto", fisher="exact"),
    "ekfac": EKFAC(1e-2, fisher="mc", random_state=0),
    "kfac": KFAC(1e-2),
    "diagonal": Diagonal(1e-2),
}


class Network(nn.Module):
    """Rows of every form: looked up, factored and dense."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return self.linear(torch.tanh(self.norm(self.embedding(x).sum(1))))


def main():
    torch.manual_seed(0)
    folder = Path(__file__).parent / str(serialization.VERSION)
    folder.mkdir(exist_ok=True)
    batch = torch.randint(0, 7, (6, 2)), torch.arange(6) % 4
    model = Network()
    answers = {}
    for name, estimator in METHODS.items():
        estimator.fit(model, [batch])
        estimator.save(folder / f"{name}.fimkit")
        vectors = np.linspace(-1, 1, 3 * estimator.n_features_in_).reshape(3, -1)
        answers[name] = {
            method: getattr(estimator, method)(vectors).tolist()
            for method in ("transform", "inverse_transform", "score_samples")
        }
    (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
