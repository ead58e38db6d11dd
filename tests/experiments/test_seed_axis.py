"""Several seeds as one program: whose numbers are whose."""

from __future__ import annotations

from experiments import seed_axis


class Kept:
    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def resume(self, step):
        return {"seconds": 2.0, "step": step}

    def close(self):
        self.closed = True


def test_each_seed_has_its_own_numbers():
    kept = {0: Kept(), 10: Kept()}
    sink = seed_axis.BySeed({seed: [own] for seed, own in kept.items()})
    sink.write(3, {"0/loss": 1.0, "10/loss": 2.0, "10/success/task1": 0.5, "seconds": 9.0})
    assert kept[0].rows == [(3, {"loss": 1.0, "seconds": 9.0})]
    assert kept[10].rows == [(3, {"loss": 2.0, "success/task1": 0.5, "seconds": 9.0})]
    assert sink.resume(3) == {"seconds": 2.0, "step": 3}
    sink.close()
    assert kept[0].closed and kept[10].closed
