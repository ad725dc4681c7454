"""The simulated GPUs themselves: run by test_simulated_cuda.py."""

from __future__ import annotations

import copy
import gc
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from distillbench.simulated_cuda import by_place, install, recording

install(2, total_bytes=2**30)
torch.set_num_threads(1)

from simulated import check, main  # noqa: E402


def message(call: Callable[[], Any]) -> str:
    """The error that it raises, or ""."""
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def gpu(*shape: int, index: int = 0) -> torch.Tensor:
    return torch.ones(*shape, device=f"cuda:{index}")


@check
def mixed() -> dict[str, str]:
    x, cpu, number = gpu(4, 3), torch.ones(4, 3), torch.tensor(2.0)
    indices = torch.tensor([0, 1])
    net = nn.Linear(3, 2)
    return {
        "add": message(lambda: x + cpu),
        "other GPU": message(lambda: x + gpu(4, 3, index=1)),
        "mm": message(lambda: x @ cpu.T),
        "cat": message(lambda: torch.cat([x, cpu])),
        "stack of numbers": message(lambda: torch.stack([x.sum(), number])),
        "where": message(lambda: torch.where(x > 0, x, cpu)),
        "index_select": message(lambda: x.index_select(0, indices)),
        "embedding": message(lambda: nn.functional.embedding(indices, x)),
        "gather": message(lambda: x.gather(0, indices[None])),
        "CPU indexed by GPU": message(lambda: cpu[indices.to("cuda")]),
        "network": message(lambda: net(x)),
        "in place": message(lambda: cpu.add_(x)),
        "foreach": message(lambda: torch._foreach_add([x], [cpu])),
        "hook": message(lambda: _with_hook(x, cpu).backward()),
        "gradient": message(lambda: (x.requires_grad_() * 2).backward(cpu)),
    }


def _with_hook(x: torch.Tensor, cpu: torch.Tensor) -> torch.Tensor:
    y = x.detach().requires_grad_() * 2
    y.register_hook(lambda gradient: gradient * cpu)
    return y.sum()


@check
def allowed() -> dict[str, str]:
    x, number = gpu(4, 3), torch.tensor(2.0)
    return {
        "number": message(lambda: x * number + torch.tensor(1)),
        "where": message(lambda: torch.where(x > 0, x, number)),
        "indices": message(lambda: x[torch.tensor([0, 1])]),
        "copy": message(lambda: x.copy_(torch.zeros(4, 3))),
        "back": message(lambda: torch.zeros(4, 3).copy_(x)),
        "moved": message(
            lambda: x + torch.ones(4, 3).to(x) + torch.ones(4, 3).cuda() + torch.ones(4, 3, device="cuda")
        ),
        "foreach by a number": message(lambda: torch._foreach_mul_([x], number)),
        "set": message(lambda: x.__setitem__((0, 0), 3.0)),
        "zeros within operators": message(lambda: gpu(4, 2).requires_grad_().unbind()[0].sum().backward()),
        "one_hot": message(lambda: nn.functional.one_hot(torch.arange(3, device="cuda"), 4) + gpu(4)),
        "causal attention": message(
            lambda: nn.functional.scaled_dot_product_attention(*[gpu(1, 2, 4, 8)] * 3, is_causal=True) + gpu(8)
        ),
        "context": message(lambda: _in_context(x)),
        "like": message(
            lambda: x + torch.zeros_like(x) + x.new_ones(3) + torch.empty_like(torch.ones(3), device="cuda")
        ),
    }


def _in_context(x: torch.Tensor) -> torch.Tensor:
    with torch.device("cuda"):
        return x + torch.ones(4, 3)


@check
def random() -> dict[str, Any]:
    ours, theirs = torch.Generator("cuda"), torch.Generator()
    before = torch.get_rng_state()
    torch.randn(3, device="cuda")
    gpu(3).normal_()
    nn.functional.dropout(gpu(3))
    return {
        "GPU's by a CPU generator": message(lambda: torch.randn(3, device="cuda", generator=theirs)),
        "CPU's by a GPU generator": message(lambda: torch.randn(3, generator=ours)),
        "in place": message(lambda: gpu(3).uniform_(generator=theirs)),
        "in place on the CPU": message(lambda: torch.ones(3).uniform_(generator=ours)),
        "another GPU's": message(lambda: torch.randn(3, device="cuda:1", generator=ours)),
        "right": message(lambda: gpu(3).uniform_(generator=ours) + torch.randn(3, device="cuda", generator=ours)),
        "CPU's generator moved": not torch.equal(before, torch.get_rng_state()),
        "device": str(ours.device),
        "is a generator": isinstance(ours, torch.Generator) and isinstance(theirs, torch.Generator),
        "as the CPU's": torch.equal(
            torch.randn(3, device="cuda", generator=ours.manual_seed(1)).cpu(),
            torch.randn(3, generator=theirs.manual_seed(1)),
        ),
    }


