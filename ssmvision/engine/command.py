"""What every tool does around its work: expected failures in one message, unexpected ones with their traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from ssmvision.data import UserError

from .signals import Interrupted


def run_command(work: Callable[[], Any]) -> int:
    """Runs `work` and returns the exit code: 0, 2 for what the user can repair, 128 + number for a signal."""
    try:
        work()
    except UserError as error:
        _say(f"error: {_first_hand(error)}")
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        _say("error: Pictures need matplotlib: pip install 'ssmvision[train]'.")
        return 2
    except torch.OutOfMemoryError as error:
        _say(f"error: Out of memory: lower --batch-size or set --grad-checkpointing. ({str(error).splitlines()[0]})")
        return 2
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        _say(f"error: A process that reads images died, most often for lack of memory; lower --workers. ({error})")
        return 2
    except Interrupted as stop:
        _say(f"{stop}; the state is saved, --resume auto continues from it")
        return stop.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _first_hand(error: UserError) -> str:
    """A loader's worker wraps an error's text into a traceback, of which the last line is the text."""
    text = str(error)
    return text.strip().splitlines()[-1].partition("Error: ")[2] if "Original Traceback" in text else text


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
