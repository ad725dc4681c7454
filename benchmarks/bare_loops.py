"""The best hand-written PyTorch loop for each method, at its default settings: the reference for the harness's speed.

The mathematics is that of plugins/, where the symbols are explained; nothing of distillbench's training is used. Each
network is called directly, as ``network(x, time)``. It predicts v on the cosine schedule: with alpha = cos(theta) and
sigma = sin(theta), x_0 = alpha x - sigma v, eps = sigma x + alpha v, and DDIM from theta to phi gives
cos(phi - theta) x + sin(phi - theta) v. So every target is a sum of images with coefficients that depend on the time
only. They are computed ahead in float64, one row of a table for each time of a grid.

A loop is a generator that yields after each step. Random numbers come from the task's generators, in the order in which
the harness's Batch draws them: the weights at the end are the harness's, up to rounding
(tests/training/test_bare_loops.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from distillbench.diffusion.embeddings import TimeEmbedding
from distillbench.training.method import Batch, Method, Read

LOG_EVERY = 50  # steps between readings of the loss
THETA_0, THETA_1 = math.atan(math.exp(-10)), math.atan(math.exp(10))  # log SNR from 20 to -20


@dataclass
class Task:
    """What a loop trains on. `draws` is on the device where the random numbers are to be made."""

    teacher: nn.Module  # frozen; students start as copies of it
    settings: Any  # of the method: learning rate, ...
    shape: tuple[int, int, int]
    batch: int
    images: int  # of the whole training
    draws: torch.Generator  # noise and times
    device: str = "cpu"
    real: Tensor | None = None  # (N,C,H,W) in [-1, 1]
    order: torch.Generator | None = None  # of the real images
    pairs: tuple[Tensor, Tensor] | None = None  # noise, and the teacher's samples
    fresh: Callable[[], nn.Module] | None = None  # a network with fresh weights
    embedding: nn.Module | None = None  # BOOT's embedding of the time
    losses: list[float] = field(default_factory=list)  # at log steps
    student: nn.Module | None = None  # the average, once trained

    def noise(self, size: int) -> Tensor:
        eps = torch.randn(size, *self.shape, generator=self.draws, device=self.draws.device)
        return eps.to(self.device)

    def uniform(self, size: int) -> Tensor:
        u = torch.rand(size, generator=self.draws, device=self.draws.device, dtype=torch.float64)
        return u.to(self.device)

    def integers(self, low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=self.draws, device=self.draws.device).to(self.device)

    def x_0(self, size: int) -> Tensor:
        indices = torch.randint(len(self.real), (size,), generator=self.order, device=self.order.device)
        return self.real.index_select(0, indices)


# --- what the loops share --------------------------------------------------------------------------------------------


class Adam:
    """One network's optimiser."""

    def __init__(self, network: nn.Module, settings: Any) -> None:
        self.weights = list(network.parameters())
        betas, decay = (settings.beta1, settings.beta2), settings.weight_decay
        self.adam = torch.optim.AdamW(self.weights, settings.lr, betas, weight_decay=decay, fused=True)
        self.group, self.largest = self.adam.param_groups[0], settings.grad_clip

    @torch.no_grad()
    def step(self, lr: float) -> None:
        gradients = [w.grad for w in self.weights if w.grad is not None]
        if self.largest:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (self.largest / (norm + 1e-6)).clamp(max=1.0))
        self.group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()


