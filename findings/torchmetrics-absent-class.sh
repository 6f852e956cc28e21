#!/usr/bin/env bash
# torchmetrics 1.9.0's MulticlassAccuracy (whose average is "macro" by default: the mean of the classes'
# recalls) leaves out a class that no image shows, until one image is taken for it: then that class
# counts, as 0. One more mistake of an image that is wrong anyway so moves the figure by a whole class.
# MulticlassRecall and MulticlassJaccardIndex do the same. scikit-learn 1.9.1's balanced_accuracy_score
# is the mean of the classes that there are.
# Seen: four images of two classes, one of them wrong: 0.75 if it is taken for the other class, 0.5 if it
# is taken for a third one; 0.75 both times by scikit-learn.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torchmetrics==1.9.0 torch==2.15.0 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

truth = torch.tensor([0, 0, 1, 1])
seen = []
for name, found in (("the other", [0, 1, 1, 1]), ("a third", [0, 2, 1, 1])):
    found = torch.tensor(found)
    figures = [
        float(metric(num_classes=3, average="macro")(found, truth))
        for metric in (MulticlassAccuracy, MulticlassRecall)
    ]
    figures.append(float(balanced_accuracy_score(truth, found)))
    print(f"one wrong, taken for {name} class: accuracy, recall, scikit-learn's", figures)
    seen.append(figures)
sys.exit(seen != [[0.75, 0.75, 0.75], [0.5, 0.5, 0.75]])
PYTHON
