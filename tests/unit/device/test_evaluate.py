"""What a device measures of itself."""

from __future__ import annotations

import torch
from torch import Tensor

from edgelearn.device.evaluate import evaluate
from edgelearn.params import FlatModel
from edgelearn.runtime.float import FloatRuntime
from edgelearn.scenario.samples import Encoding, Samples, SharedSamples

# A "network" that answers with its input: logits are the features.
MODEL = FlatModel(torch.nn.Linear(3, 3, bias=False))
IDENTITY = torch.eye(3).flatten()


class AlwaysTwo:
    """A served model that is worse than the float one: it always answers 2."""

    model_bytes = 7

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.0, 1.0]).expand(len(x), 3)

    def calibrated(self, calibration: Tensor) -> AlwaysTwo:
        self.calibration = calibration
        return self


def store(masks: Tensor | None = None) -> SharedSamples:
    x = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1, 2])]
    y = torch.tensor([0, 1, 2, 1, 2, 2])  # the float model is right about 0, 1, 2 and 5
    return SharedSamples(x, y, Encoding(task_masks=masks))


def samples(of: SharedSamples, *ids: int) -> Samples:
    return Samples(of, torch.tensor(ids, dtype=torch.int32))


def test_correct_answers_are_counted_by_experience_and_by_model() -> None:
    test, served = store(), AlwaysTwo()
    calibration = torch.ones(4, 3)
    parts = [samples(test, 0, 1, 3), samples(test), samples(test, 2, 4, 5)]
    counts = evaluate(MODEL, IDENTITY, served, calibration, parts)
    assert counts.count == (3, 0, 3)
    assert counts.float_ == (2, 0, 2)
    assert counts.served == (0, 0, 3)
    assert counts.model_bytes == 7
    assert served.calibration is calibration


def test_a_device_without_test_samples_counts_nothing() -> None:
    test = store()
    counts = evaluate(MODEL, IDENTITY, AlwaysTwo(), torch.ones(0, 3), [samples(test)] * 2)
    assert (counts.count, counts.served, counts.float_) == ((0, 0),) * 3
    assert counts.model_bytes == 7


def test_with_tasks_only_the_classes_of_the_samples_task_compete() -> None:
    masks = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    test = store(masks)
    counts = evaluate(MODEL, IDENTITY, AlwaysTwo(), torch.ones(0, 3), [samples(test, 4, 2, 3)])
    # Sample 4 has label 2, whose task has no other class; sample 3 is wrong within its task.
    assert counts.float_ == (2,)
    assert counts.served == (2,)  # for sample 3, class 2 is not allowed and class 0 wins


def test_the_float_model_is_evaluated_in_eval_mode() -> None:
    model = FlatModel(torch.nn.Sequential(torch.nn.Dropout(1.0), torch.nn.Linear(3, 3, bias=False)))
    model.module.train()
    prepared = FloatRuntime().prepare(model, IDENTITY)
    counts = evaluate(model, IDENTITY, prepared, torch.ones(0, 3), [samples(store(), 0, 1, 2)])
    assert counts.float_ == (3,)
    assert counts.served == (3,)
