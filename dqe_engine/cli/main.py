"""What every command shares: errors as one line, exit codes, and argument types."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from dqe_engine.errors import DQEError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "yaml", "huggingface_hub"), ("train",)),
    "peft": ("lora",),
    **dict.fromkeys(("onnx", "onnxscript", "jinja2", "matplotlib"), ("export",)),
    "onnxruntime": ("cpu", "gpu"),
}
"""Optional packages by the name they are imported as, and the extras of which one brings them."""


_PROVIDERS = ("auto", "cpu", "cuda", "tensorrt", "ort-tensorrt")  # `sessions.PROVIDERS`, which --help must not import


def run(handler: Callable[[], int]) -> int:
    """Exit code of `handler`: its own; the error's after one that the user can mend (one line on stderr); 130 after Ctrl-C.

    An optional package that is missing is such an error too. Anything else is our bug and keeps its traceback.
    """
    try:
        code = handler()
        sys.stdout.flush()
        return code
    except DQEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if not (extras := _EXTRAS.get((error.name or "").partition(".")[0])):
            raise
        remedy = " or ".join(f"pip install 'dqe-engine[{extra}]'" for extra in extras)
        print(f"error: {error.name} is not installed; {remedy}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `dqe-search … | head`; the interpreter would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """`--provider` and `--threads`, as `RetrievalEngine.load` takes them."""
    parser.add_argument("--provider", choices=_PROVIDERS, default="auto", help="what runs the graphs (default: auto)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads of a graph and of a search (default: as many as are worth it)"
    )