@check
def waits() -> dict[str, list[str]]:
    """The waits of each call."""
    x, indices = gpu(4, 3), torch.tensor([0, 1])
    pinned, pageable = torch.ones(4, 3).pin_memory(), torch.ones(4, 3)
    target = torch.empty(4, 3, pin_memory=True)
    counts = torch.tensor([1, 2]).cuda()
    event = torch.cuda.Event()
    event.record()
    calls: dict[str, Callable[[], Any]] = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool((x > 0).all()),
        "float": lambda: float(x[0, 0]),
        "tolist": lambda: x.tolist(),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 0],
        "put at a mask": lambda: x.__setitem__(x > 2, 0.0),
        "equal": lambda: torch.equal(x, x),
        "allclose": lambda: torch.allclose(x, x),
        "cpu": lambda: x.cpu(),
        "print": lambda: repr(x),
        "event": lambda: event.synchronize(),
        "stream": lambda: torch.cuda.current_stream().synchronize(),
        "device": lambda: torch.cuda.synchronize(),
        "repeat_interleave": lambda: counts.repeat_interleave(counts),
        "CPU's indices": lambda: x[indices],
        "tensor": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "pageable": lambda: pageable.to("cuda"),
        "pageable, non_blocking": lambda: pageable.to("cuda", non_blocking=True),
        "pinned, blocking": lambda: pinned.to("cuda"),
        "pinned, non_blocking": lambda: pinned.to("cuda", non_blocking=True),
        "part of pinned": lambda: pinned[1:].to("cuda", non_blocking=True),
        "to pinned, non_blocking": lambda: target.copy_(x, non_blocking=True),
        "arithmetic": lambda: (x * 2 + torch.tensor(1.0)).clamp(min=0).mean(),
        "factories": lambda: torch.full((), 3.0, device="cuda") + torch.arange(3, device="cuda"),
        "repeat_interleave of a size": lambda: counts.repeat_interleave(counts, output_size=3),
        "where": lambda: torch.where(x > 0, x, 0.0),
        "set": lambda: x.__setitem__(0, 1.0),
        "query": lambda: event.query(),
        "other GPU": lambda: x.to("cuda:1"),
    }
    found = {}
    for name, call in calls.items():
        with recording() as record:
            call()
        found[name] = [wait.what for wait in record.waits]
    return found


@check
def copies() -> list[Any]:
    x, pinned = gpu(4, 3), torch.ones(2).pin_memory()
    with recording() as record:
        x.cpu()
        pinned.to("cuda", non_blocking=True)
        x.to("cuda:1")
    return [[c.direction, c.bytes, c.pinned, c.blocking, c.place.function] for c in record.copies]


@check
def places() -> dict[str, Any]:
    x, linear = gpu(4, 3), nn.Linear(3, 3).cuda()
    with recording() as record:
        for _ in range(3):
            y = linear(x).sum()
        y.backward()
        y.view(1).detach()
        y.item()
    by_line = by_place(record.launches)
    line = max(by_line, key=lambda place: by_line[place])
    parts = {part: record.launched(part) for part in ("network", "backward", "outside")}
    return {"file": Path(line.file).name, "most": by_line[line], "parts": parts, "waits": len(by_place(record.waits))}


@check
def graphs() -> dict[str, Any]:
    x, weight = torch.arange(3.0, device="cuda"), gpu(3)
    foreign = torch.Generator("cuda").manual_seed(0)
    graph, with_generator = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    pinned = torch.ones(3).pin_memory()
    with torch.no_grad(), torch.cuda.graph(graph):
        capturing = torch.cuda.is_current_stream_capturing()
        y = x * weight + torch.ones(3, device="cuda")
        y[:1].add_(10)
        z = pinned.to("cuda", non_blocking=True)
    x.fill_(2)
    weight.mul_(3)
    pinned.fill_(5)
    graph.replay()
    with_generator.register_generator_state(foreign)
    with torch.cuda.graph(with_generator):
        noise = torch.randn(2, device="cuda", generator=foreign)
    with_generator.replay()
    first = noise.tolist()
    with_generator.replay()

    def captured(call: Callable[[], Any], mode: str = "global") -> str:
        def capture() -> None:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
                call()

        return message(capture)

    pin = torch.ones(3).pin_memory
    with ThreadPoolExecutor(1) as thread:
        elsewhere = {mode: captured(lambda: thread.submit(pin).result(), mode) for mode in ("global", "thread_local")}
    pool = torch.cuda.graph_pool_handle()
    of_pool = torch.cuda.CUDAGraph()
    with torch.cuda.graph(of_pool, pool):
        pass
    del of_pool

    return {
        "replayed": [y.tolist(), z.tolist()],
        "capturing": [capturing, torch.cuda.is_current_stream_capturing()],
        "new noise": first != noise.tolist(),
        "item": captured(lambda: x.sum().item()),
        "pageable": captured(lambda: torch.ones(3).to("cuda", non_blocking=True)),
        "tensor": captured(lambda: torch.tensor([1.0], device="cuda")),
        "cpu": captured(lambda: x.cpu()),
        "synchronize": captured(torch.cuda.synchronize),
        "generator": captured(lambda: torch.randn(2, device="cuda", generator=torch.Generator("cuda"))),
        "factory": captured(lambda: torch.zeros(3, device="cuda")),
        "pinned": captured(pin, "thread_local"),
        "pinned elsewhere": elsewhere,
        "pool of freed graphs": message(lambda: torch.cuda.CUDAGraph().capture_begin(pool)),
        "not captured": message(torch.cuda.CUDAGraph().replay),
    }


