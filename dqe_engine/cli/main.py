"""What every command shares: errors as one line, exit codes, safe standard streams, and argument types."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

from dqe_engine.errors import DQEError
from dqe_engine.files import describe_os_error

from .streams import drop_unwritten, prepare_streams

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "yaml", "matplotlib"), ("train",)),
    "huggingface_hub": ("hub",),
    "peft": ("lora",),
    **dict.fromkeys(("onnx", "onnxscript", "jinja2"), ("export",)),
    "onnxruntime": ("cpu", "gpu"),
    **dict.fromkeys(("fastapi", "uvicorn", "starlette", "prometheus_client", "multipart", "python_multipart"), ("serve",)),
    "httpx": ("client",),
    "pymilvus": ("milvus",),
}
"""Optional packages by the name they are imported as, and the extras of which one brings them."""


_PROVIDERS = ("auto", "cpu", "cuda", "tensorrt", "ort-tensorrt")  # `sessions.PROVIDERS`, which --help must not import


def run(handler: Callable[[], int]) -> int:
    """Exit code of `handler`, which parses the arguments and does the work: its own; the error's after one that the user can mend
    (one line on stderr); 130 after Ctrl-C; 141 where nobody reads the output any more (`| head`).

    A file that cannot be read or written and an optional package that is missing are such errors too. Anything else is our bug
    and keeps its traceback. SystemExit, argparse's after --help and wrong arguments, passes through. See `prepare_streams` for
    what is done about the standard streams.
    """
    prepare_streams()
    try:
        return _outcome(handler)
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return _fail(describe_os_error(error))
    finally:
        drop_unwritten()


def _outcome(handler: Callable[[], int]) -> int:
    try:
        code = handler()
        sys.stdout.flush()
        return code
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # what rich's console makes of one
            return EXIT_BROKEN_PIPE
        sys.stdout.flush()
        raise
    except DQEError as error:
        return _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if not (extras := _EXTRAS.get((error.name or "").partition(".")[0])):
            raise
        remedy = " or ".join(f"pip install 'dqe-engine[{extra}]'" for extra in extras)
        return _fail(f"{error.name} is not installed; {remedy}")
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED


def _fail(message: str, code: int = EXIT_ERROR) -> int:
    _say(f"error: {' '.join(message.splitlines())}")
    return code


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # where nobody hears it, the exit code has to do
        print(line, file=sys.stderr)


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise argparse.ArgumentTypeError("the JSON is nested too deeply; use fewer levels") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got a {type(value).__name__}")
    return value


def cuda_devices(text: str) -> tuple[int, ...]:
    """Numbers of CUDA devices, for argparse: "cuda" or "cuda:0,cuda:2"."""
    numbers = []
    for part in text.split(","):
        name, colon, number = part.strip().partition(":")
        if name != "cuda" or (colon and not number.isdecimal()):
            raise argparse.ArgumentTypeError(f"expected cuda, or devices by number such as cuda:0,cuda:1, got {text!r}")
        numbers.append(int(number or 0))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"expected each device once, got {text!r}")
    return tuple(numbers)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--search-on`, as `RetrievalEngine.search_on` takes it."""
    parser.add_argument(
        "--search-on",
        type=cuda_devices,
        default=(),
        metavar="DEVICES",
        help="search a copy of the index on these CUDA devices, such as cuda:0,cuda:1; needs the CUDA kernels (default: on the CPU)",
    )


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """`--provider` and `--threads`, as `RetrievalEngine.load` takes them."""
    parser.add_argument(
        "--provider",
        choices=_PROVIDERS,
        default="auto",
        help="runtime for the graphs (default: auto, the first of tensorrt, cuda and cpu that works)",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads for each graph and each search (default: chosen by the work)"
    )
