"""Trivial clients in pfl-research: adds a vector of ones for each, nothing else. Prints CPU milliseconds per client.

usage: python pfl_trivial.py CLIENTS ROUNDS NUMBERS, in an environment that has `pfl`. pfl models no clock, link,
device, drop-out or secure aggregation; what is compared is the cost of one client's turn in the simulator.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import dataclass

import numpy as np
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import AlgorithmHyperParams, FederatedAlgorithm
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import ModelHyperParams
from pfl.internal.ops import numpy_ops
from pfl.internal.ops.selector import set_framework_module
from pfl.metrics import Metrics
from pfl.model.base import Model
from pfl.stats import MappedVectorStatistics

USERS = 10_000


class Ones(Model):
    def __init__(self, numbers: int) -> None:
        self.vector = np.zeros(numbers, np.float32)

    def apply_model_update(self, statistics):
        self.vector = self.vector + statistics["vector"]
        return self, Metrics()


@dataclass(frozen=True)
class Rounds(AlgorithmHyperParams):
    rounds: int
    clients: int
    numbers: int


class AddOnes(FederatedAlgorithm):
    def get_next_central_contexts(self, model, iteration, params, model_train_params, model_eval_params=None):
        if iteration == params.rounds:
            return None, model, Metrics()
        context = CentralContext(
            iteration,
            False,
            params.clients,
            Population.TRAIN,
            params,
            model_train_params,
            None,
            seed=iteration,
        )
        return (context,), model, Metrics()

    def simulate_one_user(self, model, dataset, context):
        ones = np.ones(context.algorithm_params.numbers, np.float32)
        return MappedVectorStatistics({"vector": ones}, weight=1), Metrics()

    def process_aggregated_statistics(self, context, metrics, model, statistics):
        statistics.average()
        return model.apply_model_update(statistics)


def main() -> None:
    clients, rounds, numbers = map(int, sys.argv[1:4])
    set_framework_module(numpy_ops)
    users = itertools.cycle(range(USERS))
    data = FederatedDataset(
        lambda user: Dataset(raw_data=[np.array([user])], user_id=str(user)), (lambda: next(users))
    )
    start = time.process_time()
    AddOnes().run(
        Rounds(rounds, clients, numbers),
        SimulatedBackend(data, data),
        Ones(numbers),
        ModelHyperParams(),
        send_metrics_to_platform=False,
    )
    spent = time.process_time() - start
    print(json.dumps({"ms_per_client": spent / rounds / clients * 1e3}))


if __name__ == "__main__":
    main()
