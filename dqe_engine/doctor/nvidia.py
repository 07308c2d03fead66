"""The NVIDIA driver and its GPUs: NVML says what is there, the CUDA driver library what a process can use.

Both come with the driver, so nothing needs to be installed. Containers may have one without the other, and
`CUDA_VISIBLE_DEVICES` hides devices from the second alone: two checks.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from dqe_engine.driver_library import CUDA_DRIVER, load_library

from .findings import Context, Finding, Steps, Trying

NVML = "libnvidia-ml.so.1"
_GET_A_DRIVER = "install its driver, if this machine has an NVIDIA GPU; without one the CPU does everything"
_NVML_REMEDIES = {
    4: "run it as a user who may open /dev/nvidia*",
    9: "load the driver's kernel module (modprobe nvidia) or restart the machine",
    18: "the driver was upgraded under a loaded one: restart the machine",
}
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_CUDA_NO_DEVICE = 100


class _Memory(ctypes.Structure):
    """nvmlMemory_t, bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _NvmlError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def probe(context: Context) -> Steps:
    yield Trying("driver", "reinstall the NVIDIA driver")
    driver = _driver()
    yield driver
    yield Trying("CUDA devices", "reinstall the NVIDIA driver")
    yield _devices(gpus=len(driver.facts.get("gpus", [])))


def _driver() -> Finding:
    nvml = load_library(NVML)
    if nvml is None:
        return Finding("driver", "not available", f"no NVIDIA driver found ({NVML})", _GET_A_DRIVER)

    def call(function: str, *arguments: Any) -> None:
        if code := getattr(nvml, function)(*arguments):
            nvml.nvmlErrorString.restype = ctypes.c_char_p
            raise _NvmlError(code, f"{function}: {(nvml.nvmlErrorString(code) or b'').decode()} (NVML error {code})")

    try:
        call("nvmlInit_v2")
        text = ctypes.create_string_buffer(96)
        number = ctypes.c_int()
        call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(len(text)))
        version = text.value.decode()
        call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(number))
        cuda = _cuda_version(number.value)
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        gpus = [_gpu(call, index) for index in range(count.value)]
    except _NvmlError as error:
        return Finding("driver", "broken", str(error), _NVML_REMEDIES.get(error.code, "run nvidia-smi, and see the driver's log (dmesg)"))
    facts = {"driver": version, "cuda": cuda, "gpus": gpus}
    found = f"{version}, for CUDA up to {cuda}"
    if not gpus:
        return Finding(
            "driver", "not available", f"{found}; it sees no GPU", "give the machine or container a GPU (docker run --gpus all)", facts
        )
    return Finding("driver", "ok", f"{found}: {'; '.join(map(_describe, gpus))}", facts=facts)


def _gpu(call: Any, index: int) -> dict[str, Any]:
    handle, memory = ctypes.c_void_p(), _Memory()
    name = ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    call("nvmlDeviceGetName", handle, name, ctypes.c_uint(len(name)))
    call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    try:
        call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    except _NvmlError:  # memory that is shared with the processor, or a slice that this user may not look at
        total = None
    else:
        total = memory.total
    return {"name": name.value.decode(), "compute_capability": f"{major.value}.{minor.value}", "memory_bytes": total}


def _describe(gpu: dict[str, Any]) -> str:
    memory = "memory unknown" if gpu["memory_bytes"] is None else f"{gpu['memory_bytes'] / 2**30:.1f} GiB"
    return f"{gpu['name']}, compute {gpu['compute_capability']}, {memory}"


def _devices(*, gpus: int) -> Finding:
    """What CUDA gives to a process. `gpus`: how many NVML sees."""
    driver = load_library(CUDA_DRIVER)
    if driver is None:
        if gpus:
            remedy = "let the container use CUDA: NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            return Finding("CUDA devices", "broken", f"{gpus} GPU{'s' if gpus > 1 else ''}, but no {CUDA_DRIVER}", remedy)
        return Finding("CUDA devices", "not available", f"no CUDA driver library ({CUDA_DRIVER})", "see driver")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    count, version = ctypes.c_int(), ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code == _CUDA_NO_DEVICE or (code == 0 and count.value == 0):
        if gpus and visible is None:
            return Finding("CUDA devices", "broken", f"CUDA sees none of {gpus}", "restart the machine, or see the driver's log (dmesg)")
        remedy = "unset CUDA_VISIBLE_DEVICES to use them" if gpus else "see driver"
        return Finding("CUDA devices", "not available", f"none{hidden}", remedy)
    if code:
        remedy = "make the driver and its libraries one version; restart the machine after an upgrade"
        return Finding("CUDA devices", "broken", f"cuInit: CUDA error {code}", remedy)
    driver.cuDriverGetVersion(ctypes.byref(version))
    names = [_device_name(driver, index) for index in range(count.value)]
    facts = {"devices": count.value, "cuda": _cuda_version(version.value), "names": names}
    return Finding("CUDA devices", "ok", f"{count.value} usable{hidden}: {', '.join(names)}", facts=facts)


def _device_name(driver: Any, index: int) -> str:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return f"{name.value.decode()} (sm_{major.value}{minor.value})"


def _cuda_version(number: int) -> str:
    """13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"