class Training:
    """Sizes of batches, learning rate, Adam, average and log."""

    def __init__(self, task: Task, student: nn.Module, *others: tuple[nn.Module, Any]) -> None:
        self.task, self.settings, self.student = task, task.settings, student
        self.trained = [(student, self.settings), *others]  # each with its settings
        self.images = self.number = 0
        self.pending: list[Tensor] = []

    def anew(self, finish: float) -> None:
        """Optimisers, average and learning rate begin; the last ends at the share `finish` of all images."""
        self.begin, self.finish = self.images, finish * self.task.images
        self.adams = [Adam(network, settings) for network, settings in self.trained]
        self.halflife, self.averaged = 1000 * self.settings.ema_halflife_kimg, 0
        self.average = copy.deepcopy(self.student).requires_grad_(False) if self.halflife else self.student
        self.mine, self.theirs = list(self.average.parameters()), list(self.student.parameters())

    def steps(self, end: float) -> Iterator[int]:
        """The size of each batch, until the share `end` of all images is seen."""
        while self.images < end * self.task.images - 1e-9:
            self.lr = self.settings.lr * self.factor()
            yield min(self.task.batch, self.task.images - self.images)

    def factor(self) -> float:
        progress, warmup = (self.images - self.begin) / (self.finish - self.begin), self.settings.lr_warmup
        if progress < warmup:
            return progress / warmup
        past = (progress - warmup) / (1 - warmup)
        return 0.5 * (1 + math.cos(math.pi * past)) if self.settings.lr_decay == "cosine" else 1 - past

    def descend(self, loss: Tensor, which: int = 0) -> None:
        loss.backward()
        self.adams[which].step(self.lr)
        self.pending.append(loss.detach())

    @torch.no_grad()
    def done(self, size: int) -> None:
        """After a step: the average, and the log."""
        self.images += size
        self.averaged += size
        if self.halflife:
            halflife = min(self.halflife, 0.05 * self.averaged)
            torch._foreach_lerp_(self.mine, self.theirs, 1 - 0.5 ** (size / halflife))
        self.number += 1
        if self.number == 1 or self.number % LOG_EVERY == 0:
            self.log()

    def log(self) -> None:
        if self.pending:
            loss = torch.stack(self.pending).double().mean().item()
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss}")
            self.task.losses.append(loss)
            self.pending.clear()

    def end(self) -> None:
        self.log()
        self.task.student = self.average


def table(*columns: Tensor | float, device: str) -> Tensor:
    """Numbers for each time of a grid, (columns, times), from float64."""
    rows = torch.broadcast_tensors(*(torch.as_tensor(column, dtype=torch.float64) for column in columns))
    return torch.stack(rows).to(device, torch.get_default_dtype())


def look_up(numbers: Tensor, k: Tensor) -> list[Tensor]:
    """The columns at k, each (B,1,1,1)."""
    return list(numbers.index_select(1, k).view(len(numbers), -1, 1, 1, 1).unbind())


def angle(t: Tensor | float) -> Any:
    return THETA_0 + (THETA_1 - THETA_0) * t


def time(theta: Tensor | float) -> Any:
    return (theta - THETA_0) / (THETA_1 - THETA_0)


def student_of(task: Task) -> nn.Module:
    return copy.deepcopy(task.teacher).train().requires_grad_(True)


@torch.no_grad()
def move(average: list[Tensor], network: list[Tensor], share: float) -> None:
    torch._foreach_lerp_(average, network, share)


# --- BOOT ------------------------------------------------------------------------------------------------------------


class Signal(nn.Module):
    """The network at t_max, plus an embedding of the time t of its output."""

    def __init__(self, network: nn.Module, embedding: TimeEmbedding) -> None:
        super().__init__()
        self.network, self.target_time = network, embedding

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return self.network(x, torch.ones_like(u), self.target_time(u))