@check
def memory() -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    x = gpu(1024, 1024)
    view = x[1:].T
    held = torch.cuda.memory_allocated() - start
    del x
    still = torch.cuda.memory_allocated() - start
    (view * 2).sum()
    del view
    free, total = torch.cuda.mem_get_info()
    import pynvml

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(0).uuid
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return {
        "held": held,
        "by a view": still,
        "after": torch.cuda.memory_allocated() - start,
        "peak": torch.cuda.max_memory_allocated() - start,
        "reserved": torch.cuda.memory_reserved() >= torch.cuda.max_memory_allocated(),
        "free": total - free == torch.cuda.memory_reserved(),
        "nvml": pynvml.nvmlDeviceGetMemoryInfo(handle).used > torch.cuda.memory_reserved(),
        "joules": pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) >= 0,
        "no such": message(lambda: _no_such_gpu(pynvml)),
        "out of memory": type(_error(lambda: gpu(2**29))).__name__,
        "other GPU": torch.cuda.memory_allocated("cuda:1"),
    }


def _no_such_gpu(pynvml: Any) -> None:
    try:
        pynvml.nvmlDeviceGetHandleByUUID("GPU-1")
    except pynvml.NVMLError as error:
        raise ValueError(error) from error


def _error(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


@check
def training() -> dict[str, Any]:
    """Optimisers and scaled losses: bit-identical to the CPU?"""
    found: dict[str, Any] = {}
    for name, settings in {"fused": {"fused": True}, "foreach": {"foreach": True}, "for": {"foreach": False}}.items():
        for scaled in (False, True):
            weights = [_trained(device, settings, scaled) for device in ("cpu", "cuda")]
            found[f"{name}, scaled {scaled}"] = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return found


def _trained(device: str, settings: dict[str, bool], scaled: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
    x = torch.randn(16, 3)
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, **settings)
    scaler = torch.amp.GradScaler(device, enabled=scaled)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            out = net(x.to(device))
        scaler.scale(out.float().square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return [weight.detach().cpu() for weight in net.parameters()]


@check
def modules() -> dict[str, Any]:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weights = list(net.parameters())
    net.to("cuda")
    same = all(a is b for a, b in zip(weights, net.parameters(), strict=True))
    twin = copy.deepcopy(net)
    twin.to(memory_format=torch.channels_last)
    twin.double().float()
    twin.load_state_dict(net.cpu().state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        safetensors.torch.save_file({k: v.contiguous() for k, v in twin.state_dict().items()}, path)
        loaded = safetensors.torch.load_file(path, device="cuda:0")
        torch.save({"a": torch.ones(2)}, path.with_suffix(".pt"))
        pickled = torch.load(path.with_suffix(".pt"), map_location="cuda:1", weights_only=True)
    return {
        "same objects": same,
        "copy": str(twin[0].weight.device),
        "channels_last": twin[0].weight.is_contiguous(memory_format=torch.channels_last),
        "back": str(net[0].weight.device),
        "loaded": sorted({str(tensor.device) for tensor in loaded.values()}),
        "pickled": str(pickled["a"].device),
        "parameter": isinstance(twin[0].weight, nn.Parameter),
        "pickle": message(lambda: pickle.dumps(gpu(2))),
        "numpy": message(lambda: gpu(2).numpy()),
        "gradient over a copy": _gradient_over_a_copy(),
    }


def _gradient_over_a_copy() -> list[Any]:
    x = torch.ones(3, requires_grad=True)
    (x.to("cuda") * 2).cpu().sum().backward()
    return [x.grad.tolist(), str(x.grad.device)]


main()
