"""What a person sees of a run: a bar on a terminal, plain lines anywhere else."""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable


class Progress:
    """steps: of the whole run; done: finished before this process; log_every: steps between plain lines; work: of so many steps
    together, in whatever unit, where they are not all alike."""

    def __init__(self, steps: int, done: int, log_every: int, work: Callable[[int], float] = float):
        self._steps, self._log_every, self._work = steps, log_every, work
        self._times = deque([(time.monotonic(), 0, done)], maxlen=21)  # (clock, tokens so far, step)
        self._bar, self._redirected = None, contextlib.ExitStack()
        if _is_terminal():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._redirected.enter_context(logging_redirect_tqdm())  # log lines above the bar, not through it
            shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"  # its own time left takes steps to be alike
            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, bar_format=shape)

    def update(self, step: int, tokens: int, values: dict) -> None:
        """After a step, or after several: `tokens` in them, `values` of the last as logged."""
        before = self._times[-1]
        self._times.append((time.monotonic(), before[1] + tokens, step))
        (start, tokens_then, step_then), (now, tokens_now, _) = self._times[0], self._times[-1]
        rate = (tokens_now - tokens_then) / max(1e-9, now - start)
        done = self._work(step)
        left = format_seconds(
            (self._work(self._steps) - done) * (now - start) / max(1e-9, done - self._work(step_then))
        )
        if self._bar is not None:
            told = f"loss {values['loss']:.4f}, {rate:,.0f} tokens/s, left {left}"
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(step - before[2])
        elif step % self._log_every == 0 or step == self._steps:
            self.note(
                f"step {step}/{self._steps}  loss {values['loss']:.4f}  {rate:,.0f} tokens/s  lr {values['lr']:.2e}  "
                f"grad norm {values['grad_norm']:.3f}  left {left}"
            )

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._redirected.close()


def _is_terminal() -> bool:
    """Whether a bar would be seen: tqdm draws nothing on a terminal without a size, as some containers have."""
    return sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno()))


def format_seconds(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
