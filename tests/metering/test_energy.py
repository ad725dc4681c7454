"""Energy and memory of a GPU with a faked NVML: which GPU, when measurements begin and end, and missing values."""

from __future__ import annotations

import resource
import sys
import time as clock
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import distillbench.metering.energy
from distillbench.errors import UserError
from distillbench.metering.energy import Energy, check_source, energy
from distillbench.metering.memory import (
    MIB,
    Before,
    SampledPeak,
    bytes_in_use,
    bytes_on_gpu,
    peak_gpu_mib,
    peak_rss_mib,
)
from distillbench.metering.nvml import compute_mode
from distillbench.training.compute import check_access

UUID = "d2f0c1a4-0000-0000-0000-00000000beef"


class NVMLError(Exception):
    pass


class Machine:
    """One GPU with a counter of energy and memory in use; `now` is the time in seconds."""

    def __init__(self) -> None:
        self.now, self.millijoules, self.used, self.waits, self.open = 0.0, 5_000_000, 100 * MIB, 0, 0
        self.allocated = self.peak = 10 * MIB
        self.uuid, self.errors = f"GPU-{UUID}", {"cut"}  # most GPUs cannot be partitioned
        self.cut = self.mode = 0

    def run(self, seconds: float, watts: float) -> None:
        self.now += seconds
        self.millijoules += round(1000 * seconds * watts)

    def ask(self, name: str, answer):
        if name in self.errors:
            raise NVMLError("Not Supported")
        return answer

    def handle(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise NVMLError("Not Found")
        return "handle"

    def init(self, by: int) -> None:
        self.ask("init", None)
        self.open += by

    def hold(self, size: int) -> None:
        self.allocated = size
        self.peak = max(self.peak, size)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    nvml = ModuleType("pynvml")
    nvml.NVMLError = NVMLError
    nvml.nvmlInit, nvml.nvmlShutdown = lambda: machine.init(1), lambda: machine.init(-1)
    nvml.nvmlDeviceGetHandleByUUID = machine.handle
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: machine.ask("energy", machine.millijoules)
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: machine.ask("memory", SimpleNamespace(used=machine.used))
    nvml.NVML_DEVICE_MIG_ENABLE = 1
    nvml.nvmlDeviceGetMigMode = lambda handle: machine.ask("cut", (machine.cut, 0))
    nvml.NVML_COMPUTEMODE_PROHIBITED, nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 2, 3
    nvml.nvmlDeviceGetComputeMode = lambda handle: machine.ask("mode", machine.mode)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    def wait(device) -> None:
        machine.waits += 1

    def reset(device) -> None:
        machine.peak = machine.allocated

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: machine.peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * machine.peak)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: machine.allocated)
    monkeypatch.setattr(distillbench.metering.energy, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    return machine


# --- energy ----------------------------------------------------------------------------------------------------------


def test_joules_of_the_block_and_of_nothing_else(machine):
    machine.run(50, 300)
    with energy("cuda") as watch:
        machine.run(10, 200)
        assert watch.used == Energy(2000.0)  # so far
        machine.run(5, 100)
    machine.run(50, 300)
    assert watch.used == Energy(2500.0)
    assert machine.waits >= 2 and machine.open == 0


def test_energy_in_a_pause_is_not_counted(machine):
    with energy("cuda") as watch:
        machine.run(10, 200)
        with watch.paused():
            machine.run(100, 400)
            assert watch.used == Energy(2000.0)
        machine.run(10, 100)
    assert watch.used == Energy(3000.0)


def test_a_short_measurement_has_no_value(machine):
    """The counter moves every 20 to 100 ms, and a pause does not lengthen the measurement."""
    with energy("cuda") as watch:
        machine.run(1.0, 300)
        with watch.paused():
            machine.run(60, 300)
        machine.run(0.5, 300)
    assert watch.used == Energy(None, "1.5 s are too short for the GPU's energy counter")


@pytest.mark.parametrize("error", ["init", "energy"])
def test_errors_of_nvml_are_the_reason(machine, error):
    machine.errors.add(error)
    with energy("cuda") as watch:
        machine.run(10, 300)
        with watch.paused():
            machine.run(10, 300)
    assert watch.used == Energy(None, "NVML: Not Supported") and machine.open == 0


def test_a_counter_that_fails_later_gives_no_value(machine):
    with energy("cuda") as watch:
        machine.run(10, 300)
        machine.errors.add("energy")
    assert watch.used == Energy(None, "NVML: Not Supported")


def test_the_gpu_is_found_by_its_uuid(machine):
    with energy("cuda:0") as watch:
        machine.run(10, 300)
    assert watch.used == Energy(3000.0)
    machine.uuid = "GPU-another"
    with energy("cuda:0") as watch:
        machine.run(10, 300)
    assert watch.used.reason == "NVML: Not Found" and machine.open == 0


def test_a_slice_of_a_gpu_has_its_own_memory_and_no_energy(machine):
    """It has its own UUID, but the counter is that of the whole GPU."""
    machine.uuid = f"MIG-{UUID}"
    with energy("cuda:0") as watch, peak_gpu_mib("cuda:0") as peak:
        machine.run(10, 300)
    assert watch.used == Energy(None, "NVML: a slice of a GPU (MIG) has no counter of energy, only the whole GPU has")
    assert peak.device.mib == 100


def test_a_partitioned_gpu_without_a_known_slice_has_no_values(machine):
    """If torch gives the UUID of the whole GPU, energy and memory would be those of all slices."""
    machine.errors.remove("cut")
    with energy("cuda") as watch:
        machine.run(10, 300)
    assert watch.used == Energy(3000.0)  # could be partitioned, and is not
    machine.cut = 1
    with energy("cuda") as watch, peak_gpu_mib("cuda") as peak:
        machine.run(10, 300)
    reason = "NVML: the GPU is cut into slices (MIG), and torch does not say which of them it uses"
    assert watch.used == Energy(None, reason) and (peak.device.mib, peak.device.reason) == (None, reason)
    assert peak.mib == 10 and machine.open == 0


def test_amd_gpus_have_no_nvml(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with energy("cuda") as watch:
        machine.run(10, 300)
    assert watch.used == Energy(None, "NVML knows only NVIDIA's GPUs") and compute_mode("cuda") == ""


def test_an_exclusive_gpu_is_an_error_for_runs_of_several_processes(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    alone = ["isolate=false", "evaluation.timing=inline"]
    check_access("cuda", alone)
    machine.mode = 3
    check_access("cpu", alone)
    check_access("cuda", [])
    with pytest.raises(UserError, match=r"cuda:0 is in the compute mode EXCLUSIVE_PROCESS.*isolate=false.*-c DEFAULT"):
        check_access("cuda:0", alone)
    (tmp_path / "control").touch()  # with the Multi-Process Service all clients are one process
    check_access("cuda", alone)
    machine.mode = 2
    with pytest.raises(UserError, match="PROHIBITED: no process may use it"):
        check_access("cuda", [])
    machine.errors.add("mode")
    check_access("cuda", alone)


def test_without_nvml(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with energy("cuda") as watch:
        machine.run(10, 300)
    assert watch.used == Energy(None, "NVML: the package nvidia-ml-py is not installed")


def test_no_energy_on_the_cpu():
    with energy("cpu") as watch, watch.paused():
        pass
    assert watch.used == Energy(None, "no GPU in use")


def test_errors_in_the_block_are_raised(machine):
    with pytest.raises(KeyError), energy("cuda") as watch:
        machine.run(10, 200)
        raise KeyError
    assert watch.used == Energy(2000.0) and machine.open == 0


def test_a_sum_is_known_if_both_parts_are():
    assert Energy(1.0) + Energy(2.0) == Energy(3.0)
    assert Energy(None, "a") + Energy(2.0) == Energy(2.0) + Energy(None, "a") == Energy(None, "a")


class Monitor:
    """The parts of zeus.monitor.ZeusMonitor that distillbench uses."""

    machine: Machine

    def __init__(self, gpu_indices, cpu_indices) -> None:
        assert cpu_indices == []
        (self.index,), self.windows = gpu_indices, {}

    def begin_window(self, key: str) -> None:
        assert key not in self.windows
        self.windows[key] = self.machine.millijoules

    def end_window(self, key: str):
        return SimpleNamespace(gpu_energy={self.index: (self.machine.millijoules - self.windows.pop(key)) / 1000})


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_zeus_measures_the_same(machine, monkeypatch, device, index):
    Monitor.machine = machine
    package, module = ModuleType("zeus"), ModuleType("zeus.monitor")
    module.ZeusMonitor = Monitor
    monkeypatch.setitem(sys.modules, "zeus", package)
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    check_source("zeus")
    with energy(device, "zeus") as watch:
        assert watch.meter.monitor.index == index
        machine.run(10, 200)
        with watch.paused():
            machine.run(100, 400)
        machine.run(10, 100)
    assert watch.used == Energy(3000.0)
    with energy("cpu", "zeus") as watch:
        pass
    assert watch.used == Energy(None, "no GPU in use")


def test_zeus_is_not_used_for_a_slice(machine, monkeypatch):
    module = ModuleType("zeus.monitor")
    module.ZeusMonitor = Monitor
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    machine.uuid = f"MIG-{UUID}"
    with energy("cuda", "zeus") as watch:
        machine.run(10, 200)
    assert watch.used.reason == "zeus: the device is a slice of a GPU (MIG), and zeus measures the whole GPU"


def test_errors_of_zeus_are_the_reason(machine, monkeypatch):
    def broken(**settings):
        raise RuntimeError("no permission")

    module = ModuleType("zeus.monitor")
    module.ZeusMonitor = broken
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    with energy("cuda", "zeus") as watch:
        machine.run(10, 200)
    assert watch.used == Energy(None, "zeus: no permission")


def test_zeus_that_fails_later_gives_no_value(machine, monkeypatch):
    Monitor.machine = machine
    module = ModuleType("zeus.monitor")
    module.ZeusMonitor = Monitor
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    with energy("cuda", "zeus") as watch:
        machine.run(10, 200)
        watch.meter.monitor.windows.clear()
    assert watch.used.joules is None and watch.used.reason.startswith("zeus:")


def test_a_missing_package_and_an_unknown_source_are_user_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus", None)
    with pytest.raises(UserError, match=r"pip install distillbench\[zeus\]"):
        check_source("zeus")
    with pytest.raises(UserError, match=r"pip install distillbench\[zeus\]"), energy("cpu", "zeus"):
        pass
    with pytest.raises(UserError, match=r"nvmll.*Did you mean 'nvml'"):
        check_source("nvmll")


# --- memory ----------------------------------------------------------------------------------------------------------


def wait_for(condition) -> None:
    end = clock.perf_counter() + 10
    while not condition():
        assert clock.perf_counter() < end
        clock.sleep(0.005)


def test_peaks_of_a_gpu(machine):
    machine.hold(500 * MIB)
    machine.hold(20 * MIB)
    with peak_gpu_mib("cuda") as peak:
        machine.hold(70 * MIB)
        machine.used = 900 * MIB
        wait_for(lambda: peak.device.mib == 900)
        machine.hold(30 * MIB)
        machine.used = 300 * MIB
        with peak.paused():
            machine.hold(800 * MIB)
            machine.used = 5000 * MIB
            clock.sleep(0.06)
            machine.hold(30 * MIB)
            machine.used = 300 * MIB
    assert (peak.mib, peak.reserved.mib, peak.device.mib) == (70, 140, 900)
    assert peak.reason == peak.reserved.reason == peak.device.reason == "" and machine.open == 0


def test_memory_of_earlier_work_is_not_part_of_a_peak(machine):
    machine.hold(500 * MIB)
    with peak_gpu_mib("cuda", own=20 * MIB) as peak:  # the teacher, of 500 MiB
        machine.hold(570 * MIB)
        with peak.paused():
            machine.hold(900 * MIB)
            machine.hold(550 * MIB)
    assert peak.mib == 90 and (peak.reserved.mib, peak.reserved.reason[:20]) == (None, "480 MiB are held by ")
    machine.hold(20 * MIB)
    with peak_gpu_mib("cuda", own=20 * MIB) as peak:
        machine.hold(30 * MIB)
    assert (peak.mib, peak.reserved.mib) == (30, 60)


def test_tensors_take_whole_blocks_of_a_gpu_and_count_once():
    def tensor(address: int, size: int, kind: str = "cuda") -> SimpleNamespace:
        return SimpleNamespace(data_ptr=lambda: address, nbytes=size, device=torch.device(kind))

    assert bytes_on_gpu([tensor(0, 4), tensor(512, 1024), tensor(0, 4), tensor(4096, 99, "cpu")]) == 512 + 1024


def test_memory_before_sampling_is_not_part_of_its_peaks(machine):
    machine.used = 900 * MIB
    assert bytes_in_use("cuda") == 900 * MIB and bytes_in_use("cpu") is None

    def peaks(before: Before):
        with peak_gpu_mib("cuda") as peak:
            pass
        before.subtract_from(peak)
        return peak.mib, peak.reserved.mib, peak.device.mib, peak.device.reason

    assert peaks(Before(in_use=300 * MIB)) == (10, 20, 600, "")
    assert peaks(Before()) == (10, 20, None, "not known before the measurement")
    gone = "other processes gave memory back during the measurement"
    assert peaks(Before(in_use=1000 * MIB)) == (10, 20, None, gone)
    shared = "earlier work of this process holds memory too (evaluation.timing=inline)"
    assert peaks(Before(tensors=4 * MIB)) == (6, None, None, shared)
    machine.errors.add("memory")
    assert bytes_in_use("cuda") is None and peaks(Before())[3] == "NVML: Not Supported"


@pytest.mark.parametrize("error", ["init", "memory"])
def test_errors_of_nvml_are_the_reason_for_missing_memory(machine, error):
    machine.errors.add(error)
    with peak_gpu_mib("cuda") as peak, peak.paused():
        pass
    assert peak.mib == 10 and (peak.device.mib, peak.device.reason) == (None, "NVML: Not Supported")


def test_no_gpu_memory_on_the_cpu():
    with peak_gpu_mib("cpu") as peak, peak.paused():
        pass
    for each in (peak, peak.reserved, peak.device):
        assert (each.mib, each.reason) == (None, "no GPU in use")


def test_memory_in_a_pause_is_not_sampled():
    used = SimpleNamespace(bytes=100 * MIB)
    with SampledPeak(lambda: used.bytes) as peak:
        with peak.paused():
            used.bytes = 500 * MIB
            clock.sleep(0.06)
            used.bytes = 120 * MIB
        wait_for(lambda: peak.mib == 120)
        used.bytes = 180 * MIB
        wait_for(lambda: peak.mib == 180)
        used.bytes = 90 * MIB
    assert peak.mib == 180 and peak.reason == ""


def test_resident_memory_of_the_process():
    """Against the kernel's count. The growth is not tested: pages may be reclaimed at any time."""
    pages = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB
    before = pages()
    with peak_rss_mib() as peak:
        held = torch.ones(20 * MIB)  # 80 MiB
        now = pages()
        wait_for(lambda: peak.mib > now - 8)
        del held
    assert 80 < peak.mib < max(before, now, pages()) + 100 and peak.reason == ""
