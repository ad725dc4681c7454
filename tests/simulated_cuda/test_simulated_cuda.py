"""The simulated GPUs behave as CUDA does: mixed devices, waits, copies, graphs, memory."""

from __future__ import annotations

import pytest

from simulated import Results, results_of

NO_WAIT = (
    "pinned, non_blocking", "part of pinned", "to pinned, non_blocking", "arithmetic", "factories",
    "repeat_interleave of a size", "where", "set", "query", "other GPU",
)  # fmt: skip


@pytest.fixture(scope="module")
def results() -> Results:
    return results_of("simulated_devices.py")


def test_operators_raise_for_tensors_of_two_devices(results):
    for name, message in results["mixed"].items():
        assert message.startswith("DevicesMixed: Expected all tensors to be on the same device"), name
        assert "simulated_devices.py:" in message, name
    assert "cuda:0 (4, 3) and cpu (4, 3)! (operator aten::add at" in results["mixed"]["add"]
    assert "cuda:0" in results["mixed"]["other GPU"] and "cuda:1" in results["mixed"]["other GPU"]


def test_mixed_devices_that_torch_allows_work(results):
    assert set(results["allowed"].values()) == {""}, results["allowed"]


def test_generators_belong_to_a_device(results):
    found = results["random"]
    wrong = "RuntimeError: Expected a '{}' device type for generator but found '{}'"
    for name in ("GPU's by a CPU generator", "in place"):
        assert found[name].startswith(wrong.format("cuda", "cpu")), name
    for name in ("CPU's by a GPU generator", "in place on the CPU"):
        assert found[name].startswith(wrong.format("cpu", "cuda")), name
    assert found["another GPU's"].startswith(wrong.format("cuda:1", "cuda:0"))
    assert not found["right"] and not found["CPU's generator moved"]
    assert found["device"] == "cuda:0" and found["is a generator"] and found["as the CPU's"]


def test_waits_are_counted_exactly(results):
    assert {name for name, waits in results["waits"].items() if not waits} == set(NO_WAIT)
    assert all(len(waits) == 1 for name, waits in results["waits"].items() if name not in NO_WAIT), results["waits"]


def test_copies_have_direction_size_and_memory(results):
    assert results["copies"] == [
        ["device to host", 48, False, True, "copies"],
        ["host to device", 8, True, False, "copies"],
        ["device to device", 48, False, False, "copies"],
    ]


def test_launches_have_a_line_and_a_part_of_the_step(results):
    found = results["places"]
    assert found["file"] == "simulated_devices.py" and found["most"] == 6  # three products and three sums
    assert found["parts"]["network"] == 0 and found["parts"]["backward"] > 0 and found["waits"] == 1
    assert found["parts"]["outside"] == 6 + 2  # the ones that a backward pass begins with, and the value that is read


def test_graphs_replay_on_the_same_memory_and_raise_for_waits(results):
    found = results["graphs"]
    assert found["replayed"] == [[17.0, 7.0, 7.0], [5.0, 5.0, 5.0]]
    assert found["capturing"] == [True, False] and found["new noise"] and not found["factory"]
    elsewhere = found["pinned elsewhere"]
    for name in ("item", "pageable", "tensor", "cpu", "synchronize", "pinned"):
        assert "operation not permitted when stream is capturing" in found[name], name
    assert "stream is capturing" in elsewhere["global"] and not elsewhere["thread_local"]
    assert "all graphs of the pool are freed" in found["pool of freed graphs"]
    assert "register_generator_state" in found["generator"] and "without a preceding" in found["not captured"]


def test_memory_is_counted_over_live_tensors(results):
    found, size = results["memory"], 4 * 1024**2
    assert found["held"] == found["by a view"] == size and found["after"] == 0
    assert 2 * size - 4096 <= found["peak"] <= 2 * size + 1024
    assert found["reserved"] and found["free"] and found["nvml"] and found["joules"]
    assert found["no such"] == "ValueError: Not Found" and found["out of memory"] == "OutOfMemoryError"
    assert found["other GPU"] == 0


def test_optimisers_and_scaled_losses_equal_the_cpu(results):
    assert len(results["training"]) == 6 and all(results["training"].values()), results["training"]


def test_modules_move_copy_and_load(results):
    found = results["modules"]
    assert found["same objects"] and found["parameter"] and found["channels_last"]
    assert (found["copy"], found["back"], found["pickled"]) == ("cuda:0", "cpu", "cuda:1")
    assert found["loaded"] == ["cuda:0"] and "cannot be pickled" in found["pickle"]
    assert "Use Tensor.cpu()" in found["numpy"]
    assert found["gradient over a copy"] == [[2.0, 2.0, 2.0], "cpu"]
