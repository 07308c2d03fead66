"""What every object of the mock has."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .abi import Native, log

if TYPE_CHECKING:
    from ..fake_tensorrt import FakeTensorRT

ERROR, INFO, VERBOSE = 1, 3, 4  # of ILogger.Severity


class TensorRTObject(Native):
    """A TensorRT object. `parts` are deleted with it: those that the bindings only borrow."""

    def __init__(self, fake: FakeTensorRT, logger: int = 0) -> None:
        super().__init__()
        self.fake, self.faults, self.logger = fake, fake.faults, logger
        self.trt: Any = sys.modules["tensorrt_bindings"]
        self.parts: list[TensorRTObject] = []

    def part(self, made: TensorRTObject) -> int:
        self.parts.append(made)
        return made.address

    def deleted(self) -> None:
        for part in self.parts:
            part.deleted()
        super().deleted()

    def refuse(self, text: str) -> int:
        """Log an error and give a null pointer, or False."""
        log(self.logger, ERROR, text)
        return 0
