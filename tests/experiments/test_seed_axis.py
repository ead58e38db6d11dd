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
    sink.write(3, {"loss": [1.0, 2.0], "success/task1": [0.25, 0.5], "seconds": 9.0})
    assert kept[0].rows == [(3, {"loss": 1.0, "success/task1": 0.25, "seconds": 9.0})]
    assert kept[10].rows == [(3, {"loss": 2.0, "success/task1": 0.5, "seconds": 9.0})]
    assert sink.resume(3) == {"seconds": 2.0, "step": 3}
    sink.close()
    assert kept[0].closed and kept[10].closed


def test_no_batch_of_a_seed_is_shared_among_threads():
    """Of eight CPU devices as many as divide the seeds."""
    sizes = {seeds: seed_axis.make_mesh("data=-1", seeds).size for seeds in (1, 2, 6, 8, 12)}
    assert sizes == {1: 1, 2: 2, 6: 2, 8: 8, 12: 4}
