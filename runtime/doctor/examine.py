"""Which checks are made of which setup, and what each of them looks at.

Each imports what it needs by itself, so that a torch or a Ray that is broken is a finding, too.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.runtime.config import DEFAULT_KV_MEMORY, EngineConfig
from headwise.runtime.doctor import machine, network, ray_cluster, software
from headwise.runtime.doctor.finding import Finding, failed, passed, warned
from headwise.workers.errors import HeadwiseError, InvalidValueError

if TYPE_CHECKING:
    from headwise.cluster.ray_nodes import NodeFacts
    from headwise.runtime.capacity import Capacity
    from headwise.workers.kv.format import KvFormat
    from headwise.workers.kv.policy import KvPolicy
    from headwise.workers.model.model_config import ModelConfig

NCCL_BYTES = 32 << 20
"""About what NCCL takes of shared memory for a rank whose GPU does not reach the next one's memory: some segments of
9,637,888 bytes (nccl#342)."""

Check = Callable[[], Iterable[Finding]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What somebody wants to run.

    Attributes:
        config: of the engine; its ``model`` is "" if none is named, and what is of the model alone is then not checked.
        ports: flag, host and number of each port of a server.
        gpu_memory: bytes of each rank's GPU; None: what is free on those of this machine.
    """

    config: EngineConfig
    ports: tuple[tuple[str, str, int], ...] = ()
    gpu_memory: int | None = None


def examine(setup: Setup, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Makes every check that the setup allows. One that breaks is a finding, and the others go on.

    Starts no Ray; joins the one that ``config.address`` or RAY_ADDRESS names.
    """
    config, nodes = setup.config, list["NodeFacts"]()
    address = _cluster_address(config, environment)
    device = config.device if config.device != "auto" else ("cuda" if _visible_gpus() else "cpu")
    checks: dict[str, Check] = {
        "packages": lambda: software.packages(software.own_requirements()),
        "shared memory": lambda: _shared_memory(config, device, address),
        "machine": lambda: _machine(config, device, address),
        "clock": lambda: _clock(config),
        "ports": lambda: [network.port(*one) for one in setup.ports],
        "Ray": lambda: _ray(config, environment, address, nodes),
        "interfaces": lambda: _interfaces(environment, nodes),
        "GPUs": lambda: _gpus(config, device, nodes),
        "model": lambda: _model(setup, device),
    }
    for name, check in checks.items():
        yield from _guarded(name, check)


def _guarded(name: str, check: Check) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        said = f"cannot be checked: {type(error).__name__}: {error}"
        yield failed(name, said, "put right what that says; if it is Headwise's fault, report it")


def _cluster_address(config: EngineConfig, environment: Mapping[str, str]) -> str | None:
    """Of the Ray that an engine would join; None if it would start its own, or use none."""
    named = (config.address or environment.get("RAY_ADDRESS")) if config.executor == "ray" else None
    return None if named in ("", "local") else named


def _shared_memory(config: EngineConfig, device: str, address: str | None) -> Iterator[Finding]:
    from headwise.workers.collectives.shared_memory import file_bytes
    from headwise.workers.leftovers import shared_memory_folder

    ranks, wanted, without = config.tensor_parallel_size, 0, []
    needed = file_bytes(ranks) if ranks > 1 and device == "cpu" else 0
    if ranks > 1 and device == "cuda":
        wanted += ranks * NCCL_BYTES
        without.append("NCCL may fail to connect GPUs that do not reach each other's memory")
    if config.executor == "ray" and address is None:
        from headwise.cluster.ray_session import OBJECT_STORE_BYTES

        wanted += OBJECT_STORE_BYTES
        without.append("Ray keeps its objects in /tmp")
    yield machine.shared_memory(Path(shared_memory_folder()), needed, needed + wanted, " and ".join(without))


def _machine(config: EngineConfig, device: str, address: str | None) -> Iterator[Finding]:
    import llvmlite.binding

    from headwise.workers.machine import usable_cores

    yield machine.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE), raised=config.executor == "ray")
    if device == "cuda":
        adapters = Path("/sys/class/infiniband")
        infiniband = adapters.is_dir() and any(adapters.iterdir())
        yield machine.locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], infiniband)
        return
    yield machine.cpu_features(platform.machine(), llvmlite.binding.get_host_cpu_features())
    if address is None:
        yield machine.cores(config.tensor_parallel_size, usable_cores())


def _clock(config: EngineConfig) -> Iterator[Finding]:
    files = [Path(__file__), *(Path(config.model).glob("*.safetensors") if config.model else ())]
    times = {str(file): file.stat().st_mtime for file in files if file.exists()}
    yield machine.clock_against_files(time.time(), times)
    for folder in _written_folders(config):
        try:
            yield machine.clock_skew(str(folder), *machine.folder_clock(folder))
        except FileNotFoundError:  # it is made when it is first needed
            continue
        except OSError as error:
            said = f"cannot be written to: {error.strerror}"
            yield warned(f"folder {folder}", said, "give this user the folder, or name another (HEADWISE_CACHE)")


def _written_folders(config: EngineConfig) -> list[Path]:
    from headwise.workers.disk_cache import cache_directory

    folders = [Path(config.disk_kv_path)] if config.disk_kv_path else []
    with suppress(RuntimeError):  # there is no home: kernels are compiled at every start
        folders.insert(0, cache_directory())
    return folders


