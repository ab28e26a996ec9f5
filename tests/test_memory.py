"""All tests together need little more memory than the largest of them."""

import weakref

import pytest

from plaindet.engine import PlainTrainer

trainers = []


@pytest.mark.parametrize("number", range(2))
def test_no_trainer_outlives_its_test(make_cfg, number):
    assert all(trainer() is None for trainer in trainers)
    trainers.append(weakref.ref(PlainTrainer(make_cfg("quick/retinanet_R_18_baseline.yaml"))))