def boot(task: Task) -> Iterator[None]:
    """The boundary's rows ride along with the others, through the teacher as through the student."""
    N, beta = task.settings.steps, task.settings.beta
    student = Signal(student_of(task), copy.deepcopy(task.embedding).requires_grad_(True))
    teacher, training = task.teacher, Training(task, student)
    alpha_T, sigma_T = math.cos(THETA_1), math.sin(THETA_1)
    t = torch.linspace(0, 1, N + 1, dtype=torch.float64)
    theta, phi = angle(t), angle(t.roll(1))
    r = theta.cos() * phi.sin() / (phi.cos() * theta.sin())
    rest = (phi - theta).sin().neg() / (phi.cos() * theta.sin())  # 1 - r
    alpha, sigma, alpha_s, sigma_s = theta.cos(), theta.sin(), phi.cos(), phi.sin()
    numbers = table(t, t.roll(1), alpha, sigma, alpha_s, sigma_s, r, rest, rest / 2, device=task.device)
    training.anew(1.0)
    for size in training.steps(1.0):
        eps, k = task.noise(size), task.integers(1, N + 1, size)
        some = math.ceil(task.settings.boundary_share * size)
        t, s, alpha, sigma, alpha_s, sigma_s, r, rest, half = look_up(numbers, k)
        with torch.no_grad():
            x_T = sigma_T * eps
            base = alpha_T * x_T
            y_t = base - sigma_T * student(x_T, t.flatten())
            noise_t, noise_s, ones = sigma * eps, sigma_s * eps, t.new_ones(some)
            x_t = torch.addcmul(noise_t, alpha, y_t)
            v, v_T = teacher(torch.cat([x_t, x_T[:some]]), torch.cat([t.flatten(), ones])).split([size, some])
            f_t = alpha * x_t - sigma * v
            known = r * y_t
            x_s = torch.addcmul(noise_s, alpha_s, torch.addcmul(known, rest, f_t))
            f_s = alpha_s * x_s - sigma_s * teacher(x_s, s.flatten())
            y_s = torch.addcmul(known, half, f_t + f_s)
            goal = (base - y_s) / sigma_T
        v_s, v_max = student(torch.cat([x_T, x_T[:some]]), torch.cat([s.flatten(), ones])).split([size, some])
        loss = mse_loss(v_s, goal) + beta * mse_loss(v_max, v_T)
        training.descend(sigma_T**2 * loss)
        training.done(size)
        yield
    training.end()


# --- consistency models ----------------------------------------------------------------------------------------------


