"""Captured steps: one launch for the several hundred kernels of a decoded token."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

Step = Callable[[], None]  # decodes one token per row, in place


class StepRunner:
    """Runs a step as it is, or where it `captures` as a CUDA graph from its second run on.

    A graph is of the very buffers that it was captured with: `renew` says that they are others now.

    Example: runner = StepRunner(); runner.start(captures=True); runner.run(step)
    """

    def __init__(self) -> None:
        self.captures = False
        self._replay: Step | None = None
        self._warm = False  # the first step with new buffers warms the libraries up
        self._captured: list[Step] = []
        self._former: list[Step] = []
        self._pool = None  # of the graphs' memory; made, with their stream, when first needed
        self._stream = None

    def start(self, *, captures: bool) -> None:
        """Begin other completions. The graphs of the former ones stay until there are new ones:
        with the last of them, the memory that they share would be gone."""
        self.captures = captures
        self._former = self._captured or self._former
        self._captured = []
        self.renew()

    def renew(self) -> None:
        """Forget the captured step: the buffers have changed."""
        self._replay, self._warm = None, False

    def run(self, step: Step) -> None:
        if self.captures and self._warm and self._replay is None:
            self._replay = self._capture(step)
            self._captured.append(self._replay)
        (self._replay or step)()
        self._warm = True

    def _capture(self, step: Step) -> Step:
        """Return the step as a CUDA graph.

        Capturing runs nothing. All graphs take their memory from one pool, and no garbage is
        collected for each, as torch.cuda.graph would.
        """
        if self._pool is None or self._stream is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # what it might free on CUDA would end the capture
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool)
                step()
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay
