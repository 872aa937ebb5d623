"""Client rows -> the next global row: a weighted average by one kernel or a robust rule, then a
server optimiser.

Letters: K clients in the round, P entries of a row.
"""

import math

import torch

from semanticfl_ref.config import Config
from semanticfl_ref.errors import unknown
from semanticfl_ref.federated.flat import RowLayout
from semanticfl_ref.federated.methods.method import Memory
from semanticfl_ref.kernels.weighted_average import RunningAverage

CHUNK = 2**20  # entries of each row that are sorted at a time


class Aggregator:
    """Takes the round's rows one by one, in ascending client number: in O(P) memory for the mean,
    in O(K P) for the robust rules, which need all rows.

    Args:
        start_P: float32 [P], the row that the clients started from.
        rule: "mean", weighted; "median" or "trimmed-mean" of every entry, BatchNorm's running
            averages too, each client counting once.
        trim: share of the clients that trimmed-mean cuts at each end.
        apart: int64 indices of entries that the updates' norms leave out; None = none.

    Attributes:
        clients: whose rows were added.
        weight: of these rows, in all.
        update_norms: client -> |row - start|, measured while the row is added: it is read from
            memory once.
        mean_update_norm: |aggregate - start|, once there is one.

    Source: FedAvg (McMahan et al. 2017); Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust
        Distributed Learning. ICML 2018, Definitions 1 and 2.
    The robust rules bear fewer hostile clients than half, or than `trim`. Under label skew an
    honest client is an outlier too, and is lost with them."""

    def __init__(
        self,
        start_P: torch.Tensor,
        rule: str = "mean",
        trim: float = 0.0,
        apart: torch.Tensor | None = None,
    ):
        if rule not in ("mean", "median", "trimmed-mean"):
            raise unknown("federation.aggregation", rule, ("mean", "median", "trimmed-mean"))
        self._average, self._rule, self._trim = (
            RunningAverage(len(start_P), start_P.device),
            rule,
            trim,
        )
        self._start_P, self._apart = start_P, apart
        self._rows: list[torch.Tensor] = []
        self._weighted_norms = 0.0
        self.clients: list[int] = []
        self.weight = 0.0
        self.update_norms: dict[int, float] = {}

    def add(self, client: int, row_P: torch.Tensor, weight: float) -> bool:
        """Add a client's row, `weight` relative to the other clients of the round; False for a row
        with NaN or infinity, which is left out.
        """
        assert not self.clients or client > self.clients[-1], (
            "rows must come in ascending client number: the sum's order is the result"
        )
        norm = self._update_norm(row_P, weight if self._rule == "mean" else 0.0)
        if norm is None:
            return False
        self._rows += [row_P] if self._rule != "mean" else []
        self.clients.append(client)
        self.weight += weight
        self._weighted_norms += weight * norm
        self.update_norms[client] = norm
        return True

    def finish(self) -> torch.Tensor:
        """The aggregate, float32 [P].

        Equation (average) [S; FedAvg, Alg. 1]: w = sum_k n_k w_k / sum_k n_k
        Test: tests/federated/test_method_equations.py::test_fedavg_weighs_by_images
        """
        if self._rule == "mean":
            aggregate_P = self._average.finish()
        else:
            clients = len(self._rows)
            aggregate_P = trimmed_mean(
                self._rows,
                (clients - 1) // 2 if self._rule == "median" else trimmed(self._trim, clients),
            )
        self.mean_update_norm = self._update_norm(aggregate_P, 0.0)
        return aggregate_P

    @property
    def agreement(self) -> float | None:
        """|aggregate - start| over the weighted mean of |row - start|: of the mean 1 when all
        updates are one, 1 / sqrt(K) when K equal ones are orthogonal, 0 when they cancel; None when
        nobody moved."""
        return (
            self.mean_update_norm * self.weight / self._weighted_norms
            if self._weighted_norms
            else None
        )

    def _update_norm(self, row_P: torch.Tensor, weight: float) -> float | None:
        """|row - start| of a row that is added with a weight, 0 = only looked at; None for one with
        NaN or infinity, which is not added.
        """
        seen = self._average.add(row_P, weight, self._start_P)
        if int(seen.non_finite):
            return None
        squared = float(seen.squared_update_norm)
        if self._apart is not None:
            squared -= float(
                (row_P[self._apart].double() - self._start_P[self._apart]).square().sum()
            )
        return math.sqrt(max(squared, 0.0))


