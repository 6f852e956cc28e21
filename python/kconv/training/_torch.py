"""The PyTorch side of ``kconv train``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import kconv.torch
from kconv._kconv import available_cpus
from kconv.models import Spec
from kconv.training._sync_norm import synchronize_norms
from kconv.training.config import Config
from kconv.training.ranks import Ranks


class RMSprop(torch.optim.Optimizer):
    """RMSprop as Keras has it: epsilon inside the root, where PyTorch's own has it outside.

    Args:
        params: The parameters.
        lr: Learning rate.
        rho: Decay of the mean of squared gradients.
        epsilon: Added to that mean.
        weight_decay: Decoupled, as in Keras.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.001,
        rho: float = 0.9,
        epsilon: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "rho": rho, "epsilon": epsilon, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["mean_square"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                mean_square = self.state[parameter]["mean_square"]
                mean_square.lerp_(parameter.grad.square(), 1 - group["rho"])
                scale = (mean_square + group["epsilon"]).sqrt_()
                parameter.addcdiv_(parameter.grad, scale, value=-group["lr"])


class TorchTrainer:
    """A model of ``kconv.torch``; see :class:`kconv.training.Trainer`."""

    def __init__(self, spec: Spec, config: Config, ranks: Ranks) -> None:
        # PyTorch itself knows nothing of a container's quota.
        torch.set_num_threads(ranks.threads or min(torch.get_num_threads(), available_cpus()))
        torch.manual_seed(config.seed)
        # The statistics of all ranks' images are known between layers only, not within fused ones.
        synchronized = config.sync_bn and ranks.size > 1
        self.model = kconv.torch.build(spec, fused=not synchronized, recompute=config.recompute)
        if synchronized:
            synchronize_norms(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = _optimizer(self.parameters, config)
        self.config, self.ranks = config, ranks
        self.ema = None if config.ema_decay is None else get_ema_multi_avg_fn(config.ema_decay)
        self.averages: list[Tensor] = []
        self._network: nn.Module | None = None

    @property
    def network(self) -> nn.Module:
        """What computes: the model, or, once its weights are there, what shares its gradients."""
        if self._network is None:
            self._network = self.model
            if self.ranks.size > 1:
                # Norms of their own have statistics of their own, which are averaged where they
                # are used.
                known = inspect.signature(DistributedDataParallel).parameters
                new = "forward_sync_buffers"  # the name in PyTorch 2.15
                option = new if new in known else "broadcast_buffers"
                options: dict[str, Any] = {option: False}
                self._network = DistributedDataParallel(self.model, **options)
                # Of depthwise kernels, whose one input channel has any stride.
                warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return self._network

    def train_step(
        self,
        images: NDArray[np.float32],
        targets: NDArray[np.float32],
        learning_rate: float,
        *,
        scale: float,
        update: bool,
        seed: int,
    ) -> tuple[float, float]:
        torch.manual_seed(seed)
        network = self.network
        self.model.train()
        # What is only added up is not shared with other processes yet.
        alone = isinstance(network, DistributedDataParallel) and not update
        with network.no_sync() if alone else nullcontext():  # type: ignore[operator]
            logits = self._logits(network, images)
            truth = torch.from_numpy(targets)
            loss = functional.cross_entropy(logits, truth)
            (loss * scale).backward()
        if update:
            self._update(learning_rate)
        found = logits.argmax(1) == truth.argmax(1)
        return loss.item(), found.float().mean().item()

    def _logits(self, network: nn.Module, images: NDArray[np.float32]) -> Tensor:
        """What a network makes of images, in the configuration's precision, as float32."""
        narrow = self.config.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logits: Tensor = network(_nchw(images))
        return logits.float()

    def _update(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is None:
            return
        weights = [parameter.detach() for parameter in self.parameters.values()]
        if self.averages:
            self.ema(self.averages, weights, 0)
        else:
            self.averages = [weight.clone() for weight in weights]

    @torch.inference_mode()
    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self.model.eval()
        return functional.softmax(self._logits(self.model, images), dim=1).numpy()

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[NDArray[np.float32]]) -> None:
        norms: list[Any] = [
            module
            for module in self.model.modules()
            if isinstance(getattr(module, "running_mean", None), Tensor)
        ]
        for norm in norms:
            norm.running_mean.zero_()
            norm.running_var.zero_()
        self.model.train()
        count = 0
        for images in batches:
            self._logits(self.model, images)
            count += 1
        # A moving average that started from zero lacks the share (1 - momentum)^count.
        for norm in norms:
            share = 1 - (1 - norm.momentum) ** count
            norm.running_mean /= share
            norm.running_var /= share
        self.share_statistics()

    @torch.no_grad()
    def share_statistics(self) -> None:
        if self.ranks.size > 1:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.ranks.size

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if not self.averages:
            yield
            return
        current = {name: value.clone() for name, value in self.model.state_dict().items()}
        with torch.no_grad():
            for parameter, average in zip(self.parameters.values(), self.averages, strict=True):
                parameter.copy_(average)
        try:
            yield
        finally:
            self.model.load_state_dict(current)

    def state(self) -> dict[str, NDArray[Any]]:
        arrays = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    arrays[f"optimizer/{key}/{name}"] = value
        for name, average in zip(self.parameters, self.averages, strict=False):
            arrays[f"ema/{name}"] = average
        return {name: value.numpy() for name, value in arrays.items()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        tensors = {
            _current_name(name, self.parameters): torch.from_numpy(np.array(value))
            for name, value in state.items()
            if name != "random"  # of kconv 0.1.0, whose steps drew from one stream
        }
        self.model.load_state_dict(
            {name: tensors[f"model/{name}"] for name in self.model.state_dict()}
        )
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            key, _, owner = rest.partition("/")
            if part == "optimizer":
                self.optimizer.state[self.parameters[owner]][key] = value
        if self.ema is not None:
            kept = [tensors[f"ema/{name}"] for name in self.parameters if f"ema/{name}" in tensors]
            self.averages = kept

    def state_shapes(self, stored: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
        """The shapes that a state must have; optimizers make their own at their first step."""
        shapes = {f"model/{name}": tuple(v.shape) for name, v in self.model.state_dict().items()}
        for name, array in stored.items():
            owner = _current_name(name, self.parameters).split("/", 2)[-1].removeprefix("ema/")
            if name == "random" or (owner in self.parameters and array.ndim == 0):
                shapes[name] = array.shape
            elif not name.startswith("model/") and owner in self.parameters:
                shapes[name] = tuple(self.parameters[owner].shape)
        return shapes


def _current_name(name: str, parameters: Mapping[str, Any]) -> str:
    """A state's name; kconv 0.1.0 had but one mean for each parameter, without a name."""
    part, _, owner = name.partition("/")
    return f"optimizer/mean_square/{owner}" if part == "optimizer" and owner in parameters else name


def _optimizer(parameters: Mapping[str, nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Weight decay is for kernels alone: norms and biases have one axis."""
    groups: Any = [
        {"params": [p for p in parameters.values() if p.ndim > 1]},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return RMSprop(groups, lr=config.lr, weight_decay=config.weight_decay)


def _nchw(images: NDArray[np.float32]) -> Tensor:
    """(N, H, W, C) to (N, C, H, W), the same memory: what PyTorch calls channels_last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