def _ray(
    config: EngineConfig, environment: Mapping[str, str], address: str | None, nodes: list[NodeFacts]
) -> Iterator[Finding]:
    """
    Args:
        address: of the Ray to join; None: an engine starts its own.
        nodes: gets the cluster's.
    """
    if config.executor == "local":
        yield ray_cluster.without_ray(config.tensor_parallel_size)
        return
    yield ray_cluster.ray_auth(environment, Path.home(), joins=address is not None)
    if address is None:
        yield passed("Ray", "no --address and no RAY_ADDRESS: an engine starts a Ray of its own")
        return
    if (problem := ray_cluster.unreachable(address)) is not None:
        yield problem
        return
    if (problem := ray_cluster.refused(address, environment, Path.home())) is not None:
        yield problem
        return
    from headwise.cluster.group import GroupStartError
    from headwise.cluster.ray_nodes import installed, visit_nodes

    try:
        nodes += visit_nodes(address)
    except GroupStartError as error:
        yield failed("Ray", str(error), "ray status --address says whether it runs; see Ray auth, too")
        return
    yield from ray_cluster.nodes(nodes, installed())
    if config.device != "cuda":
        yield from ray_cluster.cpus(nodes)


def _interfaces(environment: Mapping[str, str], nodes: list[NodeFacts]) -> Iterator[Finding]:
    import psutil

    yield network.node_addresses([node.address for node in nodes] or ["127.0.0.1"])
    if value := environment.get("GLOO_SOCKET_IFNAME"):
        yield network.gloo_variable(value)
    if value := environment.get("NCCL_SOCKET_IFNAME"):
        yield network.nccl_interface(value, {name: one.isup for name, one in psutil.net_if_stats().items()})


def _gpus(config: EngineConfig, device: str, nodes: list[NodeFacts]) -> Iterator[Finding]:
    import torch

    from headwise.runtime.doctor import model

    visible, driver = _visible_gpus(), Path("/proc/driver/nvidia/version").exists()
    if device == "cuda" or driver:
        yield model.gpu_build(torch.version.cuda, driver, visible)
    if nodes:
        yield model.gpus(device, config.tensor_parallel_size, int(sum(node.gpus for node in nodes)), "the Ray cluster")
    else:
        yield model.gpus(device, config.tensor_parallel_size, visible, "this machine")


def _model(setup: Setup, device: str) -> Iterator[Finding]:
    from headwise.runtime.doctor import model
    from headwise.runtime.kv_settings import model_format, model_policy
    from headwise.runtime.models import resolve
    from headwise.runtime.precision import resolve_dtype
    from headwise.workers.model.model_config import load_model_config

    config = setup.config
    if not config.model:
        yield passed("model", "none is given; with --model its files, heads and memory are checked, too")
        return
    try:
        directory = resolve(config.model)
        shapes = load_model_config(directory)
    except HeadwiseError as error:
        yield model.shapes("model", error)
        return
    yield model.weights(directory, shapes)
    yield model.tokenizer(directory)
    dtype = resolve_dtype(config.dtype, device, shapes.dtype)
    yield model.heads(shapes.num_heads, shapes.num_kv_heads, config.tensor_parallel_size)
    try:
        policy, kept = model_policy(config, shapes), model_format(config, shapes, dtype)
    except InvalidValueError as error:
        yield model.kv_settings(error)
        return
    yield model.kernels(config.attention, device, dtype, config.block_size, shapes.head_dim, kept, policy)
    if config.tensor_parallel_size <= shapes.num_heads:
        yield from _guarded("KV memory", partial(_kv_memory, setup, shapes, device, dtype, kept, policy))


def _kv_memory(
    setup: Setup, shapes: ModelConfig, device: str, dtype: str, kept: KvFormat, policy: KvPolicy
) -> Iterator[Finding]:
    from headwise.runtime.capacity import capacity
    from headwise.runtime.doctor import model

    config, longest = setup.config, shapes.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        said = (
            f"--max-model-len {config.max_model_len} is more than the {longest} tokens that the model was trained for"
        )
        yield failed("KV memory", said, f"--max-model-len {longest} or less")
        return
    taken = capacity(
        *(shapes, config.tensor_parallel_size, dtype, config.max_model_len or longest, config.block_size),
        policy=policy,
        format=kept,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    free = _free(setup, taken, device)
    if free is None:
        said = f"{config.tensor_parallel_size} GPU(s) are not here, so their memory is not known"
        yield warned("KV memory", said, "give it: --gpu-memory 80GiB")
        return
    yield model.kv_memory(
        taken, free, DEFAULT_KV_MEMORY[device] if config.kv_memory is None else config.kv_memory, device
    )


def _free(setup: Setup, taken: Capacity, device: str) -> list[int] | None:
    """Free memory, as :func:`headwise.runtime.doctor.model.kv_memory` takes it; None where it is another machine's."""
    from headwise.workers.machine import free_host_memory

    ranks = len(taken.ranks)
    if device == "cpu":
        return [free_host_memory()]
    if setup.gpu_memory is not None:
        return [setup.gpu_memory] * ranks
    if _visible_gpus() < ranks:
        return None
    import torch

    return [torch.cuda.mem_get_info(index)[0] for index in range(ranks)]


def _visible_gpus() -> int:
    """None where torch cannot be imported, which other checks say."""
    try:
        import torch
    except Exception:  # libraries that are missing, too
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