def trimmed(share: float, clients: int) -> int:
    """How many of the clients are cut at each end: floor(share * clients), and 0.29 * 100 is 29."""
    return math.floor(round(share * clients, 9))


def trimmed_mean(rows: list[torch.Tensor], cut: int) -> torch.Tensor:
    """The mean of every entry without its `cut` smallest and largest values, float32 [P]; all but
    one or two cut is the median.

    Equation (trimmed-mean) [Yin et al. 2018, Definitions 1 and 2]: w_p = mean of the sorted w_1p
        ... w_Kp without the `cut` first and last
    Test: tests/federated/test_aggregation.py::test_median_and_trimmed_mean_on_numbers

    Args:
        rows: K tensors float32 [P]; K > 2 cut.
    """
    parts = [
        torch.stack(part_K).sort(0).values[cut : len(rows) - cut].double().mean(0)
        for part_K in zip(*(row.split(CHUNK) for row in rows), strict=True)
    ]
    return torch.cat(parts).float()


def server_memory(config: Config, row_P: torch.Tensor) -> Memory:
    """What the server optimiser keeps: nothing, a velocity [P], or Adam's two moments [P]."""
    zero_P = torch.zeros(len(row_P))
    return {
        "none": {},
        "fedavgm": {"server.velocity": zero_P},
        "fedadam": {"server.first_moment": zero_P, "server.second_moment": zero_P.clone()},
    }[config.federation.server_optimizer]


def server_step(
    config: Config, layout: RowLayout, memory: Memory, row_P: torch.Tensor, average_P: torch.Tensor
) -> torch.Tensor:
    """The next global row from the last one and the clients' average; writes the optimiser's rows
    into the memory.

    Equation (server-step) [Hsu et al. 2019; Reddi et al. 2021, Alg. 2]:
        Delta = average - w
        none      w + Delta, which is the average itself
        fedavgm   v <- beta v + Delta,                              w + eta v
        fedadam   m <- beta_1 m + (1 - beta_1) Delta,
                  v <- beta_2 v + (1 - beta_2) Delta^2,             w + eta m / (sqrt(v) + tau)
    Test: tests/federated/test_aggregation.py::test_fedavgm_on_numbers,
        tests/federated/test_aggregation.py::test_fedadam_on_numbers

    Source: Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated
        Visual Classification. arXiv 1909.06335; Reddi et al.:
    Adaptive Federated Optimization. ICLR 2021, Algorithm 2 (no bias correction). fedavgm with beta
    = 0, eta = 1 is the average within rounding. `Choice:` the optimiser moves parameters;
    BatchNorm's running averages take the clients' average: they are no directions, and Adam could
    make a variance negative. `Choice:` v starts at zero, where the paper has at least tau^2."""
    o, kind = config.server, config.federation.server_optimizer
    if kind == "none":
        return average_P
    rate = o.learning_rate or {"fedavgm": 1.0, "fedadam": 0.01}[kind]
    change_P = average_P - row_P
    change_P[layout.buffers] = 0
    change_P = change_P.cpu()
    if kind == "fedavgm":
        step_P = memory["server.velocity"].mul_(o.momentum).add_(change_P)
    else:
        first_P = (
            memory["server.first_moment"].mul_(o.momentum).add_(change_P, alpha=1 - o.momentum)
        )
        second_P = (
            memory["server.second_moment"]
            .mul_(o.beta_2)
            .addcmul_(change_P, change_P, value=1 - o.beta_2)
        )
        step_P = first_P / (second_P.sqrt() + o.tau)
    next_P = row_P + rate * step_P.to(row_P.device)
    next_P[layout.buffers] = average_P[layout.buffers]
    return next_P
