import itertools
import threading

import numpy as np
import torch

from dimmix import Classifier
from dimmix.images import ImageError
from dimmix.stream import load_batches, run_batches


class Lanes:
    """A runtime of so many lanes; `started` holds the threads that asked how to begin."""

    def __init__(self, lanes):
        self.number, self.started = lanes, []

    def lanes(self, batch_size):
        return self.number

    def lane(self, lanes):
        return lambda: self.started.append((threading.current_thread().name, lanes))


def load(number):
    if number % 7 == 3:
        raise ImageError(str(number), "broken")
    return np.array([number])


def counting(taken):
    """0, 1, 2 and on; `taken` holds those that were asked for."""
    for number in itertools.count():
        taken.append(number)
        yield number


def test_loading_works_ahead_by_a_bounded_number_and_keeps_the_order():
    taken = []
    batches = load_batches(counting(taken), lambda number: np.array(number), batch_size=8, workers=2)
    assert [item for item, _ in next(batches)] == list(range(8))
    assert len(taken) <= 8 * 4
    batches.close()


def test_lanes_answer_as_one_model_does_in_order_and_past_errors():
    def answers(runtime, count, workers=None):
        batches = run_batches(range(count), load, lambda rows: 2 * np.stack(rows), runtime, 8, workers)
        rows = [pair for batch in batches for pair in batch]
        return [(item, str(row) if isinstance(row, ImageError) else row.item()) for item, row in rows]

    for count in (0, 1, 3, 4, 5, 8, 29):
        expected = [(n, f"{n}: broken" if n % 7 == 3 else 2 * n) for n in range(count)]
        assert answers(Lanes(1), count) == expected
        assert answers(Lanes(2), count) == expected
    side_by_side = Lanes(2)
    answers(side_by_side, 29)
    assert [lanes for name, lanes in side_by_side.started if name != threading.current_thread().name] == [2, 2]
    few, asked = Lanes(2), Lanes(2)
    answers(few, 4)  # one part: the model has all cores
    answers(asked, 29, workers=2)
    assert few.started == asked.started == []


def test_lanes_take_a_bounded_number_ahead():
    taken = []
    batches = run_batches(counting(taken), lambda number: np.array([number]), np.stack, Lanes(2), 8)
    assert [item for item, _ in next(batches)] == [0, 1, 2, 3]
    assert len(taken) <= 8 * 4
    batches.close()


def on_cores(monkeypatch, count):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(count)), raising=False)


def test_lanes_share_torchs_threads_and_give_them_back(tiny, cifar_rows, monkeypatch):
    classifier = Classifier(tiny.architecture, "cpu", tiny.checkpoint)
    images = [image for image, _ in cifar_rows[:40]]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        on_cores(monkeypatch, 1)  # this thread is bound to one of torch's cores, as OMP_PROC_BIND=true does
        assert classifier.runtime.lanes(64) == 1
        on_cores(monkeypatch, 4)
        assert classifier.runtime.lanes(64) == 2
        seen = []
        logits = classifier.runtime.logits

        def run(prepared):
            seen.append((len(prepared), torch.get_num_threads()))
            return logits(classifier.to_batch(prepared))

        batches = run_batches(images, classifier.prepare, run, classifier.runtime, 32)
        rows = np.stack([row for batch in batches for _, row in batch])
        assert seen == [(16, 1), (16, 1), (8, 1)]
        assert torch.get_num_threads() == 2
        fresh = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert fresh == [2]
    finally:
        torch.set_num_threads(before)
    whole = logits(classifier.to_batch([classifier.prepare(image) for image in images]))
    np.testing.assert_allclose(rows, whole, rtol=1e-4, atol=1e-4)