def karras(task: Task, points: int) -> Tensor:
    """Noise levels, ascending, float64."""
    rho, low, high = task.settings.rho, task.settings.sigma_min, task.settings.sigma_max
    ramp = torch.linspace(1, 0, points, dtype=torch.float64).flip(0)
    return (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def consistency(tau: Tensor, sd: float, e: float) -> tuple[Tensor, Tensor]:
    """a and b of F = a x_t + b v."""
    alpha, sigma = tau.atan().cos(), tau.atan().sin()
    ratio = 1 - e / tau
    skip = sd**2 / ((tau - e) ** 2 + sd**2) - ratio * sd**2 / (tau**2 + sd**2)
    return (skip + ratio * alpha**2) / alpha, -ratio * sigma


def cm(task: Task) -> Iterator[None]:
    """The square root of the weight 1 / (tau_t - tau_s) is part of the numbers, so the loss is a plain mean square."""
    settings, teacher, student = task.settings, task.teacher, student_of(task)
    target, training = copy.deepcopy(student).requires_grad_(False), Training(task, student)
    slow, fast = list(target.parameters()), list(student.parameters())
    tau = karras(task, settings.steps)
    theta, (a, b) = tau.atan(), consistency(tau, settings.sigma_data, tau[0].item())
    low, high, step = slice(None, -1), slice(1, None), tau.diff()
    alpha, sigma, root = theta.cos(), theta.sin(), step**-0.5
    numbers = table(
        time(theta)[high], time(theta)[low], alpha[high], sigma[high], alpha[low], sigma[low], tau[high],
        step * alpha[high], step / 2, alpha[low],
        root * a[low], root * b[low], root * a[high], root * b[high], device=task.device,
    )  # fmt: skip
    training.anew(1.0)
    for size in training.steps(1.0):
        x_0, eps, n = task.x_0(size), task.noise(size), task.integers(0, settings.steps - 1, size)
        t, s, alpha, sigma, alpha_s, sigma_s, tau, slope, half, _, a_s, b_s, a, b = look_up(numbers, n)
        with torch.no_grad():
            x_hat = torch.addcmul(x_0, tau, eps)
            x_t = alpha * x_hat
            move_t = slope * torch.addcmul(teacher(x_t, t.flatten()), sigma, x_hat)  # (tau_s - tau_t) d_t, negative
            x_euler = x_hat - move_t
            d_s = alpha_s * torch.addcmul(teacher(alpha_s * x_euler, s.flatten()), sigma_s, x_euler)
            x_s = alpha_s * (torch.addcmul(x_hat, half, d_s, value=-1) - move_t / 2)
            goal = torch.addcmul(a_s * x_s, b_s, target(x_s, s.flatten())) - a * x_t
        training.descend(mse_loss(b * student(x_t, t.flatten()), goal))
        move(slow, fast, 1 - settings.mu)
        training.done(size)
        yield
    training.end()


def ct(task: Task) -> Iterator[None]:
    settings = task.settings
    student = task.fresh()
    target, training = copy.deepcopy(student).requires_grad_(False), Training(task, student)
    slow, fast = list(target.parameters()), list(student.parameters())
    length = math.log2(settings.s1 // settings.s0) + 1
    stages = [(min(settings.s0 * 2**i, settings.s1) + 1, min(1.0, length - i)) for i in range(math.ceil(length))]
    training.anew(1.0)
    for index, (N, _) in enumerate(stages):
        tau = karras(task, N)
        theta, (a, b) = tau.atan(), consistency(tau, settings.sigma_data, settings.sigma_min)
        low, high, root = slice(None, -1), slice(1, None), tau.diff() ** -0.5
        total = torch.special.ndtr((tau.log() - settings.p_mean) / settings.p_std).diff().cumsum(0)
        cumulative = (total / total[-1]).to(task.device)
        numbers = table(
            time(theta)[high], time(theta)[low], theta.cos()[high], theta.sin()[high], theta.cos()[low],
            theta.sin()[low], root * a[low], root * b[low], root * a[high], root * b[high], device=task.device,
        )  # fmt: skip
        for size in training.steps(sum(share for _, share in stages[: index + 1]) / length):
            x_0, eps = task.x_0(size), task.noise(size)
            n = torch.searchsorted(cumulative, task.uniform(size), right=True)
            t, s, alpha, sigma, alpha_s, sigma_s, a_s, b_s, a, b = look_up(numbers, n)
            with torch.no_grad():
                x_t, x_s = torch.addcmul(alpha * x_0, sigma, eps), torch.addcmul(alpha_s * x_0, sigma_s, eps)
                goal = torch.addcmul(a_s * x_s, b_s, target(x_s, s.flatten())) - a * x_t
            training.descend(mse_loss(b * student(x_t, t.flatten()), goal))
            move(slow, fast, 1 - settings.mu)
            training.done(size)
            yield
    training.end()


# --- direct ----------------------------------------------------------------------------------------------------------


def direct(task: Task) -> Iterator[None]:
    """|alpha_T x_T - sigma_T v - x_0|^2 = sigma_T^2 |v - goal|^2; input and goal of every pair are computed once."""
    student, (eps, targets) = student_of(task), task.pairs
    training = Training(task, student)
    alpha_T, sigma_T = math.cos(THETA_1), math.sin(THETA_1)
    inputs = sigma_T * eps
    goals = (alpha_T * inputs - targets) / sigma_T
    training.anew(1.0)
    for size in training.steps(1.0):
        k = task.integers(0, len(inputs), size)
        v = student(inputs.index_select(0, k), inputs.new_ones(size))
        training.descend(sigma_T**2 * mse_loss(v, goals.index_select(0, k)))
        training.done(size)
        yield
    training.end()


# --- progressive distillation ----------------------------------------------------------------------------------------


def pd(task: Task) -> Iterator[None]:
    """x~ = A z + B v + C v', and the student's x^ = alpha z - sigma v: all times the root of the weight."""
    N = task.settings.steps
    student, teacher = student_of(task), copy.deepcopy(task.teacher)
    training = Training(task, student)
    halvings = [N >> k for k in range(1, N.bit_length())]
    shares = [2.0 if n <= 2 else 1.0 for n in halvings]
    for index, n in enumerate(halvings):
        end = sum(shares[: index + 1]) / sum(shares)
        theta = angle(torch.linspace(0, 1, 2 * n + 1, dtype=torch.float64))
        top, mid, low = theta[2::2], theta[1::2], theta[:-1:2]
        c, s, c_2, s_2 = (mid - top).cos(), (mid - top).sin(), (low - mid).cos(), (low - mid).sin()
        ratio = low.sin() / top.sin()
        under = low.cos() - ratio * top.cos()
        A, B, C = (c_2 * c - ratio) / under, c_2 * s / under, s_2 / under
        first = torch.arange(1, n + 1) == 1  # ends on the data prediction alpha' z' - sigma' v'
        A = torch.where(first, mid.cos() * c, A)
        B, C = torch.where(first, mid.cos() * s, B), torch.where(first, -mid.sin(), C)
        root = (1 / top.tan()).clamp(min=1)  # of max(SNR, 1)
        A = root * (A - top.cos())  # the student's own alpha z is taken off
        numbers = table(
            time(top), time(mid), top.cos(), top.sin(), c, s, A, root * B, root * C, -root * top.sin(),
            device=task.device,
        )  # fmt: skip
        training.anew(end)
        for size in training.steps(end):
            x_0, eps, i = task.x_0(size), task.noise(size), task.integers(1, n + 1, size)
            t, t_1, alpha, sigma, c, s, A, B, C, b = look_up(numbers, i - 1)
            with torch.no_grad():
                z = torch.addcmul(alpha * x_0, sigma, eps)
                v = teacher(z, t.flatten())
                v_1 = teacher(torch.addcmul(c * z, s, v), t_1.flatten())
                goal = torch.addcmul(torch.addcmul(A * z, B, v), C, v_1)
            training.descend(mse_loss(b * student(z, t.flatten()), goal))
            training.done(size)
            yield
        teacher.load_state_dict(training.average.state_dict())
        student.load_state_dict(training.average.state_dict())
    training.end()


# --- SiD -------------------------------------------------------------------------------------------------------------


def sid(task: Task) -> Iterator[None]:
    """The generator's loss has no gradient to the fake score's weights. Noise levels are continuous: float64."""
    settings, teacher = task.settings, task.teacher
    student, fake = student_of(task), student_of(task)
    training = Training(task, student, (fake, settings.fake.over(settings)))
    rho, dtype = settings.rho, torch.get_default_dtype()
    theta_init = math.atan(settings.sigma_init)
    alpha_G, sigma_G, t_G = math.cos(theta_init), math.sin(theta_init), time(theta_init)
    first, last = settings.sigma_min ** (1 / rho), settings.sigma_max ** (1 / rho)
    low, width = first, settings.ramp_share * (last - first)
    shortest, longest = math.tan(THETA_0), math.tan(THETA_1)
    held = list(fake.parameters())

    def G(size: int) -> Tensor:
        x = sigma_G * task.noise(size)
        return torch.add(alpha_G * x, student(x, x.new_full((size,), t_G)), alpha=-sigma_G)

    def at(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta = tau.atan()
        t, alpha, sigma = torch.stack([time(theta), theta.cos(), theta.sin()]).to(dtype)
        return t, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)

    training.anew(1.0)
    for size in training.steps(1.0):
        with torch.no_grad():
            x = G(size)
            normal = torch.special.ndtri(task.uniform(size))
            tau = (settings.p_mean + settings.p_std * normal).exp().clamp(shortest, longest)
            t, alpha, sigma = at(tau)
            root = (tau**-2 + settings.sigma_data**-2).sqrt().to(dtype).view(-1, 1, 1, 1)
            x_t = torch.addcmul(alpha * x, sigma, task.noise(size))
            b = root * sigma
            goal = root * (alpha * x_t - x)
        training.descend(mse_loss(b * fake(x_t, t), goal), which=1)

        for weight in held:
            weight.requires_grad_(False)
        x = G(size)
        t, alpha, sigma = at((low + width * task.uniform(size)) ** rho)
        x_t = torch.addcmul(alpha * x, sigma, task.noise(size))
        v, v_fake = teacher(x_t, t), fake(x_t, t)
        gap = alpha * x_t - sigma * v - x  # D_phi - x
        d = sigma * (v_fake - v)  # D_phi - D_psi
        scale = gap.detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)
        loss = (d * torch.add(gap, d, alpha=-settings.alpha) / scale).mean()
        training.descend(loss)
        for weight in held:
            weight.requires_grad_(True)
        training.done(size)
        yield
    training.end()


# --- TRACT -----------------------------------------------------------------------------------------------------------


def tract(task: Task) -> Iterator[None]:
    """x~ = a f + (1 - a) g = A x + B v + C v_g, and the student's own alpha x is taken off, times the weight's root."""
    settings, steps = task.settings, task.settings.steps
    student, teacher, phases = student_of(task), copy.deepcopy(task.teacher), len(task.settings.steps) - 1
    self_teacher, training, k = copy.deepcopy(student).requires_grad_(False), Training(task, student), 0
    slow, fast = list(self_teacher.parameters()), list(student.parameters())
    grid = angle(torch.linspace(0, 1, steps[0] + 1, dtype=torch.float64))
    training.anew(1.0)
    for index in range(phases):
        before, n = steps[index : index + 2]
        theta = grid[:: steps[0] // before]
        j = torch.arange(1, before + 1)
        e = (j - 1) // (before // n) * (before // n)
        top, mid, low = theta[j], theta[(j - 1).clamp(min=1)], theta[e]
        tau, tau_1, tau_2 = top.tan(), mid.tan(), torch.where(e == 0, 0.0, low.tan())
        a = torch.where(j - 1 == e, 1.0, tau_2 * (tau - tau_1) / (tau_1 * (tau - tau_2)))
        c, s = (mid - top).cos(), (mid - top).sin()
        A, B = a * top.cos() + (1 - a) * mid.cos() * c, -a * top.sin() + (1 - a) * mid.cos() * s
        C = -(1 - a) * mid.sin()
        root = (1 / tau).clamp(min=1)
        numbers = table(
            time(top), time(mid), top.cos(), top.sin(), c, s, root * (A - top.cos()), root * B, root * C,
            -root * top.sin(), device=task.device,
        )  # fmt: skip
        for size in training.steps((index + 1) / phases):
            x_0, eps, j = task.x_0(size), task.noise(size), task.integers(1, before + 1, size)
            t, t_1, alpha, sigma, c, s, A, B, C, b = look_up(numbers, j - 1)
            with torch.no_grad():
                x_t = torch.addcmul(alpha * x_0, sigma, eps)
                v = teacher(x_t, t.flatten())
                v_g = self_teacher(torch.addcmul(c * x_t, s, v), t_1.flatten())
                goal = torch.addcmul(torch.addcmul(A * x_t, B, v), C, v_g)
            training.descend(mse_loss(b * student(x_t, t.flatten()), goal))
            k += 1
            move(slow, fast, (1 - settings.mu) / (1 - settings.mu**k))
            training.done(size)
            yield
        teacher.load_state_dict(training.average.state_dict())
    training.end()


# --- the methods' own steps ------------------------------------------------------------------------------------------


def own_steps(method: Method, task: Task, read: Read | None) -> Iterator[None]:
    """`method`, ready for its first step, in a loop of a few lines: what is more by the harness is its loop's."""
    phases, optimizers = method.phases(), dict[nn.Module, Adam]()
    training, shares = Training(task, method.student), [phase.share for phase in phases]
    about = task.shape, task.draws, task.device, read, method.teacher.conditioning
    for index, phase in enumerate(phases):
        method.start_phase(index)
        end = sum(shares[: index + 1]) / sum(shares)
        if index == 0 or phase.fresh:
            together = next((i for i in range(index + 1, len(phases)) if phases[i].fresh), len(phases))
            training.anew(sum(shares[:together]) / sum(shares))
            optimizers = {method.student: training.adams[0]}
        for size in training.steps(end):
            for network, loss in method.train_step(Batch(size, *about)):
                if network not in optimizers:
                    optimizers[network] = Adam(network, method.settings_of(network).over(task.settings))
                loss.backward()
                optimizers[network].step(training.lr)
                training.pending.append(loss.detach())
            method.after_step()
            training.done(size)
            yield
        method.end_phase(index, training.average)
    training.end()


LOOPS: dict[str, Callable[[Task], Iterator[None]]] = {
    "boot": boot, "cm": cm, "ct": ct, "direct": direct, "pd": pd, "sid": sid, "tract": tract,
}  # fmt: skip
